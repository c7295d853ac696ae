"""Every operation in plain JAX: the lowering where there is no kernel, and a cross-check of tests.

The functions take the same operands as the primitives and return the same results, so that either
can stand in for the other. All arithmetic is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router._options import Groups, RouteOptions

EPSILON = np.float32(1e-20)
LARGEST = np.float32(np.finfo(np.float32).max)
_INFINITY = np.float32(np.inf)


def as_float32(logits: jax.Array) -> jax.Array:
  """Logits in float32 with NaN as -inf, which gives it key -inf and score 0."""
  x = logits.astype(jnp.float32)
  return jnp.where(jnp.isnan(x), -_INFINITY, x)


def _exp_normalize(x: jax.Array, total: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Softmax over the last axis, and the sum of exp(x - max(x)) that it divides by, or `total`.

  Entries of -inf get 0; a row of nothing else is all 0, its sum 1.
  """
  x = jnp.minimum(x, LARGEST)
  largest = jax.lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
  largest = jnp.maximum(largest, -LARGEST)
  present = x > -_INFINITY
  shifted = jnp.where(present, x, largest) - largest
  unnormalized = jnp.where(present, jnp.exp(shifted), np.float32(0))
  if total is None:
    total = jnp.sum(unnormalized, axis=-1, keepdims=True)
  empty = total == 0
  safe_total = jnp.where(empty, np.float32(1), total)
  return unnormalized / safe_total, safe_total[..., 0]


def _elementwise_score(x: jax.Array, score: str) -> jax.Array:
  """Score of each logit for every score but softmax; 0 for -inf."""
  present = x > -_INFINITY
  x = jnp.where(present, jnp.minimum(x, LARGEST), np.float32(0))
  if score == "sigmoid":
    y = jax.nn.sigmoid(x)
  elif score == "sqrtsoftplus":
    softplus = jax.nn.softplus(x)
    positive = softplus > 0
    y = jnp.where(positive, jnp.sqrt(jnp.where(positive, softplus, np.float32(1))), np.float32(0))
  else:
    y = x
  return jnp.where(present, y, np.float32(0))


def quotient(rows: jax.Array, divisors: jax.Array) -> jax.Array:
  """`rows` `[..., n]` over `divisors` `[..., 1]`.

  Tiny and huge divisors are scaled towards 1: the derivative of the quotient squares them, and XLA
  may multiply by their inverse.
  """
  size = jnp.abs(divisors)
  factor = jnp.where(size < 1e-10, 1 / EPSILON, jnp.where(size > 1e10, EPSILON, np.float32(1)))
  return (rows * factor) / (divisors * factor)


def normalize(y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """y / (sum(y) + EPSILON) over the last axis, and its divisor."""
  divisor = jnp.sum(y, axis=-1, keepdims=True) + EPSILON
  return quotient(y, divisor), divisor[..., 0]


def scores(logits: jax.Array, score: str) -> jax.Array:
  """Scores `[..., E]` float32 of logits `[..., E]`; NaN and -inf score 0."""
  x = as_float32(logits)
  return _exp_normalize(x)[0] if score == "softmax" else _elementwise_score(x, score)


def aux_scores(logits: jax.Array, where: jax.Array | None, *, score: str) -> jax.Array:
  """Normalized scores `[*B, T, E]` float32 of logits `[*B, T, E]`, 0 outside where `[*B, T]`."""
  x = as_float32(logits)
  if where is not None:
    x = jnp.where(where[..., None], x, -_INFINITY)
  y = _exp_normalize(x)[0] if score == "softmax" else normalize(_elementwise_score(x, score))[0]
  # Stops the cotangents of entries without a score.
  return jnp.where(x > -_INFINITY, y, np.float32(0))


def aux_scores_backward(
  cotangent: jax.Array, logits: jax.Array, where: jax.Array | None, *, score: str
) -> jax.Array:
  """Gradient `[*B, T, E]` of the logits, in their dtype, for a cotangent of the scores."""
  _, pull_back = jax.vjp(lambda x: aux_scores(x, where, score=score), logits)
  return pull_back(cotangent)[0]


def _largest_sum(keys: jax.Array, count: int) -> jax.Array:
  """Sum of the `count` largest keys of the last axis, added in descending order."""
  best = jax.lax.top_k(keys, count)[0]
  total = best[..., 0]
  for i in range(1, count):
    total = total + best[..., i]
  return jnp.where(jnp.isnan(total), -_INFINITY, total)


def _group_mask(keys: jax.Array, groups: Groups, count: int) -> tuple[jax.Array, jax.Array]:
  """Which experts belong to a kept group, and whether the row has `keep` groups above -inf."""
  num_experts = keys.shape[-1]
  size = num_experts // groups.count
  grouped = keys.reshape(*keys.shape[:-1], groups.count, size)
  if count > size:
    group_scores = jnp.full(grouped.shape[:-1], -_INFINITY)
  else:
    group_scores = _largest_sum(grouped, count)
  best, kept = jax.lax.top_k(group_scores, groups.keep)
  each = jnp.arange(groups.count, dtype=kept.dtype)
  each = jnp.expand_dims(each, tuple(range(kept.ndim)))
  mask = (kept[..., :, None] == each).any(axis=-2)
  return jnp.repeat(mask, size, axis=-1), best[..., -1] > -_INFINITY


def group_terms(groups: Groups, k: int) -> int:
  """How many keys a group score adds up."""
  return {"max": 1, "top2": 2, "sum": k // groups.keep}[groups.score]


def _select(
  logits: jax.Array, bias: jax.Array | None, options: RouteOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Experts `[..., T, k]` int32, which slots hold a key above -inf, and which rows are degenerate.

  Without a bias the key is the logit itself: every score is monotone in it, so no rounding of a
  score can reorder experts.
  """
  x = as_float32(logits)
  key = x
  if bias is not None:
    y = x if options.score == "none" else scores(logits, options.score)
    key = y + bias.astype(jnp.float32)[..., None, :]
    key = jnp.where(jnp.isnan(logits) | jnp.isnan(key), -_INFINITY, key)
  enough = jnp.ones(x.shape[:-1], bool)
  if options.groups is not None:
    terms = group_terms(options.groups, options.k)
    raw = options.score == "none" or (options.score == "softmax" and options.renormalize)
    if bias is not None or terms == 1 or raw:
      group_key = key
    else:
      group_key = jnp.where(jnp.isnan(logits), -_INFINITY, scores(logits, options.score))
    mask, enough = _group_mask(group_key, options.groups, terms)
    key = jnp.where(mask, key, -_INFINITY)
  best, experts = jax.lax.top_k(key, options.k)
  active = best > -_INFINITY
  degenerate = ~(enough & active[..., 0])
  lowest = jnp.broadcast_to(jnp.arange(options.k, dtype=jnp.int32), experts.shape)
  return jnp.where(degenerate[..., None], lowest, experts), active, degenerate


class Weighing(NamedTuple):
  """Weights of chosen experts `[..., T, k]` and the normalizer of each token `[..., T]`."""

  weights: jax.Array
  normalizer: jax.Array


def weigh(
  logits: jax.Array, experts: jax.Array, active: jax.Array, options: RouteOptions
) -> Weighing:
  """Scaled weights of `experts` at active slots, 0 elsewhere. Differentiable in `logits`.

  The normalizer is what the backward needs: sum(exp(x - max(x))) of the row for a softmax over all
  experts, the divisor of the weights for another score that is renormalized, else 1.
  """
  x = as_float32(logits)
  safe = jnp.where(active, experts, 0).astype(jnp.int32)
  chosen = jnp.take_along_axis(x, safe, axis=-1)
  normalizer = jnp.ones(x.shape[:-1], jnp.float32)
  if options.score == "softmax" and options.renormalize:
    w = _exp_normalize(jnp.where(active, chosen, -_INFINITY))[0]
  elif options.score == "softmax":
    probabilities, normalizer = _exp_normalize(x)
    w = jnp.take_along_axis(probabilities, safe, axis=-1)
  else:
    w = jnp.where(active, _elementwise_score(chosen, options.score), np.float32(0))
    if options.renormalize:
      w, normalizer = normalize(w)
  weights = jnp.where(active, w * np.float32(options.scale), np.float32(0))
  return Weighing(weights, normalizer)


def route(
  logits: jax.Array,
  bias: jax.Array | None,
  where: jax.Array | None,
  experts: jax.Array | None,
  *,
  options: RouteOptions,
  index_dtype: np.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weights `[*B, T, k]` float32, experts `[*B, T, k]` and normalizer `[*B, T]` float32.

  Operands: logits `[*B, T, E]`, bias `[*B, E]`, where `[*B, T]`, given experts `[*B, T, k]` int32.
  A slot without gradient (filled up for want of keys above -inf) has weight -0.0; a row without
  gradient (degenerate, padding) has normalizer NaN. The backward tells them by these marks.
  """
  num_experts = np.int32(logits.shape[-1])
  if experts is None:
    experts, active, degenerate = _select(logits, bias, options)
    valid = jnp.ones(experts.shape, bool)
  else:
    valid = (experts >= 0) & (experts < num_experts)
    safe = jnp.where(valid, experts, 0)
    active = valid & (jnp.take_along_axis(as_float32(logits), safe, axis=-1) > -_INFINITY)
    degenerate = valid.any(axis=-1) & ~active.any(axis=-1)
  if where is not None:
    valid &= where[..., None]
  active &= valid & ~degenerate[..., None]
  weights, normalizer = weigh(logits, experts, active, options)
  # Adding 0 turns an honest -0.0 into +0.0.
  weights = jnp.where(active, weights + np.float32(0), np.float32(-0.0))
  uniform = np.float32(1) / np.float32(options.k)
  weights = jnp.where(degenerate[..., None], uniform, weights)
  weights = jnp.where(valid, weights, np.float32(0))
  experts = jnp.where(valid, experts, num_experts).astype(index_dtype)
  no_gradient = degenerate if where is None else degenerate | ~where
  return weights, experts, jnp.where(no_gradient, np.float32(np.nan), normalizer)


def dense(
  logits: jax.Array,
  bias: jax.Array | None,
  where: jax.Array | None,
  experts: jax.Array | None,
  *,
  options: RouteOptions,
  map_format: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Probs `[*B, T, E]` of the logits' dtype, the map of the chosen, and the results of `route`.

  The map is `[*B, T, E]` bool ("bytemap") or `[*B, T, ceil(E / 8)]` uint8 ("bitmap").
  """
  num_experts = logits.shape[-1]
  weights, experts, normalizer = route(
    logits, bias, where, experts, options=options, index_dtype=np.dtype(np.int32)
  )
  probs = scatter(weights, experts, num_experts).astype(logits.dtype)
  routing_map = scatter(jnp.ones_like(experts), experts, num_experts) > 0
  if map_format == "bitmap":
    routing_map = jnp.packbits(routing_map, axis=-1, bitorder="little")
  return probs, routing_map, weights, experts, normalizer


def active_slots(
  weights: jax.Array, experts: jax.Array, normalizer: jax.Array, num_experts: int
) -> jax.Array:
  """Slots that carry a gradient, read off the marks that `route` leaves."""
  filled = (weights == 0) & jnp.signbit(weights)
  in_range = experts < jnp.asarray(num_experts, experts.dtype)
  return in_range & ~filled & ~jnp.isnan(normalizer)[..., None]


def score_gradient(y: jax.Array, score: str) -> jax.Array:
  """dy/dx of an elementwise score, from the score alone."""
  if score == "sigmoid":
    return y * jnp.maximum(np.float32(1) - y, np.float32(0))
  if score == "sqrtsoftplus":
    # sigmoid(x) / (2 y), with sigmoid(x) = 1 - exp(-softplus(x)) and softplus(x) = y**2.
    positive = y > 0
    safe = jnp.where(positive, y, np.float32(1))
    return jnp.where(positive, -jnp.expm1(-safe * safe) / (np.float32(2) * safe), np.float32(0))
  return jnp.ones_like(y)


def scatter(values: jax.Array, experts: jax.Array, num_experts: int) -> jax.Array:
  """Adds `values` `[..., k]` up into rows `[..., E]`; experts out of range are dropped."""

  def row(values, experts):
    return jnp.zeros(num_experts, values.dtype).at[experts].add(values, mode="drop")

  for _ in values.shape[:-1]:
    row = jax.vmap(row)
  return row(values, experts)


def route_backward(
  cotangent: jax.Array,
  weights: jax.Array,
  experts: jax.Array,
  normalizer: jax.Array,
  logits: jax.Array | None,
  *,
  options: RouteOptions,
  num_experts: int,
  dtype: np.dtype,
) -> jax.Array:
  """Gradient `[*B, T, E]` of the logits from the choice alone; `logits` only where it is dense.

  With p = weights / scale, h = scale * cotangent on the active slots and y = p * normalizer:

      softmax, renormalized   dx = p (h - sum h p)                       on the slots
      softmax over all        dx = softmax(x) (h - sum h p)              for every expert
      others, renormalized    dx = (h - sum h p) / normalizer * dy/dx    on the slots
      others                  dx = h * dy/dx                             on the slots

  An expert given twice gets the sum of its slots.
  """
  active = active_slots(weights, experts, normalizer, num_experts)
  scale = np.float32(options.scale)
  inverse_scale = np.float32(1) / scale if options.scale else np.float32(0)
  zero = np.float32(0)
  p = jnp.where(active, weights * inverse_scale, zero)
  h = jnp.where(active, cotangent * scale, zero)
  mean = jnp.sum(h * p, axis=-1, keepdims=True)
  if options.dense_gradient:
    assert logits is not None
    alive = ~jnp.isnan(normalizer)
    total = jnp.where(alive, normalizer, np.float32(1))[..., None]
    y = _exp_normalize(as_float32(logits), total)[0]
    gradient = jnp.where(alive[..., None], y * (scatter(h, experts, num_experts) - mean), zero)
    return gradient.astype(dtype)
  if options.score == "softmax":
    slot_gradient = p * (h - mean)
  else:
    divisor = jnp.where(jnp.isnan(normalizer), np.float32(1), normalizer)[..., None]
    y = p * divisor
    if options.renormalize:
      h = (h - mean) / divisor
    slot_gradient = h * score_gradient(y, options.score)
  slot_gradient = jnp.where(active, slot_gradient, zero)
  return scatter(slot_gradient, experts, num_experts).astype(dtype)


def dense_backward(
  cotangent: jax.Array,
  weights: jax.Array,
  experts: jax.Array,
  normalizer: jax.Array,
  logits: jax.Array | None,
  *,
  options: RouteOptions,
  num_experts: int,
  dtype: np.dtype,
) -> jax.Array:
  """The same for a cotangent `[*B, T, E]` of probs, of which only the chosen entries are read."""
  in_range = jnp.minimum(experts, num_experts - 1)
  slots = jnp.take_along_axis(cotangent, in_range, axis=-1).astype(jnp.float32)
  return route_backward(
    slots, weights, experts, normalizer, logits,
    options=options, num_experts=num_experts, dtype=dtype,
  )  # fmt: skip
