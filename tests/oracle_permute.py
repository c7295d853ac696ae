"""`permute`, `combine` and their gradients in numpy, entry by entry, independently of the package.

Values are float64. Beside each sum stands how far a sum in float32 may be from it.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

import jax_router

ROUNDING = float(np.finfo(np.float32).eps)
# Relative rounding of a dtype, and the distance of its subnormals.
ROUNDINGS = {
  "float32": (ROUNDING, 1e-37), "bfloat16": (2.0**-8, 1e-37), "float16": (2.0**-11, 2.0**-24)
}  # fmt: skip

PLAN_KINDS = ("random", "outside", "one expert", "padding", "no group", "repeated")


class Sum(NamedTuple):
  """Values, and how far these may be from them."""

  values: np.ndarray
  tolerance: np.ndarray

  def check(self, got, dtype) -> None:
    """Compares an array of the given dtype."""
    got = np.asarray(got)
    assert got.dtype == np.dtype(dtype) and got.shape == self.values.shape
    relative, absolute = ROUNDINGS[np.dtype(dtype).name]
    wide = got.astype(np.float64)
    np.testing.assert_array_equal(np.isfinite(wide), np.isfinite(self.values))
    finite = np.isfinite(self.values)
    np.testing.assert_array_equal(wide[~finite], self.values[~finite])
    error = np.abs(wide[finite] - self.values[finite])
    allowed = self.tolerance[finite] + relative * np.abs(self.values[finite]) + absolute
    assert (error <= allowed).all(), (error / allowed).max()


def make_experts(kind: str, tokens: int, k: int, num_experts: int, seed: int = 0) -> np.ndarray:
  """Ids `[tokens, k]`.

  random: distinct ones. outside: a third in no group. one expert: the first slots are all of one.
  padding: some tokens without a group. no group: all of them. repeated: one expert in all slots.
  """
  rng = np.random.default_rng([seed, tokens, k, num_experts])
  experts = rng.random((tokens, max(k, num_experts))).argsort(axis=1)[:, :k] % num_experts
  if kind == "outside":
    outside = rng.choice([-1, num_experts, num_experts + 5], experts.shape)
    experts = np.where(rng.random(experts.shape) < 1 / 3, outside, experts)
  elif kind == "one expert":
    experts[:, :1] = num_experts // 2
  elif kind == "padding":
    experts[rng.random(tokens) < 0.4] = num_experts
  elif kind == "no group":
    experts[:] = num_experts
  elif kind == "repeated":
    experts[:] = experts[:, :1]
  elif kind != "random":
    raise ValueError(kind)
  return experts.astype(np.int32)


def make_plan(experts: np.ndarray, num_experts: int) -> jax_router.Plan:
  """The plan of ids `[..., T, k]`."""
  lead = experts.shape[:-2]
  ids = experts.reshape(*lead, experts.shape[-2] * experts.shape[-1])
  keys = np.where((ids >= 0) & (ids < num_experts), ids, num_experts)
  order = keys.argsort(axis=-1, kind="stable")
  sizes = np.zeros((*lead, num_experts), np.int32)
  for row in np.ndindex(lead):
    sizes[row] = np.bincount(keys[row], minlength=num_experts + 1)[:num_experts]
  return jax_router.Plan(order.astype(np.int32), order.argsort(-1).astype(np.int32), sizes)


def positions(plan: jax_router.Plan, tokens: int):
  """(token, slot, position) of every entry in a group, slot after slot."""
  inverse = np.asarray(plan.inverse)
  total = int(np.asarray(plan.group_sizes).sum())
  k = inverse.size // tokens if tokens else 0
  for j in range(k):
    for t in range(tokens):
      if inverse[t * k + j] < total:
        yield t, j, inverse[t * k + j]


def permute(x: np.ndarray, plan: jax_router.Plan) -> np.ndarray:
  """Rows `[n, d]` in the dtype of `x`."""
  rows = np.zeros((len(np.asarray(plan.order)), x.shape[1]), x.dtype)
  for t, _, p in positions(plan, len(x)):
    rows[p] = x[t]
  return rows


def combine(y: np.ndarray, weights: np.ndarray, plan: jax_router.Plan) -> Sum:
  """Sums `[T, d]` of rows `y` `[n, d]` times weights `[T, k]`."""
  y, weights = y.astype(np.float64), weights.astype(np.float64)
  tokens, k = weights.shape
  values = np.zeros((tokens, y.shape[1]))
  magnitude = np.zeros_like(values)
  for t, j, p in positions(plan, tokens):
    with np.errstate(invalid="ignore"):
      values[t] += weights[t, j] * y[p]
      magnitude[t] += np.abs(weights[t, j] * y[p])
  return Sum(values, (k + 1) * ROUNDING * magnitude)


def permute_gradient(cotangent: np.ndarray, plan: jax_router.Plan, tokens: int) -> Sum:
  """Gradient `[T, d]` of the tokens for the cotangent of the rows."""
  k = len(cotangent) // tokens if tokens else 0
  return combine(cotangent, np.ones((tokens, k)), plan)


def combine_gradients(
  cotangent: np.ndarray, y: np.ndarray, weights: np.ndarray, plan: jax_router.Plan
) -> tuple[Sum, Sum]:
  """Gradients of the rows `[n, d]` and of the weights `[T, k]`."""
  cotangent, y, weights = (x.astype(np.float64) for x in (cotangent, y, weights))
  of_rows, of_weights = np.zeros(y.shape), np.zeros(weights.shape)
  magnitude = np.zeros(weights.shape)
  for t, j, p in positions(plan, len(weights)):
    of_rows[p] = weights[t, j] * cotangent[t]
    of_weights[t, j] = cotangent[t] @ y[p]
    magnitude[t, j] = np.abs(cotangent[t]) @ np.abs(y[p])
  return Sum(of_rows, ROUNDING * np.abs(of_rows)), Sum(of_weights, 64 * ROUNDING * magnitude)


def make_rows(rng, *shape: int, dtype=np.float32) -> np.ndarray:
  """Random rows of a dtype."""
  return rng.normal(size=shape).astype(np.float32).astype(dtype)


DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
