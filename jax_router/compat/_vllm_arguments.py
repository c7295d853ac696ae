"""Checks of the arguments of `jax_router.compat.vllm`, and the length of its results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _options
from jax_router._options import Groups
from jax_router.compat._arguments import LARGEST_INT32 as LARGEST_INT32
from jax_router.compat._arguments import check_bias as check_bias
from jax_router.compat._arguments import check_gating as check_gating
from jax_router.compat._arguments import check_length as check_length
from jax_router.compat._arguments import look_up as look_up
from jax_router.compat._arguments import token_expert_indices as token_expert_indices

_INDEX_DTYPES = ("int32", "uint32", "int64")


def check_indices_type(value: Any) -> np.dtype:
  try:
    dtype = np.dtype(value)
  except TypeError:
    dtype = None
  if value is None or dtype is None or dtype.name not in _INDEX_DTYPES:
    raise TypeError(f"indices_type must be one of {', '.join(_INDEX_DTYPES)}, got {value!r}")
  if dtype.name == "int64" and not jax.config.jax_enable_x64:
    raise ValueError("indices_type int64 needs jax_enable_x64, which is off")
  return dtype


def check_hidden(hidden_states: Any, gating_output: Any) -> None:
  if hidden_states is None:
    return
  shape = _options.check_array("hidden_states", hidden_states).shape
  tokens = check_gating(gating_output).shape[:-1]
  if shape[:-1] != tokens or not shape:
    raise ValueError(
      f"hidden_states must have the tokens of gating_output, shape {(*tokens, 'd')}, got {shape}"
    )


def check_groups(
  num_expert_group: Any, topk_group: Any, num_experts: int, topk: int, biased: bool
) -> Groups | None:
  """The groups, None where they limit nothing."""
  largest = LARGEST_INT32
  count = _options.check_int("num_expert_group", num_expert_group, -largest, largest)
  keep = _options.check_int("topk_group", topk_group, -largest, largest)
  if count < 1 or num_experts % count or count >= num_experts:
    return None
  keep = _options.check_int("topk_group", keep, 1, count, "num_expert_group")
  reachable = keep * (num_experts // count)
  if topk > reachable:
    raise ValueError(
      f"topk must be at most topk_group * E / num_expert_group = {reachable}, got {topk}"
    )
  return Groups(count, keep, "top2" if biased else "max")


def check_map(value: Any, num_experts: int) -> jax.Array:
  """An expert map as int32 `[E]`, -1 for experts elsewhere."""
  local = _options.check_array("expert_map", value)
  if not jnp.issubdtype(local.dtype, jnp.integer):
    raise TypeError(f"expert_map must have an integer dtype, got {local.dtype.name}")
  _options.check_shape("expert_map", local.shape, (num_experts,), "(num_experts,)")
  if isinstance(value, np.ndarray) and value.dtype.itemsize == 8:
    # Before JAX cuts off the upper half.
    local = jnp.asarray(np.where((value >= 0) & (value < num_experts), value, num_experts))
  elif local.dtype.itemsize == 8:
    local = jnp.where((local >= 0) & (local < num_experts), local, num_experts)
  local = local.astype(jnp.int32)
  return jnp.where((local >= 0) & (local < num_experts), local, -1)


def sorted_length(entries: int, num_experts: int, block_size: int, round_up: bool) -> int:
  """M, the static length of `sorted_ids`; never more than `plan_blocks` has positions."""
  length = entries + num_experts * (block_size - 1)
  if round_up:
    length = -(-length // block_size) * block_size
  if entries < num_experts:
    length = min(entries * block_size, length)
  return check_length("sorted_ids", length, "T * K + E * (block_size - 1)")
