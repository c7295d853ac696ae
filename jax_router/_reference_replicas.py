"""`assign_replicas` in plain JAX: the lowering where there is no kernel, and a cross-check."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _reference


def _xorshift(x: jax.Array) -> jax.Array:
  x ^= x >> np.uint32(7)
  x ^= x << np.uint32(9)
  return x ^ (x >> np.uint32(13))


def _mix_bits(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit integers, MurmurHash3's finalizer."""
  x ^= x >> np.uint32(16)
  x *= np.uint32(0x85EBCA6B)
  x ^= x >> np.uint32(13)
  x *= np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def assign_replicas(
  experts: jax.Array,
  table: jax.Array,
  counts: jax.Array,
  offset: jax.Array,
  where: jax.Array | None,
  *,
  num_physical: int,
  policy: str,
  load: str,
) -> tuple[jax.Array, jax.Array]:
  """Physical ids `[*B, T, k]` int32 and load `[*B, E or P]` int32.

  Operands: experts `[*B, T, k]` int32, table `[*B, E, R]` int32, counts `[*B, E]` int32, offset
  `[*B]` uint32, where `[*B, T]`.
  """
  *batch, tokens, k = experts.shape
  num_experts, width = table.shape[-2:]
  valid = (experts >= 0) & (experts < num_experts)
  if where is not None:
    valid &= where[..., None]
  ids = jnp.where(valid, experts, 0)
  index = jax.lax.broadcasted_iota(jnp.uint32, experts.shape, experts.ndim - 2)
  index += offset[..., None, None]
  if policy == "xorshift":
    draw = _xorshift(index)
  else:
    draw = _mix_bits(index + np.uint32(0x9E3779B9) * ids.astype(jnp.uint32))
  flat = (*batch, tokens * k)
  count = jnp.take_along_axis(counts, ids.reshape(flat), axis=-1).reshape(ids.shape)
  valid &= (count >= 1) & (count <= width)
  replica = (draw % jnp.where(valid, count, 1).astype(jnp.uint32)).astype(jnp.int32)
  cell = (ids * np.int32(width) + replica).reshape(flat)
  cells = table.reshape(*batch, num_experts * width)
  slot = jnp.take_along_axis(cells, cell, axis=-1).reshape(ids.shape)
  valid &= (slot >= 0) & (slot < num_physical)
  physical = jnp.where(valid, slot, np.int32(num_physical))
  bins = num_experts if load == "logical" else num_physical
  chosen = jnp.where(valid, ids, np.int32(bins)) if load == "logical" else physical
  chosen = chosen.reshape(flat)
  return physical, _reference.scatter(jnp.ones_like(chosen), chosen, bins)
