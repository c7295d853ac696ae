"""Statistics of a routing and their gradients in float64 numpy, beside `oracle`.

`statistics` gives the sums over the tokens and how far float32 may stray from them, `gradient` the
gradient of the logits for cotangents of weights, score sums and z sum together. `check_stats` and
`check_gradient` compare.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

import oracle
from oracle import DENORMAL, EPSILON, LARGEST, RELATIVE, ROUNDING


class Statistics(NamedTuple):
  """What `RouterStats` must be, of logits `[..., T, E]`, and what float32 may miss it by."""

  expert_counts: np.ndarray  # [..., E]
  score_sums: np.ndarray  # [..., E]
  z_sum: np.ndarray  # [...]
  num_tokens: np.ndarray  # [...]
  score_tolerance: np.ndarray  # [..., E]
  z_tolerance: np.ndarray  # [...]


class Shares(NamedTuple):
  """Scores that add up to 1 over the experts, with what their gradient is made of."""

  values: np.ndarray  # [..., E]
  divisor: np.ndarray  # [..., 1]
  slope: np.ndarray  # [..., E], dy/dx of the scores before the division
  tolerance: np.ndarray  # [..., E], of the values
  divisor_error: np.ndarray  # [..., 1], relative
  slope_tolerance: np.ndarray  # [..., E]


def shares(x: np.ndarray, score: str) -> Shares:
  """The shares of the experts in each row; 0 in a row of -inf, unless its scores are given."""
  if score == "softmax":
    p = oracle.softmax(x)
    one = np.ones((*x.shape[:-1], 1))
    return Shares(p, one, p, _softmax_error(p), 0 * one, _softmax_error(p))
  y, slope, lost = oracle.elementwise(x, score)
  divisor = y.sum(-1, keepdims=True) + EPSILON
  error = (2 * RELATIVE * np.abs(y) + lost).sum(-1, keepdims=True) / np.abs(divisor)
  values = y / divisor
  tolerance = (error + RELATIVE) * np.abs(values) + lost / np.abs(divisor) + DENORMAL
  # The slope is made of y, which float32 knows to a rounding: 1 - y cancels for a large sigmoid.
  slope_error = 4 * RELATIVE * slope + (2 * ROUNDING * y if score == "sigmoid" else 0) + lost
  return Shares(values, divisor, slope, tolerance, error, slope_error)


def _softmax_error(p: np.ndarray) -> np.ndarray:
  """Error of a float32 softmax: its exponents are rounded differences, its divisor a long sum."""
  return 2 * RELATIVE * p * (1 - np.log(np.maximum(p, 1e-45)) / 10) + DENORMAL


def logsumexp(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """log(sum(exp(x))) of each row and its float32 tolerance; 0 of a row of -inf."""
  x = np.minimum(x, LARGEST)
  alive = (x > -np.inf).any(-1)
  largest = np.where(alive, x.max(-1), 0)
  total = np.where(alive, np.exp(x - largest[..., None]).sum(-1), 1)
  tolerance = 2 * RELATIVE + ROUNDING * (np.abs(largest) + np.log(total))
  return largest + np.log(total), np.where(alive, tolerance, 0)


def with_statistics(logits, where) -> np.ndarray:
  """Which rows add to the score sums and the z sum: no padding, not nothing but NaN and -inf."""
  alive = (oracle.widen(logits) > -np.inf).any(-1)
  return alive if where is None else alive & np.asarray(where)


def _rounding_of_sum(tokens: int) -> float:
  """Error of a float32 sum over tokens, relative to the sum of magnitudes.

  No term takes part in more additions than there are tokens in a block and blocks; two for the
  roundings of other orders.
  """
  return ROUNDING * min(tokens, 160 + tokens / 128)


def statistics(logits, experts, *, score="softmax", where=None) -> Statistics:
  """The statistics of logits `[..., T, E]` of which `experts` `[..., T, k]` were chosen."""
  x, (tokens, num_experts) = oracle.widen(logits), np.shape(logits)[-2:]
  lead = x.shape[:-2]
  alive = with_statistics(logits, where)
  of_rows, row = shares(x, score), alive[..., None]
  values = np.where(row, of_rows.values, 0)
  tolerance = np.where(row, of_rows.tolerance, 0).sum(-2)
  rounding = _rounding_of_sum(tokens)
  z, error = logsumexp(x)
  z, error = np.where(alive, z, 0), np.where(alive, error, 0)
  z_error = 2 * np.abs(z) * error + error**2 + 2 * ROUNDING * z**2
  flat = np.asarray(experts).astype(np.int64).reshape(math.prod(lead), -1)
  counts = [np.bincount(row, minlength=num_experts + 1)[:num_experts] for row in flat]
  real = np.ones(x.shape[:-1], bool) if where is None else np.asarray(where)
  return Statistics(
    np.reshape(counts, (*lead, num_experts)).astype(np.int64),
    values.sum(-2),
    (z**2).sum(-1),
    real.sum(-1),
    tolerance + rounding * np.abs(values).sum(-2) + DENORMAL,
    z_error.sum(-1) + rounding * (z**2).sum(-1) + DENORMAL,
  )


def gradient(
  logits, choice: oracle.Choice, cotangents: dict[str, Any], *, where=None, score="softmax",
  renormalize=True, scale=1.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """Gradient `[..., T, E]` of the logits, and its float32 tolerance.

  `cotangents`: any of weights `[..., T, k]`, score_sums `[..., E]` and z_sum `[...]`.
  """
  x = oracle.widen(logits)
  total, tolerance = np.zeros(x.shape), np.zeros(x.shape)

  def add(value, error):
    nonlocal total, tolerance
    total, tolerance = total + value, tolerance + error + 2 * ROUNDING * np.abs(value)

  if "weights" in cotangents:
    static = {"score": score, "renormalize": renormalize, "scale": scale}
    add(*oracle.gradient(logits, choice, cotangents["weights"], **static))
  alive = with_statistics(logits, where)[..., None]
  if "score_sums" in cotangents:
    s = np.asarray(cotangents["score_sums"]).astype(np.float64)[..., None, :]
    a = shares(x, score)
    mean = (s * a.values).sum(-1, keepdims=True)
    size = np.abs(s) + np.abs(s * a.values).sum(-1, keepdims=True)
    mean_error = (np.abs(s) * a.tolerance).sum(-1, keepdims=True)
    error = size * (a.slope_tolerance + 4 * a.divisor_error * np.abs(a.slope))
    error = (error + mean_error * np.abs(a.slope)) / np.abs(a.divisor)
    value = (s - mean) / a.divisor * a.slope
    add(np.where(alive, value, 0), np.where(alive, 4 * error, 0))
  if "z_sum" in cotangents:
    z = 2 * np.asarray(cotangents["z_sum"]).astype(np.float64)[..., None, None]
    lse, lse_error = (value[..., None] for value in logsumexp(x))
    p = oracle.softmax(x)
    error = np.abs(z) * (np.abs(lse) * 4 * _softmax_error(p) + lse_error * p)
    add(np.where(alive, z * lse * p, 0), np.where(alive, error, 0))
  return total, tolerance + DENORMAL


# ---- comparison ----


def check_stats(stats, logits, experts, *, score="softmax", where=None) -> Statistics:
  """Asserts that `stats` are the statistics of `logits` of which `experts` were chosen."""
  logits, experts = np.atleast_2d(np.asarray(logits)), np.atleast_2d(np.asarray(experts))
  one = None if where is None else np.atleast_1d(where)
  want = statistics(logits, experts, score=score, where=one)
  counts, score_sums, z_sum, num_tokens = (np.asarray(value) for value in stats)
  assert counts.dtype == num_tokens.dtype == np.int32
  assert score_sums.dtype == z_sum.dtype == np.float32
  np.testing.assert_array_equal(counts, want.expert_counts)
  np.testing.assert_array_equal(num_tokens, want.num_tokens)
  assert counts.shape == want.expert_counts.shape and num_tokens.shape == want.num_tokens.shape
  _check_close(score_sums, want.score_sums, want.score_tolerance)
  _check_close(z_sum, np.where(want.z_sum > LARGEST, np.inf, want.z_sum), want.z_tolerance)
  return want


def check_call(result, logits, k: int, **options) -> oracle.Choice:
  """Asserts that `result` is what `route_with_stats` must give; returns the oracle's choice."""
  routing, stats = result
  choice = oracle.check_route(routing, logits, k, **options)
  static = {name: options[name] for name in ("score", "where") if name in options}
  check_stats(stats, logits, routing.experts, **static)
  return choice


def check_gradient(got, logits, choice, cotangents, **options) -> None:
  """Asserts that `got` is the joint gradient, in float32 or rounded to the dtype of the logits."""
  want, tolerance = gradient(logits, choice, cotangents, **options)
  got = np.asarray(got)
  assert got.dtype == np.asarray(logits).dtype and got.shape == want.shape
  _check_close(got, want, oracle.widened(tolerance, want, got.dtype))


def _check_close(got, want, tolerance) -> None:
  assert got.shape == want.shape
  same = np.isinf(want) & (got == want)
  with np.errstate(invalid="ignore"):
    oracle.check_close(np.where(same, 0, got), np.where(same, 0, want), tolerance)
