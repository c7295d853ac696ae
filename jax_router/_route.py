"""`route`: chooses and weighs the experts of each token."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_router import _compat, _native, _options, _reference
from jax_router._options import GROUP_SCORES, SCORES, Groups, RouteOptions, Routing
from jax_router._primitive import Operation, Result, make_primitive

CHECKPOINT_NAME = "jax_router"


def route(
  logits: jax.Array | np.ndarray,
  k: int,
  *,
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
) -> Routing:
  """Chooses `k` experts for every token and weighs them.

  With y = score(logits), S = the k experts with the largest keys:

      key     = logits                 without a bias (every score is monotone in the logit)
              = y + bias               with one
      weights = scale * y[S] / (sum(y[S]) + 1e-20)     renormalize=True
              = scale * y[S]                           renormalize=False

  where for "softmax" with `renormalize=True` the weights are the softmax over the k chosen logits.
  Experts come in the order of `jax.lax.top_k`: descending key, ties to the lowest expert, +0 above
  -0. The bias steers the choice only; weights are made of scores without it.

  A NaN logit has key -inf and score 0. A row with fewer than k keys above -inf is filled up with
  the lowest experts left at weight 0; a row with none (or, with groups, with fewer than
  `groups.keep` group scores above -inf) gets experts 0 .. k-1, each of weight 1/k, and no gradient.
  A +inf logit scores like the largest float32. So experts are always distinct and in range, and
  weights finite whatever the logits hold; with "none" they are what the formula makes of the scores
  given. Sums of keys treat denormals as 0.

  Differentiable in `logits` in reverse mode, twice. For forward mode use
  `implementation="reference"`. Under `jax.checkpoint`, the policy
  `save_only_these_names("jax_router")` keeps the choice instead of routing again.

  Args:
    logits: `[..., E]` float32, bfloat16 or float16. All arithmetic is float32.
    k: static, 1 <= k <= E.
    score: "softmax" (over all E), "sigmoid", "sqrtsoftplus" (sqrt(log(1 + exp(x)))) or "none" (the
      input is already a score).
    renormalize: static, whether the k weights are divided by their sum.
    scale: static, multiplies the weights last.
    bias: `[E]` floating, added to the scores for the choice; gets no gradient.
    groups: `Groups(count, keep, score)`: only experts of the best groups can be chosen.
    where: `[...]` bool, False marks padding. Such a token gets expert `E` in every slot, weight 0,
      no gradient.
    experts: `[..., k]` integer, the choice itself (replay, hash routing). Selection is skipped, so
      `bias` and `groups` are checked but have no effect. An expert outside 0 .. E-1 becomes E with
      weight 0; if all others of a token have logit NaN or -inf, these get weight 1/k. So replaying
      a choice gives its weights again, but for rows without a choice because of bias or groups.
    index_dtype: integer dtype of the experts returned; it must hold E.
    weight_dtype: floating dtype of the weights, float32 by default.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `Routing(weights, experts)`, both `[..., k]`, best expert first.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape, an implementation that is not there,
      or, with Explicit sharding, logits sharded along their experts.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> weights, experts = jax_router.route(jnp.array([[0.0, 2.0, 1.0, 2.0]]), 2)
    >>> experts.tolist(), weights.tolist()
    ([[1, 3]], [[0.5, 0.5]])
  """
  logits = _options.check_logits(logits)
  num_experts = logits.shape[-1]
  options = _options.route_options(num_experts, k, score, renormalize, scale, groups)
  bias, where, experts = _check_operands(logits, bias, where, experts, options.k)
  index_dtype = _options.check_index_dtype(index_dtype, num_experts)
  weight_dtype = _options.check_weight_dtype(weight_dtype)
  if implementation is not None:
    _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
    _native.check_implementation(implementation)
  if experts is not None:
    bias, options = None, options._replace(groups=None)
  operands = _fold_tokens(logits, bias, where, experts)
  results: Sequence[jax.Array]
  if implementation == "reference":
    results = _reference.route(*operands, options=options, index_dtype=index_dtype)
  else:
    static = _Static(options, index_dtype, implementation, num_experts, logits.dtype)
    results = _route(static, *operands)
  shape = (*logits.shape[:-1], options.k)
  return Routing(results[0].reshape(shape).astype(weight_dtype), results[1].reshape(shape))


def _check_operands(logits, bias, where, experts, k):
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
      valid = (experts >= 0) & (experts < jnp.asarray(num_experts).astype(experts.dtype))
      experts = jnp.where(valid, experts.astype(jnp.int32), jnp.int32(num_experts))
  return bias, where, experts


class _Operands(NamedTuple):
  """Operands of the primitive: logits `[*B, T, E]`, `[*B, E]`, `[*B, T]`, `[*B, T, k]`."""

  logits: jax.Array
  bias: jax.Array | None
  where: jax.Array | None
  experts: jax.Array | None


def _fold_tokens(logits, bias, where, experts) -> _Operands:
  """Brings the operands into the form of the primitive.

  Without a bias every leading dimension is a batch dimension as it stands. A bias must carry the
  batch dimensions too, so that the partitioner can split it with the logits: the tokens are cut
  into as many groups as there may be shards, and each group gets a copy of the bias.
  """
  batch, tokens = logits.shape[:-2], math.prod(logits.shape[-2:-1])
  if bias is not None:
    devices = _compat.automatic_devices()
    if devices == 1 or not isinstance(tokens, int):
      batch, tokens = (), math.prod(logits.shape[:-1])
    else:
      groups = math.gcd(tokens, devices)
      batch, tokens = (*batch, groups), tokens // groups
    bias = jnp.broadcast_to(bias[(None,) * len(batch)], (*batch, bias.shape[-1]))
  logits = logits.reshape(*batch, tokens, logits.shape[-1])
  if where is not None:
    where = where.reshape(*batch, tokens)
  if experts is not None:
    experts = experts.reshape(*batch, tokens, experts.shape[-1])
  # Joined here and not only at the primitive: the cast of replicated logits must lie outside the
  # custom_vjp, so that its transpose sums their gradient.
  operands = (logits, bias, where, experts)
  joined = iter(_compat.join_varying_axes([x for x in operands if x is not None]))
  return _Operands(next(joined), *(None if x is None else next(joined) for x in operands[1:]))


# ---- the primitives ----


def _unpack(operands, has_bias: bool, has_where: bool, has_experts: bool) -> _Operands:
  """The operands of the primitive with None for absent ones."""
  rest = iter(operands[1:])
  bias, where, experts = (next(rest) if x else None for x in (has_bias, has_where, has_experts))
  return _Operands(operands[0], bias, where, experts)


def _forward_batch_ndim(shapes, *, has_bias: bool, **_: Any) -> int:
  # The bias has no token dimension; with one, only the dimensions before the tokens are shared.
  return len(shapes[0]) - (2 if has_bias else 1)


def _forward_results(shapes, *, options: RouteOptions, index_dtype, has_bias: bool, **_: Any):
  tokens = (shapes[0][-2],) if has_bias else ()
  return [
    Result((*tokens, options.k), np.dtype(np.float32)),
    Result((*tokens, options.k), index_dtype),
    Result(tokens, np.dtype(np.float32)),
  ]


def _option_attributes(options: RouteOptions) -> dict[str, Any]:
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


def _forward_attributes(*, options, index_dtype, **present: bool) -> dict[str, Any]:
  del index_dtype
  return _option_attributes(options) | present


def _forward_reference(*operands, options, index_dtype, **present: bool):
  return _reference.route(*_unpack(operands, **present), options=options, index_dtype=index_dtype)


def _forward_tangents(operands, results, tangents, *, options, **_: Any):
  if tangents[0] is None:
    return None, None, None
  logits = operands[0]
  weights, experts, normalizer = results
  active = _reference.active_slots(weights, experts, normalizer, logits.shape[-1])
  _, (weights_dot, normalizer_dot) = jax.jvp(
    lambda x: _reference.weigh(x, experts, active, options), (logits,), (tangents[0],)
  )
  return weights_dot, None, normalizer_dot


# The CUDA kernels keep a row in the shared memory of a warp. Every supported GPU grants 99 KiB.
_CUDA_ROW_BYTES = 99 * 1024


def _forward_runs_on(platform: str, avals, *, options: RouteOptions, **_: Any) -> bool:
  keys = 4 * (avals[0].shape[-1] + 127)
  pairs = 8 * 2 ** (options.k - 1).bit_length() + 8
  groups = 8 * (options.groups.count + 3) if options.groups else 0
  return platform == "cpu" or keys + pairs + groups <= _CUDA_ROW_BYTES


_bind_forward = make_primitive(
  Operation(
    name="route",
    batch_ndim=_forward_batch_ndim,
    results=_forward_results,
    attributes=_forward_attributes,
    reference=_forward_reference,
    tangents=_forward_tangents,
    runs_on=_forward_runs_on,
  )
)


def _backward_results(shapes, *, num_experts: int, dtype, **_: Any):
  return [Result((num_experts,), dtype)]


def _backward_attributes(*, options, num_experts, dtype) -> dict[str, Any]:
  del num_experts, dtype
  return _option_attributes(options)


def _backward_reference(*operands, **params: Any):
  cotangent, weights, experts, normalizer, *rest = operands
  logits = rest[0] if rest else None
  return [_reference.route_backward(cotangent, weights, experts, normalizer, logits, **params)]


def _backward_tangents(operands, results, tangents, **params: Any):
  del results
  moving = [i for i, t in enumerate(tangents) if t is not None]

  def function(*values):
    full = list(operands)
    for i, value in zip(moving, values, strict=True):
      full[i] = value
    return _backward_reference(*full, **params)[0]

  primals = tuple(operands[i] for i in moving)
  return [jax.jvp(function, primals, tuple(tangents[i] for i in moving))[1]]


_bind_backward = make_primitive(
  Operation(
    name="route_backward",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 1,
    results=_backward_results,
    attributes=_backward_attributes,
    reference=_backward_reference,
    tangents=_backward_tangents,
    runs_on=lambda platform, _, *, num_experts, **__: (
      platform == "cpu" or 4 * num_experts <= _CUDA_ROW_BYTES
    ),
  )
)


# ---- the differentiable function ----


class _Static(NamedTuple):
  """What the forward and the backward need to know before they run."""

  options: RouteOptions
  index_dtype: np.dtype
  implementation: str | None
  num_experts: int
  logits_dtype: np.dtype

  @property
  def dense_gradient(self) -> bool:
    """Whether every expert gets a gradient, so that the backward must see the logits."""
    return self.options.score == "softmax" and not self.options.renormalize


def _run_forward(static: _Static, logits, bias, where, experts):
  optional = {"has_bias": bias, "has_where": where, "has_experts": experts}
  return _bind_forward(
    logits,
    *(x for x in optional.values() if x is not None),
    options=static.options,
    index_dtype=static.index_dtype,
    implementation=static.implementation,
    **{name: x is not None for name, x in optional.items()},
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(static: _Static, logits, bias, where, experts):
  return tuple(_run_forward(static, logits, bias, where, experts)[:2])


def _route_forward(static: _Static, logits, bias, where, experts):
  results = _run_forward(static, logits, bias, where, experts)
  # Named here, inside the rule, or jax.checkpoint would route again in the backward.
  weights, chosen, normalizer = (checkpoint_name(x, CHECKPOINT_NAME) for x in results)
  residuals = (weights, chosen, normalizer, logits if static.dense_gradient else None)
  return (weights, chosen), residuals


def _route_backward(static: _Static, residuals, cotangents):
  (gradient,) = _bind_backward(
    cotangents[0],
    *(x for x in residuals if x is not None),
    options=static.options,
    num_experts=static.num_experts,
    dtype=static.logits_dtype,
    implementation=static.implementation,
  )
  return gradient, None, None, None


_route.defvjp(_route_forward, _route_backward)
