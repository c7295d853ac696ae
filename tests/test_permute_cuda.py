"""What only a GPU can show of `permute` and `combine`: every kernel, repeats, command buffers."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router import combine, permute
from oracle_permute import DTYPES, make_experts, make_plan, make_rows
from test_cuda import check_same_bits, count_custom_calls, on_cpu

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  with jax.default_device(cuda_device):
    yield cuda_device


class Case(NamedTuple):
  """Sizes that lead to one shape of the launch."""

  name: str
  batch: int
  tokens: int
  k: int
  width: int
  experts: int = 16


CASES = (
  Case("thread", 1, 700, 2, 8),
  Case("lanes", 1, 301, 4, 72),
  Case("warp", 1, 97, 8, 512),
  Case("warps", 1, 60, 3, 1024),
  Case("block", 1, 41, 8, 4096),
  Case("uneven", 1, 33, 6, 2880),
  Case("rounds", 1, 19, 9, 7168),
  Case("split rows", 1, 1, 8, 7168),
  Case("many slots", 1, 5, 130, 256, 257),
  Case("batch", 7, 13, 5, 264),
  Case("many experts", 2, 40, 8, 128, 4096),
  Case("one element", 1, 50, 8, 1),
  Case("odd", 1, 37, 8, 1027),
  Case("even", 3, 21, 2, 130),
  Case("one slot", 1, 64, 1, 320),
)


def make_case(case: Case, dtype, kind="outside"):
  """x, y, weights, plan and the cotangents."""
  rng = np.random.default_rng(case.width)
  lead = (case.batch,)
  experts = np.stack(
    [make_experts(kind, case.tokens, case.k, case.experts, seed=i) for i in range(case.batch)]
  )
  entries = case.tokens * case.k
  return (
    make_rows(rng, *lead, case.tokens, case.width, dtype=dtype),
    make_rows(rng, *lead, entries, case.width, dtype=dtype),
    make_rows(rng, *lead, case.tokens, case.k),
    make_plan(experts, case.experts),
    make_rows(rng, *lead, entries, case.width, dtype=dtype),
    make_rows(rng, *lead, case.tokens, case.width, dtype=dtype),
  )


def everything(implementation, x, y, weights, plan, row_cotangent, token_cotangent):
  """Results and gradients of both words, and each gradient of `combine` alone."""
  rows, pull_rows = jax.vjp(lambda x: permute(x, plan, implementation=implementation), x)
  tokens, pull = jax.vjp(lambda *a: combine(*a, plan, implementation=implementation), y, weights)
  _, pull_y = jax.vjp(lambda y: combine(y, weights, plan, implementation=implementation), y)
  _, pull_w = jax.vjp(lambda w: combine(y, w, plan, implementation=implementation), weights)
  exact = rows, pull_rows(row_cotangent)[0], tokens, pull(token_cotangent)[0]
  exact += pull_y(token_cotangent)
  return exact, (pull(token_cotangent)[1], *pull_w(token_cotangent))


def check_like_cpu(got, want):
  """All but the dot products have the bits of the CPU, which adds in the same order."""
  check_same_bits(got[0], want[0])
  for a, b in zip(got[1], want[1], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_grid(dtype):
  """Every kernel, in few programs: small enough for compute-sanitizer (tools/gpu.sh)."""
  arguments = [make_case(case, dtype) for case in CASES]

  def run(implementation, arguments):
    return [everything(implementation, *a) for a in arguments]

  got = jax.device_get(jax.jit(functools.partial(run, "cuda"))(arguments))
  for a, b in zip(got, on_cpu(functools.partial(run, "cpu"), arguments), strict=True):
    check_like_cpu(a, b)


@pytest.mark.parametrize("kind", ("one expert", "padding", "no group", "repeated"))
def test_more_tokens_than_blocks(kind):
  """Every block takes several tokens, of several batch rows."""
  for case in (
    Case("", 3, 5000, 8, 1024, 300),
    Case("", 900, 11, 2, 16),
    Case("", 1, 30000, 2, 24),
  ):
    arguments = make_case(case, DTYPES[1], kind)
    got = jax.device_get(jax.jit(functools.partial(everything, "cuda"))(*arguments))
    check_like_cpu(got, on_cpu(functools.partial(everything, "cpu"), *arguments))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_repeats_and_batches_have_the_same_bits(case):
  arguments = jax.device_put(make_case(case, DTYPES[1]))
  run = jax.jit(functools.partial(everything, "cuda"))
  first = jax.device_get(run(*arguments))
  for _ in range(50):
    check_same_bits(jax.device_get(run(*arguments)), first)
  alone = jax.tree.map(lambda a: a[:1], arguments)
  got = jax.device_get(run(*alone))
  check_same_bits(got, jax.tree.map(lambda a: a[:1], first))


def test_command_buffers(tmp_path):
  """XLA captures every custom call in a CUDA graph, and replays of the graph are right."""

  def run(implementation, arguments):
    return [everything(implementation, *a) for a in arguments]

  arguments = [jax.device_put(make_case(case, DTYPES[1])) for case in CASES]
  compiled = (
    jax.jit(functools.partial(run, "cuda"))
    .lower(arguments)
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  targets = re.findall(r'custom_call_target="jax_router_([^"]*)"', compiled.as_text())
  words = {"permute", "permute_backward", "combine", "combine_backward"}
  assert set(targets) == words and len(targets) >= len(words) * len(CASES)
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps
  for dump in dumps:
    assert count_custom_calls(dump.read_text()) == (len(targets), 0)
  change = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.sin(3 * x + 1), tree), donate_argnums=0)
  for _ in range(6):
    want = on_cpu(functools.partial(run, "cpu"), arguments)
    for a, b in zip(jax.device_get(compiled(arguments)), want, strict=True):
      check_like_cpu(a, b)
    # The plan changes too: tokens take the positions of their neighbours.
    arguments = [
      (
        *change((x, y, weights)),
        plan._replace(inverse=jnp.roll(plan.inverse, plan.inverse.shape[-1] // x.shape[1], -1)),
        *change(rest),
      )
      for x, y, weights, plan, *rest in arguments
    ]


def test_offsets_beyond_31_bits(cuda_device):
  """More than 2**31 elements: rows out and back with weights 1/8 give the tokens themselves."""
  tokens, k, width = 40_000, 8, 7168
  memory = cuda_device.memory_stats() or {}
  if memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0) < 40e9:
    pytest.skip("fewer than 40e9 bytes of device memory are free")
  assert tokens * k * width > 2**31
  plan = jax.device_put(make_plan(make_experts("random", tokens, k, 64), 64))
  x = jax.random.normal(jax.random.key(0), (tokens, width), jnp.bfloat16)
  weights = jnp.full((tokens, k), 1 / 8, jnp.float32)

  @jax.jit
  def run(x, weights, plan):
    rows = permute(x, plan)
    back, pull = jax.vjp(lambda y, w: combine(y, w, plan), rows, weights)
    of_rows, of_weights = pull(x)
    _, pull_rows = jax.vjp(lambda x: permute(x, plan), x)
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    close = jnp.abs(of_weights - squares) <= np.float32(1e-4) * squares
    last = rows[-1] == x[plan.order[-1] // k]
    return jnp.all(back == x), jnp.all(pull_rows(of_rows)[0] == x), jnp.all(close), jnp.all(last)

  assert all(bool(x) for x in run(x, weights, plan))
