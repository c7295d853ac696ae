"""`route_and_assign_replicas`: routing and the replicas that tokens take, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_router import (
  _compat,
  _operands,
  _options,
  _reference,
  _reference_replicas,
  _replicas,
  _route,
)
from jax_router._operands import CHECKPOINT_NAME, Operands
from jax_router._options import Groups, RouteOptions, Routing
from jax_router._primitive import Operation, Result, make_primitive
from jax_router._replicas import ReplicaOptions, Tables


def route_and_assign_replicas(
  logits: jax.Array | np.ndarray,
  k: int,
  replica_table: jax.Array | np.ndarray,
  replica_counts: jax.Array | np.ndarray,
  *,
  num_physical: int | None = None,
  policy: str = "hash",
  load: str = "logical",
  token_offset: int | jax.Array | np.ndarray = 0,
  score: str = "softmax",
  renormalize: bool = True,
  scale: float = 1.0,
  bias: jax.Array | np.ndarray | None = None,
  groups: Groups | None = None,
  where: jax.Array | np.ndarray | None = None,
  experts: jax.Array | np.ndarray | None = None,
  index_dtype: Any = jnp.int32,
  weight_dtype: Any = None,
  implementation: str | None = None,
) -> tuple[Routing, jax.Array, jax.Array]:
  """Chooses `k` experts for every token, maps them to physical slots, and counts the load.

  The results are, to the bit, those of

      routing = jax_router.route(logits, k, ...)
      physical, load = jax_router.assign_replicas(
        routing.experts, replica_table, replica_counts, where=where, ...
      )

  from one call. On the CPU, and on a GPU for up to 256 tokens, that is one kernel, which writes the
  slot of a replica beside each expert and counts it; more tokens take two, which is faster there.
  The experts of the routing are the logical ones: record those to replay a choice with `experts=`.

  Differentiable in `logits` through the weights as `jax_router.route` is; slots and load have no
  gradient. Under `jax.checkpoint`, the policy `save_only_these_names("jax_router")` keeps all.

  Sharding: tokens or leading dimensions may be sharded, without a gather. Under plain jit the load
  of sharded tokens takes an all-reduce. In `jax.shard_map` the load is the shard's own, and so are
  the indices of its tokens but for `token_offset`; see `jax_router.assign_replicas`.

  Args:
    logits: `[..., T, E]` float32, bfloat16 or float16. All arithmetic is float32.
    replica_table: `[E, R]` integer, the physical slots of every expert, those used first.
    replica_counts: `[E]` integer, how many of them are used, 1 .. R.
    num_physical, policy, load, token_offset: as in `jax_router.assign_replicas`; the leading
      dimensions are those of `logits`.
    k, score, renormalize, scale, bias, groups, where, experts, index_dtype, weight_dtype,
      implementation: as in `jax_router.route`.

  Returns:
    `Routing(weights, experts)`, both `[..., T, k]`, physical ids `[..., T, k]` int32 and the load,
    `[..., E]` or `[..., num_physical]` int32. A slot without a replica, be it padding or an entry
    of a traced table that cannot be used, has the id `num_physical` and is not counted.

  Raises:
    TypeError, ValueError: as `jax_router.route` and `jax_router.assign_replicas`; logits without a
      token dimension, a table of another number of experts.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> table, counts = jnp.array([[0, 3], [1, -1], [2, -1]]), jnp.array([2, 1, 1])
    >>> logits = jnp.array([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0]])
    >>> routing, physical, load = jax_router.route_and_assign_replicas(
    ...   logits, 2, table, counts, num_physical=4, policy="xorshift"
    ... )
    >>> routing.experts.tolist(), physical.tolist(), load.tolist()
    ([[0, 1], [0, 2]], [[0, 1], [3, 2]], [2, 1, 1])
  """
  given, options = _operands.check_arguments(
    logits, k, score=score, renormalize=renormalize, scale=scale, bias=bias, groups=groups,
    where=where, experts=experts, implementation=implementation,
  )  # fmt: skip
  if given.logits.ndim < 2:
    raise ValueError(f"logits must have shape [..., T, E], got {given.logits.shape}")
  num_experts, dtype = given.logits.shape[-1], given.logits.dtype
  index_dtype = _options.check_index_dtype(index_dtype, num_experts)
  weight_dtype = _options.check_weight_dtype(weight_dtype)
  tables, replicas = _replicas.check_replicas(
    replica_table, replica_counts, token_offset, num_physical=num_physical, policy=policy,
    load=load, lead=given.logits.shape[:-2], lead_name="logits.shape[:-2]",
    num_experts=num_experts,
  )  # fmt: skip
  static = Static(
    _operands.Static(options, implementation, num_experts, dtype), replicas, index_dtype
  )
  operands, tables, groups_of_tokens = fold_tokens(given, tables)
  results: Sequence[jax.Array]
  if implementation == "reference":
    results = run_reference(static, operands, tables)
  else:
    results = _route_and_assign(static, *operands, *tables)
  weights, chosen, *_, physical, loads = results
  shape = (*given.logits.shape[:-1], options.k)
  routing = Routing(weights.reshape(shape).astype(weight_dtype), chosen.reshape(shape))
  return routing, physical.reshape(shape), _replicas.sum_groups(loads, groups_of_tokens)


class Static(NamedTuple):
  """What the forward and the backward need to know beforehand."""

  route: _operands.Static
  replicas: ReplicaOptions
  index_dtype: np.dtype


def fold_tokens(given: Operands, tables: Tables) -> tuple[Operands, Tables, int]:
  """Operands and tables in the form of the primitive, and into how many groups rows were cut."""
  *lead, tokens, _ = given.logits.shape
  groups = _operands.token_groups(tokens)
  batch = (*lead, groups) if groups > 1 else tuple(lead)
  operands = _operands.reshape_operands(given, batch, tokens // groups)
  tables = _replicas.group_tables(tables, groups, tokens)
  # Joined with the tables, too, outside the custom_vjp: see reshape_operands.
  joined = _compat.join_varying_axes([*operands.present, *tables])
  rest = iter(joined[:-3])
  operands = Operands(next(rest), *(None if x is None else next(rest) for x in operands[1:]))
  return operands, Tables(*joined[-3:]), groups


# ---- the primitive: logits, table, counts, offset, and what route takes besides logits ----


def _results(shapes, *, options: RouteOptions, index_dtype, num_physical: int, load: str, **_: Any):
  tokens, num_experts = shapes[0][-2:]
  slots = (tokens, options.k)
  return [
    Result(slots, np.dtype(np.float32)),
    Result(slots, index_dtype),
    Result((tokens,), np.dtype(np.float32)),
    Result(slots, np.dtype(np.int32)),
    Result((_replicas.load_bins(num_experts, num_physical, load),), np.dtype(np.int32)),
  ]


def _attributes(*, options, index_dtype, num_physical, policy, load, **present) -> dict[str, Any]:
  del index_dtype
  replicas = _replicas.replica_attributes(num_physical=num_physical, policy=policy, load=load)
  return _operands.option_attributes(options) | replicas | present


def _chain(
  logits, table, counts, offset, *optional, options, index_dtype, implementation, num_physical,
  policy, load, **present: bool,
):  # fmt: skip
  """The same by the primitives of `route` and `assign_replicas`."""
  routing = _route.bind_forward(
    logits, *optional, options=options, index_dtype=index_dtype, implementation=implementation,
    **present,
  )  # fmt: skip
  assigned = _replicas.bind(
    routing[1].astype(jnp.int32), table, counts, offset, num_physical=num_physical, policy=policy,
    load=load, has_where=False, implementation=implementation,
  )  # fmt: skip
  return [*routing, *assigned]


def _tangents(operands, results, tangents, *, options, **_: Any):
  weights_dot, normalizer_dot = _operands.weigh_tangents(operands, results[:3], tangents, options)
  return [weights_dot, None, normalizer_dot, None, None]


_bind = make_primitive(
  Operation(
    name="route_and_assign_replicas",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=_results,
    attributes=_attributes,
    reference=_chain,
    tangents=_tangents,
    runs_on=_operands.forward_runs_on,
    composed=True,
  )
)


# ---- the differentiable function ----


def run_reference(static: Static, operands: Operands, tables: Tables) -> list[jax.Array]:
  """The results of `run_forward` in plain JAX."""
  routing = _reference.route(
    *operands, options=static.route.options, index_dtype=static.index_dtype
  )
  ids = routing[1].astype(jnp.int32)
  assigned = _reference_replicas.assign_replicas(
    ids, tables.table, tables.counts, tables.offset, None, **static.replicas._asdict()
  )
  return [*routing, *assigned]


def run_forward(static: Static, *arrays) -> list[jax.Array]:
  """Weights, experts, normalizer, physical ids and load; `arrays` are operands and tables."""
  operands, tables = Operands(*arrays[:4]), Tables(*arrays[4:])
  logits, *optional = operands.present
  return _bind(
    logits,
    *tables,
    *optional,
    options=static.route.options,
    index_dtype=static.index_dtype,
    implementation=static.route.implementation,
    **static.replicas._asdict(),
    **operands.presence,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route_and_assign(static: Static, logits, bias, where, experts, table, counts, offset):
  weights, chosen, _, *assigned = run_forward(
    static, logits, bias, where, experts, table, counts, offset
  )
  return [weights, chosen, *assigned]


def _forward(static: Static, logits, bias, where, experts, table, counts, offset):
  *choice, physical, loads = run_forward(
    static, logits, bias, where, experts, table, counts, offset
  )
  residuals = _operands.save_choice(static.route, logits, choice)
  assigned = [checkpoint_name(x, CHECKPOINT_NAME) for x in (physical, loads)]
  return [*residuals[:2], *assigned], residuals


def _backward(static: Static, residuals, cotangents):
  gradients = _operands.pull_back(_route.bind_backward, static.route, cotangents[0], residuals)
  return *gradients, None, None, None


_route_and_assign.defvjp(_forward, _backward)
