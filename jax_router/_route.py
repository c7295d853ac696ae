"""`route`: chooses and weighs the experts of each token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _operands, _options, _reference
from jax_router._operands import Operands, Static
from jax_router._options import Groups, RouteOptions, Routing
from jax_router._primitive import Operation, Result, make_primitive


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
  given, options = _operands.check_arguments(
    logits, k, score=score, renormalize=renormalize, scale=scale, bias=bias, groups=groups,
    where=where, experts=experts, implementation=implementation,
  )  # fmt: skip
  num_experts, dtype = given.logits.shape[-1], given.logits.dtype
  index_dtype = _options.check_index_dtype(index_dtype, num_experts)
  weight_dtype = _options.check_weight_dtype(weight_dtype)
  operands = _operands.fold_tokens(given)
  results: Sequence[jax.Array]
  if implementation == "reference":
    results = _reference.route(*operands, options=options, index_dtype=index_dtype)
  else:
    static = Static(options, implementation, num_experts, dtype)
    results = _route(static, index_dtype, *operands)
  shape = (*given.logits.shape[:-1], options.k)
  return Routing(results[0].reshape(shape).astype(weight_dtype), results[1].reshape(shape))


# ---- the primitives ----


def _results(shapes, *, options: RouteOptions, index_dtype, has_bias: bool, **_: Any):
  tokens = (shapes[0][-2],) if has_bias else ()
  return [
    Result((*tokens, options.k), np.dtype(np.float32)),
    Result((*tokens, options.k), index_dtype),
    Result(tokens, np.dtype(np.float32)),
  ]


def _attributes(*, options, index_dtype, **present: bool) -> dict[str, Any]:
  del index_dtype
  return _operands.option_attributes(options) | present


def _forward_reference(*operands, options, index_dtype, **present: bool):
  operands = _operands.unpack(operands, **present)
  return _reference.route(*operands, options=options, index_dtype=index_dtype)


def _tangents(operands, results, tangents, *, options, **_: Any):
  weights_dot, normalizer_dot = _operands.weigh_tangents(operands, results, tangents, options)
  return weights_dot, None, normalizer_dot


bind_forward = make_primitive(
  Operation(
    name="route",
    batch_ndim=_operands.forward_batch_ndim,
    results=_results,
    attributes=_attributes,
    reference=_forward_reference,
    tangents=_tangents,
    runs_on=_operands.forward_runs_on,
  )
)

bind_backward = _operands.make_backward("route_backward", _reference.route_backward)


# ---- the differentiable function ----


def run_forward(static: Static, index_dtype: np.dtype, *arrays):
  operands = Operands(*arrays)
  return bind_forward(
    *operands.present,
    options=static.options,
    index_dtype=index_dtype,
    implementation=static.implementation,
    **operands.presence,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route(static: Static, index_dtype: np.dtype, logits, bias, where, experts):
  return tuple(run_forward(static, index_dtype, logits, bias, where, experts)[:2])


def _route_forward(static: Static, index_dtype: np.dtype, logits, bias, where, experts):
  choice = run_forward(static, index_dtype, logits, bias, where, experts)
  residuals = _operands.save_choice(static, logits, choice)
  return residuals[:2], residuals


def _route_backward(static: Static, index_dtype: np.dtype, residuals, cotangents):
  del index_dtype
  return _operands.pull_back(bind_backward, static, cotangents[0], residuals)


_route.defvjp(_route_forward, _route_backward)
