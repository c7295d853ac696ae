"""`quantile_histogram` in plain JAX: the lowering where there is no kernel, and a cross-check."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _reference

_TINY = np.float32(np.finfo(np.float32).tiny)


def flushed(x: jax.Array) -> jax.Array:
  """Denormals as 0, which the sums of the kernels' keys take them for."""
  return jnp.where(jnp.abs(x) < _TINY, np.float32(0), x)


def quantile_histogram(
  logits: jax.Array,
  cutoff: jax.Array,
  bounds: jax.Array,
  where: jax.Array | None,
  *,
  score: str,
  num_bins: int,
) -> jax.Array:
  """Counts `[*B, E, num_bins]` int32 of the biases that would bring each token to each expert.

  Operands: logits `[*B, T, E]`, cutoff `[*B, T]` float32, bounds `[*B, 2]` float32, where
  `[*B, T]`.
  """
  num_experts = logits.shape[-1]
  low, high = bounds[..., 0], bounds[..., 1]
  width = flushed(high - low)
  valid = jnp.isfinite(low) & jnp.isfinite(high) & (width > 0)
  scale = flushed(np.float32(num_bins) / jnp.where(valid, width, np.float32(1)))
  required = flushed(cutoff[..., None] - _reference.scores(logits, score))
  position = flushed(required - low[..., None, None]) * scale[..., None, None]
  # A NaN is not above 0.
  position = jnp.where(position > 0, position, np.float32(0))
  bins = jnp.minimum(position, np.float32(num_bins - 1)).astype(jnp.int32)
  observed = (cutoff > -np.inf) | jnp.isnan(cutoff)
  if where is not None:
    observed &= where
  observed &= valid[..., None]
  batch = math.prod(logits.shape[:-2])
  folded = bins.reshape(batch, *bins.shape[-2:])
  weight = observed.reshape(batch, observed.shape[-1]).astype(jnp.int32)

  def count(bins, weight):
    expert = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), bins.shape)
    counts = jnp.zeros((num_experts, num_bins), jnp.int32)
    return counts.at[expert, bins].add(jnp.broadcast_to(weight[:, None], bins.shape))

  counts = jax.vmap(count)(folded, weight)
  return counts.reshape(*logits.shape[:-2], num_experts, num_bins)
