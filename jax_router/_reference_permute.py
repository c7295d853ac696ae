"""`permute`, `combine` and their backward in plain JAX: the lowering where there is no kernel.

Operands have batch dimensions `*B`; inverse is `[*B, T, k]` and n = T * k. A position is in a group
if it is in [0, n) and below the sum of the group sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_ZERO = np.float32(0)


class _Positions(NamedTuple):
  """Where the entries `[T, k]` of one batch row lie."""

  safe: jax.Array  # [T, k] position, 0 where in no group
  grouped: jax.Array  # [T, k] bool, in a group
  row_grouped: jax.Array  # [n] bool, whether a row has an entry in a group
  entry: jax.Array  # [n] the entry of a row, 0 where it has none


def _positions(inverse: jax.Array, group_sizes: jax.Array) -> _Positions:
  entries = inverse.shape[-2] * inverse.shape[-1]
  total = jnp.sum(group_sizes, dtype=jnp.int32)
  inside = (inverse >= 0) & (inverse < entries)
  grouped = inside & (inverse < total)
  row = jnp.arange(entries, dtype=jnp.int32)
  target = jnp.where(inside, inverse, entries).reshape(entries)
  entry = jnp.full(entries, -1, jnp.int32).at[target].set(row, mode="drop")
  row_grouped = (row < total) & (entry >= 0)
  return _Positions(jnp.where(grouped, inverse, 0), grouped, row_grouped, jnp.maximum(entry, 0))


def _over_batch(function: Callable[..., Any], ndim: int) -> Callable[..., Any]:
  for _ in range(ndim):
    function = jax.vmap(function)
  return function


def _column(x: jax.Array) -> jax.Array:
  return jnp.expand_dims(x, -1)


def _gathered(rows: jax.Array, at: _Positions) -> jax.Array:
  """The rows of every token's slots `[T, k, d]` as float32, zeros for those in no group."""
  return jnp.where(_column(at.grouped), rows[at.safe].astype(jnp.float32), _ZERO)


def permute(x: jax.Array, inverse: jax.Array, group_sizes: jax.Array) -> list[jax.Array]:
  """Rows `[*B, n, d]` of `x` `[*B, T, d]`."""
  *batch, tokens, k = inverse.shape
  if k == 0 or tokens == 0:
    return [jnp.zeros((*batch, tokens * k, x.shape[-1]), x.dtype)]

  def one(x, inverse, group_sizes):
    at = _positions(inverse, group_sizes)
    # As float32, so that the transpose adds up in float32.
    rows = x.astype(jnp.float32)[at.entry // k]
    return jnp.where(_column(at.row_grouped), rows, _ZERO).astype(x.dtype)

  return [_over_batch(one, len(batch))(x, inverse, group_sizes)]


def permute_backward(rows: jax.Array, inverse: jax.Array, group_sizes: jax.Array):
  """Sums `[*B, T, d]` of the rows of every token, of rows `[*B, n, d]`."""
  return _combine(rows, None, inverse, group_sizes)


def combine(rows: jax.Array, weights: jax.Array, inverse: jax.Array, group_sizes: jax.Array):
  """Sums `[*B, T, d]` of rows `[*B, n, d]` times weights `[*B, T, k]` float32."""
  return _combine(rows, weights, inverse, group_sizes)


def _combine(rows, weights, inverse, group_sizes) -> list[jax.Array]:
  *batch, tokens, k = inverse.shape
  if k == 0 or tokens == 0:
    return [jnp.zeros((*batch, tokens, rows.shape[-1]), rows.dtype)]

  def one(rows, inverse, group_sizes, *weights):
    at = _positions(inverse, group_sizes)
    terms = _gathered(rows, at)
    for w in weights:
      terms *= _column(jnp.where(at.grouped, w, _ZERO))
    return jnp.sum(terms, axis=1).astype(rows.dtype)

  present = () if weights is None else (weights,)
  return [_over_batch(one, len(batch))(rows, inverse, group_sizes, *present)]


def combine_backward(
  cotangent: jax.Array,
  inverse: jax.Array,
  group_sizes: jax.Array,
  rows: jax.Array | None,
  weights: jax.Array | None,
) -> list[jax.Array]:
  """The gradient of the rows `[*B, n, d]` if there are weights, of the weights if there are rows.

  `cotangent` `[*B, T, d]` has the dtype of the rows.
  """
  *batch, tokens, k = inverse.shape
  if k == 0 or tokens == 0:
    empty = [] if weights is None else [(*batch, tokens * k, cotangent.shape[-1])]
    results = [jnp.zeros(shape, cotangent.dtype) for shape in empty]
    return results if rows is None else [*results, jnp.zeros((*batch, tokens, k), jnp.float32)]

  def of_rows(cotangent, inverse, group_sizes, weights):
    at = _positions(inverse, group_sizes)
    weight = weights.reshape(tokens * k)[at.entry]
    product = _column(weight) * cotangent[at.entry // k].astype(jnp.float32)
    return jnp.where(_column(at.row_grouped), product, _ZERO).astype(cotangent.dtype)

  def of_weights(cotangent, inverse, group_sizes, rows):
    at = _positions(inverse, group_sizes)
    products = jnp.expand_dims(cotangent.astype(jnp.float32), 1) * _gathered(rows, at)
    return jnp.where(at.grouped, jnp.sum(products, axis=-1), _ZERO)

  shared = cotangent, inverse, group_sizes
  results = []
  if weights is not None:
    results.append(_over_batch(of_rows, len(batch))(*shared, weights))
  if rows is not None:
    results.append(_over_batch(of_weights, len(batch))(*shared, rows))
  return results
