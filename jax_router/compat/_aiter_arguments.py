"""Checks of the arguments of `jax_router.compat.aiter`, and the sizes of its results."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _options
from jax_router.compat._arguments import LARGEST_INT32 as LARGEST_INT32
from jax_router.compat._arguments import check_gating as check_gating
from jax_router.compat._arguments import check_length
from jax_router.compat._arguments import look_up as look_up
from jax_router.compat._arguments import token_expert_indices as token_expert_indices

_MOST_SLOTS = 2**8 - 1  # the slot K marks a pad
_MOST_TOKENS = 2**24 - 1  # the token n <= T marks a pad
_LARGEST_INT64 = 2**63 - 1


class Size(NamedTuple):
  """Static sizes of the results.

  Attributes:
    entries: T * K.
    positions: P = T * K + E * U - K. No choice needs more: with m experts in use it takes at most
      T * K + m * (U - 1) positions, and m and K are at most E.
    blocks: ceil(P / U).
    pad: K << 24, the slot of a pad.
  """

  entries: int
  positions: int
  blocks: int
  pad: np.int32


def check_size(name: str, shape: tuple[int, ...], num_experts: int, block_size: int) -> Size:
  """The sizes for experts of this shape `[..., T, K]`; `name` is what has the tokens."""
  tokens, k = shape[-2:]
  if not isinstance(tokens, int):
    raise ValueError(f"{name} must have a static number of tokens, got shape {shape}")
  if k < 1 or k > min(_MOST_SLOTS, num_experts):
    raise ValueError(
      f"the slots K of a token must be between 1 and min({_MOST_SLOTS}, num_experts) = "
      f"{min(_MOST_SLOTS, num_experts)}, got K = {k}"
    )
  if tokens > _MOST_TOKENS:
    raise ValueError(f"{name} must have at most {_MOST_TOKENS} tokens, got {tokens}")
  positions = check_length(
    "sorted_ids", tokens * k + num_experts * block_size - k, "T * K + E * block_size - K"
  )
  pad = np.uint32(k << 24).view(np.int32)
  return Size(tokens * k, positions, -(-positions // block_size), pad)


def check_weights(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
  """Weights as float32 of the shape of the ids."""
  weights = _options.check_array(name, value)
  if not jnp.issubdtype(weights.dtype, jnp.floating):
    raise TypeError(f"{name} must have a floating dtype, got {weights.dtype.name}")
  _options.check_shape(name, weights.shape, shape, "topk_ids.shape")
  return weights.astype(jnp.float32)


def check_num_local_tokens(value: Any, batch: tuple[int, ...]) -> Any:
  """The number of tokens that count, as `jax_router.plan_blocks` takes it."""
  name = "num_local_tokens"
  if value is None:
    return None
  if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
    return _options.check_int(name, value, -_LARGEST_INT64, _LARGEST_INT64)
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise TypeError(f"{name} must have an integer dtype, got {value.dtype.name}")
  if value.shape in ((), batch):
    return value
  if value.shape != (1,):
    shapes = " or ".join(map(str, dict.fromkeys(((1,), (), batch))))
    raise ValueError(f"{name} must have shape {shapes}, got {value.shape}")
  return value.reshape(())


def check_buffer_dtype(value: Any) -> np.dtype:
  """The dtype of `moe_buf`, one that JAX has arrays of."""
  try:
    dtype = None if value is None else jnp.dtype(value)
  except TypeError:
    dtype = None
  if dtype is None or not (
    jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
  ):
    raise TypeError(f"moebuf_dtype must be a floating or integer dtype, got {value!r}")
  if dtype.itemsize == 8 and not jax.config.jax_enable_x64:
    raise ValueError(f"moebuf_dtype {dtype.name} needs jax_enable_x64, which is off")
  return dtype
