"""The differences between JAX releases. No other module names a JAX version.

Tested with JAX 0.10.2, 0.11.2 and 0.12.0.1. The calls gathered here are public, but their names or
results have moved between releases, so each stands behind one function of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.interpreters import mlir
from jax.sharding import AxisType


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Manual mesh axes (of an enclosing `shard_map`) over which `x` varies."""
  return jax.typeof(x).manual_axis_type.varying


def join_varying_axes(operands: Sequence[jax.Array]) -> list[jax.Array]:
  """Casts every operand to vary over the union of the operands' manual axes.

  A primitive must do this itself; otherwise one replicated operand lets a result be typed as
  replicated. The cast transposes to a psum, so replicated operands get the right gradient.
  """
  union = frozenset().union(*(varying_axes(x) for x in operands))
  joined = []
  for x in operands:
    missing = tuple(sorted(union - varying_axes(x)))
    joined.append(jax.lax.pcast(x, missing, to="varying") if missing else x)
  return joined


def spec_of(aval) -> tuple:
  """Partition spec of an abstract value as a tuple with one entry for each dimension."""
  spec = tuple(aval.sharding.spec)
  return spec + (None,) * (len(aval.shape) - len(spec))


def result_type(like, shape: Sequence[int], dtype, spec: Sequence):
  """Abstract value of a result that inherits the mesh and the varying axes of `like`."""
  sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
  return like.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)


def automatic_devices() -> int:
  """How many devices the compiler may spread one array over; 1 where all axes are manual."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count()
  if all(kind == AxisType.Manual for kind in mesh.axis_types):
    return 1
  return mesh.size


def hidden_shards(ctx) -> int:
  """Over how many devices an operand may be split without its type saying so, while it is lowered.

  Auto axes are hidden; Explicit ones stand in the type, and Manual ones have been split already. An
  operand whose type knows no mesh may lie on every device of the computation.
  """
  most = 1
  for aval in ctx.avals_in:
    mesh = aval.sharding.mesh
    if mesh.empty:
      most = max(most, _context_devices(ctx.module_context.axis_context))
    else:
      axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
      most = max(most, math.prod(size for size, kind in axes if kind == AxisType.Auto))
  return most


def _context_devices(context) -> int:
  """How many devices a computation is compiled for, but for the manual axes it is inside of."""
  if hasattr(context, "num_devices"):
    return context.num_devices
  if hasattr(context, "manual_axes"):
    sizes = context.mesh.shape.items()
    return math.prod(size for name, size in sizes if name not in context.manual_axes)
  return 1


def parse_attribute(text: str) -> mlir.ir.Attribute | None:
  """An MLIR attribute from its text, None where this jaxlib does not know the syntax.

  Without the sharding rule, Explicit meshes and `shard_map` still work as before, and plain jit
  over an Auto mesh gathers: slower, never wrong.
  """
  try:
    return mlir.ir.Attribute.parse(text)
  except (mlir.ir.MLIRError, ValueError):
    return None
