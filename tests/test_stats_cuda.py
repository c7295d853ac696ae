"""What only a GPU can show of `route_with_stats`: every CUDA kernel, repeats, command buffers."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import shapes
from test_cuda import (
  DTYPES,
  HUGE,
  HUGE_BYTES,
  HUGE_TOKENS,
  KERNELS,
  ODD,
  Case,
  adverse_logits,
  check_same_bits,
  choose,
  count_custom_calls,
  make_rows,
  on_cpu,
)

pytestmark = pytest.mark.gpu

# So long a row that its sums find no room beside it in shared memory.
LONG = Case("general-long", 20_000, 2048)

each_kernel = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
# The kernels differ by whether the scores are a softmax.
SCORES = ("softmax", "sigmoid")


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  with jax.default_device(cuda_device):
    yield cuda_device


def route_with_stats(case, implementation: str, logits, score: str | None = None):
  options = case.arguments(implementation)
  if score is not None:
    options["score"] = score
  return jax_router.route_with_stats(logits, case.k, **options)


def cotangents(case, logits) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cotangents of weights, score sums and z sum."""
  weights = jnp.sin(3 * logits[..., : case.k].astype(jnp.float32))
  lead = logits.shape[:-2]
  scores = jnp.cos(jnp.arange(case.experts, dtype=jnp.float32))
  return weights, jnp.broadcast_to(scores, (*lead, case.experts)), jnp.full(lead, np.float32(1e-3))


def everything(case, implementation: str, logits, score: str | None = None):
  """Routing, statistics and the gradient of the logits for cotangents of all of them."""

  def differentiable(x):
    routing, stats = route_with_stats(case, implementation, x, score)
    return (routing.weights, stats.score_sums, stats.z_sum), (routing, stats)

  _, pull_back, (routing, stats) = jax.vjp(differentiable, logits, has_aux=True)
  return routing, stats, pull_back(cotangents(case, logits))[0]


def make_logits(case, tokens: int, dtype=np.float32) -> np.ndarray:
  """Random logits; given scores are positive, for a sum that cancels has no accurate share."""
  logits = shapes.make_logits("random", tokens, case.experts, dtype)
  return np.abs(logits) if case.biased else logits


def check_stats(got: jax_router.RouterStats, want: jax_router.RouterStats):
  np.testing.assert_array_equal(got.expert_counts, want.expert_counts)
  np.testing.assert_array_equal(got.num_tokens, want.num_tokens)
  np.testing.assert_allclose(got.score_sums, want.score_sums, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(got.z_sum, want.z_sum, rtol=1e-5)


def check_like_cpu(got, want):
  """Experts and counts must be equal, the rest close."""
  np.testing.assert_array_equal(got[0].experts, want[0].experts)
  np.testing.assert_allclose(got[0].weights, want[0].weights, rtol=1e-5, atol=1e-30)
  check_stats(got[1], want[1])
  narrow = got[2].dtype != np.float32
  a, b = got[2].astype(np.float32), want[2].astype(np.float32)
  np.testing.assert_allclose(a, b, rtol=2**-7 if narrow else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("cases", ((*KERNELS, LONG), ODD), ids=("aligned", "unaligned"))
def test_grid(cases, dtype):
  """Every kernel, in few programs: small enough for compute-sanitizer (tools/gpu.sh)."""
  logits = [make_logits(case, 37, dtype) for case in cases]

  def run(implementation, logits):
    return [
      everything(c, implementation, x, None if c.biased else score)
      for c, x in zip(cases, logits, strict=True)
      for score in SCORES
    ]

  got = jax.device_get(jax.jit(functools.partial(run, "cuda"))(logits))
  for a, b in zip(got, on_cpu(functools.partial(run, "cpu"), logits), strict=True):
    check_like_cpu(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@each_kernel
def test_routing_has_the_bits_of_route(case, dtype):
  """On rows that are hard to choose from, too, and counts are those of the choice."""
  hard = adverse_logits(case.experts, case.k, dtype)
  logits = np.concatenate([make_logits(case, 700, dtype), hard])

  @jax.jit
  def run(x):
    return route_with_stats(case, "cuda", x), choose(case, "cuda", x)

  (routing, stats), want = jax.device_get(run(logits))
  check_same_bits(routing, want)
  counts = np.bincount(routing.experts.reshape(-1), minlength=case.experts)
  np.testing.assert_array_equal(stats.expert_counts, counts)
  if not case.biased:  # The hard rows have shares of a sum that cancels or overflows.
    check_stats(stats, on_cpu(lambda x: route_with_stats(case, "cpu", x)[1], logits))


@each_kernel
def test_repeats_have_the_same_bits(case):
  run = jax.jit(functools.partial(everything, case, "cuda"))
  logits = jnp.asarray(shapes.make_logits("random", 3000, case.experts))
  first = jax.device_get(run(logits))
  for _ in range(200):
    check_same_bits(jax.device_get(run(logits)), first)


@each_kernel
def test_a_sequence_has_the_same_bits_in_every_batch(case):
  """Sums depend on the tokens of a sequence alone, not on how many blocks the launch has."""
  logits = shapes.make_logits("random", 3 * 500, case.experts, ml_dtypes.bfloat16)
  logits = logits.reshape(3, 500, case.experts)

  # One device to choose from, so that tokens are not cut into groups for several.
  def run(x):
    return everything(case, "cuda", x)

  mesh = jax.make_mesh((1,), ("d",), devices=jax.devices("cuda")[:1])
  spec = jax.sharding.PartitionSpec()
  alone = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
  together = jax.device_get(alone(logits))
  for i in range(3):
    part = jax.tree.map(lambda x, i=i: x[i], together)
    check_same_bits(jax.device_get(alone(logits[i])), part)


def test_command_buffers(tmp_path):
  """XLA captures both kernels of `stats` in a CUDA graph, and replays of the graph are right."""

  def run(implementation, logits):
    return [everything(c, implementation, x) for c, x in zip(KERNELS, logits, strict=True)]

  logits = [jnp.asarray(make_logits(case, 99)) for case in KERNELS]
  compiled = (
    jax.jit(functools.partial(run, "cuda"))
    .lower(logits)
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  targets = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
  words = ("stats", "stats_backward")
  assert sorted(targets) == sorted(f"jax_router_{word}" for word in words for _ in KERNELS)
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps
  for dump in dumps:
    assert count_custom_calls(dump.read_text()) == (len(targets), 0)
  change = jax.jit(
    lambda tree: [jnp.sin(3 * x + 1) + np.float32(1.5) for x in tree], donate_argnums=0
  )
  for _ in range(6):
    want = on_cpu(functools.partial(run, "cpu"), logits)
    for a, b in zip(jax.device_get(compiled(logits)), want, strict=True):
      check_like_cpu(a, b)
    logits = change(logits)


def test_offsets_beyond_31_bits(cuda_device):
  """Statistics of more than 2**31 logits are the sums of those of their parts."""
  memory = cuda_device.memory_stats() or {}
  if memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0) < HUGE_BYTES:
    pytest.skip(f"fewer than {HUGE_BYTES:.0f} bytes of device memory are free")
  assert HUGE_TOKENS * HUGE.experts > 2**31
  parts, last = 60, 1000

  @functools.partial(jax.jit, static_argnums=1)
  def whole(first, rows):
    routing, stats, gradient = everything(HUGE, "cuda", make_rows(first, rows))
    return stats, routing.weights[-last:], gradient[-last:]

  @jax.jit
  def part(first):
    return route_with_stats(HUGE, "cuda", make_rows(first, HUGE_TOKENS // parts))[1]

  got, weights, gradient = jax.device_get(whole(np.uint32(0), HUGE_TOKENS))
  sums = jax.device_get([part(np.uint32(i * (HUGE_TOKENS // parts))) for i in range(parts)])
  want = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=x[0].dtype), *sums)
  np.testing.assert_array_equal(got.expert_counts, want.expert_counts)
  assert got.num_tokens == HUGE_TOKENS == want.num_tokens
  np.testing.assert_allclose(got.score_sums, want.score_sums, rtol=1e-4)
  np.testing.assert_allclose(got.z_sum, want.z_sum, rtol=1e-4)
  _, weights_alone, gradient_alone = jax.device_get(whole(np.uint32(HUGE_TOKENS - last), last))
  check_same_bits((weights, gradient), (weights_alone, gradient_alone))
