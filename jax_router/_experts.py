"""`dense_moe_fc2`: the second matmul of all experts at once, with their weights inside."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _compat, _native, _options, _reference_experts
from jax_router._primitive import (
  Operation,
  Result,
  batch_all,
  make_primitive,
  reference_tangents,
)
from jax_router._reference_experts import BLOCK

DTYPES = ("float32", "bfloat16", "float16")
_FLOAT8 = "float8_e4m3fn"
_FLOAT8_MOST = 448.0  # the largest float8_e4m3fn
# What the CUDA kernels want of shapes.
_CUDA_DTYPES = ("bfloat16", "float16")
_DEPTH_MULTIPLE = 64
_WIDTH_MULTIPLE = 8


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
  return PackedW2(q.astype(_FLOAT8), scale[:, 0, :, 0])


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

  There is no CUDA kernel yet; float8, and computations over several devices outside of
  `jax.shard_map`, take plain JAX everywhere. It follows any sharding of the tokens, of E or of I
  under Auto axes without a gather; for E and I it adds up over devices.

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
    skip_unselected: static; whether the gradient of `alpha` is 0 where `alpha` is. The result
      does not depend on it.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `[..., H]` of `out_dtype`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a shape that does not fit; an I that is no multiple of 128 in float8; an
      implementation that is not there or cannot run: "cuda" wants bfloat16 or float16, I in
      multiples of 64 and H of 8, neither takes float8 or types that are sharded; when it is
      compiled: an implementation asked for in a computation over several devices.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> h = jnp.array([[[1.0], [2.0], [jnp.nan]]])
    >>> w2 = jnp.array([[[1.0, 2.0]], [[10.0, 20.0]], [[100.0, 200.0]]])
    >>> jax_router.dense_moe_fc2(h, w2, jnp.array([[0.5, 1.0, 0.0]])).tolist()
    [[20.5, 41.0]]
  """
  h = _check_h(h)
  alpha = _check_alpha(alpha, h)
  quantized = h.dtype.name == _FLOAT8
  dtype = _check_out_dtype(out_dtype, jnp.bfloat16 if quantized else h.dtype)
  if _options.check_bool("skip_unselected", skip_unselected):
    alpha = jnp.where(alpha == 0, np.float32(0), alpha)
  if quantized:
    packed, h_scale = _check_packed(h, w2, h_scale)
    if implementation not in (None, "reference"):
      _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
      raise ValueError(f"implementation={implementation!r} cannot run in float8: h is {h.dtype}")
    wide = _reference_experts.dequantize_h(jax.lax.stop_gradient(h), h_scale)
    weights = _reference_experts.dequantize_w2(
      jax.lax.stop_gradient(packed.q), packed.scale, h.shape[-2]
    )
    return _reference_experts.fc2(wide, weights, alpha, dtype)
  if h_scale is not None:
    raise ValueError(f"h_scale must be None unless h is {_FLOAT8}, and h is {h.dtype.name}")
  w2 = _check_w2(w2)
  if w2.dtype != h.dtype:
    raise TypeError(f"w2 must have the dtype of h, {h.dtype.name}, got {w2.dtype.name}")
  _options.check_shape("w2", w2.shape[:2], h.shape[-2:], "[E, I, H]; its first axes")
  split = any(_is_sharded(x) for x in (h, w2, alpha))
  _check_implementation(implementation, h, w2, split)
  if implementation == "reference" or split:
    return _reference_experts.fc2(h, w2, alpha, dtype)
  return _fc2(implementation, dtype, *_compat.join_varying_axes((h, w2, alpha)))


# ---- arguments ----


def _check_h(h: Any) -> jax.Array:
  h = _options.check_array("h", h)
  if h.dtype.name not in (*DTYPES, _FLOAT8):
    raise TypeError(f"h must be one of {', '.join(DTYPES)}, {_FLOAT8}, got {h.dtype.name}")
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
  if q.dtype.name != _FLOAT8:
    raise TypeError(f"w2.q must have dtype {_FLOAT8}, got {q.dtype.name}")
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


def _fits_cuda(h: Any, w2: Any) -> bool:
  """Whether the CUDA kernel takes operands of these dtypes and sizes."""
  depth, hidden = w2.shape[-2:]
  multiples = depth % _DEPTH_MULTIPLE == 0 and hidden % _WIDTH_MULTIPLE == 0
  return h.dtype.name in _CUDA_DTYPES and multiples


def _check_implementation(
  implementation: str | None, h: jax.Array, w2: jax.Array, split: bool
) -> None:
  """ValueError if the implementation asked for is not there or cannot run."""
  if implementation is None:
    return
  _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
  if implementation == "cuda" and not _fits_cuda(h, w2):
    raise ValueError(
      f"implementation='cuda' takes {' or '.join(_CUDA_DTYPES)}, I in multiples of "
      f"{_DEPTH_MULTIPLE} and H of {_WIDTH_MULTIPLE}, got w2 {w2.dtype.name}{list(w2.shape)}"
    )
  if implementation != "reference" and split:
    raise ValueError(
      f"implementation={implementation!r} takes no sharded operands, got {jax.typeof(h)}, "
      f"{jax.typeof(w2)}; call it in jax.shard_map"
    )
  _native.check_implementation(implementation)


# ---- the primitive ----

# Operands: h [*B, *T, E, I], w2 [*B, E, I, H] and alpha [*B, *T, E]. What w2 has before its last
# three dimensions are the batch dimensions; the tokens may have any number of dimensions.


def _batch_ndim(shapes, **_: Any) -> int:
  return len(shapes[1]) - 3


def _results(shapes, *, out_dtype) -> list[Result]:
  h, w2 = shapes[:2]
  return [Result((*h[len(w2) - 3 : -2], w2[-1]), out_dtype)]


def _reference(h, w2, alpha, *, out_dtype):
  function = functools.partial(_reference_experts.fc2, out_dtype=out_dtype)
  for _ in w2.shape[:-3]:
    function = jax.vmap(function)
  return [function(h, w2, alpha)]


def _batch(bind, operands, axes, **params: Any):
  """Weights that all rows share are not copied: the new axis is one more of the tokens."""
  h, w2, alpha = operands
  if axes[1] is not None:
    return batch_all(bind, operands, axes, **params)
  size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
  at = w2.ndim - 3

  def moved(x, axis):
    if axis is None:
      return jnp.broadcast_to(jnp.expand_dims(x, at), (*x.shape[:at], size, *x.shape[at:]))
    return jnp.moveaxis(x, axis, at)

  return bind(moved(h, axes[0]), w2, moved(alpha, axes[2]), **params), [at]


_bind = make_primitive(
  Operation(
    name="experts",
    batch_ndim=_batch_ndim,
    results=_results,
    attributes=lambda **_: {},
    reference=_reference,
    tangents=reference_tangents(_reference),
    runs_on=lambda platform, avals, **_: platform == "cpu" or _fits_cuda(*avals[:2]),
    whole_operands=True,
    batch=_batch,
  )
)


# ---- the differentiable function ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fc2(implementation: str | None, out_dtype: np.dtype, h, w2, alpha):
  return _bind(h, w2, alpha, out_dtype=out_dtype, implementation=implementation)[0]


def _forward(implementation: str | None, out_dtype: np.dtype, h, w2, alpha):
  return _fc2(implementation, out_dtype, h, w2, alpha), (h, w2, alpha)


def _backward(implementation: str | None, out_dtype: np.dtype, residuals, cotangent):
  del implementation, out_dtype
  return _reference_experts.fc2_backward(cotangent, *residuals)


_fc2.defvjp(_forward, _backward)
