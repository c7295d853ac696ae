"""`route_with_stats`: routing and what the balance of the experts is judged by, in one pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_router import _operands, _options, _reference_stats
from jax_router._operands import Operands, Static
from jax_router._options import Groups, RouteOptions, RouterStats, Routing
from jax_router._primitive import Operation, Result, make_primitive, reference_tangents
from jax_router._route import bind_backward as bind_route_backward


def route_with_stats(
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
) -> tuple[Routing, RouterStats]:
  """Chooses `k` experts for every token as `jax_router.route` does, and gathers statistics.

  With experts and weights those of `route`, y = score(logits) and sums over the tokens (axis -2):

      expert_counts[e] = how often e is among the experts
      score_sums[e]    = sum of y[e] / (sum over the experts of y + 1e-20)   (softmax: of y[e])
      z_sum            = sum of logsumexp(logits)**2
      num_tokens       = number of tokens with where=True

  One kernel does all of it in one pass over the logits, and one kernel makes the gradient of the
  logits from the cotangents of weights, `score_sums` and `z_sum` together; those that are not used
  cost nothing. `load_balance_loss` and `z_loss` make losses of the statistics.

  Padding tokens are in no sum. A row of nothing but NaN and -inf adds nothing to `score_sums` and
  `z_sum`; it counts as a token, and its experts 0 .. k-1 as chosen. The scores of a bias-steered
  choice are those without the bias. With `experts` given, these are counted.

  Sums are taken in an order that depends on the number of tokens alone: the same input gives the
  same bits on every run, at any number of threads, whatever the batching. Where JAX sees several
  devices, outside `shard_map`, tokens are cut into as many groups whose sums XLA adds up: there the
  same program gives the same bits. Leading dimensions are kept, so sums are per sequence for logits
  `[B, S, E]`; logits `[E]` are one token. Token-sharded logits under plain `jit` give the sum over
  all tokens, by one all-reduce of `[E]`-sized data. In `shard_map` the statistics are the shard's
  own; `jax.lax.psum` adds them up.

  Differentiable in `logits` in reverse mode, twice; the rest as in `jax_router.route`.

  Args:
    logits: `[..., T, E]` float32, bfloat16 or float16. All arithmetic is float32.
    k, score, renormalize, scale, bias, groups, where, experts, index_dtype, weight_dtype,
      implementation: as in `jax_router.route`.

  Returns:
    `Routing(weights, experts)`, both `[..., T, k]`, to the bit those of `route`, and
    `RouterStats(expert_counts, score_sums, z_sum, num_tokens)`: `[..., E]` int32, `[..., E]`
    float32, `[...]` float32, `[...]` int32.

  Raises:
    TypeError, ValueError: as `jax_router.route`.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    >>> routing, stats = jax_router.route_with_stats(logits, 2)
    >>> stats.expert_counts.tolist(), int(stats.num_tokens)
    ([1, 2, 1], 2)
  """
  given, options = _operands.check_arguments(
    logits, k, score=score, renormalize=renormalize, scale=scale, bias=bias, groups=groups,
    where=where, experts=experts, implementation=implementation,
  )  # fmt: skip
  num_experts, dtype = given.logits.shape[-1], given.logits.dtype
  index_dtype = _options.check_index_dtype(index_dtype, num_experts)
  weight_dtype = _options.check_weight_dtype(weight_dtype)
  lead, tokens = given.logits.shape[:-2], math.prod(given.logits.shape[-2:-1])
  groups_of_tokens = _operands.token_groups(tokens)
  batch = (*lead, groups_of_tokens) if groups_of_tokens > 1 else lead
  operands = _operands.reshape_operands(given, batch, tokens // groups_of_tokens)
  # An expert may be given more than once.
  most = tokens if experts is None else tokens * options.k
  sums = _Sums(groups_of_tokens > 1, groups_of_tokens > 1 and most <= _EXACT_COUNTS)
  results: Sequence[jax.Array]
  if implementation == "reference":
    results = _reference_stats.stats(*operands, options=options, index_dtype=index_dtype)
    results = (*results[:2], *_sum_groups(results[4:], sums))
  else:
    static = Static(options, implementation, num_experts, dtype)
    results = _stats(static, index_dtype, sums, *operands)
  shape = (*given.logits.shape[:-1], options.k)
  routing = Routing(results[0].reshape(shape).astype(weight_dtype), results[1].reshape(shape))
  return routing, RouterStats(*results[2:])


# float32 holds every integer up to this.
_EXACT_COUNTS = 2**24


class _Sums(NamedTuple):
  """Whether statistics are summed over groups of tokens, and whether as one float32 array."""

  grouped: bool
  packed: bool


def _sum_groups(results: Sequence[jax.Array], sums: _Sums) -> RouterStats:
  """Sums the statistics over the token groups, their last batch dimension.

  All of them in one array where counts are exact in it, so that sharded tokens need one all-reduce.
  """
  stats = RouterStats(*results)
  if not sums.grouped:
    return stats
  if not sums.packed:
    return RouterStats(*(jnp.sum(x, axis=stats.num_tokens.ndim - 1, dtype=x.dtype) for x in stats))
  wide = [x if x.ndim > stats.num_tokens.ndim else x[..., None] for x in stats]
  packed = jnp.concatenate([x.astype(jnp.float32) for x in wide], axis=-1).sum(axis=-2)
  num_experts = stats.expert_counts.shape[-1]
  counts, scores = packed[..., :num_experts], packed[..., num_experts : 2 * num_experts]
  z_sum, num_tokens = packed[..., -2], packed[..., -1]
  return RouterStats(counts.astype(jnp.int32), scores, z_sum, num_tokens.astype(jnp.int32))


# ---- the primitives ----

# As in src/options.h: blocks of tokens whose sums the kernels keep while they run.
_MOST_TOKEN_BLOCKS = 128
_FEWEST_TOKENS = 16


def _scratch_words(tokens: Any, num_experts: int) -> int:
  """Words of scratch of a batch row: counts and sums of every expert, z sum and tokens."""
  blocks = _MOST_TOKEN_BLOCKS
  if isinstance(tokens, int):
    of_block = max(_FEWEST_TOKENS, -(-tokens // _MOST_TOKEN_BLOCKS))
    blocks = -(-tokens // of_block)
  return blocks * (2 * num_experts + 2)


def _results(shapes, *, options: RouteOptions, index_dtype, **_: Any):
  tokens, num_experts = shapes[0][-2:]
  float32, int32 = np.dtype(np.float32), np.dtype(np.int32)
  return [
    Result((tokens, options.k), float32),
    Result((tokens, options.k), index_dtype),
    Result((tokens,), float32),
    Result((tokens, 2), float32),
    Result((num_experts,), int32),
    Result((num_experts,), float32),
    Result((), float32),
    Result((), int32),
    Result((_scratch_words(tokens, num_experts),), int32),
  ]


def _attributes(*, options, index_dtype, **present: bool) -> dict[str, Any]:
  del index_dtype
  return _operands.option_attributes(options) | present


def _forward_reference(*operands, options, index_dtype, **present: bool):
  unpacked = _operands.unpack(operands, **present)
  results = _reference_stats.stats(*unpacked, options=options, index_dtype=index_dtype)
  batch, (tokens, num_experts) = operands[0].shape[:-2], operands[0].shape[-2:]
  return *results, jnp.zeros((*batch, _scratch_words(tokens, num_experts)), jnp.int32)


def _tangents(operands, results, tangents, *, options, index_dtype, **present: bool):
  del index_dtype
  choice = results[:3]
  weights_dot, normalizer_dot = _operands.weigh_tangents(operands, choice, tangents, options)
  if weights_dot is None:
    return [None] * len(results)
  where = _operands.unpack(operands, **present).where

  def statistics(logits):
    return _reference_stats.sums(logits, where, options.score)

  _, (softmax_dot, scores_dot, z_dot) = jax.jvp(statistics, (operands[0],), (tangents[0],))
  return [
    weights_dot, None, normalizer_dot, softmax_dot, None, scores_dot, z_dot, None, None
  ]  # fmt: skip


_bind_forward = make_primitive(
  Operation(
    name="stats",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=_results,
    attributes=_attributes,
    reference=_forward_reference,
    tangents=_tangents,
    runs_on=_operands.forward_runs_on,
  )
)


def _backward_reference(*operands, options, has_weights: bool, has_scores: bool, has_z: bool):
  logits, softmax, *rest = operands
  choice = (rest[0], rest[1], rest[2], rest[3]) if has_weights else None
  cotangents = iter(rest[4 if has_weights else 0 :])
  scores, z = (next(cotangents) if x else None for x in (has_scores, has_z))
  return [_reference_stats.stats_backward(logits, softmax, choice, scores, z, options=options)]


_bind_backward = make_primitive(
  Operation(
    name="stats_backward",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=lambda shapes, *, dtype, **_: [Result(shapes[0][-2:], dtype)],
    attributes=lambda *, options, dtype, **present: _operands.option_attributes(options) | present,
    reference=lambda *operands, dtype, **params: _backward_reference(*operands, **params),
    tangents=reference_tangents(
      lambda *operands, dtype, **params: _backward_reference(*operands, **params)
    ),
    runs_on=_operands.backward_runs_on,
  )
)


# ---- the differentiable function ----


def _run_forward(static: Static, index_dtype: np.dtype, *arrays):
  operands = Operands(*arrays)
  return _bind_forward(
    *operands.present,
    options=static.options,
    index_dtype=index_dtype,
    implementation=static.implementation,
    **operands.presence,
  )


# The sums over token groups lie inside, or cotangents that are not used would arrive as zeros.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stats(static: Static, index_dtype: np.dtype, sums: _Sums, logits, bias, where, experts):
  results = _run_forward(static, index_dtype, logits, bias, where, experts)
  return (*results[:2], *_sum_groups(results[4:8], sums))


def _stats_forward(static: Static, index_dtype: np.dtype, sums: _Sums, *primals):
  arrays = [None if x is None else x.value for x in primals]
  results = _run_forward(static, index_dtype, *arrays)
  # The sums, too: gradients of losses made of them need them.
  results = (*results[:4], *_sum_groups(results[4:8], sums))
  named = [checkpoint_name(x, _operands.CHECKPOINT_NAME) for x in results]
  return (*named[:2], *named[4:]), (*named[:4], arrays[0])


def _stats_backward(static: Static, index_dtype: np.dtype, sums: _Sums, residuals, cotangents):
  """Gradient of the logits from those cotangents alone that are there."""
  del index_dtype
  *choice, softmax, logits = residuals
  weights, _, _, scores, z, _ = (None if isinstance(c, SymbolicZero) else c for c in cotangents)
  if scores is None and z is None:
    if weights is None:
      return jnp.zeros_like(logits), None, None, None
    saved = (*choice, logits if static.options.dense_gradient else None)
    return _operands.pull_back(bind_route_backward, static, weights, saved)
  of_weights = [] if weights is None else [weights, *choice]
  of_stats = [c for c in (scores, z) if c is not None]
  if sums.grouped:
    *lead, groups = logits.shape[:-2]
    axis = len(lead)
    of_stats = [
      jnp.broadcast_to(jnp.expand_dims(c, axis), (*lead, groups, *c.shape[axis:])) for c in of_stats
    ]
  (gradient,) = _bind_backward(
    logits,
    softmax,
    *of_weights,
    *of_stats,
    options=static.options,
    dtype=static.logits_dtype,
    has_weights=weights is not None,
    has_scores=scores is not None,
    has_z=z is not None,
    implementation=static.implementation,
  )
  return gradient, None, None, None


_stats.defvjp(_stats_forward, _stats_backward, symbolic_zeros=True)
