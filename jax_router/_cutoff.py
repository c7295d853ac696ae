"""`route_with_cutoff`: `route`, and the key that the experts of each token had to beat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _operands, _options, _reference, _reference_balance, _route
from jax_router._operands import Operands, Static
from jax_router._options import RouteOptions, Routing
from jax_router._reference import Weighing

_INFINITY = np.float32(np.inf)


def route_with_cutoff(
  logits: jax.Array | np.ndarray,
  k: int,
  *,
  score: str = "sigmoid",
  renormalize: bool = True,
  scale: float = 1.0,
  bias: jax.Array | np.ndarray | None = None,
  where: jax.Array | np.ndarray | None = None,
  index_dtype: Any = jnp.int32,
  weight_dtype: Any = None,
  implementation: str | None = None,
) -> tuple[Routing, jax.Array]:
  """Routes as `jax_router.route` does, and gives the key that every token's experts had to beat.

  With y = score(logits) and b = `bias`, or 0 without one:

      cutoff = the (k + 1)-th largest of y + b

  So raising the bias of an expert that was not chosen to more than cutoff - y brings it the token.
  One selection of k + 1 experts gives both. The experts are exactly those of `route`, the weights
  equal to its to rounding, in special rows too.

  Differentiable in `logits` as `route` is, through the weights alone; the cutoff has no gradient.

  Args:
    logits: `[..., E]` float32, bfloat16 or float16, E >= 2. All arithmetic is float32.
    k: static, 1 <= k < E.
    score: "sigmoid", "sqrtsoftplus", "none" or "softmax". Without a bias the experts are chosen by
      the logits themselves, but the cutoff is a score; for "softmax", a probability over all E.
    renormalize, scale, bias, where, index_dtype, weight_dtype, implementation: as in `route`.

  Returns:
    `Routing(weights, experts)`, both `[..., k]`, and the cutoff `[...]` float32. The cutoff is -inf
    where there is no (k + 1)-th key above -inf, and for padding. A +inf logit counts as the largest
    float32.

  Raises:
    TypeError, ValueError: as `route` does, and for k = E.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> scores = jnp.array([[0.9, 0.6, 0.3, 0.1]])
    >>> routing, cutoff = jax_router.route_with_cutoff(scores, 2, score="none")
    >>> routing.experts.tolist(), round(cutoff.item(), 3)
    ([[0, 1]], 0.3)
  """
  num_experts = _options.check_logits(logits).shape[-1]
  k = _options.check_int("k", k, 1, num_experts - 1, "num_experts - 1")
  given, options = _operands.check_arguments(
    logits, k, score=score, renormalize=renormalize, scale=scale, bias=bias, groups=None,
    where=where, experts=None, implementation=implementation,
  )  # fmt: skip
  index_dtype = _options.check_index_dtype(index_dtype, num_experts)
  weight_dtype = _options.check_weight_dtype(weight_dtype)
  operands = _operands.fold_tokens(given)
  results: Sequence[jax.Array]
  if implementation == "reference":
    choice = _reference.route(*operands, options=_widened(options), index_dtype=index_dtype)

    def weigh(experts, active):
      return _reference.weigh(operands.logits, experts, active, options)

    weights, experts, _, cutoff = _trim(choice, operands, options, weigh)
    results = weights, experts, jax.lax.stop_gradient(cutoff)
  else:
    static = Static(options, implementation, num_experts, given.logits.dtype)
    results = _route_with_cutoff(static, index_dtype, *operands)
  weights, experts, cutoff = results
  lead = given.logits.shape[:-1]
  weights = weights.reshape(*lead, k).astype(weight_dtype)
  return Routing(weights, experts.reshape(*lead, k)), cutoff.reshape(lead)


# ---- k experts of k + 1 ----


class _Trimmed(NamedTuple):
  """The results of the primitive `route` for k experts, made of those for k + 1, and the cutoff."""

  weights: jax.Array
  experts: jax.Array
  normalizer: jax.Array
  cutoff: jax.Array


def _widened(options: RouteOptions) -> RouteOptions:
  """Options under which the weights of the primitive are the scores of one expert more."""
  return options._replace(k=options.k + 1, renormalize=False, scale=1.0)


def _weigh(scores, normalizer, active, options: RouteOptions) -> Weighing:
  """What `_reference.weigh` gives, from the scores of the experts."""
  weights = jnp.where(active, scores, np.float32(0))
  if options.renormalize:
    weights, normalizer = _reference.normalize(weights)
  if options.renormalize == (options.score == "softmax"):
    normalizer = jnp.ones_like(normalizer)
  return Weighing(weights * np.float32(options.scale), normalizer)


def _biased(scores, bias, experts) -> jax.Array:
  """Keys `[*B, T]` of one expert a token, added as the kernels add them. Expert E has any key."""
  flushed = _reference_balance.flushed
  index = jnp.minimum(experts.astype(jnp.int32), bias.shape[-1] - 1)
  return flushed(flushed(scores) + flushed(jnp.take_along_axis(bias, index, axis=-1)))


def _trim(
  choice,
  operands: Operands,
  options: RouteOptions,
  weigh: Callable[[jax.Array, jax.Array], Weighing] | None,
) -> _Trimmed:
  """What the primitive makes of k experts, from the choice of k + 1, with the same marks.

  `weigh`: (experts, active) -> their weights, where the scores are not enough.
  """
  scores, experts, normalizer = choice
  k, num_experts = options.k, operands.logits.shape[-1]
  active = _reference.active_slots(scores, experts, normalizer, num_experts)
  last = scores[..., k]
  if operands.bias is not None:
    last = _biased(last, operands.bias, experts[..., k])
  cutoff = jnp.where(active[..., k], last, -_INFINITY)
  experts, active = experts[..., :k], active[..., :k]
  if weigh is None:
    weights, divisor = _weigh(scores[..., :k], normalizer, active, options)
  else:
    weights, divisor = weigh(experts, active)
  # Adding 0 turns an honest -0.0 into +0.0: see _reference.route for the marks.
  weights = jnp.where(active, weights + np.float32(0), np.float32(-0.0))
  no_gradient = jnp.isnan(normalizer)
  uniform = np.float32(1) / np.float32(k)
  weights = jnp.where(no_gradient[..., None], uniform, weights)
  padding = experts >= jnp.asarray(num_experts, experts.dtype)
  weights = jnp.where(padding, np.float32(0), weights)
  return _Trimmed(weights, experts, jnp.where(no_gradient, normalizer, divisor), cutoff)


# ---- the differentiable function ----


def _run_with_cutoff(static: Static, index_dtype: np.dtype, *arrays) -> _Trimmed:
  wide = static._replace(options=_widened(static.options))
  choice = _route.run_forward(wide, index_dtype, *arrays)
  operands, options = Operands(*arrays), static.options

  def weigh(experts, active):
    given = jnp.where(active, experts.astype(jnp.int32), np.int32(static.num_experts))
    again = operands._replace(bias=None, experts=given)
    weights, _, normalizer = _route.run_forward(static, np.dtype(np.int32), *again)
    empty = jnp.isnan(normalizer)
    weights = jnp.where(empty[..., None], np.float32(0), weights)
    return Weighing(weights, jnp.where(empty, np.float32(1), normalizer))

  # The probabilities of all experts that a bias has chosen may be 0; their softmax is not.
  improbable = options.score == "softmax" and options.renormalize and operands.bias is not None
  return _trim(choice, operands, options, weigh if improbable else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route_with_cutoff(static: Static, index_dtype: np.dtype, logits, bias, where, experts):
  weights, experts, _, cutoff = _run_with_cutoff(static, index_dtype, logits, bias, where, experts)
  return weights, experts, cutoff


def _cutoff_forward(static: Static, index_dtype: np.dtype, logits, bias, where, experts):
  *choice, cutoff = _run_with_cutoff(static, index_dtype, logits, bias, where, experts)
  residuals = _operands.save_choice(static, logits, choice)
  return (*residuals[:2], cutoff), residuals


def _cutoff_backward(static: Static, index_dtype: np.dtype, residuals, cotangents):
  del index_dtype
  return _operands.pull_back(_route.bind_backward, static, cotangents[0], residuals)


_route_with_cutoff.defvjp(_cutoff_forward, _cutoff_backward)
