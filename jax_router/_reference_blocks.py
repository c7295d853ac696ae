"""`plan_blocks` in plain JAX: the lowering where there is no kernel, and a cross-check."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def blocks(
  experts: jax.Array,
  weights: jax.Array,
  mask: jax.Array | None,
  num_valid: jax.Array | None,
  *,
  num_experts: int,
  block_size: int,
  layout: str,
  positions: int,
) -> list[jax.Array]:
  """The fields of a `BlockPlan`, of `positions` positions.

  Operands: experts `[*B, T, k]` int32, weights `[*B, T, k]` float32, mask `[*B, E]` bool, num_valid
  `[*B]` int32.
  """
  *batch, tokens, k = experts.shape
  if mask is None:
    mask = jnp.ones((*batch, num_experts), bool)
  if num_valid is None:
    num_valid = jnp.full(tuple(batch), tokens, jnp.int32)
  num_valid = jnp.clip(num_valid, 0, tokens)
  # vmap wants all operands sharded alike, and a mask may be replicated.
  zero = jnp.sum(experts, axis=(-2, -1), dtype=jnp.int32) * 0
  mask, num_valid = mask | (zero[..., None] > 0), num_valid + zero

  def row(experts, mask, num_valid):
    return _row(experts, mask, num_valid, block_size, layout, positions)

  for _ in batch:
    row = jax.vmap(row)
  if tokens * k == 0:
    ids = jnp.zeros((*batch, positions), jnp.int32)
    block_experts = jnp.zeros((*batch, positions // block_size), jnp.int32)
    num_padded, inverse = jnp.zeros_like(num_valid), experts
  else:
    ids, block_experts, num_padded, inverse = row(experts, mask, num_valid)
  sorted_weights = scatter(weights, inverse, positions)
  return [ids, sorted_weights, block_experts, num_padded, num_valid, inverse]


def _row(experts, mask, num_valid, block_size: int, layout: str, positions: int):
  """ids, block_experts, num_padded and inverse of one plan."""
  tokens, k = experts.shape
  num_experts, entries = mask.shape[0], tokens * k
  entry = jnp.arange(entries, dtype=jnp.int32)
  flat = experts.reshape(entries)
  present = (flat >= 0) & (flat < num_experts) & (entry // k < num_valid)
  present &= mask[jnp.where(present, flat, 0)]
  key = jnp.where(present, flat, num_experts)
  counts = jnp.zeros(num_experts + 1, jnp.int32).at[key].add(1)
  needed = counts // block_size + (counts % block_size > 0).astype(jnp.int32)
  ends = jnp.cumsum(needed.at[num_experts].set(0), dtype=jnp.int32)
  # Of an entry: the first position of its expert, and its rank among that expert's entries.
  first = (ends - needed) * block_size
  order = jnp.argsort(key, stable=True)
  rank = entry - (jnp.cumsum(counts, dtype=jnp.int32) - counts)[key[order]]
  rank = jnp.zeros(entries, jnp.int32).at[order].set(rank)
  inverse = jnp.where(present, first[key] + rank, -1)
  pad, ids = entries, entry
  if layout == "packed":
    pad = (np.uint32(k) << 24 | num_valid.astype(jnp.uint32)).astype(jnp.int32)
    ids = (entry % k).astype(jnp.uint32) << 24 | (entry // k).astype(jnp.uint32)
    ids = ids.astype(jnp.int32)
  sorted_ids = jnp.full(positions, pad, jnp.int32)
  sorted_ids = sorted_ids.at[jnp.where(present, inverse, positions)].set(ids, mode="drop")
  blocks = positions // block_size
  # Of a block: how many experts end at it or before.
  expert = jnp.zeros(blocks + 1, jnp.int32).at[ends[:num_experts]].add(1)[:blocks]
  expert = jnp.cumsum(expert, dtype=jnp.int32)
  local = jnp.cumsum(mask, dtype=jnp.int32) - 1
  used = jnp.arange(blocks, dtype=jnp.int32) < ends[-1]
  block_experts = jnp.where(used, local[jnp.where(used, expert, 0)], -1)
  return sorted_ids, block_experts, ends[-1] * block_size, inverse.reshape(tokens, k)


def scatter(weights: jax.Array, inverse: jax.Array, positions: int) -> jax.Array:
  """Weights `[*B, T, k]` at their positions `[*B, positions]`, 0 elsewhere. Linear."""
  size = math.prod(weights.shape[-2:])
  if size == 0:
    return jnp.zeros((*weights.shape[:-2], positions), weights.dtype)

  def row(weights, inverse):
    # Integers are scattered and weights gathered: these keep their bits, a -0 too.
    index = jnp.where(inverse < 0, positions, inverse).reshape(size)
    entry = jnp.arange(size, dtype=jnp.int32)
    source = jnp.full(positions, -1, jnp.int32).at[index].set(entry, mode="drop")
    return gather(weights.reshape(size), source)

  for _ in weights.shape[:-2]:
    row = jax.vmap(row)
  return row(weights, inverse)


def gather(values: jax.Array, index: jax.Array) -> jax.Array:
  """Values `[*B, n]` at `index` `[*B, ...]`, 0 where it is -1: `scatter` transposed."""
  if values.shape[-1] == 0:
    return jnp.zeros(index.shape, values.dtype)

  def row(values, index):
    return jnp.where(index < 0, jnp.zeros((), values.dtype), values[jnp.where(index < 0, 0, index)])

  for _ in values.shape[:-1]:
    row = jax.vmap(row)
  return row(values, index)
