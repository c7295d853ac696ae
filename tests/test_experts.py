"""`dense_moe_fc2` against numpy: values, placement of the weights, masking, bits."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle_experts as oracle
from jax_router import dense_moe_fc2
from oracle_experts import ALPHA_KINDS, DTYPES, FOLD, make_alpha, make_operands_for

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)


@pytest.fixture(autouse=True)
def _only_what_is_built(request):
  for name in ("implementation", "kernel"):
    if name in request.fixturenames:
      oracle.skip_without_kernel(request.getfixturevalue(name))


@functools.cache
def compiled(implementation, out_dtype=None):
  return jax.jit(
    functools.partial(dense_moe_fc2, implementation=implementation, out_dtype=out_dtype)
  )


def fold(implementation, dtype) -> float:
  """What plain JAX rounds more than the sums."""
  return FOLD if implementation == "reference" and np.dtype(dtype).name == "bfloat16" else 0.0


def check(implementation, h, w2, alpha, out_dtype=None):
  got = compiled(implementation, out_dtype)(h, w2, alpha)
  want = oracle.fc2(h, w2, alpha, fold(implementation, h.dtype))
  want.check(got, out_dtype or h.dtype)
  return got


# Tokens, experts, I, H, k: each side of a group of rows, of a panel, of a tile of columns.
SHAPES = (
  (1, 1, 1, 1, 1),
  (7, 3, 5, 4, 2),
  (8, 4, 64, 64, 2),
  (33, 7, 33, 65, 3),
  (9, 33, 8, 130, 4),
)
LARGER_SHAPES = (
  (65, 8, 256, 128, 2), (64, 3, 257, 136, 1), (20, 61, 64, 72, 8), (255, 4, 16, 63, 2),
  (257, 5, 40, 8, 3), (515, 3, 12, 200, 2), (12, 2, 768, 192, 1), (3, 260, 8, 24, 8),
)  # fmt: skip


@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid(implementation, shape, dtype):
  check(implementation, *make_operands_for(implementation, *shape, dtype))


@DTYPE
@pytest.mark.parametrize("shape", LARGER_SHAPES, ids=str)
def test_larger_grid(kernel, shape, dtype):
  check(kernel, *make_operands_for(kernel, *shape, dtype))


@pytest.mark.parametrize("kind", ALPHA_KINDS)
def test_weights(implementation, kind):
  h, w2, alpha = make_operands_for(implementation, 21, 9, 16, 24, 3, kind=kind)
  got = np.asarray(check(implementation, h, w2, alpha))
  unused = (alpha == 0).all(axis=1)
  assert unused.any() == (kind in ("some without", "none"))
  # To the bit: +0, in every column.
  assert not got[unused].tobytes().strip(b"\0")


@pytest.mark.parametrize("out_dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@DTYPE
def test_dtypes_of_operands_and_result_may_differ(implementation, dtype, out_dtype):
  operands = make_operands_for(implementation, 13, 5, 24, 20, 2, dtype)
  check(implementation, *operands, out_dtype=out_dtype)


@DTYPE
def test_error_of_all_elements(implementation, dtype):
  """The bars: 4e-3 in bfloat16, 1e-4 in float32 but for the fold of plain JAX."""
  h, w2, alpha = make_operands_for(implementation, 128, 16, 64, 136, 4, dtype)
  want = oracle.fc2(h, w2, alpha).values
  # Tensor cores do not round every sum to the nearest.
  exact = 1e-5 if implementation == "cuda" else 1e-6
  bar = 2.5e-3 if fold(implementation, dtype) else exact
  assert oracle.relative_error(compiled(implementation, np.float32)(h, w2, alpha), want) < bar
  assert oracle.relative_error(compiled(implementation)(h, w2, alpha), want) < 4e-3


@DTYPE
def test_every_expert_meets_its_own_weight(implementation, dtype):
  """Blocks of constants: token t has chosen expert t alone, whose products are known exactly."""
  experts, depth, width = 11, 8, 20
  if implementation == "cuda":
    depth, width = make_operands_for("cuda", 1, 1, depth, width, 1, dtype)[1].shape[1:]
  h = np.ones((experts, experts, depth), dtype)
  constants = np.arange(1, experts + 1)
  w2 = np.broadcast_to(constants[:, None, None], (experts, depth, width)).astype(dtype)
  for weights in (np.ones(experts), -(0.5 ** np.arange(experts)), 2.0 ** np.arange(experts)):
    alpha = np.diag(weights).astype(np.float32)
    got = compiled(implementation, np.float32)(h, w2, alpha)
    want = np.repeat((weights * depth * constants)[:, None], width, axis=1)
    np.testing.assert_array_equal(got, want)


@DTYPE
def test_tiny_and_huge_weights(implementation, dtype):
  """Beyond the range of float16, in which nothing is weighed."""
  h, w2, alpha = make_operands_for(implementation, 6, 4, 16, 12, 1, dtype)
  scales = np.array([1e-30, 1e30, -1e-20, 1e6, 1e-6, 1], np.float32)
  check(implementation, h, w2, alpha * scales[:, None], out_dtype=np.float32)


# ---- what an expert that was not chosen holds ----


@pytest.mark.parametrize("special", (np.nan, np.inf, -np.inf))
@DTYPE
def test_unselected_experts_add_nothing(implementation, dtype, special):
  h, w2, alpha = make_operands_for(implementation, 19, 6, 40, 70, 2, dtype)
  alpha[:, 4] = 0
  alpha[0, 3] = -0.0
  clean = np.asarray(compiled(implementation)(h, w2, alpha))
  assert np.isfinite(clean.astype(np.float32)).all()
  poisoned = np.where(alpha[:, :, None] == 0, dtype(special), h)
  np.testing.assert_array_equal(compiled(implementation)(poisoned, w2, alpha), clean)
  w2[4] = special
  got = compiled(implementation)(poisoned, w2, alpha)
  oracle.fc2(h, w2, alpha, fold(implementation, dtype)).check(got, dtype)
  if implementation != "reference":  # Plain JAX adds up in another order then.
    np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("special", (np.nan, np.inf))
@DTYPE
def test_selected_experts_pass_on_what_they_hold(implementation, dtype, special):
  """To those tokens that have chosen them, and to no others."""
  h, w2, alpha = make_operands_for(implementation, 19, 6, 8, 70, 2, dtype)
  alpha[:, 2] = np.where(np.arange(19) % 3 == 0, 0.5, 0)
  w2[2, 3, 5], h[0, 2, 1] = special, special
  got = check(implementation, h, w2, alpha)
  wrong = ~np.isfinite(np.asarray(got).astype(np.float32))
  assert wrong[0].all() and wrong[::3, 5].all() and wrong.sum() == w2.shape[2] + 6
  alpha[1, 4] = np.nan
  got = np.asarray(compiled(implementation)(h, w2, alpha)).astype(np.float32)
  assert np.isnan(got[1]).all() and np.isfinite(got[2]).all()


# ---- order and bits ----


def test_experts_are_added_in_ascending_order(kernel):
  """Large terms that cancel leave what only this order leaves."""
  if kernel == "cuda":
    pytest.skip("sizes decide how the CUDA kernel cuts the experts into sums of their own")
  w2 = np.ones((4, 1, 9), np.float32)
  alpha = np.ones((1, 4), np.float32)
  for terms, want in (((2**25, 1, -(2**25), 1), 1), ((1, 2**25, -(2**25), 1), 1), ((1,) * 4, 4)):
    h = np.array(terms, np.float32)[None, :, None]
    got = dense_moe_fc2(h, w2, alpha, implementation=kernel)
    np.testing.assert_array_equal(got, np.full((1, 9), want, np.float32))


@DTYPE
def test_repeats_are_identical_and_fully_written(kernel, dtype):
  operands = make_operands_for(kernel, 70, 12, 50, 333, 3, dtype, kind="some without")
  first = np.asarray(check(kernel, *operands))
  for _ in range(100 if kernel == "cuda" else 20):
    # A freed array of the same size full of NaN is what an unwritten result would show.
    jax.block_until_ready(jnp.full(first.shape, jnp.nan, first.dtype))
    np.testing.assert_array_equal(compiled(kernel)(*operands), first)


@DTYPE
def test_a_token_does_not_depend_on_the_others(kernel, rng, dtype):
  """Permuted, in a part or among more tokens, a row has the same bits.

  Those of the CUDA kernel depend on the number of tokens, for that decides where sums are cut.
  """
  h, w2, alpha = make_operands_for(kernel, 300, 5, 20, 33, 2, dtype)
  whole = np.asarray(compiled(kernel)(h, w2, alpha))
  order = rng.permutation(300)
  np.testing.assert_array_equal(compiled(kernel)(h[order], w2, alpha[order]), whole[order])
  parts = () if kernel == "cuda" else (slice(0, 1), slice(3, 10), slice(100, 280))
  for part in parts:
    np.testing.assert_array_equal(compiled(kernel)(h[part], w2, alpha[part]), whole[part])


_HASH = """
import hashlib, os, jax, ml_dtypes, numpy, jax_router, oracle_experts
digest = hashlib.sha256()
for dtype in (numpy.float32, ml_dtypes.bfloat16):
  for shape in ((300, 8, 64, 1000, 2), (16, 16, 300, 520, 4)):
    operands = oracle_experts.make_operands(*shape, dtype)
    result = jax.jit(jax_router.dense_moe_fc2)(*operands)
    digest.update(jax.device_get(result).tobytes())
print(digest.hexdigest(), len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_do_not_matter_to_the_bits():
  """Processes whose pools have 1, 2 and 8 threads print the same hash."""
  base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  printed = [
    subprocess.run(
      [sys.executable, "-c", _HASH],
      env=base | {"JAX_PLATFORMS": "cpu", "NPROC": threads},
      cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True,
    ).stdout.split()
    for threads in ("1", "2", "8")
  ]  # fmt: skip
  assert len({digest for digest, _ in printed}) == 1
  assert int(printed[0][1]) < int(printed[2][1])


# ---- shapes ----


@pytest.mark.parametrize("lead", ((), (0,), (2, 3), (3, 0)), ids=str)
def test_any_leading_dimensions(implementation, lead):
  count = int(np.prod(lead))
  h, w2, alpha = make_operands_for(implementation, count, 4, 12, 10, 2)
  depth, width = w2.shape[1:]
  got = compiled(implementation)(h.reshape(*lead, 4, depth), w2, alpha.reshape(*lead, 4))
  assert got.shape == (*lead, width)
  oracle.fc2(h, w2, alpha, 0.0).check(np.asarray(got).reshape(count, width), h.dtype)


def test_eager_calls_and_numpy_arrays(implementation):
  operands = make_operands_for(implementation, 5, 3, 8, 9, 2)
  got = dense_moe_fc2(*operands, implementation=implementation)
  assert isinstance(got, jax.Array)
  np.testing.assert_array_equal(got, compiled(implementation)(*operands))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_weights_of_another_dtype_are_taken_as_float32(implementation, dtype):
  h, w2, _ = make_operands_for(implementation, 5, 3, 8, 9, 2)
  alpha = make_alpha("top-k", 5, 3, 2).astype(dtype)
  check(implementation, h, w2, alpha)
