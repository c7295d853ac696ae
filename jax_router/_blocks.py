"""`plan_blocks`: entries sorted by expert, each expert's run padded to whole blocks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_router import _native, _options, _reference_blocks
from jax_router._operands import CHECKPOINT_NAME
from jax_router._options import Routing
from jax_router._plan import check_experts
from jax_router._primitive import Operation, Result, check_whole_tokens, make_primitive

BLOCK_LAYOUTS = ("flat", "packed")
_MOST_POSITIONS = 2**31 - 1
_MOST_PACKED_SLOTS = 2**8 - 1  # the slot k marks a pad
_MOST_PACKED_TOKENS = 2**24 - 1  # the token n <= T marks a pad


class BlockPlan(NamedTuple):
  """Entries sorted by expert in blocks that belong to one expert each.

  Of experts `[..., T, k]` and blocks of U positions, with entry t * k + j slot j of token t,
  N = T * k and P = N + min(E, N) * (U - 1) rounded up to whole blocks. Every position is defined:

  Attributes:
    ids: `[..., P]` int32. "flat": the entry, N where a position holds none. "packed":
      j << 24 | t, k << 24 | num_tokens where it holds none; to decode a slot, shift unsigned.
    weights: `[..., P]` in the dtype of the routing's, weight of the entry, 0 where there is none.
    block_experts: `[..., P // U]` int32, expert of each block, -1 for unused ones, which come last.
      With an `expert_mask` experts are numbered among those that it keeps.
    num_padded: `[...]` int32, positions in used blocks.
    num_tokens: `[...]` int32, how many tokens count: T, or `num_valid`.
    inverse: `[..., T, k]` int32, position of each entry, -1 if it was dropped.
  """

  ids: jax.Array
  weights: jax.Array
  block_experts: jax.Array
  num_padded: jax.Array
  num_tokens: jax.Array
  inverse: jax.Array


def plan_blocks(
  routing: Routing,
  num_experts: int,
  block_size: int,
  *,
  layout: str = "flat",
  expert_mask: jax.Array | np.ndarray | None = None,
  num_valid: int | jax.Array | np.ndarray | None = None,
  implementation: str | None = None,
) -> BlockPlan:
  """Sorts the slots of all tokens by expert and pads each expert's run to whole blocks.

  A grouped matmul that works on tiles of `block_size` rows then finds one expert in each tile.
  Experts come in ascending order, those without entries take no block; the entries of an expert in
  the order of the tokens, of a token in the order of its slots. An expert given twice keeps both.

  Dropped, with an inverse of -1, are entries of experts outside [0, E) (`route` gives padding
  tokens E), of experts that `expert_mask` leaves out, and of tokens from `num_valid` on.

  The integers are the same on every device and in every run. Differentiable in `routing.weights`.

  Sharding: leading dimensions may be sharded, each has its own plan. Tokens may not, for the order
  is one over all of them: call `plan_blocks` in `jax.shard_map`, or with a leading dimension that
  carries the sharding.

  Args:
    routing: `Routing(weights, experts)` as `route` gives it: `[..., T, k]` floating (they pass
      through float32), and `[..., T, k]` integer with T * k < 2**31. "packed" needs k < 2**8 and
      T < 2**24.
    num_experts: static E, at least 1.
    block_size: static U, at least 1. P must be less than 2**31.
    layout: "flat" (as vLLM's moe_align_block_size) or "packed" (as aiter's moe_sorting).
    expert_mask: `[E]` bool or integer, False or 0 for experts that live elsewhere.
    num_valid: how many tokens count, clamped to [0, T]: an integer or an integer array, `[]` or
      one for each leading index `[...]`. It may be traced: no shape depends on it.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `BlockPlan(ids, weights, block_experts, num_padded, num_tokens, inverse)`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; a size that the layout cannot hold;
      an implementation that is not there; tokens sharded along Explicit axes; when it is compiled:
      no leading dimension in a computation over several devices whose sharding its type does not
      tell.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> routing = jax_router.Routing(jnp.ones((3, 2)), jnp.array([[2, 0], [1, 2], [0, 2]]))
    >>> blocks = jax_router.plan_blocks(routing, 4, 2)
    >>> blocks.ids.tolist(), blocks.block_experts.tolist(), int(blocks.num_padded)
    ([1, 4, 2, 6, 0, 3, 5, 6, 6, 6], [0, 1, 2, 2, -1], 8)
  """
  num_experts = _options.check_int("num_experts", num_experts, 1, 2**31 - 1)
  weights, experts = _check_routing(routing, num_experts)
  static = check_static(experts.shape, num_experts, block_size, layout, implementation)
  batch = experts.shape[:-2]
  mask = None
  if expert_mask is not None:
    mask = _check_mask(expert_mask, num_experts)
    mask = jnp.broadcast_to(mask[(None,) * len(batch)], (*batch, num_experts))
  if num_valid is not None:
    num_valid = _check_num_valid(num_valid, batch, experts.shape[-2])
  results: Sequence[jax.Array]
  if implementation == "reference":
    results = _reference(static, experts, weights.astype(jnp.float32), mask, num_valid)
  else:
    results = _blocks(static, experts, weights.astype(jnp.float32), mask, num_valid)
  ids, sorted_weights, *rest = results
  return BlockPlan(ids, sorted_weights.astype(weights.dtype), *rest)


# ---- arguments ----


class Static(NamedTuple):
  """What the primitive and its gradient need to know beforehand."""

  num_experts: int
  block_size: int
  layout: str
  implementation: str | None

  @property
  def params(self) -> dict[str, Any]:
    """Those parameters of the primitive."""
    return {
      "num_experts": self.num_experts, "block_size": self.block_size, "layout": self.layout
    }  # fmt: skip


def num_positions(entries: int, num_experts: int, block_size: int) -> int:
  """P: the most positions that so many entries can need, in whole blocks."""
  most = entries + min(num_experts, entries) * (block_size - 1)
  return -(-most // block_size) * block_size


def check_static(
  shape: tuple[int, ...], num_experts: int, block_size: Any, layout: Any, implementation: Any
) -> Static:
  """Checks the static arguments for experts of this shape `[..., T, k]`."""
  block_size = _options.check_int("block_size", block_size, 1, _MOST_POSITIONS)
  layout = _options.check_choice("layout", layout, BLOCK_LAYOUTS)
  if implementation is not None:
    _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
    _native.check_implementation(implementation)
  tokens, k = shape[-2:]
  if not isinstance(tokens, int):
    raise ValueError(f"a block plan needs a static number of tokens, got shape {shape}")
  if layout == "packed" and (k > _MOST_PACKED_SLOTS or tokens > _MOST_PACKED_TOKENS):
    raise ValueError(
      f"layout='packed' holds at most k = {_MOST_PACKED_SLOTS} slots and {_MOST_PACKED_TOKENS} "
      f"tokens, got experts of shape {shape}; use layout='flat'"
    )
  positions = num_positions(tokens * k, num_experts, block_size)
  if positions > _MOST_POSITIONS:
    raise ValueError(
      f"block_size {block_size} needs {positions} positions for experts of shape {shape} and "
      f"num_experts = {num_experts}, more than int32 numbers ({_MOST_POSITIONS})"
    )
  return Static(num_experts, block_size, layout, implementation)


def _check_routing(routing: Any, num_experts: int) -> tuple[jax.Array, jax.Array]:
  """Weights, and experts as int32, both `[..., T, k]`."""
  if not isinstance(routing, tuple) or len(routing) != 2:
    raise TypeError(f"routing must be a jax_router.Routing, got {type(routing).__name__}")
  experts = check_experts("plan_blocks", "routing.experts", routing[1], num_experts)
  weights = _options.check_array("routing.weights", routing[0])
  if not jnp.issubdtype(weights.dtype, jnp.floating):
    raise TypeError(f"routing.weights must have a floating dtype, got {weights.dtype.name}")
  _options.check_shape("routing.weights", weights.shape, experts.shape, "routing.experts.shape")
  if experts.shape[-1] < 1:
    raise ValueError(f"routing.experts must have k >= 1 slots, got shape {experts.shape}")
  check_whole_tokens("plan_blocks", "routing.weights", weights, weights.ndim - 2)
  return weights, experts


def _check_mask(mask: Any, num_experts: int) -> jax.Array:
  """An expert mask as bool `[E]`."""
  mask = _options.check_array("expert_mask", mask)
  if mask.dtype != np.bool_ and not jnp.issubdtype(mask.dtype, jnp.integer):
    raise TypeError(f"expert_mask must have dtype bool or an integer one, got {mask.dtype.name}")
  _options.check_shape("expert_mask", mask.shape, (num_experts,), "(num_experts,)")
  return mask if mask.dtype == np.bool_ else mask != 0


def _check_num_valid(num_valid: Any, batch: tuple[int, ...], tokens: int) -> jax.Array:
  """The number of valid tokens as int32, one for each row of the batch."""
  if not isinstance(num_valid, (jax.Array, np.ndarray, np.generic)):
    try:
      num_valid = np.int32(min(max(operator.index(num_valid), 0), tokens))
    except TypeError:
      kind = type(num_valid).__name__
      raise TypeError(f"num_valid must be an integer or an integer array, got {kind}") from None
  if not jnp.issubdtype(num_valid.dtype, jnp.integer):
    raise TypeError(f"num_valid must have an integer dtype, got {num_valid.dtype.name}")
  if num_valid.shape not in ((), batch):
    shapes = " or ".join(map(str, dict.fromkeys(((), batch))))
    raise ValueError(f"num_valid must have shape {shapes}, got {num_valid.shape}")
  if num_valid.dtype.itemsize > 4 or num_valid.dtype == np.uint32:
    num_valid = num_valid.clip(0, tokens)  # by numpy or JAX: neither cuts off the upper half
  return jnp.broadcast_to(jnp.asarray(num_valid).astype(jnp.int32), batch)


# ---- the primitive ----

# The kernels cut more entries than that into chunks, of which each has its counts.
MOST_OF_ONE_CHUNK = 2048
_CHUNKS = 128  # wanted
_FEWEST_OF_CHUNK, _MOST_OF_CHUNK = 512, 32768


def _scratch_rows(entries: int, num_experts: int) -> int:
  """Rows of counts: one for each chunk, and one for all."""
  if entries <= MOST_OF_ONE_CHUNK:
    return 2
  # A chunk's counts must cost less than its entries.
  size = max(_FEWEST_OF_CHUNK, num_experts, -(-entries // _CHUNKS))
  return -(-entries // min(size, _MOST_OF_CHUNK)) + 1


def block_results(
  tokens: int, k: int, *, num_experts: int, block_size: int, **_: Any
) -> list[Result]:
  """Types of the results of the primitives that make a block plan."""
  entries = tokens * k
  positions = num_positions(entries, num_experts, block_size)
  float32, int32 = np.dtype(np.float32), np.dtype(np.int32)
  return [
    Result((positions,), int32),
    Result((positions,), float32),
    Result((positions // block_size,), int32),
    Result((), int32),
    Result((), int32),
    Result((tokens, k), int32),
    Result((_scratch_rows(entries, num_experts), num_experts), int32),
  ]


def block_attributes(*, num_experts: int, block_size: int, layout: str) -> dict[str, Any]:
  """FFI attributes of the static arguments."""
  return {
    "num_experts": num_experts,
    "block_size": block_size,
    "layout": BLOCK_LAYOUTS.index(layout),
  }


def runs_on(platform: str, avals: Any, *, num_experts: int, **_: Any) -> bool:
  """Whether the kernel of the platform takes so many experts."""
  del avals
  return platform == "cpu" or num_experts <= _MOST_CUDA_EXPERTS


# What a block of threads has to know of every expert lies in its shared memory.
_MOST_CUDA_EXPERTS = 8192


def _primitive_reference(*operands, has_mask: bool, has_num_valid: bool, **params: Any):
  experts, weights, *rest = operands
  mask = rest[0] if has_mask else None
  num_valid = rest[-1] if has_num_valid else None
  *batch, tokens, k = experts.shape
  types = block_results(tokens, k, **params)
  (positions,), (rows, num_experts) = types[0].trailing, types[-1].trailing
  results = _reference_blocks.blocks(
    experts, weights, mask, num_valid, positions=positions, **params
  )
  return [*results, jnp.zeros((*batch, rows, num_experts), jnp.int32)]


def _tangents(operands, results, tangents, **_: Any):
  del operands
  dot = _reference_blocks.scatter(tangents[1], results[5], results[0].shape[-1])
  return [None, dot, None, None, None, None, None]


bind = make_primitive(
  Operation(
    name="blocks",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=lambda shapes, **params: block_results(*shapes[0][-2:], **params),
    attributes=lambda *, has_mask, has_num_valid, **params: (
      block_attributes(**params) | {"has_mask": has_mask, "has_num_valid": has_num_valid}
    ),
    reference=_primitive_reference,
    tangents=_tangents,
    runs_on=runs_on,
    whole_tokens=True,
  )
)


# ---- the differentiable function ----


def _reference(static: Static, experts, weights, mask, num_valid):
  tokens, k = experts.shape[-2:]
  positions = num_positions(tokens * k, static.num_experts, static.block_size)
  return _reference_blocks.blocks(
    experts, weights, mask, num_valid, positions=positions, **static.params
  )


def _run(static: Static, experts, weights, mask, num_valid) -> tuple[jax.Array, ...]:
  results = bind(
    *(x for x in (experts, weights, mask, num_valid) if x is not None),
    has_mask=mask is not None,
    has_num_valid=num_valid is not None,
    implementation=static.implementation,
    **static.params,
  )
  return tuple(results[:6])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(static: Static, experts, weights, mask, num_valid):
  return _run(static, experts, weights, mask, num_valid)


def _blocks_forward(static: Static, experts, weights, mask, num_valid):
  # Named here, or jax.checkpoint would sort again in the backward.
  results = _run(static, experts, weights, mask, num_valid)
  named = tuple(checkpoint_name(x, CHECKPOINT_NAME) for x in results)
  return named, named[5]


def _blocks_backward(static: Static, inverse, cotangents):
  del static
  return None, _reference_blocks.gather(cotangents[1], inverse), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)
