"""`route_and_plan_blocks`: routing and its block plan in one call, for batches of few tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_router import _blocks, _native, _operands, _options, _reference, _reference_blocks, _route
from jax_router._blocks import BlockPlan
from jax_router._operands import CHECKPOINT_NAME
from jax_router._options import Groups, RouteOptions, Routing
from jax_router._primitive import Operation, Result, check_whole_tokens, make_primitive


def route_and_plan_blocks(
  logits: jax.Array | np.ndarray,
  k: int,
  block_size: int,
  *,
  layout: str = "flat",
  score: str = "softmax",
  renormalize: bool = True,
  scale: float = 1.0,
  bias: jax.Array | np.ndarray | None = None,
  groups: Groups | None = None,
  where: jax.Array | np.ndarray | None = None,
  experts: jax.Array | np.ndarray | None = None,
  index_dtype: Any = jnp.int32,
  weight_dtype: Any = None,
  zeros: jax.ShapeDtypeStruct | None = None,
  implementation: str | None = None,
) -> tuple[Routing, BlockPlan] | tuple[Routing, BlockPlan, jax.Array]:
  """Chooses `k` experts for every token and sorts the choice by expert into blocks.

  The results are, to the bit, those of

      routing = jax_router.route(logits, k, ...)
      blocks = jax_router.plan_blocks(routing, E, block_size, layout=layout)

  Up to `max_fused_tokens` tokens one kernel makes both, above it the two kernels follow each other.
  Which it is depends on shapes and platform alone.

  Differentiable in `logits` through both `weights`, in reverse mode, twice; the rest as in
  `jax_router.route`. Sharding as in `jax_router.plan_blocks`.

  Args:
    logits: `[..., T, E]` float32, bfloat16 or float16. All arithmetic is float32.
    block_size, layout: as in `jax_router.plan_blocks`.
    k, score, renormalize, scale, bias, groups, where, experts, index_dtype, weight_dtype,
      implementation: as in `jax_router.route`.
    zeros: shape and dtype of an array of zeros to return too, such as the one that the outputs of
      the experts will be added up in; its shape starts with the leading dimensions of `logits`.

  Returns:
    `(Routing, BlockPlan)`, or with `zeros` `(Routing, BlockPlan, array)`.

  Raises:
    TypeError, ValueError: as `jax_router.route` and `jax_router.plan_blocks`; `zeros` of another
      type, or of a shape that does not start with the leading dimensions.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    >>> routing, blocks = jax_router.route_and_plan_blocks(logits, 2, 2)
    >>> routing.experts.tolist(), blocks.ids.tolist(), blocks.block_experts.tolist()
    ([[1, 2], [0, 1]], [2, 4, 0, 3, 1, 4, 4, 4], [0, 1, 2, -1])
  """
  given, options = _operands.check_arguments(
    logits, k, score=score, renormalize=renormalize, scale=scale, bias=bias, groups=groups,
    where=where, experts=experts, implementation=implementation,
  )  # fmt: skip
  if given.logits.ndim < 2:
    raise ValueError(f"logits must have shape [..., T, E], got {given.logits.shape}")
  *lead, tokens, num_experts = given.logits.shape
  batch = tuple(lead)
  index_dtype = _options.check_index_dtype(index_dtype, num_experts)
  weight_dtype = _options.check_weight_dtype(weight_dtype)
  shape = (*batch, tokens, options.k)
  blocks = _blocks.check_static(shape, num_experts, block_size, layout, implementation)
  for name, operand in (
    ("logits", given.logits),
    ("where", given.where),
    ("experts", given.experts),
  ):
    if operand is not None:
      check_whole_tokens("route_and_plan_blocks", name, operand, len(batch))
  static = _Static(
    _operands.Static(options, implementation, num_experts, given.logits.dtype),
    blocks,
    _check_zeros(zeros, batch),
  )
  operands = _operands.reshape_operands(given, batch, tokens)
  results: Sequence[jax.Array]
  if implementation == "reference":
    results = _chain_reference(static, *operands)
  else:
    results = _route_and_plan(static, *operands)
  weights, chosen, ids, sorted_weights, *rest = results
  routing = Routing(weights.astype(weight_dtype), chosen.astype(index_dtype))
  plan = BlockPlan(ids, sorted_weights.astype(weight_dtype), *rest[:4])
  return (routing, plan) if zeros is None else (routing, plan, rest[4])


def max_fused_tokens(
  num_experts: int, k: int, *, groups: Groups | None = None, device: Any = None
) -> int:
  """Up to how many tokens `route_and_plan_blocks` is one kernel; 0 where there is none.

  On NVIDIA GPUs that takes clusters of thread blocks (compute capability 9 or 10), and room for the
  rows of the tokens in shared memory.

  Args:
    num_experts: E.
    k: experts for each token, 1 <= k <= E.
    groups: as in `jax_router.route`.
    device: the `jax.Device` where it runs; by default the first of the default backend.

  Returns:
    The largest number of tokens in a batch row. More than that take two kernels, with the same
    results.

  Raises:
    TypeError, ValueError: a number that is not an integer, or out of range; groups that do not fit.
  """
  num_experts = _options.check_int("num_experts", num_experts, 1, 2**31 - 1)
  options = _options.route_options(num_experts, k, "softmax", True, 1.0, groups)
  device = jax.devices()[0] if device is None else device
  if device.platform == "cpu":
    return _most_on_cpu(options.k)
  if device.platform != "gpu":
    return 0
  count = 0 if groups is None else groups.count
  return _native.max_fused_tokens(num_experts, options.k, count, device.local_hardware_id)


def _most_on_cpu(k: int) -> int:
  # Of more entries than one chunk holds, the sort has several threads to write them.
  return _blocks.MOST_OF_ONE_CHUNK // k


class _Static(NamedTuple):
  """What the forward and the backward need to know beforehand."""

  route: _operands.Static
  blocks: _blocks.Static
  zeros: Result | None


def _check_zeros(zeros: Any, batch: tuple[int, ...]) -> Result | None:
  """The dimensions of `zeros` after the leading ones, and its dtype."""
  if zeros is None:
    return None
  if not isinstance(zeros, jax.ShapeDtypeStruct):
    raise TypeError(f"zeros must be a jax.ShapeDtypeStruct or None, got {type(zeros).__name__}")
  if zeros.shape[: len(batch)] != batch:
    raise ValueError(
      f"zeros must have a shape that starts with the leading dimensions of logits {batch}, got "
      f"{zeros.shape}"
    )
  return Result(tuple(zeros.shape[len(batch) :]), np.dtype(zeros.dtype))


# ---- the primitive ----


def _results(shapes, *, options: RouteOptions, zeros: Result | None, **params: Any) -> list[Result]:
  tokens, num_experts = shapes[0][-2:]
  return [
    Result((tokens, options.k), np.dtype(np.float32)),
    Result((tokens, options.k), np.dtype(np.int32)),
    Result((tokens,), np.dtype(np.float32)),
    *_blocks.block_results(
      tokens, options.k, num_experts=num_experts, block_size=params["block_size"]
    ),
    *([] if zeros is None else [zeros]),
  ]


def _attributes(*, options, num_experts, block_size, layout, zeros, **present) -> dict[str, Any]:
  del zeros
  blocks = _blocks.block_attributes(num_experts=num_experts, block_size=block_size, layout=layout)
  return _operands.option_attributes(options) | blocks | present


def _chain(
  *operands, options, num_experts, block_size, layout, zeros, implementation, **present: bool
):
  """The same by the primitives of `route` and `plan_blocks`."""
  routing = _route.bind_forward(
    *operands, options=options, index_dtype=np.dtype(np.int32), implementation=implementation,
    **present,
  )  # fmt: skip
  blocks = _blocks.bind(
    routing[1], routing[0], num_experts=num_experts, block_size=block_size, layout=layout,
    has_mask=False, has_num_valid=False, implementation=implementation,
  )  # fmt: skip
  return [*routing, *blocks, *_zeros(zeros, operands[0].shape[:-2])]


def _zeros(zeros: Result | None, batch: tuple[int, ...]) -> list[jax.Array]:
  return [] if zeros is None else [jnp.zeros((*batch, *zeros.trailing), zeros.dtype)]


def _tangents(operands, results, tangents, *, options, **_: Any):
  choice = results[:3]
  weights_dot, normalizer_dot = _operands.weigh_tangents(operands, choice, tangents, options)
  absent = [None] * (len(results) - 5)
  if weights_dot is None:
    return [None, None, None, None, None, *absent]
  ids, inverse = results[3], results[8]
  sorted_dot = _reference_blocks.scatter(weights_dot, inverse, ids.shape[-1])
  return [weights_dot, None, normalizer_dot, None, sorted_dot, *absent]


def _runs_on(platform: str, avals, *, options: RouteOptions, **params: Any) -> bool:
  # On a GPU the call itself falls back to two kernels: only the device knows its shared memory.
  return (
    avals[0].shape[-2] <= _most_on_cpu(options.k)
    and _operands.forward_runs_on(platform, avals, options=options)
    and _blocks.runs_on(platform, avals, num_experts=params["num_experts"])
  )


_bind = make_primitive(
  Operation(
    name="route_and_plan_blocks",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=_results,
    attributes=_attributes,
    reference=_chain,
    tangents=_tangents,
    runs_on=_runs_on,
    whole_tokens=True,
    composed=True,
  )
)


# ---- the differentiable function ----


def _chain_reference(static: _Static, *arrays):
  """Results in plain JAX, without the normalizer."""
  options, num_experts = static.route.options, static.route.num_experts
  weights, experts, _ = _reference.route(*arrays, options=options, index_dtype=np.dtype(np.int32))
  *batch, tokens, k = experts.shape
  positions = _blocks.num_positions(tokens * k, num_experts, static.blocks.block_size)
  blocks = _reference_blocks.blocks(
    experts, weights, None, None, positions=positions, **static.blocks.params
  )
  return weights, experts, *blocks, *_zeros(static.zeros, tuple(batch))


def _run(static: _Static, *arrays) -> list[jax.Array]:
  operands = _operands.Operands(*arrays)
  results = _bind(
    *operands.present,
    options=static.route.options,
    zeros=static.zeros,
    implementation=static.route.implementation,
    **static.blocks.params,
    **operands.presence,
  )
  return [*results[:9], *results[10:]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route_and_plan(static: _Static, logits, bias, where, experts):
  results = _run(static, logits, bias, where, experts)
  return *results[:2], *results[3:]


def _forward(static: _Static, logits, bias, where, experts):
  results = _run(static, logits, bias, where, experts)
  residuals = _operands.save_choice(static.route, logits, results[:3])
  blocks = [checkpoint_name(x, CHECKPOINT_NAME) for x in results[3:9]]
  return (*residuals[:2], *blocks, *results[9:]), (residuals, blocks[5])


def _backward(static: _Static, residuals, cotangents):
  choice, inverse = residuals
  cotangent = cotangents[0] + _reference_blocks.gather(cotangents[3], inverse)
  return _operands.pull_back(_route.bind_backward, static.route, cotangent, choice)


_route_and_plan.defvjp(_forward, _backward)
