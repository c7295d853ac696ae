"""`route_with_stats` in plain JAX, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _reference
from jax_router._options import RouteOptions

_ZERO = np.float32(0)
_ONE = np.float32(1)


class _Softmax(NamedTuple):
  """The softmax of rows `[..., E]`, as its terms and what they are divided by."""

  probabilities: jax.Array  # [..., E], 0 in rows without statistics
  logsumexp: jax.Array  # [...], 0 there
  saved: jax.Array  # [..., 2]: the largest logit, the sum of exp(logit - largest), 0 there


def _softmax(logits: jax.Array, real: jax.Array | None, saved: jax.Array | None) -> _Softmax:
  """The softmax of every row that has statistics, from what was saved of it if it was.

  Padding has none, nor has a row of nothing but NaN and -inf.
  """
  x = jnp.minimum(_reference.as_float32(logits), _reference.LARGEST)
  present = x > -jnp.inf
  if saved is None:
    largest = jnp.max(x, axis=-1, initial=-_reference.LARGEST)
    alive = present.any(axis=-1)
    alive = alive if real is None else alive & real
    largest = jnp.where(alive, jax.lax.stop_gradient(largest), _ZERO)
  else:
    largest, alive = saved[..., 0], saved[..., 1] > 0
  present &= alive[..., None]
  shifted = jnp.where(present, x, largest[..., None]) - largest[..., None]
  terms = jnp.where(present, jnp.exp(shifted), _ZERO)
  total = jnp.sum(terms, axis=-1) if saved is None else saved[..., 1]
  safe = jnp.where(alive, total, _ONE)
  logsumexp = jnp.where(alive, largest + jnp.log(safe), _ZERO)
  kept = jnp.stack([largest, jnp.where(alive, total, _ZERO)], axis=-1)
  return _Softmax(terms / safe[..., None], logsumexp, kept)


def _scores(logits: jax.Array, softmax: _Softmax, score: str) -> tuple[jax.Array, ...]:
  """Scores `[..., E]` that add up to 1, the scores before that, and their sum `[..., 1]`."""
  if score == "softmax":
    y = softmax.probabilities
    return y, y, jnp.ones_like(y[..., :1])
  y = jnp.where(softmax.saved[..., 1:] > 0, _reference.scores(logits, score), _ZERO)
  total = jnp.sum(y, axis=-1, keepdims=True) + _reference.EPSILON
  return _reference.quotient(y, total), y, total


def sums(
  logits: jax.Array, where: jax.Array | None, score: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Softmax `[*B, T, 2]` for the backward, score sums `[*B, E]` and z sum `[*B]`."""
  softmax = _softmax(logits, where, None)
  shares, _, _ = _scores(logits, softmax, score)
  return softmax.saved, jnp.sum(shares, axis=-2), jnp.sum(jnp.square(softmax.logsumexp), axis=-1)


def stats(
  logits: jax.Array,
  bias: jax.Array | None,
  where: jax.Array | None,
  experts: jax.Array | None,
  *,
  options: RouteOptions,
  index_dtype: np.dtype,
) -> tuple[jax.Array, ...]:
  """The results of `route`, then of each batch row its statistics.

  Weights, experts and normalizer as `_reference.route`; softmax `[*B, T, 2]` for the backward;
  expert counts `[*B, E]` int32, score sums `[*B, E]`, z sum `[*B]`, number of tokens `[*B]` int32.
  """
  weights, chosen, normalizer = _reference.route(
    logits, bias, where, experts, options=options, index_dtype=index_dtype
  )
  softmax, score_sums, z_sum = sums(logits, where, options.score)
  *batch, tokens, k = chosen.shape
  slots = chosen.reshape(*batch, tokens * k).astype(jnp.int32)
  counts = _reference.scatter(jnp.ones_like(slots), slots, logits.shape[-1])
  real = jnp.ones(logits.shape[:-1], jnp.int32) if where is None else where.astype(jnp.int32)
  num_tokens = jnp.sum(real, axis=-1, dtype=jnp.int32)
  return weights, chosen, normalizer, softmax, counts, score_sums, z_sum, num_tokens


def stats_backward(
  logits: jax.Array,
  saved: jax.Array,
  choice: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None,
  score_cotangent: jax.Array | None,
  z_cotangent: jax.Array | None,
  *,
  options: RouteOptions,
) -> jax.Array:
  """Gradient `[*B, T, E]` of the logits, in their dtype.

  `saved`: the softmax `[*B, T, 2]` of the forward. `choice`: cotangent, weights and experts
  `[*B, T, k]` and normalizer `[*B, T]`. Cotangents `[*B, E]` of the score sums and `[*B]` of the z
  sum. With s and z these, p = softmax(x), a = y / D the scores over their sum D:

      softmax   dx = p (s - sum s p)
      others    dx = (s - sum s a) / D * dy/dx
      z         dx = 2 z logsumexp(x) p
  """
  gradient = jnp.zeros(logits.shape, jnp.float32)
  if choice is not None:
    gradient = _reference.route_backward(
      *choice, logits if options.dense_gradient else None,
      options=options, num_experts=logits.shape[-1], dtype=np.dtype(np.float32),
    )  # fmt: skip
  softmax = _softmax(logits, None, saved)
  # Whatever the cotangents are, padding and entries of -inf have no gradient.
  present = (_reference.as_float32(logits) > -jnp.inf) & (saved[..., 1:] > 0)
  if score_cotangent is not None:
    shares, y, total = _scores(logits, softmax, options.score)
    s = score_cotangent[..., None, :]
    difference = s - jnp.sum(s * shares, axis=-1, keepdims=True)
    difference = _reference.quotient(difference, total)
    slope = y if options.score == "softmax" else _reference.score_gradient(y, options.score)
    gradient += jnp.where(present, difference * slope, _ZERO)
  if z_cotangent is not None:
    factor = np.float32(2) * z_cotangent[..., None] * softmax.logsumexp
    gradient += jnp.where(present, factor[..., None] * softmax.probabilities, _ZERO)
  return gradient.astype(logits.dtype)
