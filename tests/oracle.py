"""Routing in float64 numpy, written for clarity and independently of the package.

`route` gives the experts, their weights, how far float32 may stray from these, and whether the
choice is clear: every comparison that decides it is either an exact tie or wider than the rounding
of a float32 key. `gradient` gives the gradient of the logits. `check_route` compares.

Inside, logits are float64 with NaN replaced by -inf. Functions that take `logits` round to float32
first, as the package does. `dense` scatters a choice over all experts; `check_dense` compares that.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
VARIANTS = tuple(itertools.product(SCORES, (True, False)))  # score, renormalize

EPSILON = 1e-20
LARGEST = float(np.finfo(np.float32).max)
ROUNDING = float(np.finfo(np.float32).eps)
RELATIVE = 1e-6  # how accurate a float32 weight must be

# exp of less than this is no normal float32: it may become 0, and so may its square root.
SMALLEST_EXPONENT = -87.0
DENORMAL = 2e-38
DENORMAL_ROOT = 1.5e-19


class Choice(NamedTuple):
  """What the routing must be: arrays `[..., k]`, but `degenerate` and `clear` `[...]`.

  Attributes:
    weights: float64.
    experts: int64; E at padding and at given experts out of range.
    active: slots that carry a gradient.
    degenerate: rows without any key above -inf.
    tolerance: how far a float32 weight may be from `weights`.
    clear: rows of which float32 arithmetic cannot order two keys differently.
  """

  weights: np.ndarray
  experts: np.ndarray
  active: np.ndarray
  degenerate: np.ndarray
  tolerance: np.ndarray
  clear: np.ndarray


class Weighed(NamedTuple):
  """Weights before the scale, their divisor, and how far float32 may stray from both."""

  p: np.ndarray  # [..., k]
  divisor: np.ndarray  # [..., 1]
  tolerance: np.ndarray  # [..., k], of p
  divisor_tolerance: np.ndarray  # [..., 1], relative


def widen(logits: Any) -> np.ndarray:
  """Logits rounded to float32, as float64, with NaN as -inf."""
  x = np.asarray(logits).astype(np.float32).astype(np.float64)
  return np.where(np.isnan(x), -np.inf, x)


def descending(keys: np.ndarray) -> np.ndarray:
  """Indices of the last axis by descending key, ties to the lowest index, +0 above -0."""
  minus_zero = (keys == 0) & np.signbit(keys)
  index = np.broadcast_to(np.arange(keys.shape[-1]), keys.shape)
  return np.lexsort((index, minus_zero, -keys), axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
  """Softmax over the last axis; -inf entries get 0, so a row of -inf is all 0."""
  x = np.minimum(x, LARGEST)
  top = np.maximum(x.max(-1, keepdims=True), -LARGEST)
  y = np.exp(x - top)
  total = y.sum(-1, keepdims=True)
  return y / np.where(total == 0, 1, total)


def elementwise(x: np.ndarray, score: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Score y, dy/dx, and the loss where float32 flushes y to 0. A logit of -inf scores 0."""
  present = x > -np.inf
  x = np.where(present, np.minimum(x, LARGEST), 0)
  small = np.exp(-np.abs(x))
  sigmoid = np.where(x < 0, small, 1) / (1 + small)
  tiny = x < SMALLEST_EXPONENT
  if score == "sigmoid":
    y, slope, lost = sigmoid, small / (1 + small) ** 2, tiny * DENORMAL
  elif score == "sqrtsoftplus":
    y = np.sqrt(np.maximum(x, 0) + np.log1p(small))
    slope = np.where(y > 0, sigmoid / (2 * np.where(y > 0, y, 1)), 0)
    lost = tiny * DENORMAL_ROOT
  elif score == "none":
    y, slope, lost = x, np.ones_like(x), (np.abs(x) < DENORMAL) * DENORMAL
  else:
    raise ValueError(score)
  return tuple(np.where(present, value, 0) for value in (y, slope, lost))


def scores(x: np.ndarray, score: str) -> np.ndarray:
  """Scores `[..., E]`."""
  return softmax(x) if score == "softmax" else elementwise(x, score)[0]


# ---- selection ----


def selection_keys(logits: Any, score: str, bias: Any) -> tuple[np.ndarray, np.ndarray]:
  """Keys and how far a float32 key may be from them."""
  x = widen(logits)
  if bias is None:
    return x, np.zeros_like(x)
  y = x if score == "none" else scores(x, score)
  b = np.asarray(bias).astype(np.float32).astype(np.float64)
  with np.errstate(invalid="ignore"):
    keys = y + b
  keys = np.where(np.isnan(np.asarray(logits).astype(np.float32)) | np.isnan(keys), -np.inf, keys)
  return keys, np.where(np.isfinite(keys), 8 * ROUNDING * (np.abs(y) + np.abs(b)), 0)


def _separate(high, low, error, same) -> bool:
  """Whether float32 orders `high` >= `low` alike: a wide gap, or equal keys of the same making."""
  if not (np.isfinite(high) and np.isfinite(low)):
    return True
  return high - low > error or (high == low and same)


def _exact_in_float32(terms) -> np.ndarray:
  """Whether float32 adds up the last axis without rounding and without flushing a denormal."""
  with np.errstate(invalid="ignore"):
    sums = np.cumsum(terms, axis=-1)
  tiny = (sums != 0) & (np.abs(sums) < DENORMAL) & (terms.shape[-1] > 1)
  return ((sums == sums.astype(np.float32)) & ~tiny | ~np.isfinite(sums)).all(-1)


def _kept_groups(keys, errors, groups, terms):
  """Experts of kept groups of one row, whether enough groups score above -inf, and clearness."""
  size = len(keys) // groups.count
  rows, errors = keys.reshape(groups.count, size), errors.reshape(groups.count, size)
  best = np.take_along_axis(rows, descending(rows), -1)[:, :terms]
  # The last partial sum: unlike sum(), which starts from +0, it keeps the sign of -0.
  with np.errstate(invalid="ignore"):
    total = np.cumsum(best, -1)[:, -1] if terms <= size else np.full(groups.count, -np.inf)
  total = np.where(np.isnan(total), -np.inf, total)
  ranked = descending(total)
  kept, left = ranked[: groups.keep], ranked[groups.keep :]
  exact = (errors == 0).all(-1) & _exact_in_float32(best)
  finite = np.where(np.isfinite(best), np.abs(best), 0).sum(-1)
  error = np.where(exact, 0, terms * (errors.max(-1) + ROUNDING * finite) + DENORMAL)

  def separate(i, j):
    same = (exact[i] and exact[j]) or np.array_equal(best[i], best[j])
    return _separate(total[i], total[j], error[i] + error[j], same)

  clear = all(separate(i, j) for i in kept for j in left)
  mask = np.isin(np.arange(len(keys)) // size, kept)
  return mask, total[kept[-1]] > -np.inf, clear


def _select(logits, k, score, renormalize, bias, groups):
  """Experts, active slots, degenerate rows and clear rows for logits `[T, E]`."""
  keys, errors = selection_keys(logits, score, bias)
  tokens = len(keys)
  enough, clear = np.ones(tokens, bool), np.ones(tokens, bool)
  if groups is not None:
    terms = {"max": 1, "top2": 2, "sum": k // groups.keep}[groups.score]
    raw = terms == 1 or score == "none" or (score == "softmax" and renormalize)
    group_keys, group_errors = keys, errors
    if bias is None and not raw:
      y = scores(widen(logits), score)
      group_keys = np.where(np.isnan(np.asarray(logits).astype(np.float32)), -np.inf, y)
      group_errors = 8 * ROUNDING * np.abs(y)
    for t in range(tokens):
      mask, enough[t], clear[t] = _kept_groups(group_keys[t], group_errors[t], groups, terms)
      keys[t] = np.where(mask, keys[t], -np.inf)
  ranked = descending(keys)
  if bias is not None:
    x, b = widen(logits), np.asarray(bias).astype(np.float32)
    for t in range(tokens):
      for slot, (i, j) in enumerate(itertools.pairwise(ranked[t])):
        same = x[t, i] == x[t, j] and b[i] == b[j]
        clear[t] &= _separate(keys[t, i], keys[t, j], errors[t, i] + errors[t, j], same)
        if slot >= k - 1 and not same:  # Keys like the last one chosen are behind us.
          break
  experts = ranked[:, :k]
  active = np.take_along_axis(keys, experts, -1) > -np.inf
  degenerate = ~enough | ~active[:, 0]
  experts = np.where(degenerate[:, None], np.arange(k), experts)
  return experts, active & ~degenerate[:, None], degenerate, clear | ~enough


# ---- weights ----


def weigh(x: np.ndarray, experts, active, score: str, renormalize: bool) -> Weighed:
  """Weights of `experts` before the scale, 0 at slots that are not active."""
  chosen = np.take_along_axis(x, np.where(active, experts, 0), -1)
  one = np.ones((*chosen.shape[:-1], 1))
  if score == "softmax":
    if renormalize:
      p = softmax(np.where(active, chosen, -np.inf))
    else:
      p = np.where(active, np.take_along_axis(softmax(x), np.where(active, experts, 0), -1), 0)
    return Weighed(p, one, _exponent_error(p), 0 * one)
  y, _, lost = elementwise(np.where(active, chosen, -np.inf), score)
  if not renormalize:
    return Weighed(y, one, RELATIVE * np.abs(y) + lost + DENORMAL, 0 * one)
  divisor = y.sum(-1, keepdims=True) + EPSILON
  error = (RELATIVE * np.abs(y) + lost).sum(-1, keepdims=True) / np.abs(divisor)
  p = y / divisor
  tolerance = np.maximum(error, RELATIVE) * np.abs(p) + lost / np.abs(divisor) + DENORMAL
  return Weighed(p, divisor, tolerance, error)


def _exponent_error(p: np.ndarray) -> np.ndarray:
  """Error of a float32 softmax: its exponent, about log(p), is itself a rounded difference."""
  return RELATIVE * p * (1 - np.log(np.maximum(p, 1e-45)) / 10) + DENORMAL


def route(
  logits, k, *, score="softmax", renormalize=True, scale=1.0, bias=None, groups=None, where=None,
  experts=None,
) -> Choice:  # fmt: skip
  """The routing of logits `[..., E]`."""
  shape, num_experts = np.shape(logits)[:-1], np.shape(logits)[-1]
  logits = np.asarray(logits).reshape(-1, num_experts)
  x = widen(logits)
  clear = np.ones(len(x), bool)
  if experts is None:
    chosen, active, degenerate, clear = _select(logits, k, score, renormalize, bias, groups)
    valid = np.ones(chosen.shape, bool)
  else:
    chosen = np.asarray(experts).astype(np.int64).reshape(-1, k)
    valid = (chosen >= 0) & (chosen < num_experts)
    active = valid & (np.take_along_axis(x, np.where(valid, chosen, 0), -1) > -np.inf)
    degenerate = valid.any(-1) & ~active.any(-1)
  if where is not None:
    valid &= np.asarray(where).reshape(-1, 1)
  active &= valid
  scale = float(np.float32(scale))
  weighed = weigh(x, chosen, active, score, renormalize)
  weights = np.where(degenerate[:, None], 1 / k, np.where(active, weighed.p * scale, 0))
  tolerance = weighed.tolerance * abs(scale) + DENORMAL
  tolerance = np.where(active, tolerance, ROUNDING * degenerate[:, None])
  return Choice(
    np.where(valid, weights, 0).reshape(*shape, k),
    np.where(valid, chosen, num_experts).reshape(*shape, k),
    active.reshape(*shape, k),
    degenerate.reshape(shape),
    np.where(valid, tolerance, 0).reshape(*shape, k),
    clear.reshape(shape),
  )


def dense(choice: Choice, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Probs `[..., E]`, their float32 tolerance, and the map of chosen experts."""
  shape = (*choice.experts.shape[:-1], num_experts)
  in_range = choice.experts < num_experts
  probs, size, tolerance, count = (
    _scatter(shape, choice.experts, np.where(in_range, values, 0))
    for values in (choice.weights, np.abs(choice.weights), choice.tolerance, 1.0)
  )
  return probs, tolerance + ROUNDING * np.where(count > 1, size, 0), count > 0


# ---- gradient ----


def at_chosen(choice: Choice, cotangent) -> np.ndarray:
  """The cotangent `[..., k]` of weights that a cotangent `[..., E]` of probs amounts to."""
  cotangent = np.asarray(cotangent).astype(np.float64)
  return np.take_along_axis(cotangent, np.where(choice.active, choice.experts, 0), -1)


def gradient(logits, choice: Choice, cotangent, *, score="softmax", renormalize=True, scale=1.0):
  """Gradient `[..., E]` of the logits for a cotangent of the weights, and its float32 tolerance."""
  x = widen(logits)
  g = np.where(choice.active, np.asarray(cotangent).astype(np.float64), 0)
  h = g * float(np.float32(scale))
  w = weigh(x, choice.experts, choice.active, score, renormalize)
  mean = (h * w.p).sum(-1, keepdims=True)
  size = np.abs(h) + (np.abs(h) * np.abs(w.p)).sum(-1, keepdims=True)
  mean_error = (np.abs(h) * w.tolerance).sum(-1, keepdims=True)
  if score == "softmax" and not renormalize:
    y = softmax(x)
    experts = np.where(choice.active, choice.experts, x.shape[-1])
    total, error = _scatter(x.shape, experts, h), _scatter(x.shape, experts, size)
    error = error + size.max(-1, keepdims=True)
    return y * (total - mean), 4 * _exponent_error(y) * error + DENORMAL
  if score == "softmax":
    slot, error = w.p * (h - mean), 4 * w.tolerance * size + w.p * mean_error
  else:
    chosen = np.take_along_axis(x, np.where(choice.active, choice.experts, 0), -1)
    y, slope, lost = elementwise(np.where(choice.active, chosen, -np.inf), score)
    if not renormalize:
      mean, size, mean_error = 0 * mean, np.abs(h), 0 * mean_error
    slot = (h - mean) / w.divisor * slope
    # The slope is made of y, which float32 knows to a rounding: 1 - y cancels for a large sigmoid.
    slope_error = 4 * RELATIVE * slope + (2 * ROUNDING * y if score == "sigmoid" else 0) + lost
    error = size * (slope_error + 4 * w.divisor_tolerance * slope) + mean_error * slope
    error = error / np.abs(w.divisor)
  experts = np.where(choice.active, choice.experts, x.shape[-1])
  return _scatter(x.shape, experts, slot), _scatter(x.shape, experts, error) + DENORMAL


def _scatter(shape, experts, slots) -> np.ndarray:
  """Adds slots `[..., k]` up into rows of `shape` `[..., E]`; expert E is dropped."""
  tokens, k = int(np.prod(shape[:-1])), experts.shape[-1]
  rows = np.zeros((tokens, shape[-1] + 1))
  np.add.at(
    rows, (np.arange(tokens)[:, None], experts.reshape(tokens, k)), slots.reshape(tokens, k)
  )
  return rows[:, :-1].reshape(shape)


# ---- comparison ----


def check_route(routing, logits, k: int, **options) -> Choice:
  """Asserts that `routing` is the routing of `logits`; returns what it must be.

  Clear rows (without a bias and without group sums: every row) must have exactly the oracle's
  experts. In the others each slot must hold a key that float32 cannot tell from the right one.
  Weights are compared in every row.
  """
  want = route(logits, k, **options)
  weights, experts = np.asarray(routing.weights), np.asarray(routing.experts)
  assert weights.shape == experts.shape == want.weights.shape
  assert np.isfinite(weights).all()
  clear = want.clear
  np.testing.assert_array_equal(experts[clear], want.experts[clear])
  check_close(weights[clear], want.weights[clear], want.tolerance[clear])
  if not clear.all():
    assert clear.mean() > 0.5, "the input leaves too much open"
    logits, experts = np.asarray(logits)[~clear], experts[~clear].astype(np.int64)
    assert all(len(set(row)) == k for row in experts.tolist())
    if options.get("groups") is None:
      keys, errors = selection_keys(logits, options.get("score", "softmax"), options.get("bias"))
      got = np.take_along_axis(keys, experts, -1)
      right = np.take_along_axis(keys, want.experts[~clear], -1)
      assert (np.abs(got - right) <= 2 * errors.max(-1, keepdims=True)).all()
    again = route(logits, k, **options | {"experts": experts, "bias": None, "where": None})
    check_close(weights[~clear], again.weights, again.tolerance)
  return want


def check_dense(routing, logits, k: int, *, map_format="bytemap", **options) -> Choice:
  """Asserts that `routing` is the dense routing of `logits` in clear rows, where only the rounding
  of a weight to the dtype of the logits may be added; returns the choice."""
  choice = route(logits, k, **options)
  probs, routing_map = np.asarray(routing.probs), np.asarray(routing.routing_map)
  want, tolerance, chosen = dense(choice, np.shape(logits)[-1])
  assert probs.dtype == np.asarray(logits).dtype and probs.shape == want.shape
  if map_format == "bitmap":
    chosen = np.packbits(chosen, axis=-1, bitorder="little")
  assert routing_map.dtype == chosen.dtype and routing_map.shape == chosen.shape
  clear = choice.clear
  assert clear.mean() > 0.5 or not clear.size, "the input leaves too much open"
  np.testing.assert_array_equal(routing_map[clear], chosen[clear])
  zeros = probs == 0
  assert not np.signbit(probs[zeros & (want >= 0)]).any()
  largest = float(ml_dtypes.finfo(probs.dtype).max)
  bounded = np.clip(probs.astype(np.float64), -largest, largest)
  tolerance = widened(tolerance, want, probs.dtype)
  check_close(bounded[clear], np.clip(want, -largest, largest)[clear], tolerance[clear])
  assert (probs[clear] == 0)[want[clear] == 0].all()
  return choice


def check_close(got, want, tolerance):
  wrong = ~(np.abs(got.astype(np.float64) - want) <= tolerance)
  assert not wrong.any(), (
    f"{wrong.sum()} of {wrong.size} are off: {got[wrong][:4]} instead of {want[wrong][:4]}, "
    f"allowed {tolerance[wrong][:4]}"
  )


def check_gradient(got, logits, choice: Choice, cotangent, **options) -> None:
  """Asserts that `got` is the gradient, in float32 or rounded to the dtype of the logits."""
  want, tolerance = gradient(logits, choice, cotangent, **options)
  got = np.asarray(got)
  assert got.dtype == np.asarray(logits).dtype and got.shape == want.shape
  check_close(got, want, widened(tolerance, want, got.dtype))


def widened(tolerance, want, dtype) -> np.ndarray:
  """The tolerance with the rounding to a narrower dtype."""
  if dtype == np.float32:
    return tolerance
  info = ml_dtypes.finfo(dtype)
  return tolerance + float(info.eps) * np.abs(want) + float(info.smallest_subnormal)
