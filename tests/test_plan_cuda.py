"""What only a GPU can show of `plan`: every kernel, batches, repeats, command buffers."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
import oracle_plan
from test_cuda import check_same_bits, count_custom_calls

pytestmark = pytest.mark.gpu

# Around the 4096 entries that one block sorts; blocks of unlike sizes, without counters for every
# warp, and more than 128 of them.
CASES = (
  (1, 1, 1), (31, 1, 7), (512, 8, 255), (1365, 3, 8192), (1366, 3, 8192), (4097, 1, 33),
  (2048, 8, 256), (5462, 3, 8192), (16385, 1, 33), (8192, 8, 256), (8192, 36, 2304),
  (8192, 8, 16384), (700_000, 8, 100),
)  # fmt: skip


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  with jax.default_device(cuda_device):
    yield cuda_device


def plan(experts, num_experts, implementation="cuda"):
  return jax_router.plan(experts, num_experts, implementation=implementation)


def check(got, experts, num_experts):
  ids = np.asarray(experts).reshape(-1)
  order = np.argsort(np.where((ids >= 0) & (ids < num_experts), ids, num_experts), kind="stable")
  inverse = np.empty_like(order)
  inverse[order] = np.arange(len(order))
  sizes = np.bincount(ids[(ids >= 0) & (ids < num_experts)], minlength=num_experts)
  for value, want in zip(jax.device_get(got), (order, inverse, sizes), strict=True):
    np.testing.assert_array_equal(value, want)


@pytest.mark.parametrize("tokens, k, num_experts", CASES)
def test_grid(tokens, k, num_experts):
  run = jax.jit(functools.partial(plan, num_experts=num_experts))
  for kind in oracle_plan.KINDS:
    experts = oracle_plan.make_experts(kind, tokens, k, num_experts)
    check(run(experts), experts, num_experts)


@pytest.mark.parametrize("batch, tokens", ((5000, 3), (300, 700), (9, 5000)))
def test_more_batch_rows_than_blocks(batch, tokens):
  experts = oracle_plan.make_experts("some in no group", batch * tokens, 4, 20)
  experts = experts.reshape(batch, tokens, 4)
  got = jax.device_get(jax.jit(functools.partial(plan, num_experts=20))(experts))
  for i in range(0, batch, max(1, batch // 50)):
    check(jax.tree.map(lambda x, i=i: x[i], got), experts[i], 20)
  assert (got.group_sizes.sum(-1) == ((experts >= 0) & (experts < 20)).sum((1, 2))).all()


@pytest.mark.parametrize("tokens", (1000, 8192))
def test_repeats_have_the_same_bits(tokens):
  run = jax.jit(functools.partial(plan, num_experts=256))
  experts = jnp.asarray(oracle_plan.make_experts("skewed", tokens, 8, 256))
  first = jax.device_get(run(experts))
  for _ in range(200):
    check_same_bits(jax.device_get(run(experts)), first)


def test_too_many_experts():
  experts = np.array([[16384, 3], [0, 16384]], np.int32)
  with pytest.raises(ValueError, match="implementation='cuda' of plan cannot run here"):
    jax.jit(functools.partial(plan, num_experts=16385))(experts)
  check(plan(experts, 16385, implementation=None), experts, 16385)


def test_command_buffers(tmp_path):
  """XLA captures one launch and three, and replays of the graph are right."""

  def run(few, many):
    return plan(few, 256), plan(many, 2304)

  few = jnp.asarray(oracle_plan.make_experts("random", 100, 8, 256))
  many = jnp.asarray(oracle_plan.make_experts("random", 5000, 8, 2304))
  compiled = (
    jax.jit(run)
    .lower(few, many)
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  targets = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
  assert targets == ["jax_router_plan"] * 2
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps
  for dump in dumps:
    assert count_custom_calls(dump.read_text()) == (2, 0)
  for step in range(6):
    got_few, got_many = compiled(few, many)
    check(got_few, few, 256)
    check(got_many, many, 2304)
    few, many = (few * 5 + step) % 300, (many * 7 + step) % 2400
