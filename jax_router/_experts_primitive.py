"""The primitives of `dense_moe_fc2`, of wide dtypes and of float8, and their gradients.

Operands: h `[*B, *T, E, I]`, w2 `[*B, E, I, H]`, in float8 `[*B, H, E * I]`, and alpha
`[*B, *T, E]`; in float8 h_scale `[*B, *T, E * I / 128]` and w2_scale
`[*B, ceil(H / 128), E * I / 128]` too. What w2 has before its last dimensions are the batch
dimensions; the tokens may have any number of dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _compat, _native, _reference_experts
from jax_router._primitive import (
  Operation,
  Result,
  batch_all,
  make_primitive,
  reference_tangents,
)

FLOAT8 = "float8_e4m3fn"
# What the CUDA kernel takes.
_CUDA_DTYPES = ("bfloat16", "float16", FLOAT8)
_DEPTH_MULTIPLE = 64
_WIDTH_MULTIPLE = 8
_MOST_EXPERTS = 65536
_MOST = 2**31 - 1
_MOST_TOKENS = 2**24
# Beyond so many tokens weights are read more than once, and in 16 bits cuBLAS takes over.
_MOST_FASTER = 512
CUDA_LIMITS = (
  f"{', '.join(_CUDA_DTYPES)}, at most {_MOST_EXPERTS} experts, I in multiples of "
  f"{_DEPTH_MULTIPLE}, H in multiples of {_WIDTH_MULTIPLE}, at most 2**24 tokens, and H and E * I "
  "below 2**31"
)


# ---- where the CUDA kernel runs ----


def fits_cuda(dtype: Any, tokens: Sequence[Any], experts: Any, depth: Any, hidden: Any) -> bool:
  """Whether the CUDA kernel takes operands of this dtype and these sizes, all of them known."""
  sizes = (*tokens, experts, depth, hidden)
  if np.dtype(dtype).name not in _CUDA_DTYPES or not all(isinstance(n, int) for n in sizes):
    return False
  multiples = depth % _DEPTH_MULTIPLE == 0 and hidden % _WIDTH_MULTIPLE == 0
  few = experts <= _MOST_EXPERTS and math.prod(tokens) <= _MOST_TOKENS
  return multiples and few and max(experts * depth, hidden) <= _MOST


@functools.cache
def why_not_cuda() -> str | None:
  """Why the CUDA kernel cannot run on every CUDA device of this process, None if it can."""
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return "JAX sees no CUDA device"
  wrong = [d for d in devices if not _native.experts_run(d.local_hardware_id)]
  if not wrong:
    return None
  capability = getattr(wrong[0], "compute_capability", "unknown")
  return (
    "it wants GPUs of compute capability 9.0, all that JAX sees, and a build for 90a; here is "
    f"{wrong[0].device_kind} of compute capability {capability}"
  )


def _split_h(h: Sequence[Any], batch: int) -> tuple[Sequence[Any], Any, Any]:
  """Dimensions of the tokens, E and I."""
  return h[batch:-2], h[-2], h[-1]


def _runs_on(platform: str, avals: Sequence[Any], *, sizes, **_: Any) -> bool:
  if platform != "cuda":
    return True
  shapes = tuple(tuple(aval.shape) for aval in avals)
  batch, hidden = sizes(shapes)
  return fits_cuda(avals[0].dtype, *_split_h(shapes[0], batch), hidden) and why_not_cuda() is None


def _pays(platform: str, avals: Sequence[Any], **_: Any) -> bool:
  h, w2 = (aval.shape for aval in avals[:2])
  return platform != "cuda" or math.prod(h[len(w2) - 3 : -2]) <= _MOST_FASTER


def _scratch(platform: str, avals: Sequence[Any], *, sizes, **_: Any) -> list[Result]:
  """Of each batch row, though they take turns with one: the partitioner splits all arrays alike."""
  if platform != "cuda":
    return []
  shapes = tuple(tuple(aval.shape) for aval in avals)
  batch, hidden = sizes(shapes)
  tokens, experts, depth = _split_h(shapes[0], batch)
  float8 = avals[0].dtype.name == FLOAT8
  words = _native.experts_scratch(float8, math.prod(tokens), experts, depth, hidden)
  return [Result((words,), np.int32)]


def _results(shapes, *, sizes, out_dtype) -> list[Result]:
  batch, hidden = sizes(shapes)
  return [Result((*shapes[0][batch:-2], hidden), out_dtype)]


def _vmapped(function, batch: int):
  for _ in range(batch):
    function = jax.vmap(function)
  return function


def _batch_tokens(bind, operands, axes, *, shared: Sequence[int], at: int, **params: Any):
  """Weights that all rows share are not copied: the new axis is one more of the tokens.

  `shared`: the operands that are weights; `at`: how many batch dimensions there are.
  """
  if any(axes[i] is not None for i in shared):
    return batch_all(bind, operands, axes, **params)
  size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)

  def moved(x, axis):
    if axis is None:
      return jnp.broadcast_to(jnp.expand_dims(x, at), (*x.shape[:at], size, *x.shape[at:]))
    return jnp.moveaxis(x, axis, at)

  rows = [
    x if i in shared else moved(x, axis)
    for i, (x, axis) in enumerate(zip(operands, axes, strict=True))
  ]
  return bind(*rows, **params), [at]


def _make_bind(name: str, sizes, reference, *, shared: Sequence[int], **more: Any):
  """The primitive of these dtypes; `sizes`: of shapes, the batch dimensions and H."""

  def batch(bind, operands, axes, **params: Any):
    at, _ = sizes([x.shape for x in operands])
    return _batch_tokens(bind, operands, axes, shared=shared, at=at, **params)

  return make_primitive(
    Operation(
      name=name,
      batch_ndim=lambda shapes, **_: sizes(shapes)[0],
      results=functools.partial(_results, sizes=sizes),
      attributes=lambda **_: {},
      reference=reference,
      tangents=reference_tangents(reference),
      runs_on=functools.partial(_runs_on, sizes=sizes),
      whole_operands=True,
      batch=batch,
      scratch=functools.partial(_scratch, sizes=sizes),
      **more,
    )
  )


# ---- wide dtypes ----


def _wide_sizes(shapes) -> tuple[int, Any]:
  """How many batch dimensions there are, and H."""
  return len(shapes[1]) - 3, shapes[1][-1]


def _wide_reference(h, w2, alpha, *, out_dtype):
  function = functools.partial(_reference_experts.fc2, out_dtype=out_dtype)
  return [_vmapped(function, w2.ndim - 3)(h, w2, alpha)]


_bind_wide = _make_bind("experts", _wide_sizes, _wide_reference, shared=(1,), pays=_pays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fc2(implementation: str | None, out_dtype: np.dtype, h, w2, alpha):
  return _bind_wide(h, w2, alpha, out_dtype=out_dtype, implementation=implementation)[0]


def _forward(implementation: str | None, out_dtype: np.dtype, h, w2, alpha):
  return _fc2(implementation, out_dtype, h, w2, alpha), (h, w2, alpha)


def _backward(implementation: str | None, out_dtype: np.dtype, residuals, cotangent):
  del implementation, out_dtype
  return _reference_experts.fc2_backward(cotangent, *residuals)


_fc2.defvjp(_forward, _backward)


def fc2(implementation: str | None, out_dtype: np.dtype, *operands: jax.Array) -> jax.Array:
  """The result `[*T, H]` of h, w2 and alpha."""
  return _fc2(implementation, out_dtype, *_compat.join_varying_axes(operands))


# ---- float8 ----


def _float8_sizes(shapes) -> tuple[int, Any]:
  """How many batch dimensions there are, and H."""
  return len(shapes[1]) - 2, shapes[1][-2]


def _float8_reference(h, w2, alpha, h_scale, w2_scale, *, out_dtype):
  function = functools.partial(_reference_experts.fc2_float8, out_dtype=out_dtype)
  return [_vmapped(function, w2.ndim - 2)(h, w2, alpha, h_scale, w2_scale)]


_bind_float8 = _make_bind("experts_float8", _float8_sizes, _float8_reference, shared=(1, 4))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fc2_float8(implementation: str | None, out_dtype: np.dtype, *operands):
  return _bind_float8(*operands, out_dtype=out_dtype, implementation=implementation)[0]


def _float8_forward(implementation: str | None, out_dtype: np.dtype, *operands):
  return _fc2_float8(implementation, out_dtype, *operands), operands


def _float8_backward(implementation: str | None, out_dtype: np.dtype, residuals, cotangent):
  """None for h and w2: they are integers in all but name."""
  del implementation, out_dtype
  of_alpha, of_h, of_w2 = _reference_experts.fc2_float8_backward(cotangent, *residuals)
  return None, None, of_alpha, of_h, of_w2


_fc2_float8.defvjp(_float8_forward, _float8_backward)


def fc2_float8(implementation: str | None, out_dtype: np.dtype, *operands: jax.Array) -> jax.Array:
  """The result `[*T, H]` of h, w2, alpha, h_scale and w2_scale."""
  return _fc2_float8(implementation, out_dtype, *_compat.join_varying_axes(operands))
