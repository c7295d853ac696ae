"""What only a GPU can show of `aux_scores`: command buffers, offsets beyond 2**31, many repeats."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import shapes
from test_cuda import HUGE, HUGE_BYTES, HUGE_TOKENS, count_custom_calls, make_rows, on_cpu

pytestmark = pytest.mark.gpu

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
# Rows in 4, 8, 16 and 32 lanes, in blocks of 2, 5 and 16 warps, in memory; rows of odd sizes.
EXPERTS = (64, 128, 250, 512, 1024, 2304, 8192, 9000, 33, 509, 1001)


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  with jax.default_device(cuda_device):
    yield cuda_device


def scores_and_gradient(implementation: str, logits, score: str):
  function = functools.partial(jax_router.aux_scores, score=score, implementation=implementation)
  scores, pull_back = jax.vjp(function, logits)
  # Behind a barrier, or XLA might take the sine of logits that it has not rounded yet.
  cotangent = jnp.sin(jax.lax.optimization_barrier(logits).astype(jnp.float32))
  return scores, pull_back(cotangent)[0]


def run_grid(implementation: str, rows):
  """Every score of every array of logits."""
  return [scores_and_gradient(implementation, x, score) for x in rows for score in SCORES]


def check_like_cpu(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    narrow = a.dtype != np.float32
    a, b = a.astype(np.float32), b.astype(np.float32)
    np.testing.assert_allclose(a, b, rtol=2**-7 if narrow else 1e-5, atol=1e-6)


def check_same_bits(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", (np.float32, ml_dtypes.bfloat16), ids=("float32", "bfloat16"))
def test_grid_repeats(dtype):
  """Every kernel in one program: like the CPU's, and 200 times the same bits."""
  rows = [jnp.abs(shapes.make_logits("random", 37, experts, dtype)) for experts in EXPERTS]
  run = jax.jit(functools.partial(run_grid, "cuda"))
  first = jax.device_get(run(rows))
  check_like_cpu(first, on_cpu(functools.partial(run_grid, "cpu"), rows))
  for _ in range(200):
    check_same_bits(jax.device_get(run(rows)), first)


def test_command_buffers(tmp_path):
  """XLA captures every custom call in a CUDA graph, and replays of the graph are right."""
  rows = [jnp.asarray(shapes.make_logits("random", 37, experts)) for experts in EXPERTS]
  compiled = (
    jax.jit(functools.partial(run_grid, "cuda"))
    .lower(rows)
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  calls = compiled.as_text().count('custom_call_target="jax_router_scores')
  assert calls == 2 * len(EXPERTS) * len(SCORES)
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps, f"no thunks in the dump: {sorted(path.name for path in tmp_path.iterdir())}"
  for dump in dumps:
    assert count_custom_calls(dump.read_text()) == (calls, 0)
  for i in range(6):
    moved = [jnp.abs(x + i / 8) for x in rows]
    want = on_cpu(functools.partial(run_grid, "cpu"), moved)
    check_like_cpu(jax.device_get(compiled(moved)), want)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def run_bands(implementation: str, first, rows: int, bands):
  """Results of `rows` rows, cut to some bands of them."""
  results = scores_and_gradient(implementation, make_rows(first, rows), "softmax")
  return [tuple(x[a:b] for x in results) for a, b in bands]


def test_offsets_beyond_31_bits(cuda_device):
  stats = cuda_device.memory_stats() or {}
  if stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) < HUGE_BYTES:
    pytest.skip(f"fewer than {HUGE_BYTES:.0f} bytes of device memory are free")
  width = 1001
  # The first rows, those whose elements cross 2**31, and the last.
  starts = (0, 2**31 // HUGE.experts - width // 2, HUGE_TOKENS - width)
  bands = tuple((a, a + width) for a in starts)
  found = jax.device_get(run_bands("cuda", np.uint32(0), HUGE_TOKENS, bands))
  for start, got in zip(starts, found, strict=True):
    first, whole = np.uint32(start), ((0, width),)
    check_same_bits(got, jax.device_get(run_bands("cuda", first, width, whole))[0])
    with jax.default_device(jax.devices("cpu")[0]):
      check_like_cpu(got, jax.device_get(run_bands("cpu", first, width, whole))[0])
