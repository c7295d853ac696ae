"""`route_dense`: the routing scattered over all experts, with a map of the chosen ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_router import _operands, _options, _reference
from jax_router._operands import Operands, Static
from jax_router._options import MAP_FORMATS, DenseRouting, Groups, RouteOptions
from jax_router._primitive import Operation, Result, make_primitive


def route_dense(
  logits: jax.Array | np.ndarray,
  k: int,
  *,
  map_format: str = "bytemap",
  score: str = "softmax",
  renormalize: bool = True,
  scale: float = 1.0,
  bias: jax.Array | np.ndarray | None = None,
  groups: Groups | None = None,
  where: jax.Array | np.ndarray | None = None,
  experts: jax.Array | np.ndarray | None = None,
  implementation: str | None = None,
) -> DenseRouting:
  """Chooses `k` experts for every token; gives weights and choice as rows over all experts.

  With weights and chosen experts those of `jax_router.route` for the same arguments:

      probs[e]       = sum of weights[i] over the slots i with experts[i] = e
      routing_map[e] = whether there is such a slot

  The sum is taken in float32 in the order of the slots and rounded once, so an expert given twice
  has the sum of its two weights. The map marks every expert that `route` returns in range, also
  those of weight 0 that fill up a row.

  Differentiable in `logits` in reverse mode, twice; cotangents of experts that were not chosen are
  ignored, even NaN. For forward mode use `implementation="reference"`. The backward works from the
  choice, `[..., k]`, which the policy `save_only_these_names("jax_router")` keeps under
  `jax.checkpoint`. The results themselves are not among these names: where a later backward needs
  `probs`, give them one with `jax.ad_checkpoint.checkpoint_name`.

  Args:
    logits: `[..., E]` float32, bfloat16 or float16. All arithmetic is float32.
    k: static, 1 <= k <= E.
    map_format: static, "bytemap" (one bool for each expert) or "bitmap" (one bit).
    score, renormalize, scale, bias, groups, where, experts: as in `jax_router.route`. Padding
      tokens have no chosen expert, and given experts out of range choose none.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `DenseRouting(probs, routing_map)`. `probs` is `[..., E]` in the logits' dtype, 0 where not
    chosen. `routing_map` is `[..., E]` bool ("bytemap") or `[..., ceil(E / 8)]` uint8 ("bitmap"):
    bit e % 8 of byte e // 8, the least significant bit first, stands for expert e.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape, an implementation that is not there,
      or, with Explicit sharding, logits sharded along their experts.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> logits = jnp.array([[0.0, 2.0, 1.0, 2.0]])
    >>> probs, routing_map = jax_router.route_dense(logits, 2, map_format="bitmap")
    >>> probs.tolist(), routing_map.tolist()
    ([[0.0, 0.5, 0.0, 0.5]], [[10]])
  """
  given, options = _operands.check_arguments(
    logits, k, score=score, renormalize=renormalize, scale=scale, bias=bias, groups=groups,
    where=where, experts=experts, implementation=implementation,
  )  # fmt: skip
  num_experts, dtype = given.logits.shape[-1], given.logits.dtype
  map_format = _options.check_choice("map_format", map_format, MAP_FORMATS)
  operands = _operands.fold_tokens(given)
  results: Sequence[jax.Array]
  if implementation == "reference":
    results = _reference.dense(*operands, options=options, map_format=map_format)
  else:
    static = Static(options, implementation, num_experts, dtype)
    results = _dense(static, map_format, *operands)
  lead = given.logits.shape[:-1]
  return DenseRouting(*(x.reshape(*lead, x.shape[-1]) for x in results[:2]))


# ---- the primitives ----


def _results(shapes, *, options: RouteOptions, map_format: str, dtype, has_bias: bool, **_: Any):
  num_experts = shapes[0][-1]
  tokens = (shapes[0][-2],) if has_bias else ()
  if map_format == "bytemap":
    routing_map = Result((*tokens, num_experts), np.dtype(np.bool_))
  else:
    routing_map = Result((*tokens, -(-num_experts // 8)), np.dtype(np.uint8))
  return [
    Result((*tokens, num_experts), dtype),
    routing_map,
    Result((*tokens, options.k), np.dtype(np.float32)),
    Result((*tokens, options.k), np.dtype(np.int32)),
    Result(tokens, np.dtype(np.float32)),
  ]


def _attributes(*, options, map_format, dtype, **present: bool) -> dict[str, Any]:
  del dtype
  map_attribute = {"map_format": MAP_FORMATS.index(map_format)}
  return _operands.option_attributes(options) | present | map_attribute


def _forward_reference(*operands, options, map_format, dtype, **present: bool):
  del dtype
  operands = _operands.unpack(operands, **present)
  return _reference.dense(*operands, options=options, map_format=map_format)


def _tangents(operands, results, tangents, *, options, dtype, **_: Any):
  choice = results[2:]
  weights_dot, normalizer_dot = _operands.weigh_tangents(operands, choice, tangents, options)
  if weights_dot is None:
    return [None] * len(results)
  probs_dot = _reference.scatter(weights_dot, choice[1], operands[0].shape[-1]).astype(dtype)
  return probs_dot, None, weights_dot, None, normalizer_dot


_bind_forward = make_primitive(
  Operation(
    name="dense",
    batch_ndim=_operands.forward_batch_ndim,
    results=_results,
    attributes=_attributes,
    reference=_forward_reference,
    tangents=_tangents,
    runs_on=_operands.forward_runs_on,
  )
)

_bind_backward = _operands.make_backward("dense_backward", _reference.dense_backward)


# ---- the differentiable function ----


def _run_forward(static: Static, map_format: str, *arrays):
  operands = Operands(*arrays)
  return _bind_forward(
    *operands.present,
    options=static.options,
    map_format=map_format,
    dtype=static.logits_dtype,
    implementation=static.implementation,
    **operands.presence,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dense(static: Static, map_format: str, logits, bias, where, experts):
  return tuple(_run_forward(static, map_format, logits, bias, where, experts)[:2])


def _dense_forward(static: Static, map_format: str, logits, bias, where, experts):
  probs, routing_map, *choice = _run_forward(static, map_format, logits, bias, where, experts)
  return (probs, routing_map), _operands.save_choice(static, logits, choice)


def _dense_backward(static: Static, map_format: str, residuals, cotangents):
  del map_format
  return _operands.pull_back(_bind_backward, static, cotangents[0], residuals)


_dense.defvjp(_dense_forward, _dense_backward)
