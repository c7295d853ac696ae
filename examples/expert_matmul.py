"""The matmuls of all experts in one call, by the fastest way that is there.

`jax.lax.ragged_dot` says what to compute, but except on TPUs XLA multiplies every row by the
matrices of all experts and masks: as many times too slow as there are experts. So:

  "tokamax"  `tokamax.ragged_dot`, where tokamax is installed
  "hopper"   the Pallas kernels that come with JAX, on NVIDIA GPUs of compute capability 9.0
  "blocks"   plain JAX, elsewhere on GPUs and on CPUs: a batched matmul over blocks of rows
  "lax"      `jax.lax.ragged_dot`, elsewhere
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

BLOCK_ROWS = 64


def grouped_matmul(
  lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, implementation: str | None = None
) -> jax.Array:
  """Multiplies each row by the matrix of its group: result[p] = lhs[p] @ rhs[group of p].

  Differentiable in `lhs` and `rhs`. If the groups do not fill all rows, those past the groups are
  undefined in the result and in the gradient of `lhs`; `lhs` and the cotangent must be zeros there,
  as `jax_router.permute` and the gradient of `jax_router.combine` are.

  Args:
    lhs: `[M, K]`, the rows of each group together.
    rhs: `[E, K, N]` of the same dtype.
    group_sizes: `[E]` int32, rows of each group.
    implementation: a name above, or None for what `choose` says.

  Returns:
    `[M, N]` in the dtype of `lhs`.
  """
  functions = {"tokamax": _tokamax, "hopper": _hopper, "blocks": _blocks, "lax": jax.lax.ragged_dot}
  implementation = implementation or choose(lhs, rhs)
  if implementation not in functions:
    raise ValueError(f"implementation must be one of {[*functions]}, got {implementation!r}")
  if implementation == "hopper" and not _fits_hopper(lhs, rhs):
    raise ValueError(
      "'hopper' needs bfloat16 or float16, M a multiple of 8, K and N multiples of 128, "
      f"got {lhs.dtype.name} {lhs.shape} and {rhs.dtype.name} {rhs.shape}"
    )
  return functions[implementation](lhs, rhs, group_sizes)


def choose(lhs: jax.Array | jax.ShapeDtypeStruct, rhs: jax.Array | jax.ShapeDtypeStruct) -> str:
  """The implementation for these operands on the default device."""
  return available(lhs, rhs)[0]


def available(
  lhs: jax.Array | jax.ShapeDtypeStruct, rhs: jax.Array | jax.ShapeDtypeStruct
) -> list[str]:
  """All implementations for these operands on the default device, in order of preference."""
  device = _default_device()
  names = []
  if device.platform != "cpu" and importlib.util.find_spec("tokamax") is not None:
    names.append("tokamax")
  if getattr(device, "compute_capability", None) == "9.0" and _fits_hopper(lhs, rhs):
    names.append("hopper")
  return names + (["blocks", "lax"] if device.platform in ("cpu", "gpu") else ["lax", "blocks"])


def _fits_hopper(lhs: Any, rhs: Any) -> bool:
  half = lhs.dtype == rhs.dtype and lhs.dtype.name in ("bfloat16", "float16")
  rows = lhs.shape[0]
  return half and rows > 0 and rows % 8 == 0 and all(size % 128 == 0 for size in rhs.shape[1:])


def _default_device() -> Any:
  device = jax.config.jax_default_device
  return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def _tokamax(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  return importlib.import_module("tokamax").ragged_dot(lhs, rhs, group_sizes)


def _blocks(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  """Each group gets as many blocks of `BLOCK_ROWS` rows as it fills, so that shapes are static."""
  (rows, depth), num_groups = lhs.shape, rhs.shape[0]
  num_blocks = rows // BLOCK_ROWS + num_groups
  blocks = (group_sizes + BLOCK_ROWS - 1) // BLOCK_ROWS
  ends, block_ends = jnp.cumsum(group_sizes), jnp.cumsum(blocks)
  # Where the rows of each group move to, and the group of each row and block. Blocks behind the
  # last one in use stay zeros: any matrix will do. Rows past the groups go nowhere.
  shift = (block_ends - blocks) * BLOCK_ROWS - (ends - group_sizes)
  position = jnp.arange(rows, dtype=jnp.int32)
  group = jnp.searchsorted(ends, position, side="right")
  place = position + shift.at[group].get(mode="fill", fill_value=num_blocks * BLOCK_ROWS)
  owner = jnp.searchsorted(block_ends, jnp.arange(num_blocks), side="right")
  padded = jnp.zeros((num_blocks * BLOCK_ROWS, depth), lhs.dtype)
  padded = padded.at[place].set(lhs, mode="drop", unique_indices=True)
  padded = padded.reshape(num_blocks, BLOCK_ROWS, depth)
  result = jnp.einsum("brk,bkn->brn", padded, rhs.at[owner].get(mode="clip"))
  result = result.reshape(num_blocks * BLOCK_ROWS, -1)
  return result.at[place].get(mode="fill", fill_value=0, unique_indices=True)


# JAX's kernels for Hopper have no gradient, but there are the transposed ones that it needs.


def _hopper(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  # Outside of the custom_vjp, so that matrices that all devices of a `shard_map` share get the sum
  # of the devices' gradients.
  operands = (lhs, rhs, group_sizes)
  return _hopper_vjp(*(_vary_like(x, *operands) for x in operands))


@jax.custom_vjp
def _hopper_vjp(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
  return _hopper_dot(lhs, rhs, group_sizes, transpose_rhs=False)


def _hopper_forward(lhs, rhs, group_sizes):
  return _hopper_vjp(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _hopper_backward(saved, cotangent):
  lhs, rhs, group_sizes = saved
  of_lhs = _hopper_dot(cotangent, rhs, group_sizes, transpose_rhs=True)
  module = importlib.import_module("jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu")
  tiles = _tiles(lhs.shape[0], len(rhs)) | {"block_m": 128}
  of_rhs = module.transposed_ragged_dot(lhs, cotangent, group_sizes=group_sizes, **tiles)
  return of_lhs, _vary_like(of_rhs, rhs), None


_hopper_vjp.defvjp(_hopper_forward, _hopper_backward)


def _hopper_dot(lhs, rhs, group_sizes, *, transpose_rhs: bool) -> jax.Array:
  module = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
  function = functools.partial(module.ragged_dot, transpose_rhs=transpose_rhs)
  result = function(lhs, rhs, group_sizes=group_sizes, **_tiles(lhs.shape[0], len(rhs)))
  return _vary_like(result, lhs)


def _vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
  """Types `x` as different on the devices of a `shard_map` where others are: kernels do not."""
  varying = (jax.typeof(y).manual_axis_type.varying for y in (x, *others))
  own, *more = varying
  missing = frozenset().union(*more) - own
  return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _tiles(rows: int, num_groups: int) -> dict[str, int]:
  """Sizes of the blocks of a kernel: small ones in the ragged dimension for small groups.

  `grid_block_n` blocks side by side read the same rows while these are in the cache.
  """
  block_m = 128 if rows >= 128 * num_groups else 64
  tiles = {"block_m": block_m, "block_n": 128, "block_k": 64}
  return tiles | {"max_concurrent_steps": 4, "grid_block_n": 8}
