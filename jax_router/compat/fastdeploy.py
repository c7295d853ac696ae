"""FastDeploy's grouped top-k by its own names, argument order and outputs.

`grouped_topk` is FastDeploy's fused operator; `noaux_tc` and `noaux_tc_redundant` are the older
ones, which take scores instead of logits. `grouped_topk_redundant` is the fused form of the latter,
which FastDeploy does not have. With keys = scores + bias for every expert:

    a key that is not finite counts as -inf
    a group scores the sum of its two largest keys, -inf if it has fewer
    the `topk_group` best groups stay, ties to the lowest
    among their experts, the `topk` largest keys are chosen, ties to the lowest, best first
    value = score * routed_scaling_factor / (sum of the chosen scores + 1e-20)  with renormalize
          = score * routed_scaling_factor                                       without

A degenerate token, with fewer than `topk_group` group scores above -inf, gets experts 0 to topk - 1
with value 1 / topk each, not scaled, and a row of zeros in `scores`. Where the kept groups have
fewer keys above -inf than `topk`, the lowest experts left follow with value 0. `n_group` and
`topk_group` that are not positive count as 1.

Indices are int64 with jax_enable_x64 and int32 without. Nothing is updated in place: what
FastDeploy writes into an argument is returned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _operands, _options, _reference, _replicas, _route, _route_replicas
from jax_router._operands import Static
from jax_router._options import Groups, RouteOptions
from jax_router._replicas import ReplicaOptions, Tables
from jax_router.compat._transformer_engine_arguments import check_number

_MOST_GROUPS = 32
_MOST_TOPK = 32
_LARGEST_INT = 2**31 - 1

Array = jax.Array | np.ndarray


def grouped_topk(
  gating_output: Array,
  e_score_correction_bias: Array,
  n_group: int,
  topk_group: int,
  topk: int,
  renormalize: bool,
  routed_scaling_factor: float,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sigmoid, bias, groups, choice and values of the tokens' experts from one kernel.

  Scores are sigmoid(gating_output), keys scores + bias. The rule is that of the module.

  Args:
    gating_output: logits `[T, E]` float32, float16 or bfloat16; all arithmetic is float32.
    e_score_correction_bias: `[E]` or `[1, E]` floating.
    n_group: static, at most 32; it divides E.
    topk_group: static, at most `n_group`.
    topk: static, 1 <= topk <= 32, at most the experts of `topk_group` groups.
    renormalize: static, whether values are divided by their sum.
    routed_scaling_factor: static, multiplies the values.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `(scores, topk_values, topk_indices)`: `[T, E]` float32, zeros but for the values at the chosen
    experts; `[T, topk]` float32; `[T, topk]` int64 (int32 without jax_enable_x64).

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape.

  Source: FastDeploy's `grouped_topk` (pull requests 7777 and 7818).

  Example:
    >>> import jax.numpy as jnp
    >>> from jax_router.compat.fastdeploy import grouped_topk
    >>> logits = jnp.array([[1.0, 1.0, 9.0, -9.0]])  # the first two score more together
    >>> scores, values, indices = grouped_topk(logits, jnp.zeros(4), 2, 1, 2, True, 2.0)
    >>> values.tolist(), indices.tolist()
    ([[1.0, 1.0]], [[0, 1]])
  """
  logits = _check_matrix("gating_output", gating_output)
  options = _check_options(
    logits.shape[1], n_group, topk_group, topk, renormalize, routed_scaling_factor
  )
  choice = _choose_fused(logits, e_score_correction_bias, options, implementation)
  return choice.scores, choice.values, _as_indices(choice.experts)


def noaux_tc(
  scores: Array,
  scores_with_bias: Array,
  n_group: int,
  topk_group: int,
  topk: int,
  renormalize: bool,
  routed_scaling_factor: float,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`grouped_topk` of scores and of keys that are there already.

  FastDeploy's commits differ in the first result: that of most, the values among zeros, is given
  here, not the scores as they came.

  Args:
    scores: `[T, E]` float32, float16 or bfloat16, as a sigmoid gives them.
    scores_with_bias: the keys, of the same shape.
    n_group, topk_group, topk, renormalize, routed_scaling_factor, implementation: as in
      `grouped_topk`.

  Returns:
    `(scores, topk_values, topk_indices)` as `grouped_topk`.

  Raises:
    TypeError, ValueError: as `grouped_topk`.
  """
  scores = _check_matrix("scores", scores)
  options = _check_options(
    scores.shape[1], n_group, topk_group, topk, renormalize, routed_scaling_factor
  )
  choice = _choose_scored(scores, scores_with_bias, options, implementation)
  return choice.scores, choice.values, _as_indices(choice.experts)


def noaux_tc_redundant(
  scores: Array,
  scores_with_bias: Array,
  expert_id_to_ep_rank_array: Array,
  expert_in_rank_num_list: Array,
  tokens_per_expert_stats_list: Array,
  n_group: int,
  topk_group: int,
  topk: int,
  renormalize: bool,
  routed_scaling_factor: float,
  redundant_ep_rank_num_plus_one: int,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """`noaux_tc` of experts with replicas: indices are physical slots, and chosen experts counted.

  One kernel chooses, assigns and counts, as `jax_router.route_and_assign_replicas` does.
  Token t takes replica h(t) % count of each of its experts, h being the "xorshift" of
  `jax_router.assign_replicas`. Every chosen expert is counted, those of degenerate tokens too.

  Args:
    scores, scores_with_bias: as in `noaux_tc`.
    expert_id_to_ep_rank_array: `[E, R]` integer, the slots of every expert; unused entries are -1.
    expert_in_rank_num_list: `[E]` integer, how many slots every expert has, 1 .. R.
    tokens_per_expert_stats_list: `[E]` int32, what has been counted so far.
    n_group, topk_group, topk, renormalize, routed_scaling_factor, implementation: as in
      `grouped_topk`.
    redundant_ep_rank_num_plus_one: static, R.

  Returns:
    `(scores, topk_values, topk_indices, tokens_per_expert_stats_list)`: the first two as
    `grouped_topk`, by logical expert; physical slots `[T, topk]`, -1 where traced counts or entries
    cannot be used; counts `[E]` int32, those given and those of this call.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; known counts outside 1 .. R, known
      entries in use that are negative.
  """
  scores = _check_matrix("scores", scores)
  options = _check_options(
    scores.shape[1], n_group, topk_group, topk, renormalize, routed_scaling_factor
  )
  replicas = _check_replicas(
    expert_id_to_ep_rank_array, expert_in_rank_num_list, tokens_per_expert_stats_list,
    redundant_ep_rank_num_plus_one, scores.shape[1],
  )  # fmt: skip
  choice = _choose_scored(scores, scores_with_bias, options, implementation, replicas)
  return choice.scores, choice.values, *_replicate(choice, replicas)


def grouped_topk_redundant(
  gating_output: Array,
  e_score_correction_bias: Array,
  expert_id_to_ep_rank_array: Array,
  expert_in_rank_num_list: Array,
  tokens_per_expert_stats_list: Array,
  n_group: int,
  topk_group: int,
  topk: int,
  renormalize: bool,
  routed_scaling_factor: float,
  redundant_ep_rank_num_plus_one: int,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """`noaux_tc_redundant` of logits and a bias, as fused as `grouped_topk`.

  Args:
    gating_output, e_score_correction_bias: as in `grouped_topk`.
    expert_id_to_ep_rank_array, expert_in_rank_num_list, tokens_per_expert_stats_list, n_group,
      topk_group, topk, renormalize, routed_scaling_factor, redundant_ep_rank_num_plus_one,
      implementation: as in `noaux_tc_redundant`.

  Returns:
    `(scores, topk_values, topk_indices, tokens_per_expert_stats_list)` as `noaux_tc_redundant`.

  Raises:
    TypeError, ValueError: as `noaux_tc_redundant`.
  """
  logits = _check_matrix("gating_output", gating_output)
  options = _check_options(
    logits.shape[1], n_group, topk_group, topk, renormalize, routed_scaling_factor
  )
  replicas = _check_replicas(
    expert_id_to_ep_rank_array, expert_in_rank_num_list, tokens_per_expert_stats_list,
    redundant_ep_rank_num_plus_one, logits.shape[1],
  )  # fmt: skip
  choice = _choose_fused(logits, e_score_correction_bias, options, implementation, replicas)
  return choice.scores, choice.values, *_replicate(choice, replicas)


# ---- arguments ----


class _Replicas(NamedTuple):
  tables: Tables
  options: ReplicaOptions
  stats: jax.Array


def _check_matrix(name: str, value: Any) -> jax.Array:
  value = _options.check_array(name, value)
  if value.dtype.name not in _options.LOGITS_DTYPES:
    allowed = ", ".join(_options.LOGITS_DTYPES)
    raise TypeError(f"{name} must be one of {allowed}, got {value.dtype.name}")
  if value.ndim != 2 or value.shape[1] < 1:
    raise ValueError(f"{name} must have shape [T, E] with E >= 1, got {value.shape}")
  return value


def _check_options(
  num_experts: int, n_group: Any, topk_group: Any, topk: Any, renormalize: Any, scale: Any
) -> RouteOptions:
  count = max(_options.check_int("n_group", n_group, -_LARGEST_INT, _MOST_GROUPS), 1)
  keep = max(_options.check_int("topk_group", topk_group, -_LARGEST_INT, count, "n_group"), 1)
  if num_experts % count:
    raise ValueError(f"n_group must divide the number of experts {num_experts}, got {count}")
  most = min(_MOST_TOPK, keep * (num_experts // count))
  k = _options.check_int("topk", topk, 1, most)
  renormalize = _options.check_bool("renormalize", renormalize)
  scale = check_number("routed_scaling_factor", scale)
  return RouteOptions(k, "sigmoid", renormalize, scale, Groups(count, keep, "top2"))


def _check_replicas(table: Any, counts: Any, stats: Any, width: Any, experts: int) -> _Replicas:
  """The table and counts, checked, and the counts so far."""
  for name, value, shape, meaning in (
    ("expert_in_rank_num_list", counts, (experts,), "[E]"),
    ("tokens_per_expert_stats_list", stats, (experts,), "[E]"),
  ):
    _options.check_shape(name, _options.check_array(name, value).shape, shape, meaning)
  width = _options.check_int("redundant_ep_rank_num_plus_one", width, 1, _LARGEST_INT)
  name = "expert_id_to_ep_rank_array"
  shape = _options.check_array(name, table).shape
  meaning = "[E, redundant_ep_rank_num_plus_one]"
  _options.check_shape(name, shape, (experts, width), meaning)
  stats = _options.check_array("tokens_per_expert_stats_list", stats)
  if stats.dtype != np.int32:
    raise TypeError(f"tokens_per_expert_stats_list must have dtype int32, got {stats.dtype.name}")
  checked = _replicas.check_replicas(
    table, counts, 0, num_physical=_LARGEST_INT, policy="xorshift", load="logical", lead=(),
    lead_name="()",
  )  # fmt: skip
  return _Replicas(*checked, stats)


# ---- the choice ----


class _Choice(NamedTuple):
  scores: jax.Array  # [T, E] float32
  values: jax.Array  # [T, k] float32
  experts: jax.Array  # [T, k] int32
  assigned: list[jax.Array]  # physical slots [T, k] int32 and load [E] int32, if asked for


def _finite(x: jax.Array) -> jax.Array:
  """float32 with -inf for what is not finite."""
  x = x.astype(jnp.float32)
  return jnp.where(jnp.isfinite(x), x, np.float32(-np.inf))


def _route_marked(
  logits: jax.Array,
  options: RouteOptions,
  bias: jax.Array | None,
  implementation: str | None,
  replicas: _Replicas | None,
) -> list[jax.Array]:
  """What `route` computes: weights and experts `[T, k]`, and the normalizer `[T]`.

  The weights are -0.0 in slots that were filled up, the normalizer is NaN for degenerate tokens.
  With replicas, physical slots `[T, k]` and the load `[E]` follow.
  """
  given, options = _operands.check_arguments(
    logits, options.k, score=options.score, renormalize=options.renormalize, scale=options.scale,
    bias=bias, groups=options.groups, where=None, experts=None, implementation=implementation,
  )  # fmt: skip
  index_dtype = np.dtype(np.int32)
  static = Static(options, implementation, logits.shape[1], logits.dtype)
  slots, tokens = (logits.shape[0], options.k), logits.shape[:1]
  if replicas is None:
    operands = _operands.fold_tokens(given)
    if implementation == "reference":
      results = _reference.route(*operands, options=options, index_dtype=index_dtype)
    else:
      results = _route.run_forward(static, index_dtype, *operands)
    shapes = (slots, slots, tokens)
    return [x.reshape(shape) for x, shape in zip(results, shapes, strict=True)]
  static = _route_replicas.Static(static, replicas.options, index_dtype)
  operands, tables, groups = _route_replicas.fold_tokens(given, replicas.tables)
  if implementation == "reference":
    *results, loads = _route_replicas.run_reference(static, operands, tables)
  else:
    *results, loads = _route_replicas.run_forward(static, *operands, *tables)
  shapes = (slots, slots, tokens, slots)
  reshaped = [x.reshape(shape) for x, shape in zip(results, shapes, strict=True)]
  return [*reshaped, _replicas.sum_groups(loads, groups)]


def _choose_fused(
  logits: jax.Array,
  bias: Any,
  options: RouteOptions,
  implementation: str | None,
  replicas: _Replicas | None = None,
) -> _Choice:
  num_experts = logits.shape[1]
  bias = _options.check_array("e_score_correction_bias", bias)
  if not jnp.issubdtype(bias.dtype, jnp.floating):
    raise TypeError(f"e_score_correction_bias must have a floating dtype, got {bias.dtype.name}")
  if bias.shape not in ((num_experts,), (1, num_experts)):
    raise ValueError(
      f"e_score_correction_bias must have shape [E] or [1, E] with E = {num_experts}, "
      f"got {bias.shape}"
    )
  bias = _finite(bias.reshape(num_experts))
  values, experts, normalizer, *assigned = _route_marked(
    logits, options, bias, implementation, replicas
  )
  return _spread(values, experts, jnp.isnan(normalizer), num_experts, assigned)


def _choose_scored(
  scores: jax.Array,
  keys: Any,
  options: RouteOptions,
  implementation: str | None,
  replicas: _Replicas | None = None,
) -> _Choice:
  keys = _check_matrix("scores_with_bias", keys)
  _options.check_shape("scores_with_bias", keys.shape, scores.shape, "scores.shape")
  selection = options._replace(score="none", renormalize=False, scale=1.0)
  marks, experts, normalizer, *assigned = _route_marked(
    _finite(keys), selection, None, implementation, replicas
  )
  degenerate = jnp.isnan(normalizer)
  values = jnp.take_along_axis(scores.astype(jnp.float32), experts, axis=1)
  values = jnp.where((marks == 0) & jnp.signbit(marks), np.float32(0), values)
  scaled = values * np.float32(options.scale)
  if options.renormalize:
    scaled = scaled / (jnp.sum(values, axis=1, keepdims=True) + _reference.EPSILON)
  uniform = np.float32(1) / np.float32(options.k)
  scaled = jnp.where(degenerate[:, None], uniform, scaled)
  return _spread(scaled, experts, degenerate, scores.shape[1], assigned)


def _spread(values, experts, degenerate, num_experts: int, assigned: list[jax.Array]) -> _Choice:
  """The choice with its values over all experts, which degenerate tokens have none of."""
  present = jnp.where(degenerate[:, None], np.int32(num_experts), experts)
  return _Choice(_reference.scatter(values, present, num_experts), values, experts, assigned)


def _as_indices(experts: jax.Array) -> jax.Array:
  return experts.astype(jnp.int64 if jax.config.jax_enable_x64 else jnp.int32)


def _replicate(choice: _Choice, replicas: _Replicas) -> tuple[jax.Array, jax.Array]:
  """Physical indices, and the counts with those of this call."""
  physical, load = choice.assigned
  physical = jnp.where(physical == np.int32(_LARGEST_INT), np.int32(-1), physical)
  return _as_indices(physical), replicas.stats + load
