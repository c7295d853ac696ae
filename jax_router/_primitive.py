"""Builds a JAX primitive around an XLA FFI target.

One call of `make_primitive` gives an operation its abstract values, vmap (the axis is folded into
the batch dimensions: one launch), forward-mode rule, eager dispatch through a cached jit, the
custom call on the CPU and on NVIDIA GPUs, plain JAX on every other platform, and the attributes
that keep arrays sharded over batch dimensions free of collectives.

Every operand and every result starts with the same batch dimensions. The partitioner splits along
these and replicates the rest, so an operand without them would be cut along the wrong dimension.

An operation with an order over all tokens cannot have them as a batch dimension, so tokens that are
sharded would be gathered. `Operation.whole_tokens` and `check_whole_tokens` refuse them instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_router import _compat, _native


class Result(NamedTuple):
  """Type of one result: its dimensions after the batch dimensions, and its dtype."""

  trailing: tuple[int, ...]
  dtype: Any


class Operation(NamedTuple):
  """What `make_primitive` needs to know of an operation.

  Attributes:
    name: the word; the FFI target is `jax_router_<name>`.
    batch_ndim: (operand shapes, **params) -> number of leading batch dimensions.
    results: (operand shapes, **params) -> types of the results.
    attributes: (**params) -> the FFI attributes, numpy scalars or Python ints and bools.
    reference: the operation in plain JAX, (*operands, **params) -> results.
    tangents: (operands, results, tangents, **params) -> tangents of the results in plain JAX, None
      for a result without one. Called only if an operand has a tangent; absent ones are None.
    runs_on: (platform, operand avals, **params) -> whether this platform's kernel takes the call;
      where it does not, and no platform was asked for, the reference is lowered instead.
    pays: (platform, operand avals, **params) -> whether this platform's kernel is the faster one;
      where it is not, and no platform was asked for, the reference is lowered instead.
    whole_tokens: whether each batch row must lie on one device. Then a call without batch
      dimensions cannot be compiled where the compiler might have split its operands.
    composed: whether the reference is made of other primitives. Then it takes the keyword
      `implementation` too, and may stand in for a kernel that was asked for.
    whole_operands: whether the kernel cannot be split at all. Where the compiler might have split
      the operands, and no platform was asked for, the reference is lowered instead.
    batch: (bind, operands, axes, **params) -> (results, axes), the rule of vmap if it is not to
      give every operand the new axis.
    scratch: (platform, operand avals, **params) -> types of the results that this platform's kernel
      has after those of the operation, which are dropped.
  """

  name: str
  batch_ndim: Callable[..., int]
  results: Callable[..., Sequence[Result]]
  attributes: Callable[..., dict[str, Any]]
  reference: Callable[..., Sequence[jax.Array]]
  tangents: Callable[..., Sequence[jax.Array | None]]
  runs_on: Callable[..., bool] = lambda platform, avals, **params: True
  pays: Callable[..., bool] = lambda platform, avals, **params: True
  whole_tokens: bool = False
  composed: bool = False
  whole_operands: bool = False
  batch: Callable[..., tuple[Sequence[jax.Array], Sequence[int]]] | None = None
  scratch: Callable[..., Sequence[Result]] = lambda platform, avals, **params: ()


def reference_tangents(reference: Callable[..., Sequence[jax.Array]]):
  """The rule `tangents` of an operation whose reference is differentiable in all its results."""

  def tangents_of(operands, results, tangents, **params: Any):
    del results
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def function(*values):
      full = list(operands)
      for i, value in zip(moving, values, strict=True):
        full[i] = value
      return reference(*full, **params)

    primals = tuple(operands[i] for i in moving)
    return jax.jvp(function, primals, tuple(tangents[i] for i in moving))[1]

  return tangents_of


def check_whole_tokens(word: str, name: str, operand: jax.Array, batch_ndim: int) -> None:
  """ValueError if the type of an operand says that its tokens, or what follows them, are sharded.

  `word` is the public function, `name` its argument, `batch_ndim` the number of leading dimensions.
  """
  if any(axis is not None for axis in _compat.spec_of(jax.typeof(operand))[batch_ndim:]):
    raise ValueError(
      f"{name} must not be sharded along its tokens or what follows them, got "
      f"{jax.typeof(operand)}: {word} has an order over all tokens. Call it in jax.shard_map, or "
      f"give {name} a leading dimension that carries the sharding"
    )


def make_primitive(operation: Operation) -> Callable[..., list[jax.Array]]:
  """Makes the primitive of `operation` and returns its bind function.

  The bind function takes the operands, the keyword `implementation` (None, "cpu" or "cuda") and the
  operation's own parameters, all hashable.
  """
  primitive = Primitive(f"jax_router_{operation.name}")
  primitive.multiple_results = True

  def bind(*operands: jax.Array, **params: Any) -> list[jax.Array]:
    return primitive.bind(*_compat.join_varying_axes(operands), **params)

  @functools.cache
  def compiled(**params: Any):
    return jax.jit(functools.partial(bind, **params))

  primitive.def_impl(lambda *operands, **params: compiled(**params)(*operands))
  primitive.def_abstract_eval(functools.partial(_abstract_eval, operation))
  batching.primitive_batchers[primitive] = functools.partial(operation.batch or batch_all, bind)
  ad.primitive_jvps[primitive] = functools.partial(_jvp, operation, bind)
  _register_lowerings(primitive, operation)
  return bind


def _shapes(avals: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(aval.shape) for aval in avals)


def _abstract_eval(operation: Operation, *avals: Any, implementation: str | None, **params: Any):
  del implementation
  shapes = _shapes(avals)
  ndim = operation.batch_ndim(shapes, **params)
  batch = shapes[0][:ndim]
  for shape in shapes:
    if shape[:ndim] != batch:
      raise ValueError(
        f"jax_router_{operation.name}: operands must share the batch dimensions {batch}, "
        f"got {shape}"
      )
  specs = zip(*(_compat.spec_of(aval)[:ndim] for aval in avals), strict=True)
  spec = tuple(next((axis for axis in axes if axis is not None), None) for axes in specs)
  return [
    _compat.result_type(avals[0], batch + r.trailing, r.dtype, spec + (None,) * len(r.trailing))
    for r in operation.results(shapes, **params)
  ]


def batch_all(bind, operands, axes, **params: Any):
  """Rule of vmap: every operand gets the new axis in front, as a batch dimension."""
  size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
  moved = [
    jax.lax.broadcast(x, (size,)) if axis is None else jnp.moveaxis(x, axis, 0)
    for x, axis in zip(operands, axes, strict=True)
  ]
  results = bind(*moved, **params)
  return results, [0] * len(results)


def _jvp(operation: Operation, bind, operands, tangents, **params: Any):
  results = bind(*operands, **params)
  present = [None if isinstance(t, ad.Zero) else t for t in tangents]
  params.pop("implementation")
  if all(t is None for t in present):
    computed: Sequence[jax.Array | None] = [None] * len(results)
  else:
    computed = operation.tangents(operands, results, present, **params)
  return results, [
    ad.Zero(jax.typeof(r).to_tangent_aval()) if t is None else t
    for r, t in zip(results, computed, strict=True)
  ]


def _register_lowerings(primitive: Primitive, operation: Operation) -> None:
  def run_reference(*operands: jax.Array, implementation: str | None, **params: Any):
    if operation.composed:
      params["implementation"] = implementation
    return operation.reference(*operands, **params)

  reference = mlir.lower_fun(run_reference, multiple_results=True)
  mlir.register_lowering(primitive, functools.partial(_lower_reference, operation, reference))
  for platform, modules in _native.platforms().items():
    if operation.name not in modules:
      continue
    target = f"jax_router_{operation.name}"
    jax.ffi.register_ffi_target_as_batch_partitionable(target)
    rule = functools.partial(_lower, operation, reference, platform, target)
    mlir.register_lowering(primitive, rule, platform=platform)


def _check_lowering(operation: Operation, ctx, params: dict[str, Any]) -> None:
  """ValueError if the operands may be split over devices along tokens that must stay together."""
  if not operation.whole_tokens or operation.batch_ndim(_shapes(ctx.avals_in), **params) > 0:
    return
  devices = _compat.hidden_shards(ctx)
  if devices > 1:
    raise ValueError(
      f"{operation.name} has an order over all tokens, and in a computation over {devices} devices "
      "it cannot tell whether its tokens are sharded; call it in jax.shard_map, or give a leading "
      "dimension (x[None]) that carries the sharding"
    )


def _lower_reference(operation: Operation, reference, ctx, *operands, **params: Any):
  wanted = params["implementation"]
  if wanted is not None and not operation.composed:
    raise ValueError(
      f"implementation={wanted!r} of {operation.name} cannot run here: it is being compiled for "
      f"{', '.join(ctx.module_context.platforms)}, or its options have no {wanted} kernel"
    )
  options = {name: value for name, value in params.items() if name != "implementation"}
  _check_lowering(operation, ctx, options)
  return reference(ctx, *operands, **params)


def _lower(
  operation: Operation, reference, platform: str, target: str, ctx, *operands, **params: Any
):
  wanted = params.pop("implementation")
  runs = wanted in (None, platform) and operation.runs_on(platform, ctx.avals_in, **params)
  if wanted is None:
    runs = runs and operation.pays(platform, ctx.avals_in, **params)
  if runs and operation.whole_operands and _compat.hidden_shards(ctx) > 1:
    if wanted is not None:
      raise ValueError(
        f"implementation={wanted!r} of {operation.name} cannot run here: in a computation over "
        "several devices it cannot tell whether its operands are sharded; call it in jax.shard_map"
      )
    runs = False
  if not runs:
    return _lower_reference(operation, reference, ctx, *operands, implementation=wanted, **params)
  _check_lowering(operation, ctx, params)
  results = len(ctx.avals_out)
  ctx = _with_scratch(operation, platform, ctx, params)
  rule = jax.ffi.ffi_lowering(target, extra_attributes=_partitioning(operation, ctx, params))
  return rule(ctx, *operands, **operation.attributes(**params))[:results]


def _with_scratch(operation: Operation, platform: str, ctx, params: dict[str, Any]):
  """The context of a call that has scratch too, after the results."""
  first = ctx.avals_out[0]
  ndim = operation.batch_ndim(_shapes(ctx.avals_in), **params)
  batch, spec = first.shape[:ndim], _compat.spec_of(first)[:ndim]
  scratch = [
    _compat.result_type(first, batch + r.trailing, r.dtype, spec + (None,) * len(r.trailing))
    for r in operation.scratch(platform, ctx.avals_in, **params)
  ]
  return ctx.replace(avals_out=[*ctx.avals_out, *scratch])


def _partitioning(operation: Operation, ctx, params: dict[str, Any]) -> dict[str, Any]:
  """Attributes that let the partitioner split the call along its batch dimensions."""
  shapes_in, shapes_out = _shapes(ctx.avals_in), _shapes(ctx.avals_out)
  if not all(isinstance(d, int) for shape in shapes_in + shapes_out for d in shape):
    return {}
  ndim = operation.batch_ndim(shapes_in, **params)
  attributes = {"mhlo.frontend_attributes": mlir.ir_attribute({"num_batch_dims": str(ndim)})}
  rule = _compat.parse_attribute(sharding_rule(ndim, shapes_in, shapes_out))
  if rule is not None:
    attributes["sdy.sharding_rule"] = rule
  return attributes


def sharding_rule(
  batch_ndim: int, shapes_in: Sequence[Sequence[int]], shapes_out: Sequence[Sequence[int]]
) -> str:
  """Text of the Shardy rule: batch dimensions shared, every other dimension replicated."""
  sizes: list[int] = list(shapes_in[0][:batch_ndim])

  def name(factor: int) -> str:
    letters = "ijklmnopqrstuvwxyz"
    return letters[factor] if factor < len(letters) else f"z_{factor - len(letters) + 1}"

  def mapping(shape: Sequence[int]) -> str:
    factors = list(range(batch_ndim))
    for size in shape[batch_ndim:]:
      factors.append(len(sizes))
      sizes.append(size)
    return f"[{', '.join(name(f) for f in factors)}]"

  left = ", ".join(mapping(shape) for shape in shapes_in)
  right = ", ".join(mapping(shape) for shape in shapes_out)
  text = f"({left})->({right})"
  if sizes:
    text += " {" + ", ".join(f"{name(i)}={n}" for i, n in enumerate(sizes)) + "}"
  replicated = [name(i) for i in range(batch_ndim, len(sizes))]
  if replicated:
    text += " need_replication={" + ", ".join(replicated) + "}"
  return f"#sdy.op_sharding_rule<{text}, custom>"
