"""What only a GPU can show of `assign_replicas`: launches, batches, repeats, command buffers."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle_replicas
from jax_router import assign_replicas
from test_cuda import check_same_bits, count_custom_calls

pytestmark = pytest.mark.gpu

# One block and several; a load in static, in large shared and in global memory.
CASES = (
  (1, 8, 256, 2), (63, 8, 256, 2), (64, 8, 256, 2), (129, 8, 256, 2), (8192, 8, 256, 2),
  (4097, 3, 12_000, 2), (3000, 7, 30_000, 3), (70_000, 1, 64, 1),
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  with jax.default_device(cuda_device):
    yield cuda_device


def make_case(rng, tokens: int, k: int, num_experts: int, width: int):
  """Arguments as arrays, and the function of them."""
  table, counts, num_physical = oracle_replicas.make_table(rng, num_experts, width)
  experts = oracle_replicas.make_experts(rng, tokens, k, num_experts=num_experts)
  function = functools.partial(
    assign_replicas, num_physical=num_physical, load="physical", implementation="cuda"
  )
  return (experts, table, counts), function


def check(got, arrays, function):
  static = {name: function.keywords[name] for name in ("num_physical", "load")}
  want = oracle_replicas.assign(*arrays, **static)
  for value, right in zip(jax.device_get(got), want, strict=True):
    np.testing.assert_array_equal(value, right)


@pytest.mark.parametrize("tokens, k, num_experts, width", CASES)
def test_grid(rng, tokens, k, num_experts, width):
  arrays, function = make_case(rng, tokens, k, num_experts, width)
  check(jax.jit(function)(*arrays), arrays, function)


@pytest.mark.parametrize("batch, tokens", ((5000, 3), (300, 700), (9, 5000)))
def test_more_batch_rows_than_blocks(rng, batch, tokens):
  (experts, table, counts), function = make_case(rng, batch * tokens, 4, 20, 3)
  experts = experts.reshape(batch, tokens, 4)
  physical, load = jax.device_get(jax.jit(function)(experts, table, counts))
  for i in range(0, batch, max(1, batch // 50)):
    check((physical[i], load[i]), (experts[i], table, counts), function)
  assert (load.sum(-1) == ((experts >= 0) & (experts < 20)).sum((1, 2))).all()


def test_repeats_have_the_same_bits(rng):
  arrays, function = make_case(rng, 8192, 8, 256, 2)
  run, arrays = jax.jit(function), jax.device_put(arrays)
  first = jax.device_get(run(*arrays))
  for _ in range(200):
    check_same_bits(jax.device_get(run(*arrays)), first)


def test_command_buffers(rng, tmp_path):
  """XLA captures the kernel with and without the clearing before it; replays are right."""
  few, function = make_case(rng, 20, 8, 256, 2)
  many = (oracle_replicas.make_experts(rng, 5000, 8, num_experts=256), *few[1:])

  def run(few, many, table, counts):
    return function(few, table, counts), function(many, table, counts)

  experts = jnp.asarray(few[0]), jnp.asarray(many[0])
  compiled = (
    jax.jit(run)
    .lower(*experts, *few[1:])
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  targets = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
  assert targets == ["jax_router_assign_replicas"] * 2
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps
  for dump in dumps:
    assert count_custom_calls(dump.read_text()) == (2, 0)
  table, counts = jax.device_put(few[1:])
  for step in range(4):
    got = compiled(*experts, table, counts)
    for result, ids in zip(got, experts, strict=True):
      check(result, (np.asarray(ids), *few[1:]), function)
    experts = tuple((x * 5 + step) % 260 for x in experts)
