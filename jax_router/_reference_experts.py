"""`dense_moe_fc2` and its backward in plain JAX: the lowering where there is no kernel.

Operands: h `[*T, E, I]`, w2 `[E, I, H]`, alpha `[*T, E]` float32. One matmul of depth E * I, the
weights folded into h. An expert of weight 0 must add exactly 0 even where it holds Inf or NaN. In h
these are replaced by zeros; those of w2 reach every token of the matmul, and show in the result. So
only a result that is not finite is computed again, expert after expert.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _compat

BLOCK = 128  # columns that share a scale, and rows of w2 that do
_ZERO = np.float32(0)


def _dot(a: jax.Array, b: jax.Array, of_a: tuple[int, ...], of_b: tuple[int, ...]) -> jax.Array:
  """Sum over the products of some dimensions, in float32 and as exact as the operands."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == np.float32 else None
  return jax.lax.dot_general(
    a, b, ((of_a, of_b), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def _dot_dtype(dtype: np.dtype) -> np.dtype:
  """What the operands of a matmul are cast to: products with weights do not fit float16."""
  return np.dtype(np.float32) if dtype == np.float16 else dtype


def _column(x: jax.Array) -> jax.Array:
  return jnp.expand_dims(x, -1)


def _without_unselected(x: jax.Array, alpha: jax.Array) -> jax.Array:
  """`x` `[*T, E, I]` as float32, with zeros for what is not finite in experts of weight 0.

  Finite values stay, and with them the derivative of their product with a weight that is 0.
  """
  x = x.astype(jnp.float32)
  return jnp.where(_column(alpha != 0) | jnp.isfinite(x), x, _ZERO)


def _at_once(h: jax.Array, w2: jax.Array, alpha: jax.Array) -> jax.Array:
  """The sum over the experts as one matmul, right if it is finite."""
  tokens = h.ndim - 2
  weighed = (_column(alpha) * _without_unselected(h, alpha)).astype(h.dtype)
  return _dot(weighed, w2, (tokens, tokens + 1), (0, 1))


@jax.checkpoint  # or its gradient would keep the products of every expert, needed or not
def _one_by_one(h: jax.Array, w2: jax.Array, alpha: jax.Array) -> jax.Array:
  """The sum over the experts, each added to the tokens that have chosen it and to no others."""

  def term(expert):
    h, w2, alpha = expert
    used = _column(alpha != 0)
    products = _dot(jnp.where(used, h, jnp.zeros_like(h)), w2, (h.ndim - 1,), (0,))
    # Selected before and after, so that neither the sum nor the gradient of alpha sees a NaN.
    products = jnp.where(used, products, _ZERO)
    return jnp.where(used, _column(alpha) * products, _ZERO)

  experts = jnp.moveaxis(h, -2, 0), w2, jnp.moveaxis(alpha, -1, 0)
  first, others = (jax.tree.map(lambda x, at=at: x[at], experts) for at in (0, slice(1, None)))
  return jax.lax.scan(lambda total, e: (total + term(e), None), term(first), others)[0]


def _widened(h, w2, alpha):
  dtype = _dot_dtype(h.dtype)
  return _compat.join_varying_axes((h.astype(dtype), w2.astype(dtype), alpha))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def fc2(h: jax.Array, w2: jax.Array, alpha: jax.Array, out_dtype: np.dtype) -> jax.Array:
  """The result `[*T, H]`."""
  return _fc2(h, w2, alpha)[0].astype(out_dtype)


def _fc2(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The result in float32, and whether one matmul gave it."""
  wide = _widened(*operands)
  result = _at_once(*wide)
  finite = jnp.all(jnp.isfinite(result))
  once_more = lambda _, *operands: _one_by_one(*operands)  # noqa: E731
  return jax.lax.cond(finite, lambda x, *_: x, once_more, result, *wide), finite


@fc2.defjvp
def _fc2_tangent(out_dtype: np.dtype, operands, tangents):
  """That of the sum which gave the result: an unused matmul would bring its NaN into the other."""
  result, finite = _fc2(*operands)

  def along(function):
    def tangent(operands, tangents):
      return jax.jvp(lambda *x: function(*_widened(*x)), operands, tangents)[1]

    return tangent

  of_result = jax.lax.cond(finite, along(_at_once), along(_one_by_one), operands, tangents)
  return result.astype(out_dtype), of_result.astype(out_dtype)


def fc2_backward(
  cotangent: jax.Array, h: jax.Array, w2: jax.Array, alpha: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of h, w2 and alpha for a cotangent `[*T, H]`.

  With g[t, e, i] = sum over n of cotangent[t, n] * w2[e, i, n]:

      dh     = alpha * g
      dw2    = sum over t of cotangent * alpha * h
      dalpha = sum over i of h * g

  An expert of weight 0 that is not finite has gradient 0 in h and alpha, and adds 0 to that of w2.
  """
  dtype = _dot_dtype(h.dtype if cotangent.dtype == h.dtype else np.dtype(np.float32))
  cotangent, tokens = cotangent.astype(dtype), tuple(range(h.ndim - 2))
  g = _dot(cotangent, w2.astype(dtype), (len(tokens),), (2,))
  of_alpha = jnp.sum(h.astype(jnp.float32) * g, axis=-1)
  of_alpha = jnp.where((alpha != 0) | jnp.isfinite(of_alpha), of_alpha, _ZERO)
  of_h = _column(alpha) * _without_unselected(g, alpha)
  weighed = (_column(alpha) * _without_unselected(h, alpha)).astype(dtype)
  of_w2 = _dot(weighed, cotangent, tokens, tokens)
  return of_h.astype(h.dtype), of_w2.astype(w2.dtype), of_alpha


def dequantize_h(h: jax.Array, scale: jax.Array) -> jax.Array:
  """float32 of h `[*T, E, I]` with a scale `[*T, E * I / 128]` for every 128 of its columns."""
  blocks = h.astype(jnp.float32).reshape(*scale.shape, BLOCK)
  return (blocks * _column(scale)).reshape(h.shape)


def dequantize_w2(q: jax.Array, scale: jax.Array, num_experts: int) -> jax.Array:
  """float32 w2 `[E, I, H]` of a `PackedW2`."""
  hidden, columns = q.shape
  wide = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0)[:hidden], BLOCK, axis=1)
  w2 = (q.astype(jnp.float32) * wide).reshape(hidden, num_experts, columns // num_experts)
  return jnp.transpose(w2, (1, 2, 0))


def fc2_float8(
  h: jax.Array,
  q: jax.Array,
  alpha: jax.Array,
  h_scale: jax.Array,
  w2_scale: jax.Array,
  out_dtype: np.dtype,
) -> jax.Array:
  """`fc2` of h `[*T, E, I]` and q `[H, E * I]` in float8, of which no gradient is taken."""
  h, q = jax.lax.stop_gradient((h, q))
  # Without the NaN of experts of weight 0, which the gradient of their scales would meet.
  wide = dequantize_h(_without_unselected(h, alpha), h_scale)
  return fc2(wide, dequantize_w2(q, w2_scale, h.shape[-2]), alpha, out_dtype)


def fc2_float8_backward(
  cotangent: jax.Array,
  h: jax.Array,
  q: jax.Array,
  alpha: jax.Array,
  h_scale: jax.Array,
  w2_scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of alpha and of both scales, that of a scale a sum over what it is times."""
  h, q = jax.lax.stop_gradient((h, q))
  hidden, columns = q.shape
  wide = dequantize_h(h, h_scale), dequantize_w2(q, w2_scale, h.shape[-2])
  of_h, of_w2, of_alpha = fc2_backward(cotangent, *wide, alpha)
  of_q = jnp.transpose(of_w2, (2, 0, 1)).reshape(hidden, columns)
  of_h_scale = jnp.sum(_products(of_h, h).reshape(*h_scale.shape, BLOCK), axis=-1)
  of_rows = jnp.sum(_products(of_q, q).reshape(hidden, columns // BLOCK, BLOCK), axis=-1)
  of_rows = jnp.pad(of_rows, ((0, -hidden % BLOCK), (0, 0)))
  of_w2_scale = jnp.sum(of_rows.reshape(-1, BLOCK, columns // BLOCK), axis=1)
  return of_alpha, of_h_scale, of_w2_scale


def _products(gradient: jax.Array, x: jax.Array) -> jax.Array:
  """Those with `x` in float8; 0 where the gradient is, whatever `x` holds."""
  return jnp.where(gradient == 0, _ZERO, gradient * x.astype(jnp.float32))
