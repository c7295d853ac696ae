"""The dense expert matmul and its gradients in numpy, expert by expert, for tests.

Values are float64. Beside each sum stands how far a sum in float32 may be from it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from jax_router import _experts_primitive, _native
from oracle_permute import DTYPES, ROUNDING, Sum, make_rows

__all__ = ("DTYPES", "Sum", "make_alpha", "make_operands")

ALPHA_KINDS = ("top-k", "signed", "dense", "one expert", "some without", "none")

# Plain JAX rounds h * alpha once more, and each product by so much.
FOLD = 2.0**-8

FLOAT8 = ml_dtypes.float8_e4m3fn
# Tensor cores keep so much of each product that they add up in float8.
FLOAT8_SUMS = 2.0**-11


def skip_without_kernel(implementation: str) -> None:
  """Skips a test of an implementation that has no kernel of this word in this build and here."""
  known = _native.platforms().get(implementation, ())
  if implementation != "reference" and "experts" not in known:
    pytest.skip(f"this build has no {implementation} kernel of experts")
  reason = _experts_primitive.why_not_cuda() if implementation == "cuda" else None
  if reason is not None:
    pytest.skip(f"no kernel of experts: {reason}")


def make_alpha(kind: str, tokens: int, experts: int, k: int, seed: int = 0) -> np.ndarray:
  """Weights `[tokens, experts]` float32, k for each token unless the kind says otherwise."""
  rng = np.random.default_rng([seed, tokens, experts, k])
  weights = rng.uniform(0.1, 1, (tokens, experts)).astype(np.float32)
  if kind == "dense":
    return weights
  chosen = rng.random((tokens, experts)).argsort(axis=1) < k
  if kind == "signed":
    weights *= rng.choice([-1, 1], weights.shape).astype(np.float32)
  elif kind == "one expert":
    chosen[:] = np.arange(experts) == experts // 2
  elif kind == "some without":
    chosen[rng.random(tokens) < 0.5] = False
  elif kind == "none":
    chosen[:] = False
  elif kind != "top-k":
    raise ValueError(kind)
  return np.where(chosen, weights, np.float32(0))


def make_operands(tokens, experts, depth, width, k, dtype=np.float32, kind="top-k", seed=0):
  """h, w2 and alpha."""
  rng = np.random.default_rng([seed, tokens, experts, depth, width])
  h = make_rows(rng, tokens, experts, depth, dtype=dtype)
  w2 = make_rows(rng, experts, depth, width, dtype=dtype)
  return h, w2, make_alpha(kind, tokens, experts, min(k, experts), seed)


def round_up(x: int, multiple: int) -> int:
  return -(-x // multiple) * multiple


def make_operands_for(
  implementation, tokens, experts, depth, width, k, dtype=None, kind="top-k", seed=0
):
  """`make_operands` of sizes and a dtype that an implementation takes.

  Those of the CUDA kernel are rounded up; where no dtype is given it gets bfloat16.
  """
  if implementation == "cuda":
    dtype = DTYPES[1] if dtype is None else dtype
    if np.dtype(dtype) == np.float32:
      pytest.skip("the CUDA kernel of experts takes no float32")
    depth, width = round_up(depth, 64), round_up(width, 8)
  dtype = np.float32 if dtype is None else dtype
  return make_operands(tokens, experts, depth, width, k, dtype, kind, seed)


# ---- float8 ----


def quantize_h(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """float8 of h `[T, E, I]`, and its scales for every 128 columns."""
  blocks = h.astype(np.float32).reshape(len(h), h.shape[1] * h.shape[2] // 128, 128)
  scale = np.abs(blocks).max(axis=2) / 448
  return (blocks / scale[:, :, None]).astype(FLOAT8).reshape(h.shape), scale


def dequantize(h, h_scale, packed):
  """float64 h `[T, E, I]` and w2 `[E, I, H]`."""
  blocks = h.astype(np.float64).reshape(*h_scale.shape, 128) * h_scale[:, :, None].astype(
    np.float64
  )
  q, scale = np.asarray(packed.q).astype(np.float64), np.asarray(packed.scale).astype(np.float64)
  for row in range(scale.shape[0]):
    for column in range(scale.shape[1]):
      q[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] *= scale[row, column]
  return blocks.reshape(h.shape), np.moveaxis(q.reshape(len(q), *h.shape[1:]), 0, 2)


# ---- sums ----


def fc2(h: np.ndarray, w2: np.ndarray, alpha: np.ndarray, fold: float = 0.0) -> Sum:
  """Result `[T, H]`; `fold`: a relative rounding of each product."""
  h, w2, alpha = (x.astype(np.float64) for x in (h, w2, alpha))
  tokens, experts, depth = h.shape
  values = np.zeros((tokens, w2.shape[2]))
  magnitude = np.zeros_like(values)
  for e in range(experts):
    rows = np.flatnonzero(alpha[:, e])
    with np.errstate(invalid="ignore"):
      values[rows] += alpha[rows, e, None] * (h[rows, e] @ w2[e])
      magnitude[rows] += np.abs(alpha[rows, e, None]) * (np.abs(h[rows, e]) @ np.abs(w2[e]))
  return Sum(values, ((depth + experts + 2) * ROUNDING + fold) * magnitude)


def gradients(
  cotangent: np.ndarray, h: np.ndarray, w2: np.ndarray, alpha: np.ndarray, fold: float = 0.0
) -> tuple[Sum, Sum, Sum]:
  """Those of h, w2 and, dense, of alpha for a cotangent `[T, H]`."""
  cotangent, h, w2, alpha = (x.astype(np.float64) for x in (cotangent, h, w2, alpha))
  tokens, _, depth = h.shape
  g = np.einsum("tn,ein->tei", cotangent, w2)
  size = np.einsum("tn,ein->tei", np.abs(cotangent), np.abs(w2))
  weighed = alpha[:, :, None] * h
  of_w2 = np.einsum("tn,tei->ein", cotangent, weighed)
  w2_size = np.einsum("tn,tei->ein", np.abs(cotangent), np.abs(weighed))
  inner = (w2.shape[2] + 2) * ROUNDING
  return (
    Sum(alpha[:, :, None] * g, (inner + fold) * np.abs(alpha)[:, :, None] * size),
    Sum(of_w2, ((tokens + 2) * ROUNDING + fold) * w2_size),
    Sum((h * g).sum(axis=2), (inner + depth * ROUNDING + fold) * (np.abs(h) * size).sum(axis=2)),
  )


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
  """Of all elements together, in the Frobenius norm."""
  return float(np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want))
