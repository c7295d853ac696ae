"""`dense_moe_fc2`: the second matmul of all experts at once, with their weights inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _compat, _experts_primitive, _native, _options, _reference_experts
from jax_router._experts_primitive import CUDA_LIMITS, FLOAT8
from jax_router._reference_experts import BLOCK

DTYPES = ("float32", "bfloat16", "float16")
_FLOAT8_MOST = 448.0  # the largest float8_e4m3fn


class PackedW2(NamedTuple):
  """The second weights of all experts in float8, as `pack_w2` makes them.

  Attributes:
    q: `[H, E * I]` float8_e4m3fn, expert after expert along a row.
    scale: `[ceil(H / 128), E * I / 128]` float32: w2[e, i, n] is q[n, e * I + i] times
      scale[n // 128, (e * I + i) // 128].
  """

  q: jax.Array
  scale: jax.Array


def pack_w2(w2: jax.Array | np.ndarray) -> PackedW2:
  """Quantizes second weights to float8, a scale for each block of 128 x 128.

  With a the largest absolute value of a block:

      scale = a / 448        q = w2 / scale, rounded to float8_e4m3fn

  448 is the largest float8_e4m3fn; a block of zeros has scale 1. (The blocks are those of
  DeepSeek-V3, arXiv:2412.19437, section 3.3.2.)

  Args:
    w2: `[E, I, H]` float32, bfloat16 or float16; I is a multiple of 128.

  Returns:
    `PackedW2(q [H, E * I] float8_e4m3fn, scale [ceil(H / 128), E * I / 128] float32)`.

  Raises:
    TypeError: `w2` is not an array of such a dtype.
    ValueError: a shape that does not fit.
  """
  w2 = _check_w2(w2)
  num_experts, depth, hidden = w2.shape
  if depth % BLOCK:
    raise ValueError(f"w2 must have an I that is a multiple of {BLOCK}, got shape {w2.shape}")
  rows = jnp.transpose(w2, (2, 0, 1)).reshape(hidden, num_experts * depth).astype(jnp.float32)
  padded = jnp.pad(rows, ((0, -hidden % BLOCK), (0, 0)))
  blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
  most = jnp.max(jnp.abs(blocks), axis=(1, 3), keepdims=True)
  # At least the smallest normal float: scales below would be flushed to 0.
  least = np.float32(np.finfo(np.float32).tiny)
  scale = jnp.where(most == 0, np.float32(1), jnp.maximum(most / np.float32(_FLOAT8_MOST), least))
  limit = np.float32(_FLOAT8_MOST)
  q = jnp.clip(blocks / scale, -limit, limit).reshape(padded.shape)[:hidden]
  return PackedW2(q.astype(FLOAT8), scale[:, 0, :, 0])


def dense_moe_fc2(
  h: jax.Array | np.ndarray,
  w2: jax.Array | np.ndarray | PackedW2,
  alpha: jax.Array | np.ndarray,
  *,
  h_scale: jax.Array | np.ndarray | None = None,
  out_dtype: Any = None,
  skip_unselected: bool = False,
  implementation: str | None = None,
) -> jax.Array:
  """Multiplies the activations of all experts by their second weights and adds them up, weighed.

      result[t, n] = sum over e of alpha[t, e] * (sum over i of h[t, e, i] * w2[e, i, n])

  An `alpha` of 0 contributes exactly 0, even where that expert's `h` or `w2` hold Inf or NaN. So a
  layer of few tokens needs no sorting: all experts are computed, and `alpha` chooses
  (TensorRT-LLM, pull request 12686). `choose_moe_form` says when that is the faster way.

  The CPU kernel skips experts of weight 0, adds up in float32, over i and then over the experts in
  ascending order, and weighs that sum: the same bits in every run, at any number of threads and
  whatever the other tokens are. Plain JAX, which runs where there is no kernel, folds `alpha` into
  `h`, which rounds once more in bfloat16; float16 is computed in float32.

  The CUDA kernel runs on GPUs of compute capability 9.0 (Hopper) and takes bfloat16, float16 and
  float8, I in multiples of 64 and H of 8. It multiplies each expert by the tokens that have chosen
  it alone, weighs the float32 sum of every expert, in float8 of 128 of its columns, and adds these
  up in an order that sizes and device alone decide: the same bits in every run, wherever a token
  stands among others. It is made for a few chosen experts for each token; where `alpha` has few
  zeros, `implementation="reference"` is faster. An exported program with symbolic sizes has plain
  JAX in its place, and so do more than 512 tokens in 16 bits, unless "cuda" is asked for.

  Computations over several devices outside of `jax.shard_map` take plain JAX everywhere. It follows
  any sharding of the tokens, of E or of I under Auto axes without a gather; for E and I it adds up
  over devices.

  Differentiable in `h`, `w2` and `alpha` in reverse mode, twice; for forward mode use
  `implementation="reference"`. The gradient of `alpha` is dense: an expert of weight 0 has that of
  its result, and 0 if that is not finite. That of weights per chosen expert comes through
  `alpha_from_topk`. In float8 only `alpha` and the scales have a gradient.

  Args:
    h: `[..., E, I]` float32, bfloat16 or float16, or float8_e4m3fn with `h_scale`: activations
      without the weights.
    w2: `[E, I, H]` of the dtype of `h`, or for float8 a `PackedW2`.
    alpha: `[..., E]` a floating dtype, taken as float32: weights, 0 for experts not chosen.
    h_scale: `[..., E * I / 128]` float32, with float8 alone: what 128 values of `h` are times.
    out_dtype: float32, bfloat16 or float16; by default the dtype of `h`, bfloat16 for float8.
    skip_unselected: static; whether the gradient of `alpha` is 0 where `alpha` is. Neither the
      result nor what is read for it depends on this: kernels never read experts nobody has chosen.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `[..., H]` of `out_dtype`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a shape that does not fit; an I that is no multiple of 128 in float8; an
      implementation that is not there or cannot run: "cuda" wants a dtype, sizes and GPUs as above,
      "cpu" takes no float8, neither takes types that are sharded; when it is compiled: an
      implementation asked for in a computation over several devices.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> h = jnp.array([[[1.0], [2.0], [jnp.nan]]])
    >>> w2 = jnp.array([[[1.0, 2.0]], [[10.0, 20.0]], [[100.0, 200.0]]])
    >>> jax_router.dense_moe_fc2(h, w2, jnp.array([[0.5, 1.0, 0.0]])).tolist()
    [[20.5, 41.0]]
  """
  h = _check_h(h)
  alpha = _check_alpha(alpha, h)
  quantized = h.dtype.name == FLOAT8
  dtype = _check_out_dtype(out_dtype, jnp.bfloat16 if quantized else h.dtype)
  if _options.check_bool("skip_unselected", skip_unselected):
    alpha = jnp.where(alpha == 0, np.float32(0), alpha)
  if quantized:
    packed, h_scale = _check_packed(h, w2, h_scale)
    hidden, operands = packed.q.shape[0], (h, packed.q, alpha, h_scale, packed.scale)
    reference: Callable[..., Any] = _reference_experts.fc2_float8
    primitive = _experts_primitive.fc2_float8
  else:
    if h_scale is not None:
      raise ValueError(f"h_scale must be None unless h is {FLOAT8}, and h is {h.dtype.name}")
    w2 = _check_w2(w2)
    if w2.dtype != h.dtype:
      raise TypeError(f"w2 must have the dtype of h, {h.dtype.name}, got {w2.dtype.name}")
    _options.check_shape("w2", w2.shape[:2], h.shape[-2:], "[E, I, H]; its first axes")
    hidden, operands = w2.shape[2], (h, w2, alpha)
    reference, primitive = _reference_experts.fc2, _experts_primitive.fc2
  split = any(_is_sharded(x) for x in operands)
  _check_implementation(implementation, operands, hidden, split)
  if implementation == "reference" or split:
    return reference(*operands, dtype)
  return primitive(implementation, dtype, *operands)


# ---- arguments ----


def _check_h(h: Any) -> jax.Array:
  h = _options.check_array("h", h)
  if h.dtype.name not in (*DTYPES, FLOAT8):
    raise TypeError(f"h must be one of {', '.join(DTYPES)}, {FLOAT8}, got {h.dtype.name}")
  if h.ndim < 2 or 0 in h.shape[-2:]:
    raise ValueError(f"h must have shape [..., E, I] with E and I at least 1, got {h.shape}")
  return h


def _check_alpha(alpha: Any, h: jax.Array) -> jax.Array:
  alpha = _options.check_array("alpha", alpha)
  if not jnp.issubdtype(alpha.dtype, jnp.floating):
    raise TypeError(f"alpha must have a floating dtype, got {alpha.dtype.name}")
  _options.check_shape("alpha", alpha.shape, h.shape[:-1], "h.shape[:-1]")
  return alpha.astype(jnp.float32)


def _check_w2(w2: Any) -> jax.Array:
  w2 = _options.check_array("w2", w2)
  if w2.dtype.name not in DTYPES:
    raise TypeError(f"w2 must be one of {', '.join(DTYPES)}, got {w2.dtype.name}")
  if w2.ndim != 3 or 0 in w2.shape:
    raise ValueError(f"w2 must have shape [E, I, H], each at least 1, got {w2.shape}")
  return w2


def _check_out_dtype(out_dtype: Any, default: Any) -> np.dtype:
  dtype = np.dtype(default if out_dtype is None else out_dtype)
  if dtype.name not in DTYPES:
    raise TypeError(f"out_dtype must be one of {', '.join(DTYPES)}, got {dtype.name}")
  return dtype


def _check_packed(h: jax.Array, w2: Any, h_scale: Any) -> tuple[PackedW2, jax.Array]:
  """Packed weights and scales of float8 activations."""
  num_experts, depth = h.shape[-2:]
  if not isinstance(w2, PackedW2):
    raise TypeError(f"w2 must be a jax_router.PackedW2 for an h in float8, got {type(w2).__name__}")
  if depth % BLOCK:
    raise ValueError(
      f"h must have an I that is a multiple of {BLOCK} in float8, got shape {h.shape}"
    )
  q = _options.check_array("w2.q", w2.q)
  if q.dtype.name != FLOAT8:
    raise TypeError(f"w2.q must have dtype {FLOAT8}, got {q.dtype.name}")
  columns = num_experts * depth
  if q.ndim != 2 or q.shape[0] < 1 or q.shape[1] != columns:
    raise ValueError(f"w2.q must have shape [H, E * I] with E * I = {columns}, got {q.shape}")
  scales = (-(-q.shape[0] // BLOCK), columns // BLOCK)
  scale = _check_scale("w2.scale", w2.scale, scales, "[ceil(H / 128), E * I / 128]")
  if h_scale is None:
    raise ValueError("h_scale must be given for an h in float8, got None")
  shape = (*h.shape[:-2], columns // BLOCK)
  return PackedW2(q, scale), _check_scale("h_scale", h_scale, shape, "[..., E * I / 128]")


def _check_scale(name: str, scale: Any, shape: tuple[int, ...], meaning: str) -> jax.Array:
  scale = _options.check_array(name, scale)
  if scale.dtype != np.float32:
    raise TypeError(f"{name} must have dtype float32, got {scale.dtype.name}")
  _options.check_shape(name, scale.shape, shape, meaning)
  return scale


def _is_sharded(x: jax.Array) -> bool:
  """Whether the type says so."""
  return any(axis is not None for axis in _compat.spec_of(jax.typeof(x)))


def _check_implementation(
  implementation: str | None, operands: tuple[jax.Array, ...], hidden: int, split: bool
) -> None:
  """ValueError if the implementation asked for is not there or cannot run."""
  if implementation is None:
    return
  _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
  h = operands[0]
  *tokens, experts, depth = h.shape
  if implementation == "cpu" and h.dtype.name == FLOAT8:
    raise ValueError(f"implementation='cpu' cannot run in float8: h is {h.dtype.name}")
  if implementation == "cuda" and not _experts_primitive.fits_cuda(
    h.dtype, tokens, experts, depth, hidden
  ):
    raise ValueError(
      f"implementation='cuda' takes {CUDA_LIMITS}, got h {h.dtype.name}{list(h.shape)} and "
      f"H = {hidden}"
    )
  if implementation != "reference" and split:
    types = ", ".join(str(jax.typeof(x)) for x in operands)
    raise ValueError(
      f"implementation={implementation!r} takes no sharded operands, got {types}; call it in "
      "jax.shard_map"
    )
  _native.check_implementation(implementation)
  if implementation == "cuda":
    reason = _experts_primitive.why_not_cuda()
    if reason is not None:
      raise ValueError(f"implementation='cuda' of dense_moe_fc2 cannot run here: {reason}")
