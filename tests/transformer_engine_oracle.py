"""The router's operations under TransformerEngine's names in float64 numpy, and its test inputs.

Written for clarity and independently of the package. Inputs are TransformerEngine's: rows that rise
along the experts by steps that float32 tells apart, so no choice hangs on a rounding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_router.compat import transformer_engine

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
EPSILON = 1e-20


# ---- inputs ----


def make_logits(tokens: int, experts: int, score_function: str) -> np.ndarray:
  """Logits `[tokens, experts]` float32."""
  if score_function == "softmax":
    size = tokens * experts
    rows = np.arange(-size // 2, -size // 2 + size, dtype=np.float32) * np.float32(1e-4)
    return rows.reshape(tokens, experts)
  offset = np.arange(-tokens // 2, -tokens // 2 + tokens, dtype=np.float32) * np.float32(1e-4)
  row = np.arange(-experts // 2, -experts // 2 + experts, dtype=np.float32) * np.float32(1e-2)
  return row[None, :] + offset[:, None]


def make_bias(experts: int) -> np.ndarray:
  """A bias `[experts]` float32 that falls by 0.1."""
  return (np.arange(experts, dtype=np.float32) * np.float32(0.1))[::-1].copy()


# ---- the choice ----


class Choice(NamedTuple):
  """The chosen experts `[T, K]`, best first, and the routing as rows `[T, E]`."""

  indices: np.ndarray
  probs: np.ndarray  # float64, scaled
  routing_map: np.ndarray  # bool


def widen(logits: Any) -> np.ndarray:
  return np.asarray(logits).astype(np.float64)


def softmax(x: np.ndarray) -> np.ndarray:
  y = np.exp(x - x.max(-1, keepdims=True))
  return y / y.sum(-1, keepdims=True)


def score(x: np.ndarray, score_function: str) -> np.ndarray:
  if score_function == "softmax":
    return softmax(x)
  if score_function == "sigmoid":
    return 1 / (1 + np.exp(-x))
  return np.sqrt(np.logaddexp(0, x))


def best(keys: np.ndarray, count: int) -> np.ndarray:
  """The `count` largest of the last axis, ties to the lowest index."""
  return np.argsort(-keys, axis=-1, kind="stable")[..., :count]


def mark(indices: np.ndarray, width: int) -> np.ndarray:
  marks = np.zeros((*indices.shape[:-1], width), bool)
  np.put_along_axis(marks, indices, True, -1)
  return marks


def limit(keys: np.ndarray, num_groups: int, group_topk: int, topk: int) -> np.ndarray:
  """Keys, -inf outside the groups whose topk / group_topk largest keys have the largest sums."""
  grouped = keys.reshape(*keys.shape[:-1], num_groups, -1)
  sums = np.sort(grouped, axis=-1)[..., -(topk // group_topk) :].sum(-1)
  kept = mark(best(sums, group_topk), num_groups)
  return np.where(kept[..., None], grouped, -np.inf).reshape(keys.shape)


def choose(
  logits, topk, *, score_function="softmax", use_pre_softmax=False, num_groups=-1, group_topk=-1,
  scaling_factor=1.0, expert_bias=None,
) -> Choice:  # fmt: skip
  x = widen(logits)
  post = score_function == "softmax" and not use_pre_softmax
  keys = x if post else score(x, score_function)
  if expert_bias is not None:
    keys = keys + widen(expert_bias)
  if group_topk > 0:
    keys = limit(keys, num_groups, group_topk, topk)
  indices = best(keys, topk)
  chosen = mark(indices, x.shape[-1])
  if post:
    probs = softmax(np.where(chosen, x, -np.inf))
  else:
    probs = np.where(chosen, score(x, score_function), 0)
    if score_function != "softmax" and topk > 1:
      probs = probs / (probs.sum(-1, keepdims=True) + EPSILON)
  return Choice(indices, probs * scaling_factor, chosen)


def _score_gradient(x: np.ndarray, h: np.ndarray, score_function: str, normalize: bool):
  """Gradient of sum(h * y), or of sum(h * y / sum(y)), where h is 0 off the experts that count."""
  y = score(x, score_function)
  if normalize:
    inside = h[1]
    total = np.where(inside, y, 0).sum(-1, keepdims=True) + EPSILON
    outer = (h[0] - (h[0] * y).sum(-1, keepdims=True) / total) / total
    outer = np.where(inside, outer, 0)
  else:
    outer = h[0]
  sigmoid = 1 / (1 + np.exp(-x))
  slope = y * (1 - y) if score_function == "sigmoid" else sigmoid / (2 * y)
  return outer * slope


def choice_gradient(
  logits, choice: Choice, cotangent, *, score_function="softmax", use_pre_softmax=False,
  scaling_factor=1.0, **_,
) -> np.ndarray:  # fmt: skip
  """Gradient of the logits for a cotangent of probs; its entries off the choice do not count."""
  x = widen(logits)
  h = np.where(choice.routing_map, widen(cotangent) * scaling_factor, 0)
  if score_function == "softmax":
    p = softmax(x) if use_pre_softmax else choice.probs / scaling_factor
    return p * (h - (h * p).sum(-1, keepdims=True))
  normalize = choice.indices.shape[-1] > 1
  return _score_gradient(x, (h, choice.routing_map), score_function, normalize)


# ---- scores and loss ----


def aux_scores(logits, score_function: str) -> np.ndarray:
  y = score(widen(logits), score_function)
  return y if score_function == "softmax" else y / (y.sum(-1, keepdims=True) + EPSILON)


def aux_scores_gradient(logits, cotangent, score_function: str) -> np.ndarray:
  x, g = widen(logits), widen(cotangent)
  if score_function == "softmax":
    y = softmax(x)
    return y * (g - (g * y).sum(-1, keepdims=True))
  return _score_gradient(x, (g, np.ones(x.shape, bool)), score_function, True)


def aux_loss(probs, tokens_per_expert, topk, coeff, total_num_tokens, num_experts):
  """The loss and its gradient."""
  counts, p = widen(tokens_per_expert), widen(probs)
  factor = num_experts * coeff / topk / total_num_tokens / total_num_tokens
  gradient = np.broadcast_to(factor * counts, p.shape)
  return factor * (counts * p.sum(0)).sum(), gradient


# ---- the package ----


@functools.cache
def _compiled(name: str, topk: int, static: tuple):
  function = getattr(transformer_engine, name)

  def run(logits, cotangents, operands):
    def first_and_all(x):
      results = function(x, topk, **operands, **dict(static))
      return results[0], results

    _, vjp, results = jax.vjp(first_and_all, logits, has_aux=True)
    return results, [vjp(cotangent)[0] for cotangent in cotangents]

  return jax.jit(run)


def run(implementation: str, logits, topk: int, cotangents=(), *, name="topk", **options):
  """Results of a function of the package and gradients of the logits, under jit.

  `name`: "topk" or "scores".
  """
  name = {
    "topk": "fused_topk_with_score_function", "scores": "fused_score_for_moe_aux_loss"
  }[name]  # fmt: skip
  arrays = ("expert_bias", "qb_histogram", "qb_bounds")
  operands = {key: options.pop(key) for key in arrays if options.get(key) is not None}
  static = tuple(sorted((options | {"implementation": implementation}).items()))
  return _compiled(name, topk, static)(logits, list(cotangents), operands)


def check_close(got, want, tolerance: float = 1e-5):
  np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance)


def assert_same_bits(got, want):
  """Equal trees to the bit, signs of zeros and dtypes too."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def check_choice(implementation: str, logits, topk: int, rng, tolerance: float = 1e-5, **options):
  """Probs, map and the gradients of the sum and of a random cotangent against the oracle."""
  logits = np.asarray(logits)
  given = {k: v for k, v in options.items() if k not in ("routing_map_format",)}
  want = choose(logits, topk, **given)
  cotangents = [np.ones_like(logits), rng.normal(size=logits.shape).astype(logits.dtype)]
  (probs, routing_map), gradients = run(implementation, logits, topk, cotangents, **options)
  assert probs.dtype == logits.dtype and routing_map.dtype == np.bool_
  np.testing.assert_array_equal(routing_map, want.routing_map)
  check_close(probs, want.probs, tolerance)
  assert (np.asarray(probs)[~want.routing_map] == 0).all()
  for cotangent, gradient in zip(cotangents, gradients, strict=True):
    assert gradient.dtype == logits.dtype
    check_close(gradient, choice_gradient(logits, want, cotangent, **given), tolerance)
  return want


# ---- quantile balancing ----


class Counts(NamedTuple):
  """Histograms `[E, num_bins]` with every count as low and as high as a rounding may put it."""

  low: np.ndarray
  high: np.ndarray


def quantile_counts(logits, bias, topk, bounds, num_bins) -> Counts:
  """Counts of the required biases cutoff - score, with the doubt of float32 at the bins' edges."""
  doubt = 1e-6 * num_bins
  y = score(widen(logits), "sigmoid")
  cutoff = -np.sort(-(y + widen(bias)), axis=-1)[:, topk]
  lower, upper = widen(bounds)
  position = (cutoff[:, None] - y - lower) * num_bins / (upper - lower)
  counts = []
  for shift in (-doubt, doubt):
    bins = np.clip(np.floor(position + shift), 0, num_bins - 1).astype(np.int64)
    histogram = np.zeros((y.shape[-1], num_bins), np.int64)
    np.add.at(histogram, (np.broadcast_to(np.arange(y.shape[-1]), bins.shape), bins), 1)
    counts.append(histogram)
  return Counts(*counts)


def check_counts(got, want: Counts):
  """Counts that lie in their bins or, where a bin is in doubt, in the one beside it."""
  got = np.asarray(got, np.int64)
  np.testing.assert_array_equal(got.sum(-1), want.low.sum(-1))
  running = got.cumsum(-1)
  assert (running <= want.low.cumsum(-1)).all() and (running >= want.high.cumsum(-1)).all()
  assert (want.low == want.high).mean() > 0.9, "the input leaves too much open"
