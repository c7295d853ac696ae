"""What `route` and its kin share: arguments, operands of the primitives, and their derivatives.

The forward primitives take logits `[*B, T, E]` and, where present, bias `[*B, E]`, where `[*B, T]`
and given experts `[*B, T, k]`. The backward primitives take a cotangent, then what the forward has
left: weights `[*B, T, k]`, experts `[*B, T, k]` and normalizer `[*B, T]`; the logits only where the
gradient is dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_router import _compat, _native, _options, _reference
from jax_router._options import GROUP_SCORES, SCORES, Groups, RouteOptions
from jax_router._primitive import Operation, Result, make_primitive, reference_tangents

CHECKPOINT_NAME = "jax_router"


class Operands(NamedTuple):
  """Operands of a forward primitive, None where absent."""

  logits: jax.Array
  bias: jax.Array | None
  where: jax.Array | None
  experts: jax.Array | None

  @property
  def present(self) -> list[jax.Array]:
    """What the primitive takes."""
    return [x for x in self if x is not None]

  @property
  def presence(self) -> dict[str, bool]:
    """Parameters of the primitive that tell its operands apart."""
    return {
      "has_bias": self.bias is not None,
      "has_where": self.where is not None,
      "has_experts": self.experts is not None,
    }


def unpack(operands, has_bias: bool, has_where: bool, has_experts: bool) -> Operands:
  """The operands of the primitive with None for absent ones."""
  rest = iter(operands[1:])
  bias, where, experts = (next(rest) if x else None for x in (has_bias, has_where, has_experts))
  return Operands(operands[0], bias, where, experts)


# ---- arguments ----


def check_arguments(
  logits: Any,
  k: Any,
  *,
  score: Any,
  renormalize: Any,
  scale: Any,
  bias: Any,
  groups: Any,
  where: Any,
  experts: Any,
  implementation: Any,
) -> tuple[Operands, RouteOptions]:
  """Checks the arguments of a public function; shapes stay as the caller has them."""
  logits = _options.check_logits(logits)
  options = _options.route_options(logits.shape[-1], k, score, renormalize, scale, groups)
  operands = _check_operands(logits, bias, where, experts, options.k)
  if implementation is not None:
    _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
    _native.check_implementation(implementation)
  if experts is not None:
    operands, options = operands._replace(bias=None), options._replace(groups=None)
  return operands, options


def _check_operands(logits, bias, where, experts, k) -> Operands:
  """The optional operands as arrays of the right shape and dtype."""
  num_experts = logits.shape[-1]
  if _compat.spec_of(jax.typeof(logits))[-1] is not None:
    raise ValueError(
      f"logits must not be sharded along their experts (last axis), got {jax.typeof(logits)}; "
      "reshard them to PartitionSpec(..., None)"
    )
  if bias is not None:
    bias = _options.check_array("bias", bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
      raise TypeError(f"bias must have a floating dtype, got {bias.dtype.name}")
    _options.check_shape("bias", bias.shape, (num_experts,), "[E]")
    bias = bias.astype(jnp.float32)
  if where is not None:
    where = _options.check_array("where", where)
    if where.dtype != np.bool_:
      raise TypeError(f"where must have dtype bool, got {where.dtype.name}")
    _options.check_shape("where", where.shape, logits.shape[:-1], "logits.shape[:-1]")
  if experts is not None:
    experts = _options.check_array("experts", experts)
    if not jnp.issubdtype(experts.dtype, jnp.integer):
      raise TypeError(f"experts must have an integer dtype, got {experts.dtype.name}")
    _options.check_shape(
      "experts", experts.shape, (*logits.shape[:-1], k), "logits.shape[:-1] + (k,)"
    )
    if experts.dtype != np.int32:
      experts = _narrowed(experts, num_experts)
  return Operands(logits, bias, where, experts)


def _narrowed(experts: jax.Array, num_experts: int) -> jax.Array:
  """Given experts as int32; those out of range, whatever their dtype, become `num_experts`."""
  most = min(num_experts - 1, int(jnp.iinfo(experts.dtype).max))
  valid = (experts >= 0) & (experts <= jnp.asarray(most, experts.dtype))
  return jnp.where(valid, experts.astype(jnp.int32), jnp.int32(num_experts))


def token_groups(tokens: Any) -> int:
  """Into how many groups tokens are cut, so that the partitioner can split what belongs to each.

  What has no token dimension of its own (a bias, a sum over tokens) must have one for the groups,
  or it could not be split with the logits: as many as there may be shards.
  """
  return math.gcd(tokens, _compat.automatic_devices()) if isinstance(tokens, int) else 1


def fold_tokens(operands: Operands) -> Operands:
  """Brings the operands into the form of the primitive.

  Without a bias every leading dimension is a batch dimension as it stands. With one, the tokens are
  cut into groups, and each group gets a copy of the bias.
  """
  batch, tokens = operands.logits.shape[:-2], math.prod(operands.logits.shape[-2:-1])
  if operands.bias is not None:
    if _compat.automatic_devices() == 1 or not isinstance(tokens, int):
      batch, tokens = (), math.prod(operands.logits.shape[:-1])
    else:
      groups = token_groups(tokens)
      batch, tokens = (*batch, groups), tokens // groups
  return reshape_operands(operands, batch, tokens)


def reshape_operands(operands: Operands, batch: tuple[int, ...], tokens: int) -> Operands:
  """Operands of `tokens` tokens for each of the batch dimensions, with a copy of the bias each."""
  logits, bias, where, experts = operands
  if bias is not None:
    bias = jnp.broadcast_to(bias[(None,) * len(batch)], (*batch, bias.shape[-1]))
  logits = logits.reshape(*batch, tokens, logits.shape[-1])
  if where is not None:
    where = where.reshape(*batch, tokens)
  if experts is not None:
    experts = experts.reshape(*batch, tokens, experts.shape[-1])
  # Joined here and not only at the primitive: the cast of replicated logits must lie outside the
  # custom_vjp, so that its transpose sums their gradient.
  folded = Operands(logits, bias, where, experts)
  joined = iter(_compat.join_varying_axes(folded.present))
  return Operands(next(joined), *(None if x is None else next(joined) for x in folded[1:]))


# ---- forward primitives ----


def forward_batch_ndim(shapes, *, has_bias: bool, **_: Any) -> int:
  """Number of batch dimensions."""
  # The bias has no token dimension; with one, only the dimensions before the tokens are shared.
  return len(shapes[0]) - (2 if has_bias else 1)


def option_attributes(options: RouteOptions) -> dict[str, Any]:
  """FFI attributes of the options."""
  groups = options.groups or Groups(0, 0, "max")
  return {
    "k": options.k,
    "score": SCORES.index(options.score),
    "renormalize": options.renormalize,
    "scale": np.float32(options.scale),
    "group_count": groups.count,
    "group_keep": groups.keep,
    "group_score": GROUP_SCORES.index(groups.score),
  }


# The CUDA kernels keep a row in the shared memory of a warp. Every supported GPU grants 99 KiB.
_CUDA_ROW_BYTES = 99 * 1024


def _row_fits(platform: str, num_experts: int) -> bool:
  return platform == "cpu" or 4 * num_experts <= _CUDA_ROW_BYTES


def forward_runs_on(platform: str, avals, *, options: RouteOptions, **_: Any) -> bool:
  """Whether the kernel of the platform takes a row of this size."""
  num_experts = avals[0].shape[-1]
  keys = 4 * (num_experts + 127)
  pairs = 8 * 2 ** (options.k - 1).bit_length() + 8
  groups = 8 * (options.groups.count + 3) if options.groups else 0
  bitmap = 4 * (num_experts // 32 + 4)
  return platform == "cpu" or keys + pairs + groups + bitmap <= _CUDA_ROW_BYTES


def backward_runs_on(platform: str, avals, **_: Any) -> bool:
  """The same for a backward whose first operand are the logits."""
  return _row_fits(platform, avals[0].shape[-1])


def weigh_tangents(operands, choice, tangents, options: RouteOptions):
  """Tangents of weights and normalizer, None where the logits have none.

  `choice`: the weights, experts and normalizer of the forward.
  """
  if tangents[0] is None:
    return None, None
  logits = operands[0]
  weights, experts, normalizer = choice
  active = _reference.active_slots(weights, experts, normalizer, logits.shape[-1])
  _, (weights_dot, normalizer_dot) = jax.jvp(
    lambda x: _reference.weigh(x, experts, active, options), (logits,), (tangents[0],)
  )
  return weights_dot, normalizer_dot


# ---- backward primitives ----


def make_backward(name: str, reference: Callable[..., jax.Array]) -> Callable[..., list[jax.Array]]:
  """Makes a backward primitive.

  `reference`: (cotangent, weights, experts, normalizer, logits or None, *, options, num_experts,
  dtype) -> gradient of the logits `[*B, T, E]` in plain JAX.
  """

  def run(*operands, **params):
    logits = operands[4] if len(operands) > 4 else None
    return [reference(*operands[:4], logits, **params)]

  def attributes(*, options, num_experts, dtype):
    del num_experts, dtype
    return option_attributes(options)

  return make_primitive(
    Operation(
      name=name,
      batch_ndim=lambda shapes, **_: len(shapes[0]) - 1,
      results=lambda _, *, num_experts, dtype, **__: [Result((num_experts,), dtype)],
      attributes=attributes,
      reference=run,
      tangents=reference_tangents(run),
      runs_on=lambda platform, _, *, num_experts, **__: _row_fits(platform, num_experts),
    )
  )


# ---- differentiable functions ----


class Static(NamedTuple):
  """What the forward and the backward of a differentiable function need to know beforehand."""

  options: RouteOptions
  implementation: str | None
  num_experts: int
  logits_dtype: np.dtype


def save_choice(static: Static, logits: jax.Array, choice) -> tuple[jax.Array | None, ...]:
  """Residuals of the backward: weights, experts and normalizer, and the logits where it needs them.

  Named here, inside the rule of a custom_vjp, or jax.checkpoint would route again in the backward.
  """
  named = (checkpoint_name(x, CHECKPOINT_NAME) for x in choice)
  return (*named, logits if static.options.dense_gradient else None)


def pull_back(bind_backward, static: Static, cotangent: jax.Array, residuals):
  """Gradients of logits, bias, where and experts; only the logits have one."""
  (gradient,) = bind_backward(
    cotangent,
    *(x for x in residuals if x is not None),
    options=static.options,
    num_experts=static.num_experts,
    dtype=static.logits_dtype,
    implementation=static.implementation,
  )
  return gradient, None, None, None
