"""aiter's top-k softmax and sort of tokens by expert by their own names, orders and encodings.

Functional: what aiter writes into arrays that it is handed is returned here. Every function takes
leading dimensions before the tokens, each index of which is a call of its own, and the keyword
`implementation`: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_router
from jax_router import _options, _reference
from jax_router._blocks import BlockPlan
from jax_router._options import Routing
from jax_router._plan import check_experts
from jax_router._primitive import check_whole_tokens
from jax_router.compat import _aiter_arguments as _arguments

BLOCK_SIZE_M = 32

Array = jax.Array | np.ndarray


def topk_softmax(
  gating_output: Array,
  topk: int,
  need_renorm: bool,
  num_shared_experts: int = 0,
  shared_expert_scoring_func: str = "",
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses the `topk` most probable experts of every token.

  With p = softmax(gating_output) over all routed experts, in float32:

      topk_indices         = experts of the largest logits, ties to the lowest
      topk_weights         = p[topk_indices]            need_renorm=False
                           = the same / their sum       need_renorm=True
      token_expert_indices = slot * T + token

  The last `num_shared_experts` columns belong to experts that every token takes: they are not
  chosen, have no part in p, and the sigmoids of their logits follow the weights.

  NaN and infinities as in `jax_router.route`; a NaN logit of a shared expert has weight 0.
  Differentiable in `gating_output`.

  Args:
    gating_output: logits `[..., T, E + S]` float32, bfloat16 or float16.
    topk: static, 1 <= topk <= E; in aiter the width of the arrays it fills.
    need_renorm: static.
    num_shared_experts: static S, 0 <= S < E + S.
    shared_expert_scoring_func: static, "sigmoid" where there are shared experts, else also "".
    implementation: as in `jax_router.route`.

  Returns:
    `(topk_weights [..., T, topk + S] float32, topk_indices [..., T, topk] int32,
    token_expert_indices [..., T, topk] int32)`, best expert first.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from jax_router.compat import aiter
    >>> weights, ids, _ = aiter.topk_softmax(jnp.array([[0.0, 2.0, 1.0, 2.0]]), 2, True)
    >>> weights.tolist(), ids.tolist()
    ([[0.5, 0.5]], [[1, 3]])
  """
  logits = _arguments.check_gating(gating_output)
  columns = logits.shape[-1]
  shared = _options.check_int(
    "num_shared_experts", num_shared_experts, 0, columns - 1, "gating_output.shape[-1] - 1"
  )
  choices = ("sigmoid",) if shared else ("", "sigmoid")
  _options.check_choice("shared_expert_scoring_func", shared_expert_scoring_func, choices)
  num_experts = columns - shared
  weights, experts = jax_router.route(
    logits[..., :num_experts],
    _options.check_int("topk", topk, 1, num_experts, "num_experts"),
    renormalize=_options.check_bool("need_renorm", need_renorm),
    implementation=implementation,
  )
  if shared:
    shared_weights = _reference.scores(logits[..., num_experts:], "sigmoid")
    weights = jnp.concatenate([weights, shared_weights], axis=-1)
  return weights, experts, _arguments.token_expert_indices(experts)


def moe_sorting(
  topk_ids: Array,
  topk_weights: Array,
  num_experts: int,
  model_dim: int,
  moebuf_dtype: Any,
  block_size: int = BLOCK_SIZE_M,
  expert_mask: Array | None = None,
  num_local_tokens: int | Array | None = None,
  dispatch_policy: int = 0,
  return_local_topk_ids: bool = False,
  accumulate: bool = True,
  *,
  output_aux: bool = False,
  implementation: str | None = None,
) -> tuple[jax.Array, ...]:
  """Sorts the slots of all tokens by expert and pads each expert's run to whole blocks.

  With U = block_size, n = num_local_tokens (T by default), P = T * K + E * U - K, B = ceil(P / U):

      entry of slot k of token t = k << 24 | t
      entry of a pad             = K << 24 | n

  Experts come in ascending order, those without entries take no block; the entries of an expert in
  the order of the tokens, of a token in the order of its slots, however often it names the expert.
  Dropped are the tokens from n on, experts that the mask leaves out, and ids outside 0 .. E - 1.

  Every position of every result is defined. Differentiable in `topk_weights`.

  Args:
    topk_ids: `[..., T, K]` integer, K <= min(255, E), T < 2**24.
    topk_weights: `[..., T, K]` floating.
    num_experts: static E, at least 1.
    model_dim, moebuf_dtype: static, width and dtype of `moe_buf`.
    block_size: static U, at least 1.
    expert_mask: `[E]` bool or integer, 0 for experts that live elsewhere. Those kept are numbered
      among themselves.
    num_local_tokens: how many tokens count, clamped to 0 .. T: an integer, or an integer array
      `[1]`, `[]` or one for each leading index. It may be traced.
    dispatch_policy: static, 0, 1 or 2. Results are the same.
    return_local_topk_ids: static, whether to return `local_topk_ids`.
    accumulate: static; where it is False and there is no mask, `moe_buf` is `[..., 0, 0]`.
    output_aux: static, whether to return `m_indices` and `reverse_sorted`.
    implementation: as in `jax_router.plan_blocks`.

  Returns:
    `(sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)`, then with
    `output_aux` `m_indices, reverse_sorted`, then with `return_local_topk_ids` `local_topk_ids`:

      sorted_ids         `[..., P]` int32, entries and pads
      sorted_weights     `[..., P]` float32, the weight of an entry, 0 of a pad
      sorted_expert_ids  `[..., B]` int32, the expert of each block, -1 of an unused one
      num_valid_ids      `[..., 2]` int32, positions in used blocks, and n
      moe_buf            `[..., T, model_dim]` zeros
      m_indices          `[..., P]` int32, the token of each entry, n of a pad
      reverse_sorted     `[..., T * K]` int32, position of each slot, -1 if dropped
      local_topk_ids     `[..., T, K]` int32, number of the expert among those kept, -1 if dropped

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; tokens that are or may be sharded,
      as in `jax_router.plan_blocks`.

  Example:
    >>> import jax.numpy as jnp
    >>> from jax_router.compat import aiter
    >>> ids, weights = jnp.array([[2, 0], [0, 1]]), jnp.array([[0.5, 0.25], [0.75, 0.125]])
    >>> sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf = aiter.moe_sorting(
    ...   ids, weights, 3, 4, jnp.bfloat16, block_size=2
    ... )
    >>> sorted_weights.tolist(), sorted_expert_ids.tolist(), num_valid_ids.tolist(), moe_buf.shape
    ([0.25, 0.75, 0.125, 0.0, 0.5, 0.0, 0.0, 0.0], [0, 1, 2, -1], [6, 2], (2, 4))
  """
  num_experts = _options.check_int("num_experts", num_experts, 1, _arguments.LARGEST_INT32)
  block_size = _options.check_int("block_size", block_size, 1, _arguments.LARGEST_INT32)
  experts = check_experts("moe_sorting", "topk_ids", topk_ids, num_experts)
  weights = _arguments.check_weights("topk_weights", topk_weights, experts.shape)
  check_whole_tokens("moe_sorting", "topk_weights", weights, weights.ndim - 2)
  size = _arguments.check_size("topk_ids", experts.shape, num_experts, block_size)
  model_dim = _options.check_int("model_dim", model_dim, 0, _arguments.LARGEST_INT32)
  dtype = _arguments.check_buffer_dtype(moebuf_dtype)
  _options.check_int("dispatch_policy", dispatch_policy, 0, 2)
  want_local = _options.check_bool("return_local_topk_ids", return_local_topk_ids)
  want_aux = _options.check_bool("output_aux", output_aux)
  batch = experts.shape[:-2]
  blocks = jax_router.plan_blocks(
    Routing(weights, experts),
    num_experts,
    block_size,
    layout="packed",
    expert_mask=expert_mask,
    num_valid=_arguments.check_num_local_tokens(num_local_tokens, batch),
    implementation=implementation,
  )
  shape = experts.shape[-2], model_dim
  if not _options.check_bool("accumulate", accumulate) and expert_mask is None:
    shape = 0, 0
  results = *_sorted(blocks, size), _zeros(blocks.num_padded, shape, dtype)
  if want_aux:
    m_indices = results[0] & 0xFFFFFF
    results += m_indices, blocks.inverse.reshape(*batch, size.entries)
  if want_local:
    results += (_local_ids(experts, blocks.inverse, expert_mask),)
  return results


def topk_softmax_sorting(
  gating_output: Array,
  topk: int,
  num_experts: int,
  model_dim: int,
  moebuf_dtype: Any,
  need_renorm: bool,
  block_size: int = BLOCK_SIZE_M,
  expert_mask: Array | None = None,
  num_local_tokens: int | Array | None = None,
  dispatch_policy: int = 0,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """`topk_softmax` and `moe_sorting` of its result in one call, with the same bits.

  Without a mask and `num_local_tokens` it is one kernel up to `fused_topk_moe_sorting_max_tokens`
  tokens, which depends on shapes and platform alone. Differentiable in `gating_output`.

  Args:
    gating_output: logits `[..., T, C]` float32, bfloat16 or float16; only the first `num_experts`
      of the C >= E columns are looked at.
    topk: static K, 1 <= K <= min(255, E).
    need_renorm: static, as in `topk_softmax`.
    num_experts, model_dim, moebuf_dtype, block_size, expert_mask, num_local_tokens,
      dispatch_policy, implementation: as in `moe_sorting`.

  Returns:
    `(sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)`, as `moe_sorting`.

  Raises:
    TypeError, ValueError: as `topk_softmax` and `moe_sorting`.
  """
  logits = _arguments.check_gating(gating_output)
  columns = logits.shape[-1]
  num_experts = _options.check_int(
    "num_experts", num_experts, 1, columns, "gating_output.shape[-1]"
  )
  topk = _options.check_int("topk", topk, 1, num_experts, "num_experts")
  block_size = _options.check_int("block_size", block_size, 1, _arguments.LARGEST_INT32)
  need_renorm = _options.check_bool("need_renorm", need_renorm)
  check_whole_tokens("topk_softmax_sorting", "gating_output", logits, logits.ndim - 2)
  logits = logits[..., :num_experts]
  *lead, tokens, _ = logits.shape
  size = _arguments.check_size("gating_output", (tokens, topk), num_experts, block_size)
  if expert_mask is not None or num_local_tokens is not None:
    weights, experts = jax_router.route(
      logits, topk, renormalize=need_renorm, implementation=implementation
    )
    results = moe_sorting(
      experts, weights, num_experts, model_dim, moebuf_dtype, block_size, expert_mask,
      num_local_tokens, dispatch_policy, implementation=implementation,
    )  # fmt: skip
    return results[0], results[1], results[2], results[3], results[4]
  model_dim = _options.check_int("model_dim", model_dim, 0, _arguments.LARGEST_INT32)
  dtype = _arguments.check_buffer_dtype(moebuf_dtype)
  _options.check_int("dispatch_policy", dispatch_policy, 0, 2)
  _, blocks, *buffers = jax_router.route_and_plan_blocks(
    logits,
    topk,
    block_size,
    layout="packed",
    renormalize=need_renorm,
    zeros=jax.ShapeDtypeStruct((*lead, tokens, model_dim), dtype),
    implementation=implementation,
  )
  return *_sorted(blocks, size), buffers[0]


def fused_topk_moe_sorting_fwd(
  gating_output: Array,
  num_experts: int,
  topk: int,
  unit_size: int,
  need_renorm: bool,
  *,
  model_dim: int,
  moebuf_dtype: Any,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """`topk_softmax_sorting` by the name and order of the operation below it, for any size.

  Args:
    unit_size: the `block_size`.
    model_dim, moebuf_dtype: shape and dtype of `moe_buf`, in aiter those of an array it is handed.
    gating_output, num_experts, topk, need_renorm, implementation: as in `topk_softmax_sorting`.

  Returns:
    `(sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)`, as `moe_sorting`.

  Raises:
    TypeError, ValueError: as `topk_softmax_sorting`.
  """
  unit_size = _options.check_int("unit_size", unit_size, 1, _arguments.LARGEST_INT32)
  return topk_softmax_sorting(
    gating_output, topk, num_experts, model_dim, moebuf_dtype, need_renorm, unit_size,
    implementation=implementation,
  )  # fmt: skip


def fused_topk_moe_sorting_max_tokens(num_experts: int, topk: int, *, device: Any = None) -> int:
  """Up to how many tokens `topk_softmax_sorting` is one kernel; 0 where there is none.

  Args:
    num_experts: E.
    topk: K, 1 <= K <= E.
    device: the `jax.Device` where it runs; by default one of the default backend.

  Raises:
    TypeError, ValueError: a number that is not an integer, or out of range.
  """
  num_experts = _options.check_int("num_experts", num_experts, 1, _arguments.LARGEST_INT32)
  topk = _options.check_int("topk", topk, 1, num_experts, "num_experts")
  return jax_router.max_fused_tokens(num_experts, topk, device=device)


# ---- aiter's arrays, made of a block plan ----


def _sorted(
  blocks: BlockPlan, size: _arguments.Size
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """The first four results: as long as aiter has them, which may be more or less than the plan."""
  pad = size.pad | blocks.num_tokens
  known = min(blocks.ids.shape[-1], size.positions)
  ids = _resized(blocks.ids, size.positions, 0)
  position = jnp.arange(size.positions, dtype=jnp.int32)
  position = jnp.expand_dims(position, range(ids.ndim - 1))
  ids = jnp.where(position < known, ids, pad[..., None])
  weights = _resized(blocks.weights, size.positions, 0)
  block_experts = _resized(blocks.block_experts, size.blocks, -1)
  return ids, weights, block_experts, jnp.stack([blocks.num_padded, blocks.num_tokens], axis=-1)


def _resized(x: jax.Array, length: int, fill: int) -> jax.Array:
  """The first `length` of the last axis, `fill` from its end on."""
  missing = max(length - x.shape[-1], 0)
  widths = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
  return jnp.pad(x[..., :length], widths, constant_values=fill)


def _zeros(like: jax.Array, shape: tuple[int, int], dtype: np.dtype) -> jax.Array:
  """Zeros `[..., *shape]` for `like` `[...]`, sharded as it is."""
  return jnp.broadcast_to(jnp.zeros_like(like, dtype)[..., None, None], (*like.shape, *shape))


def _local_ids(experts: jax.Array, inverse: jax.Array, mask: Array | None) -> jax.Array:
  """Numbers of experts `[..., T, K]` among those that the mask keeps, -1 where dropped."""
  kept = inverse >= 0
  if mask is None:
    return jnp.where(kept, experts, -1)
  number = jnp.cumsum(jnp.asarray(mask).astype(bool), dtype=jnp.int32) - 1
  return jnp.where(kept, _arguments.look_up(number, experts), -1)
