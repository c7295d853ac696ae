"""Checks and results that several of the layers under other systems' names share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_router import _compat, _options

LARGEST_INT32 = 2**31 - 1


def check_gating(value: Any, name: str = "gating_output") -> jax.Array:
  """Router logits `[..., T, E]`, under the name that the caller knows them by."""
  logits = _options.check_logits(value, name)
  if logits.ndim < 2:
    raise ValueError(f"{name} must have shape [..., T, E], got {logits.shape}")
  if _compat.spec_of(jax.typeof(logits))[-1] is not None:
    raise ValueError(
      f"{name} must not be sharded along its experts (last axis), got {jax.typeof(logits)}; "
      "reshard it to PartitionSpec(..., None)"
    )
  return logits


def check_bias(name: str, value: Any, num_experts: int) -> jax.Array | None:
  """A selection bias `[E]`, None where there is none."""
  if value is None:
    return None
  bias = _options.check_array(name, value)
  if not jnp.issubdtype(bias.dtype, jnp.floating):
    raise TypeError(f"{name} must have a floating dtype, got {bias.dtype.name}")
  _options.check_shape(name, bias.shape, (num_experts,), "[E]")
  return bias


def check_length(name: str, value: int, meaning: str) -> int:
  """A static size that int32 positions can number."""
  if value > LARGEST_INT32:
    raise ValueError(f"{name} would be {value} = {meaning}, more than int32 numbers")
  return value


def token_expert_indices(experts: jax.Array) -> jax.Array:
  """slot * T + token for experts `[..., T, k]`, int32 of their shape.

  The row that the entry would have if the slots came one after the other.
  """
  tokens, k = experts.shape[-2:]
  if isinstance(tokens, int):
    check_length("the largest of token_expert_indices", tokens * k, "T * topk")
  token = jax.lax.broadcasted_iota(jnp.int32, (tokens, k), 0)
  slot = jax.lax.broadcasted_iota(jnp.int32, (tokens, k), 1)
  index = slot * jnp.asarray(tokens, jnp.int32) + token
  return jnp.broadcast_to(jnp.expand_dims(index, range(experts.ndim - 2)), experts.shape)


def look_up(table: jax.Array, experts: jax.Array) -> jax.Array:
  """`table` `[E]` at `experts` `[...]`, -1 for those outside 0 .. E - 1."""
  valid = (experts >= 0) & (experts < table.shape[0])
  # Of leading dimensions sharded along Explicit axes a gather must be told that they stay so.
  spec = _compat.spec_of(jax.typeof(experts))
  sharding = jax.sharding.PartitionSpec(*spec) if any(spec) else None
  values = table.at[jnp.where(valid, experts, 0)].get(out_sharding=sharding)
  return jnp.where(valid, values, -1)
