"""Experts that exist more than once: which replica a token takes, and the load that follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_router import _native, _operands, _options, _reference_replicas
from jax_router._primitive import Operation, Result, make_primitive

# The order of each is the order of the enumeration in src/replicas_call.h.
POLICIES = ("hash", "xorshift")
LOADS = ("logical", "physical")

_MOST_INT32 = 2**31 - 1
_MOST_BINS = 2**24


def assign_replicas(
  experts: jax.Array | np.ndarray,
  replica_table: jax.Array | np.ndarray,
  replica_counts: jax.Array | np.ndarray,
  *,
  num_physical: int | None = None,
  policy: str = "hash",
  load: str = "logical",
  where: jax.Array | np.ndarray | None = None,
  token_offset: int | jax.Array | np.ndarray = 0,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Maps the experts of tokens to physical slots that hold replicas of them, and counts the load.

  For token t of a row of T tokens and an expert e chosen by it, all in unsigned 32 bits:

      i        = token_offset + t
      draw     = mix(i + 0x9e3779b9 * e)                                policy="hash"
               = s ^ (s >> 13), s = r ^ (r << 9), r = i ^ (i >> 7)      policy="xorshift"
      physical = replica_table[e, draw % replica_counts[e]]

  where mix is MurmurHash3's 32-bit finalizer. "hash" draws anew for every expert and is well mixed
  from the first token on. "xorshift" is FastDeploy's exact draw, one for all experts of a token;
  there the first 16 tokens all take the first of 3 replicas.

  A row is the last two dimensions: every leading index starts again at its `token_offset`. Few
  tokens in a row, as in decoding, would draw the same replicas in every call: give an offset that
  moves on, such as the number of tokens seen so far. The index is that of the whole row however
  plain jit splits it; in `jax.shard_map` it is the shard's own, and the offset is the caller's
  (`jax.lax.axis_index(axis) * tokens`).

  A slot gets the id `num_physical`, which JAX scatters drop, and is counted nowhere if its token
  has `where=False`, its expert lies outside 0 .. E-1 (as that of padding does), its count lies
  outside 1 .. R or its entry outside 0 .. num_physical - 1. Counts and used entries like that are
  errors where their values are known, that is, unless they are traced. Entries beyond the count are
  never returned.

  The integers are the same on every device and in every run. Nothing here has a gradient.

  Sharding: tokens or leading dimensions may be sharded, without a gather. Under plain jit the load
  of sharded tokens takes an all-reduce. In `jax.shard_map` the load is the shard's own:
  `jax.lax.psum` it.

  Args:
    experts: `[..., T, k]` integer, logical experts as `route` gives them.
    replica_table: `[E, R]` integer, the physical slots of every expert, those used first.
    replica_counts: `[E]` integer, how many of them are used, 1 .. R.
    num_physical: static P, the number of physical slots, 1 <= P < 2**31. E * R by default, which no
      slot reaches as long as none holds two experts.
    policy: "hash" or "xorshift".
    load: "logical" counts the slots of tokens for every expert, "physical" for every physical slot.
    where: `[..., T]` bool, False marks padding.
    token_offset: index of the first token of a row; an integer, or an integer array, which may be
      traced, of shape `()` or that of the leading dimensions. Taken modulo 2**32.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    physical ids `[..., T, k]` int32 and the load, `[..., E]` or `[..., P]` int32.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; known counts outside 1 .. R or known
      entries in use outside 0 .. P-1; an implementation that is not there.

  Source: "xorshift" as in FastDeploy's noaux_tc_redundant.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> table = jnp.array([[0, 4], [1, -1], [2, 5], [3, -1]])
    >>> counts = jnp.array([2, 1, 2, 1])
    >>> experts = jnp.array([[0, 2], [0, 2], [0, 2], [0, 2]])
    >>> physical, load = jax_router.assign_replicas(experts, table, counts, policy="xorshift")
    >>> physical.tolist(), load.tolist()
    ([[0, 2], [4, 5], [0, 2], [4, 5]], [4, 0, 4, 0])
  """
  ids = _as_int32("experts", experts)
  if ids.ndim < 2:
    raise ValueError(f"experts must have shape [..., T, k], got {ids.shape}")
  tables, options = check_replicas(
    replica_table, replica_counts, token_offset, num_physical=num_physical, policy=policy,
    load=load, lead=ids.shape[:-2], lead_name="experts.shape[:-2]",
  )  # fmt: skip
  if where is not None:
    where = _options.check_array("where", where)
    if where.dtype != np.bool_:
      raise TypeError(f"where must have dtype bool, got {where.dtype.name}")
    _options.check_shape("where", where.shape, ids.shape[:-1], "experts.shape[:-1]")
  if implementation is not None:
    _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
    _native.check_implementation(implementation)
  *lead, tokens, k = ids.shape
  groups = _operands.token_groups(tokens)
  batch = (*lead, groups) if groups > 1 else tuple(lead)
  operands = [ids.reshape(*batch, tokens // groups, k), *group_tables(tables, groups, tokens)]
  if where is not None:
    operands.append(where.reshape(*batch, tokens // groups))
  params = options._asdict() | {"has_where": where is not None}
  if implementation == "reference":
    physical, loads = _reference(*operands, **params)
  else:
    physical, loads = bind(*operands, implementation=implementation, **params)
  return physical.reshape(ids.shape), sum_groups(loads, groups)


# ---- arguments ----


class Tables(NamedTuple):
  """The replicas of experts, and the index of the first token of every row.

  As arguments: table `[E, R]` int32, counts `[E]` int32, offset `[*lead]` uint32. As operands of a
  primitive each of them starts with the batch dimensions.
  """

  table: jax.Array
  counts: jax.Array
  offset: jax.Array


class ReplicaOptions(NamedTuple):
  """The static options, checked; they are parameters of the primitives."""

  num_physical: int
  policy: str
  load: str


def check_replicas(
  replica_table: Any,
  replica_counts: Any,
  token_offset: Any,
  *,
  num_physical: Any,
  policy: Any,
  load: Any,
  lead: tuple[int, ...],
  lead_name: str,
  num_experts: int | None = None,
) -> tuple[Tables, ReplicaOptions]:
  """Checks what says how replicas are assigned.

  `lead` are the leading dimensions of the tokens, which `lead_name` describes; `num_experts` is the
  number of experts if it is known otherwise.
  """
  table = _as_int32("replica_table", replica_table)
  if table.ndim != 2 or 0 in table.shape:
    raise ValueError(f"replica_table must have shape [E, R] with E, R >= 1, got {table.shape}")
  experts, width = table.shape
  if num_experts is not None and experts != num_experts:
    raise ValueError(
      f"replica_table must have shape [E, R] with E = {num_experts}, the experts of logits, got "
      f"{table.shape}"
    )
  if experts * width > _MOST_INT32:
    raise ValueError(
      f"replica_table must have at most {_MOST_INT32} entries, got shape {table.shape}"
    )
  counts = _as_int32("replica_counts", replica_counts)
  _options.check_shape("replica_counts", counts.shape, (experts,), "[E]")
  if num_physical is None:
    num_physical = experts * width
  num_physical = _options.check_int("num_physical", num_physical, 1, _MOST_INT32)
  policy = _options.check_choice("policy", policy, POLICIES)
  load = _options.check_choice("load", load, LOADS)
  bins = load_bins(experts, num_physical, load)
  if bins > _MOST_BINS:
    what = "E" if load == "logical" else "num_physical"
    raise ValueError(f"{what} must be at most {_MOST_BINS} to count load={load!r}, got {bins}")
  offset = _check_offset(token_offset, lead, lead_name)
  _check_values(replica_table, replica_counts, width, num_physical)
  return Tables(table, counts, offset), ReplicaOptions(num_physical, policy, load)


def _as_int32(name: str, value: Any) -> jax.Array:
  """Integers as int32; what int32 cannot hold becomes -1, which is as much out of range."""
  if not isinstance(value, np.ndarray):
    value = _options.check_array(name, value)
  if not jnp.issubdtype(value.dtype, jnp.integer):
    raise TypeError(f"{name} must have an integer dtype, got {value.dtype.name}")
  if isinstance(value, np.ndarray):  # before JAX cuts off the upper half of 64 bits
    return jnp.asarray(_narrowed(value, np))
  return _narrowed(value, jnp)


def _narrowed(value, xp):
  """Integers of an array of numpy or JAX (`xp`) as int32."""
  if value.dtype.itemsize < 4 or value.dtype == np.int32:
    return value.astype(xp.int32)
  fits = (value >= 0) & (value <= _MOST_INT32)
  return xp.where(fits, value.astype(xp.int32), xp.int32(-1))


def _check_offset(value: Any, lead: tuple[int, ...], lead_name: str) -> jax.Array:
  """The offset as uint32, of shape `lead`."""
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    value = np.asarray(int(value) % 2**32, np.uint32)
  if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer):
    value = value.astype(np.uint32)  # before JAX cuts off the upper half of 64 bits
  offset = _options.check_array("token_offset", value)
  if not jnp.issubdtype(offset.dtype, jnp.integer):
    raise TypeError(f"token_offset must have an integer dtype, got {offset.dtype.name}")
  if offset.shape not in ((), lead):
    raise ValueError(f"token_offset must have shape () or {lead_name} = {lead}, got {offset.shape}")
  offset = offset.astype(jnp.uint32)
  return offset if offset.shape == lead else jnp.broadcast_to(offset, lead)


def _known(value: Any) -> np.ndarray | None:
  """The values of an array, None where it is traced or lies on other hosts."""
  if isinstance(value, jax.Array):
    if isinstance(value, Tracer) or not value.is_fully_addressable:
      return None
    return jax.device_get(value)
  return np.asarray(value)


def _check_values(table: Any, counts: Any, width: int, num_physical: int) -> None:
  """ValueError if values that are known cannot be used."""
  known_counts, known_table = _known(counts), _known(table)
  if known_counts is None:
    return
  bad = np.flatnonzero((known_counts < 1) | (known_counts > width))
  if bad.size:
    e = int(bad[0])
    raise ValueError(
      f"replica_counts must lie in 1 .. R = {width}, got {known_counts[e]} for expert {e}"
    )
  if known_table is None:
    return
  used = np.arange(width) < known_counts[:, None].astype(np.int64)
  bad = np.argwhere(used & ((known_table < 0) | (known_table >= num_physical)))
  if bad.size:
    e, r = bad[0].tolist()
    raise ValueError(
      f"replica_table must hold slots in 0 .. num_physical - 1 = {num_physical - 1} where they are "
      f"used, got {known_table[e, r]} for expert {e}, replica {r}"
    )


# ---- the primitive ----


def group_tables(tables: Tables, groups: int, tokens: Any) -> Tables:
  """The tables as operands, with a copy for every batch row.

  The load has no token dimension for the partitioner to split by, so the tokens of a row are cut
  into as many groups as there may be shards, each with the index of its own first token: the last
  batch dimension, if there is more than one.
  """
  table, counts, offset = tables
  if groups > 1:
    batch = (*offset.shape, groups)
    first = jax.lax.broadcasted_iota(jnp.uint32, batch, len(batch) - 1)
    offset = first * np.uint32(tokens // groups) + offset[..., None]
  batch = offset.shape
  expand = (None,) * len(batch)
  return Tables(
    jnp.broadcast_to(table[expand], (*batch, *table.shape)),
    jnp.broadcast_to(counts[expand], (*batch, *counts.shape)),
    offset,
  )


def sum_groups(loads: jax.Array, groups: int) -> jax.Array:
  """The load of rows from that of their groups of tokens."""
  return jnp.sum(loads, axis=-2, dtype=jnp.int32) if groups > 1 else loads


def load_bins(num_experts: int, num_physical: int, load: str) -> int:
  """The size of a row of the load."""
  return num_experts if load == "logical" else num_physical


def _results(shapes, *, num_physical: int, load: str, **_: Any) -> list[Result]:
  bins = load_bins(shapes[1][-2], num_physical, load)
  return [Result(shapes[0][-2:], np.dtype(np.int32)), Result((bins,), np.dtype(np.int32))]


def replica_attributes(*, num_physical: int, policy: str, load: str) -> dict[str, Any]:
  """FFI attributes of the options."""
  return {
    "num_physical": num_physical,
    "policy": POLICIES.index(policy),
    "load": LOADS.index(load),
  }


def _attributes(*, has_where: bool, **params: Any) -> dict[str, Any]:
  return replica_attributes(**params) | {"has_where": has_where}


def _reference(*operands: jax.Array, has_where: bool, **params: Any):
  experts, table, counts, offset = operands[:4]
  where = operands[4] if has_where else None
  return _reference_replicas.assign_replicas(experts, table, counts, offset, where, **params)


bind = make_primitive(
  Operation(
    name="assign_replicas",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=_results,
    attributes=_attributes,
    reference=_reference,
    tangents=lambda *_, **__: [None, None],
  )
)
