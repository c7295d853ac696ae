"""The order of tokens by expert that a grouped matmul wants."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_router import _native, _options, _reference_plan
from jax_router._operands import CHECKPOINT_NAME
from jax_router._primitive import Operation, Result, check_whole_tokens, make_primitive

_MOST_EXPERTS = 2**24
_MOST_ENTRIES = 2**31 - 1


class Plan(NamedTuple):
  """Where the entries of tokens go when they are sorted by expert.

  Of experts `[..., T, k]`, n = T * k. Entry f = t * k + j is slot j of token t.

  Attributes:
    order: `[..., n]` int32, the entries sorted by expert, those of one expert in the order of the
      tokens; entries in no group last.
    inverse: `[..., n]` int32, the position of each entry: order[inverse[f]] = f.
    group_sizes: `[..., E]` int32, how many entries each expert has; what `jax.lax.ragged_dot`
      takes. Positions from their sum on are those of entries in no group.
  """

  order: jax.Array
  inverse: jax.Array
  group_sizes: jax.Array


def plan(
  experts: jax.Array | np.ndarray,
  num_experts: int,
  *,
  implementation: str | None = None,
) -> Plan:
  """Sorts the slots of all tokens by expert, stably.

  With n = T * k and ids = experts.reshape(n):

      order       = stable argsort of ids
      inverse     = its inverse permutation, order[inverse[f]] = f
      group_sizes = how often each of 0 .. E - 1 occurs in ids

  An id outside [0, E), such as the index E that `route` gives padding tokens, is in no group: it is
  counted nowhere, and its entry comes after all groups, in the order of the tokens.

  The integers are the same on every device and in every run. Nothing here has a gradient. It takes
  time in proportion to n + E: entries are counted and scattered, not compared.

  Sharding: leading dimensions may be sharded, each has its own plan. Tokens may not, for the order
  is one over all of them: call `plan` in `jax.shard_map`, or with a leading dimension that carries
  the sharding.

  Args:
    experts: `[..., T, k]` integer, as `route` gives it; T * k < 2**31.
    num_experts: static E, 1 <= E <= 2**24.
    implementation: None (best for the platform), "cpu", "cuda" (up to 16384 experts; beyond that
      None takes plain JAX on a GPU) or "reference" (plain JAX).

  Returns:
    `Plan(order [..., n], inverse [..., n], group_sizes [..., E])`, all int32.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; an implementation that is not there;
      tokens sharded along Explicit axes; when it is compiled: no leading dimension in a computation
      over several devices whose sharding its type does not tell.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> order, inverse, group_sizes = jax_router.plan(jnp.array([[2, 0], [1, 2], [0, 2]]), 3)
    >>> order.tolist(), inverse.tolist(), group_sizes.tolist()
    ([1, 4, 2, 0, 3, 5], [3, 0, 2, 4, 1, 5], [2, 1, 3])
  """
  num_experts = _options.check_int("num_experts", num_experts, 1, _MOST_EXPERTS)
  experts = check_experts("plan", "experts", experts, num_experts)
  if implementation is not None:
    _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
    _native.check_implementation(implementation)
  if implementation == "reference":
    return Plan(*_reference_plan.plan(experts, num_experts=num_experts))
  order, inverse, group_sizes, _ = _bind(
    experts, num_experts=num_experts, implementation=implementation
  )
  # Named, so that jax.checkpoint with a policy of names does not sort again.
  return Plan(*(checkpoint_name(x, CHECKPOINT_NAME) for x in (order, inverse, group_sizes)))


def check_experts(word: str, name: str, experts: Any, num_experts: int) -> jax.Array:
  """Ids as int32 `[..., T, k]`; `word` is the public function, `name` its argument."""
  if isinstance(experts, np.ndarray) and experts.dtype in (np.int64, np.uint64):
    experts = _narrowed(experts, num_experts, np)  # before JAX cuts off the upper half
  experts = _options.check_array(name, experts)
  if not jnp.issubdtype(experts.dtype, jnp.integer):
    raise TypeError(f"{name} must have an integer dtype, got {experts.dtype.name}")
  if experts.ndim < 2:
    raise ValueError(f"{name} must have shape [..., T, k], got {experts.shape}")
  tokens, k = experts.shape[-2:]
  if isinstance(tokens * k, int) and tokens * k > _MOST_ENTRIES:
    raise ValueError(
      f"{name} must have at most {_MOST_ENTRIES} entries T * k in a plan, got shape {experts.shape}"
    )
  check_whole_tokens(word, name, experts, experts.ndim - 2)
  if experts.dtype.itemsize == 8:
    return _narrowed(experts, num_experts, jnp)
  # An unsigned id that int32 cannot hold becomes negative: in no group, as it was.
  return experts.astype(jnp.int32)


def _narrowed(ids, num_experts: int, xp):
  """64-bit ids as int32, of an array of numpy or JAX (`xp`)."""
  return xp.where((ids >= 0) & (ids < num_experts), ids, num_experts).astype(xp.int32)


# The blocks of entries that the CUDA kernels count on their own, and what one of them can hold; the
# same as in src/plan_call.h.
_MOST_WHOLE_ENTRIES = 2**12
_MOST_BLOCK_ENTRIES = 2**15
_ENOUGH_BLOCKS = 128  # about as many as a GPU has processors
_FEWEST_BLOCK_ENTRIES = 512

# Every supported GPU grants a block 99 KiB of shared memory, in which each expert takes 6 bytes.
_MOST_ON_CUDA = 2**14


def _blocks(entries: Any, num_experts: int) -> Any:
  """Into how many blocks the entries of a batch row are cut, so that their counts find room."""
  if not isinstance(entries, int):  # a symbolic dimension
    return -(-entries // 2048)
  if entries <= _MOST_WHOLE_ENTRIES:
    return 0
  wanted = min(_ENOUGH_BLOCKS, entries // _FEWEST_BLOCK_ENTRIES)
  # Their counts take no more memory than the order and the inverse.
  affordable = 2 * entries // (num_experts + 1)
  return max(-(-entries // _MOST_BLOCK_ENTRIES), min(wanted, affordable))


def _results(shapes, *, num_experts: int) -> list[Result]:
  tokens, k = shapes[0][-2:]
  blocks = _blocks(tokens * k, num_experts)
  shapes = (tokens * k,), (tokens * k,), (num_experts,), (blocks, num_experts + 1)
  return [Result(shape, np.dtype(np.int32)) for shape in shapes]


def _reference(experts: jax.Array, *, num_experts: int) -> tuple[jax.Array, ...]:
  """The plan, and nothing in the place of the counts."""
  *batch, tokens, k = experts.shape
  counts = jnp.zeros((*batch, _blocks(tokens * k, num_experts), num_experts + 1), jnp.int32)
  return *_reference_plan.plan(experts, num_experts=num_experts), counts


_bind = make_primitive(
  Operation(
    name="plan",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=_results,
    attributes=lambda **_: {},
    reference=_reference,
    tangents=lambda *_, **__: [None] * 4,
    runs_on=lambda platform, _, *, num_experts: platform == "cpu" or num_experts <= _MOST_ON_CUDA,
    whole_tokens=True,
  )
)
