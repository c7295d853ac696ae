"""TransformerEngine's fused router by its own names, argument order, defaults and outputs.

Names and order of the positional arguments are those of `transformer_engine.jax.router`. Keyword
arguments after them cover what only its PyTorch side has: dense indices, quantile balancing, and
the auxiliary loss over a global batch or over sequences.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_router
from jax_router import _options, _reference
from jax_router._options import LOGITS_DTYPES, Routing
from jax_router.compat import _transformer_engine_arguments as _arguments
from jax_router.compat._transformer_engine_arguments import RoutingMapFormat as RoutingMapFormat
from jax_router.compat._transformer_engine_arguments import ScoreFunction as ScoreFunction

_MAP_FORMATS = {RoutingMapFormat.BYTEMAP: "bytemap", RoutingMapFormat.BITMAP_U8: "bitmap"}

Array = jax.Array | np.ndarray


def fused_topk_with_score_function(
  logits: Array,
  topk: int,
  use_pre_softmax: bool = False,
  num_groups: int | None = -1,
  group_topk: int | None = -1,
  scaling_factor: float = 1.0,
  score_function: str | ScoreFunction | int = ScoreFunction.SOFTMAX,
  expert_bias: Array | None = None,
  compute_aux_scores: bool = False,
  routing_map_format: str | RoutingMapFormat | int = RoutingMapFormat.BYTEMAP,
  *,
  topk_indices_dtype: Any = None,
  qb_histogram: Array | None = None,
  qb_bounds: Array | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, ...]:
  """Chooses `topk` experts for every token; gives their weights and a map over all experts.

  With y = score(logits) and S = the `topk` experts of the largest keys, ties to the lowest expert:

      softmax, pre      key = y               probs = y
      softmax, post     key = logits          probs = softmax of the logits over S
      the others        key = y + bias        probs = y / (sum of y over S + 1e-20), y if topk = 1

  times `scaling_factor`, at the experts of S; 0 elsewhere. Where `group_topk` is positive, S lies
  in the `group_topk` of `num_groups` contiguous groups whose topk / group_topk largest keys have
  the largest sums. All arithmetic is float32. Differentiable in `logits`.

  With `compute_aux_scores=True` it is `fused_score_for_moe_aux_loss` instead, and the arguments of
  the choice (pre-softmax, groups, scale, bias) are ignored.

  Quantile balancing: with `qb_histogram` and `qb_bounds` the third result is the histogram plus,
  for every token t and every expert e, one count in bin
  floor((cutoff[t] - y[t, e] - lower) * num_bins / (upper - lower)), clamped to the bins there are,
  where the cutoff is the (topk + 1)-th largest key of the token. It needs the sigmoid, a float32
  bias and topk < E, and takes no groups.

  Args:
    logits: `[..., E]` float32, bfloat16 or float16.
    topk: static, 1 <= topk <= E.
    use_pre_softmax: static, whether softmax comes before the choice; no effect on other scores.
    num_groups, group_topk: static. Groups are off where `group_topk` is None or not positive. Else
      num_groups divides E, group_topk divides topk, and a group holds topk / group_topk experts.
    scaling_factor: static Python number.
    score_function: static, a `ScoreFunction`, its name in any case, or its number.
    expert_bias: `[E]` floating, for the choice only and not with softmax; gets no gradient.
    compute_aux_scores: static, whether to give the scores for the auxiliary loss instead.
    routing_map_format: static, a `RoutingMapFormat`, its name in any case, or its number.
    topk_indices_dtype: int16, int32 or int64: the second result is the experts chosen, best first,
      instead of the map.
    qb_histogram: `[E, num_bins]` int32, what has been counted so far.
    qb_bounds: `[2]` float32, lower and upper bound of the bins, finite with lower < upper.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `(probs, routing_map)`: probs `[..., E]` in the logits' dtype; the map bool `[..., E]` or uint8
    `[..., ceil(E / 8)]`, or the indices `[..., topk]`. With quantile balancing
    `(probs, routing_map, histogram)`. With `compute_aux_scores=True` `(scores, routing_map)`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range, of the wrong shape, or in a combination that there is not.

  Example:
    >>> import jax.numpy as jnp
    >>> from jax_router.compat.transformer_engine import fused_topk_with_score_function
    >>> logits = jnp.array([[0.0, 2.0, 1.0, 2.0]])
    >>> probs, routing_map = fused_topk_with_score_function(logits, 2)
    >>> probs.tolist(), routing_map.tolist()
    ([[0.0, 0.5, 0.0, 0.5]], [[False, True, False, True]])
  """
  logits = _options.check_logits(logits)
  num_experts = logits.shape[-1]
  topk = _options.check_int("topk", topk, 1, num_experts, "num_experts")
  scale = _arguments.check_number("scaling_factor", scaling_factor)
  score = _arguments.check_member("score_function", score_function, ScoreFunction)
  map_format = _arguments.check_member("routing_map_format", routing_map_format, RoutingMapFormat)
  index_dtype = _arguments.check_index_dtype(topk_indices_dtype, num_experts)
  if index_dtype is not None and map_format != RoutingMapFormat.BYTEMAP:
    raise ValueError(
      "topk_indices_dtype gives indices instead of a map: it cannot be combined with "
      f"routing_map_format={map_format.name}"
    )
  balancing = _arguments.check_balancing(qb_histogram, qb_bounds, num_experts)
  if _options.check_bool("compute_aux_scores", compute_aux_scores):
    if index_dtype is not None or balancing is not None:
      raise ValueError(
        "compute_aux_scores=True cannot be combined with topk_indices_dtype, qb_histogram or "
        "qb_bounds"
      )
    return fused_score_for_moe_aux_loss(
      logits, topk, score, routing_map_format=map_format, implementation=implementation
    )
  pre_softmax = _options.check_bool("use_pre_softmax", use_pre_softmax)
  bias = _arguments.check_bias(expert_bias, score, num_experts)
  groups = _arguments.check_groups(num_groups, group_topk, num_experts, topk)
  renormalize = not pre_softmax if score == ScoreFunction.SOFTMAX else topk > 1
  options: dict[str, Any] = {
    "score": score.name.lower(),
    "renormalize": renormalize,
    "scale": scale,
    "bias": bias,
    "implementation": implementation,
  }
  if balancing is not None:
    _arguments.check_balanced_choice(score, pre_softmax, groups, expert_bias, topk, num_experts)
    routing, cutoff = jax_router.route_with_cutoff(logits, topk, **options)
    histogram = balancing.histogram + _count(logits, cutoff, balancing, implementation)
    return *_dense_results(logits, routing, map_format, index_dtype), histogram
  if index_dtype is not None:
    routing = jax_router.route(logits, topk, groups=groups, **options)
    return _dense_results(logits, routing, map_format, index_dtype)
  return tuple(
    jax_router.route_dense(
      logits, topk, groups=groups, map_format=_MAP_FORMATS[map_format], **options
    )
  )


def fused_score_for_moe_aux_loss(
  logits: Array,
  topk: int,
  score_function: str | ScoreFunction | int,
  *,
  routing_map_format: str | RoutingMapFormat | int = RoutingMapFormat.BYTEMAP,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Scores of all experts, as the auxiliary loss wants them, and a map of the `topk` largest.

  The scores are softmax(logits), or y / (sum of y over all experts + 1e-20) for the other score
  functions, also for topk = 1: no bias, no groups, no scale. Differentiable in `logits`.

  Args:
    logits: `[..., E]` float32, bfloat16 or float16.
    topk: static, 1 <= topk <= E; matters for the map only.
    score_function, routing_map_format, implementation: as in `fused_topk_with_score_function`.

  Returns:
    `(scores, routing_map)`: scores `[..., E]` float32 for every dtype of the logits, and the map
    bool `[..., E]` or uint8 `[..., ceil(E / 8)]`; ties go to the lowest expert.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range.
  """
  logits = _options.check_logits(logits)
  topk = _options.check_int("topk", topk, 1, logits.shape[-1], "num_experts")
  score = _arguments.check_member("score_function", score_function, ScoreFunction).name.lower()
  map_format = _arguments.check_member("routing_map_format", routing_map_format, RoutingMapFormat)
  scores = jax_router.aux_scores(logits, score, implementation=implementation)
  # Every score is monotone in the logit, so the largest logits have the largest scores.
  routing_map = jax_router.route_dense(
    jax.lax.stop_gradient(logits),
    topk,
    map_format=_MAP_FORMATS[map_format],
    score=score,
    implementation=implementation,
  ).routing_map
  return scores, routing_map


def fused_moe_aux_loss(
  probs: Array,
  tokens_per_expert: Array,
  topk: int,
  coeff: float,
  *,
  total_num_tokens: int | Array | None = None,
  num_experts: int | None = None,
) -> jax.Array:
  """Auxiliary load-balancing loss of a batch.

      loss = num_experts * coeff / (topk * N * N) * sum_j tokens_per_expert[j] * sum_i probs[i, j]

  with N = `total_num_tokens`. Sums are float32 in an order that does not change from run to run.
  Differentiable in `probs` only. It is plain JAX: rows sharded over devices are summed over them.

  Loss of a global batch: give the counts and the number of tokens of all ranks with the probs of
  one; the sum of the results over the ranks is the loss. Sum of the losses of sequences: lay B
  sequences of S tokens out as probs `[S, B * E]` and counts `[B * E]`, with `num_experts=E`; divide
  the result by B for their mean.

  Args:
    probs: `[..., C]` float32, bfloat16 or float16, one row for each token.
    tokens_per_expert: `[C]` integer or floating, how many tokens chose each expert.
    topk: static, experts for each token, 1 <= topk <= num_experts.
    coeff: static Python number.
    total_num_tokens: N, a positive integer or a 0-d integer array, which may be traced. The number
      of rows by default. 0 tokens give 0.
    num_experts: static, a divisor of C; C by default.

  Returns:
    The loss, 0-d, in the dtype of `probs`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape.
  """
  probs = _options.check_array("probs", probs)
  if probs.dtype.name not in LOGITS_DTYPES:
    raise TypeError(f"probs must be one of {', '.join(LOGITS_DTYPES)}, got {probs.dtype.name}")
  if probs.ndim == 0 or probs.shape[-1] < 1:
    raise ValueError(f"probs must have shape [..., C] with C >= 1, got {probs.shape}")
  columns = probs.shape[-1]
  counts = _options.check_array("tokens_per_expert", tokens_per_expert)
  if not (jnp.issubdtype(counts.dtype, jnp.integer) or jnp.issubdtype(counts.dtype, jnp.floating)):
    raise TypeError(f"tokens_per_expert must be integer or floating, got {counts.dtype.name}")
  _options.check_shape("tokens_per_expert", counts.shape, (columns,), "(probs.shape[-1],)")
  if num_experts is None:
    num_experts = columns
  num_experts = _options.check_int("num_experts", num_experts, 1, columns, "probs.shape[-1]")
  if columns % num_experts:
    raise ValueError(f"num_experts must divide probs.shape[-1] = {columns}, got {num_experts}")
  topk = _options.check_int("topk", topk, 1, num_experts, "num_experts")
  total = _arguments.check_total(total_num_tokens, probs)
  factor = (
    np.float32(num_experts) * np.float32(_arguments.check_number("coeff", coeff)) / np.float32(topk)
  )
  safe_total = jnp.maximum(total, np.float32(1))
  factor = jnp.where(total > 0, factor / safe_total / safe_total, np.float32(0))
  sums = jnp.sum(probs, axis=tuple(range(probs.ndim - 1)), dtype=jnp.float32)
  loss = factor * jnp.sum(jax.lax.stop_gradient(counts.astype(jnp.float32)) * sums)
  return loss.astype(probs.dtype)


# ---- results made of a Routing ----


def _dense_results(
  logits: jax.Array,
  routing: Routing,
  map_format: RoutingMapFormat,
  index_dtype: np.dtype | None,
) -> tuple[jax.Array, jax.Array]:
  """Probs, and the indices or the map."""
  weights, experts = routing
  num_experts = logits.shape[-1]
  probs = _reference.scatter(weights, experts, num_experts).astype(logits.dtype)
  if index_dtype is not None:
    return probs, experts.astype(index_dtype)
  routing_map = _reference.scatter(jnp.ones_like(experts), experts, num_experts) > 0
  if map_format == RoutingMapFormat.BITMAP_U8:
    routing_map = jnp.packbits(routing_map, axis=-1, bitorder="little")
  return probs, routing_map


def _count(
  logits: jax.Array, cutoff: jax.Array, balancing: _arguments.Balancing, implementation: str | None
) -> jax.Array:
  """What one call adds to the histogram `[E, num_bins]`."""
  if logits.ndim == 1:
    logits, cutoff = logits[None], cutoff[None]
  increment = jax_router.quantile_histogram(
    logits,
    cutoff,
    bounds=balancing.bounds,
    num_bins=balancing.histogram.shape[1],
    implementation=implementation,
  )
  return jnp.sum(increment, axis=tuple(range(increment.ndim - 2)), dtype=jnp.int32)
