"""`plan` in plain JAX: the lowering where there is no kernel, and a cross-check."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def plan(experts: jax.Array, *, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Order and inverse `[*B, T * k]` and group sizes `[*B, num_experts]` of ids `[*B, T, k]`, int32.

  An id outside [0, num_experts) is in no group and comes last.
  """
  *batch, tokens, k = experts.shape
  entries = tokens * k
  ids = experts.reshape(math.prod(batch), entries)
  # The sort of JAX knows no order but that of the keys: all ids of no group must be the same.
  keys = jnp.where((ids >= 0) & (ids < num_experts), ids, jnp.int32(num_experts))

  def sort(keys):
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    positions = jnp.arange(entries, dtype=jnp.int32)
    inverse = jnp.zeros_like(order).at[order].set(positions, unique_indices=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[keys].add(jnp.int32(1), mode="drop")
    return order, inverse, sizes

  order, inverse, sizes = jax.vmap(sort)(keys)
  return (
    order.reshape(*batch, entries),
    inverse.reshape(*batch, entries),
    sizes.reshape(*batch, num_experts),
  )
