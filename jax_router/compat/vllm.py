"""vLLM's router and block alignment by their own names, argument order, defaults and sentinels.

Functional: what vLLM writes into arrays that it is handed is returned here. Every function takes
leading dimensions before the tokens, each index of which is a call of its own, and the keyword
`implementation`: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_router
from jax_router import _options
from jax_router._options import Routing
from jax_router._plan import check_experts
from jax_router.compat import _vllm_arguments as _arguments

_SCORES = ("softmax", "sigmoid")

Array = jax.Array | np.ndarray


# ---- routing ----


def topk_softmax(
  gating_output: Array,
  topk: int,
  renormalize: bool = False,
  e_score_correction_bias: Array | None = None,
  *,
  indices_type: Any = jnp.int32,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses the `topk` most probable experts of every token.

  With p = softmax(gating_output) over all experts, in float32:

      topk_ids             = experts of the largest p (+ bias), ties to the lowest
      topk_weights         = p[topk_ids]                renormalize=False
                           = the same / their sum       renormalize=True
      token_expert_indices = slot * T + token

  NaN and infinities as in `jax_router.route`. Differentiable in `gating_output`.

  Args:
    gating_output: logits `[..., T, E]` float32, bfloat16 or float16.
    topk: static, 1 <= topk <= E; in vLLM the width of the arrays it fills.
    renormalize: static.
    e_score_correction_bias: `[E]` floating, for the choice only; gets no gradient.
    indices_type: int32, uint32 or int64 (with jax_enable_x64), dtype of `topk_ids`.
    implementation: as in `jax_router.route`.

  Returns:
    `(topk_weights float32, topk_ids, token_expert_indices int32)`, each `[..., T, topk]`, best
    expert first.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from jax_router.compat import vllm
    >>> weights, ids, _ = vllm.topk_softmax(jnp.array([[0.0, 2.0, 1.0, 2.0]]), 2, True)
    >>> weights.tolist(), ids.tolist()
    ([[0.5, 0.5]], [[1, 3]])
  """
  return _topk(
    "softmax", gating_output, topk, renormalize, e_score_correction_bias, indices_type,
    implementation,
  )  # fmt: skip


def topk_sigmoid(
  gating_output: Array,
  topk: int,
  renormalize: bool = False,
  e_score_correction_bias: Array | None = None,
  *,
  indices_type: Any = jnp.int32,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`topk_softmax` with the sigmoid of each logit in place of p."""
  return _topk(
    "sigmoid", gating_output, topk, renormalize, e_score_correction_bias, indices_type,
    implementation,
  )  # fmt: skip


def fused_topk(
  hidden_states: Array | None,
  gating_output: Array,
  topk: int,
  renormalize: bool,
  indices_type: Any = None,
  scoring_func: str = "softmax",
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`topk_softmax` or `topk_sigmoid`, by `scoring_func`.

  Args:
    hidden_states: `[..., T, d]` or None; only its number of tokens is looked at.
    gating_output, topk, renormalize, implementation: as in `topk_softmax`.
    indices_type: as in `topk_softmax`, None for int32.
    scoring_func: static, "softmax" or "sigmoid".

  Returns:
    `(topk_weights, topk_ids, token_expert_indices)`, as `topk_softmax`.

  Raises:
    TypeError, ValueError: as `topk_softmax`; tokens of `hidden_states` that do not match.
  """
  score = _options.check_choice("scoring_func", scoring_func, _SCORES)
  _arguments.check_hidden(hidden_states, gating_output)
  indices_type = jnp.int32 if indices_type is None else indices_type
  return _topk(score, gating_output, topk, renormalize, None, indices_type, implementation)


def grouped_topk(
  hidden_states: Array | None,
  gating_output: Array,
  topk: int,
  renormalize: bool,
  num_expert_group: int = 0,
  topk_group: int = 0,
  scoring_func: str = "softmax",
  routed_scaling_factor: float = 1.0,
  e_score_correction_bias: Array | None = None,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Chooses `topk` experts of the `topk_group` best of `num_expert_group` contiguous groups.

  With y = softmax or sigmoid of the logits, in float32, and key = y + bias:

      score of a group = the sum of its two largest keys     with a bias (DeepSeek-V3)
                       = its largest key                     without one (DeepSeek-V2)
      topk_ids         = the largest keys in the best groups, ties to the lowest group and expert
      topk_weights     = routed_scaling_factor * y[topk_ids]                            or
                       = routed_scaling_factor * y[topk_ids] / (their sum + 1e-20)

  Groups that cannot be (`num_expert_group` < 1, not a divisor of E, or not less than E) limit
  nothing, as in vLLM's router. Of a row with fewer than `topk_group` group scores above -inf the
  result is experts 0 .. topk-1, each of weight 1 / topk. Differentiable in `gating_output`.

  Args:
    hidden_states: `[..., T, d]` or None; only its number of tokens is looked at.
    gating_output: logits `[..., T, E]` float32, bfloat16 or float16.
    topk: static, 1 <= topk <= E, and no more than the experts of `topk_group` groups.
    renormalize: static.
    num_expert_group, topk_group: static, 1 <= topk_group <= num_expert_group.
    scoring_func: static, "softmax" or "sigmoid".
    routed_scaling_factor: static Python number.
    e_score_correction_bias: `[E]` floating, for the choice only; gets no gradient.
    implementation: as in `jax_router.route`.

  Returns:
    `(topk_weights float32, topk_ids int32)`, both `[..., T, topk]`, best expert first.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape.
  """
  score = _options.check_choice("scoring_func", scoring_func, _SCORES)
  _arguments.check_hidden(hidden_states, gating_output)
  logits = _arguments.check_gating(gating_output)
  num_experts = logits.shape[-1]
  topk = _options.check_int("topk", topk, 1, num_experts, "num_experts")
  bias = _arguments.check_bias("e_score_correction_bias", e_score_correction_bias, num_experts)
  routing = jax_router.route(
    logits,
    topk,
    score=score,
    renormalize=_options.check_bool("renormalize", renormalize),
    scale=_options.check_scale(routed_scaling_factor, "routed_scaling_factor"),
    bias=bias,
    groups=_arguments.check_groups(
      num_expert_group, topk_group, num_experts, topk, bias is not None
    ),
    implementation=implementation,
  )
  return routing.weights, routing.experts


def _topk(score, gating_output, topk, renormalize, bias, indices_type, implementation):
  logits = _arguments.check_gating(gating_output)
  num_experts = logits.shape[-1]
  weights, experts = jax_router.route(
    logits,
    _options.check_int("topk", topk, 1, num_experts, "num_experts"),
    score=score,
    renormalize=_options.check_bool("renormalize", renormalize),
    bias=_arguments.check_bias("e_score_correction_bias", bias, num_experts),
    index_dtype=_arguments.check_indices_type(indices_type),
    implementation=implementation,
  )
  return weights, experts, _arguments.token_expert_indices(experts)


# ---- blocks ----


def moe_align_block_size(
  topk_ids: Array,
  block_size: int,
  num_experts: int,
  expert_map: Array | None = None,
  pad_sorted_ids: bool = False,
  ignore_invalid_experts: bool = False,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sorts the entries of all tokens by expert and pads each expert's run to whole blocks.

  With N = T * K entries t * K + k, U = block_size and E = num_experts:

      M = N + E * (U - 1), rounded up to whole blocks with `pad_sorted_ids`; no more than N * U
          where N < E

  Experts come in ascending order, those without entries take no block, and an expert's entries come
  in ascending order, always. Ids outside 0 .. E - 1 are skipped.

  With `expert_map`, from global to local ids: `ignore_invalid_experts=False` sorts all experts by
  their global ids and maps what `expert_ids` holds, so that blocks of experts elsewhere have -1;
  `True` maps first, sorts by local ids and drops entries of experts elsewhere.

  Args:
    topk_ids: `[..., T, K]` integer, T * K < 2**31.
    block_size: static U, at least 1.
    num_experts: static E, at least 1.
    expert_map: `[E]` integer, local id of each global expert, -1 (or any other id outside 0 ..
      E - 1) where it lives elsewhere.
    pad_sorted_ids, ignore_invalid_experts: static.
    implementation: as in `jax_router.plan_blocks`.

  Returns:
    `(sorted_ids, expert_ids, num_tokens_post_pad)`, int32: entries `[..., M]`, N wherever a
    position holds none; the expert of each block `[..., ceil(M / U)]`, -1 for those unused;
    positions in used blocks `[..., 1]`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; tokens that are or may be sharded,
      as in `jax_router.plan_blocks`.

  Example:
    >>> import jax.numpy as jnp
    >>> from jax_router.compat import vllm
    >>> ids = jnp.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
    >>> sorted_ids, expert_ids, num_tokens_post_pad = vllm.moe_align_block_size(ids, 4, 5)
    >>> sorted_ids[:16].tolist(), expert_ids[:4].tolist(), num_tokens_post_pad.tolist()
    ([3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12], [1, 2, 3, 4], [16])
  """
  num_experts = _options.check_int("num_experts", num_experts, 1, _arguments.LARGEST_INT32)
  block_size = _options.check_int("block_size", block_size, 1, _arguments.LARGEST_INT32)
  round_up = _options.check_bool("pad_sorted_ids", pad_sorted_ids)
  map_first = _options.check_bool("ignore_invalid_experts", ignore_invalid_experts)
  experts = check_experts("moe_align_block_size", "topk_ids", topk_ids, num_experts)
  tokens, k = experts.shape[-2:]
  if k < 1:
    raise ValueError(f"topk_ids must have K >= 1 slots, got shape {experts.shape}")
  if not isinstance(tokens, int):
    raise ValueError(f"topk_ids must have a static number of tokens, got shape {experts.shape}")
  local = None if expert_map is None else _arguments.check_map(expert_map, num_experts)
  length = _arguments.sorted_length(tokens * k, num_experts, block_size, round_up)
  if local is not None and map_first:
    experts = _arguments.look_up(local, experts)
  blocks = jax_router.plan_blocks(
    Routing(jnp.zeros_like(experts, jnp.float32), experts),
    num_experts,
    block_size,
    implementation=implementation,
  )
  expert_ids = blocks.block_experts
  if local is not None and not map_first:
    expert_ids = _arguments.look_up(local, expert_ids)
  return blocks.ids[..., :length], expert_ids, blocks.num_padded[..., None]


def batched_moe_align_block_size(
  max_tokens_per_batch: int, block_size: int, expert_num_tokens: Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`moe_align_block_size` of tokens that already lie in one batch for each expert.

  Of B batches of M = `max_tokens_per_batch` rows each, row i of batch b is entry b * M + i, and the
  first `expert_num_tokens[b]` rows of batch b count. It is plain JAX.

  Args:
    max_tokens_per_batch: static M, at least 0.
    block_size: static U, at least 1.
    expert_num_tokens: `[..., B]` integer, clamped to 0 .. M.

  Returns:
    `(sorted_ids, expert_ids, num_tokens_post_pad)`, int32, with P = B * M, M rounded up to whole
    blocks: entries `[..., P]`, B * M wherever a position holds none; the batch of each block
    `[..., P / U]`, -1 for those unused; positions in used blocks `[..., 1]`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape.
  """
  most = _options.check_int(
    "max_tokens_per_batch", max_tokens_per_batch, 0, _arguments.LARGEST_INT32
  )
  block_size = _options.check_int("block_size", block_size, 1, _arguments.LARGEST_INT32)
  counts = _options.check_array("expert_num_tokens", expert_num_tokens)
  if not jnp.issubdtype(counts.dtype, jnp.integer):
    raise TypeError(f"expert_num_tokens must have an integer dtype, got {counts.dtype.name}")
  if counts.ndim < 1 or counts.shape[-1] < 1:
    raise ValueError(f"expert_num_tokens must have shape [..., B], B >= 1, got {counts.shape}")
  batches, blocks_of_batch = counts.shape[-1], -(-most // block_size)
  _arguments.check_length(
    "sorted_ids", batches * blocks_of_batch * block_size, "B * max_tokens_per_batch in whole blocks"
  )
  # Clipped as they are given, before JAX cuts off the upper half of a 64-bit count.
  highest = min(most, int(jnp.iinfo(expert_num_tokens.dtype).max))
  counts = jnp.asarray(expert_num_tokens.clip(0, highest)).astype(jnp.int32)

  def align(counts):
    needed = counts // block_size + (counts % block_size > 0).astype(jnp.int32)
    ends = jnp.cumsum(needed, dtype=jnp.int32)
    block = jnp.arange(batches * blocks_of_batch, dtype=jnp.int32)
    used = block < ends[-1]
    batch = jnp.where(used, jnp.searchsorted(ends, block, side="right").astype(jnp.int32), 0)
    first = (block - (ends - needed)[batch]) * block_size
    row = first[:, None] + jnp.arange(block_size, dtype=jnp.int32)[None]
    present = used[:, None] & (row < counts[batch][:, None])
    entry = batch[:, None] * most + row
    sorted_ids = jnp.where(present, entry, batches * most).reshape(block.shape[0] * block_size)
    return sorted_ids, jnp.where(used, batch, -1), ends[-1:] * block_size

  for _ in counts.shape[:-1]:
    align = jax.vmap(align)
  return align(counts)
