"""The dense form of a Mixture-of-Experts layer around `dense_moe_fc2`, and when to use it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _compat, _experts, _options, _reference
from jax_router._options import Routing


def alpha_from_topk(
  experts: jax.Array | np.ndarray, weights: jax.Array | np.ndarray, num_experts: int
) -> jax.Array:
  """Scatters the weights of the chosen experts into rows over all experts, for `dense_moe_fc2`.

      alpha[e] = sum of weights[i] over the slots i with experts[i] = e

  Ids out of range, such as those of padding, are dropped. Differentiable in `weights`: its gradient
  gathers that of `alpha` at the chosen experts, so what others have is not looked at.

  Args:
    experts: `[..., k]` an integer dtype, as `route` gives them.
    weights: `[..., k]` a floating dtype.
    num_experts: static, E >= 1.

  Returns:
    `[..., E]` float32, 0 for experts not chosen.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a shape that does not fit.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> jax_router.alpha_from_topk(jnp.array([[2, 0]]), jnp.array([[0.75, 0.25]]), 3).tolist()
    [[0.25, 0.0, 0.75]]
  """
  experts = _options.check_array("experts", experts)
  weights = _options.check_array("weights", weights)
  if not jnp.issubdtype(experts.dtype, jnp.integer):
    raise TypeError(f"experts must have an integer dtype, got {experts.dtype.name}")
  if not jnp.issubdtype(weights.dtype, jnp.floating):
    raise TypeError(f"weights must have a floating dtype, got {weights.dtype.name}")
  if experts.ndim == 0:
    raise ValueError("experts must have shape [..., k], got a scalar")
  _options.check_shape("weights", weights.shape, experts.shape, "experts.shape")
  num_experts = _options.check_int("num_experts", num_experts, 1, 2**31 - 1)
  # In comparisons, not by an index: a negative one would count from the end.
  inside = (experts >= 0) & (experts <= min(num_experts - 1, jnp.iinfo(experts.dtype).max))
  ids = jnp.where(inside, experts.astype(jnp.int32), np.int32(num_experts))
  ids, weights = _compat.join_varying_axes((ids, weights.astype(jnp.float32)))
  return _reference.scatter(weights, ids, num_experts)


def dense_moe(
  x: jax.Array | np.ndarray,
  w13: jax.Array | np.ndarray,
  w2: jax.Array | np.ndarray,
  routing: Routing,
  *,
  out_dtype: Any = None,
  implementation: str | None = None,
) -> jax.Array:
  """A Mixture-of-Experts layer that computes all experts for all tokens, without sorting.

      gate, up = x @ w13[e]^T, its first and its second half
      h[t, e]  = up * gate / (1 + exp(-gate))
      result   = dense_moe_fc2(h, w2, alpha_from_topk(routing.experts, routing.weights, E))

  The first matmul is one of XLA over all experts, in float32 sums; the activation is computed in
  float32 by the kernel that XLA fuses it into, and rounded once. The layouts of `w13` and `w2` are
  those that make both one matmul without a copy of the weights. An expert that a token has not
  chosen adds exactly 0 to it, even Inf or NaN.

  Differentiable in `x`, `w13`, `w2` and `routing.weights`, as `dense_moe_fc2`.

  Args:
    x: `[..., D]` float32, bfloat16 or float16.
    w13: `[E, 2 * I, D]` of the dtype of `x`: rows of the gate, then of what it multiplies.
    w2: `[E, I, H]` of the dtype of `x`.
    routing: of these tokens, `[..., k]`; experts out of range, those of padding, add nothing.
    out_dtype: float32, bfloat16 or float16; by default the dtype of `x`.
    implementation: of `dense_moe_fc2`: None (best for the platform), "cpu", "cuda" or "reference".

  Returns:
    `[..., H]` of `out_dtype`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a shape that does not fit, an implementation that is not there or cannot run.
  """
  x = _options.check_array("x", x)
  if x.dtype.name not in _experts.DTYPES:
    raise TypeError(f"x must be one of {', '.join(_experts.DTYPES)}, got {x.dtype.name}")
  if x.ndim == 0:
    raise ValueError("x must have shape [..., D], got a scalar")
  w13 = _options.check_array("w13", w13)
  if w13.dtype != x.dtype:
    raise TypeError(f"w13 must have the dtype of x, {x.dtype.name}, got {w13.dtype.name}")
  if w13.ndim != 3 or w13.shape[0] < 1 or w13.shape[1] % 2 or w13.shape[1] < 2:
    raise ValueError(f"w13 must have shape [E, 2 * I, D], got {w13.shape}")
  _options.check_shape("w13", w13.shape[2:], x.shape[-1:], "[E, 2 * I, D]; its last axis")
  if not isinstance(routing, Routing):
    raise TypeError(f"routing must be a jax_router.Routing, got {type(routing).__name__}")
  chosen = _options.check_array("routing.experts", routing.experts)
  _options.check_shape(
    "routing.experts", chosen.shape[:-1], x.shape[:-1], "x.shape[:-1] + (k,); its first axes"
  )
  x, w13 = _compat.join_varying_axes((x, w13))
  both = jax.lax.dot_general(
    x, w13, (((x.ndim - 1,), (2,)), ((), ())), preferred_element_type=jnp.float32
  )
  gate, up = jnp.split(both, 2, axis=-1)
  h = (up * jax.nn.silu(gate)).astype(x.dtype)
  alpha = alpha_from_topk(chosen, routing.weights, w13.shape[0])
  return _experts.dense_moe_fc2(h, w2, alpha, out_dtype=out_dtype, implementation=implementation)


# ---- which form is faster ----


class _Device(NamedTuple):
  """Rates of a device: bytes in a second, and operations in a second by dtype."""

  bytes_per_s: float
  operations_per_s: dict[str, float]


def _hopper(bytes_per_s: float) -> _Device:
  operations = {"bfloat16": 790e12, "float16": 790e12, "float8_e4m3fn": 1580e12}
  return _Device(bytes_per_s, operations)


# By a word of the kind's name, of the SXM modules. Bytes: copies of 1 GiB. Operations: matmuls of
# 8192 cubed in bfloat16, and twice that in float8.
_DEVICES = {"H100": _hopper(3.0e12), "H200": _hopper(4.3e12)}

# A grouped matmul reads only experts that were chosen, at this share of the rate of a dense one:
# from the times of both forms that docs/dense_experts.md quotes.
_GROUPED_RATE = 0.87


class MoeForm(NamedTuple):
  """Which form of a Mixture-of-Experts layer is the faster one.

  Attributes:
    form: "dense" or "grouped".
    reason: why, in words.
    dense_us: estimated microseconds of the second matmul in the dense form, NaN if unknown.
    grouped_us: the same in the grouped form.
  """

  form: str
  reason: str
  dense_us: float
  grouped_us: float


def choose_moe_form(
  tokens: int,
  hidden: int,
  num_experts: int,
  intermediate: int,
  k: int,
  *,
  dtype: Any = jnp.bfloat16,
  device: Any = None,
) -> MoeForm:
  """Says whether `dense_moe` or a grouped matmul is the better form, from sizes and the device.

  With B bytes of weights and n tokens, of which each expert is left out by all with the probability
  q = (1 - k / E)^n if they choose evenly:

      dense   = max((B + activations) / bandwidth, 2 * n * E * I * H / rate of matmuls)
      grouped = max(((1 - q) * B + activations) / (0.87 * bandwidth), 2 * n * k * I * H / rate)

  Below some 64 tokens of 256 experts the dense form reads experts that nobody chose; above the
  ridge, some 260 tokens, it waits for its products with 0. Between them it needs no sorting and is
  not slowed by an uneven load. This is an estimate: it knows neither launches nor the time of
  sorting, and where they matter one must measure.

  Args:
    tokens: static, n >= 0.
    hidden, num_experts, intermediate: static, H, E and I of `w2` `[E, I, H]`, on this device.
    k: static, 1 <= k <= E.
    dtype: bfloat16, float16 or float8_e4m3fn.
    device: a `jax.Device` or the name of its kind; by default the first one of JAX.

  Returns:
    `MoeForm(form, reason, dense_us, grouped_us)`. On devices whose rates are not known, which are
    all but H100 and H200, the form is "grouped" and the times are NaN.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range.

  Example:
    >>> import jax_router
    >>> jax_router.choose_moe_form(128, 7168, 256, 256, 8, device="NVIDIA H100 80GB HBM3").form
    'dense'
  """
  most = 2**31 - 1
  tokens = _options.check_int("tokens", tokens, 0, most)
  hidden = _options.check_int("hidden", hidden, 1, most)
  num_experts = _options.check_int("num_experts", num_experts, 1, most)
  intermediate = _options.check_int("intermediate", intermediate, 1, most)
  k = _options.check_int("k", k, 1, num_experts, "num_experts")
  name = np.dtype(dtype).name
  known = _hopper(1.0).operations_per_s
  if name not in known:
    raise TypeError(f"dtype must be one of {', '.join(known)}, got {name}")
  kind = _kind(device)
  rates = next((rates for part, rates in _DEVICES.items() if part in kind.split()), None)
  if rates is None:
    reason = f"the rates of {kind!r} are not known (only those of {', '.join(_DEVICES)})"
    return MoeForm("grouped", reason, float("nan"), float("nan"))
  size, depth = np.dtype(dtype).itemsize, num_experts * intermediate
  weights, result = size * depth * hidden, 2 * tokens * hidden
  chosen = 1 - (1 - k / num_experts) ** tokens
  operations = 2 * tokens * intermediate * hidden / rates.operations_per_s[name]
  moved = (weights + size * tokens * depth + result) / rates.bytes_per_s
  rows = tokens * k * (size * intermediate + 2 * hidden) + result
  grouped_moved = (chosen * weights + rows) / (_GROUPED_RATE * rates.bytes_per_s)
  dense = max(moved, num_experts * operations) * 1e6
  grouped = max(grouped_moved, k * operations) * 1e6
  if dense <= grouped:
    reason = f"{tokens} tokens choose {chosen:.0%} of the experts, which one pass over all reads"
    return MoeForm("dense", reason, dense, grouped)
  if moved * 1e6 < dense:
    reason = f"{num_experts / k:.0f} times the products of {tokens} tokens take longer than reading"
  else:
    reason = f"{tokens} tokens choose {chosen:.0%} of the experts, and the others need not be read"
  return MoeForm("grouped", reason, dense, grouped)


def _kind(device: Any) -> str:
  if device is None:
    device = jax.devices()[0]
  if isinstance(device, str):
    return device
  if not isinstance(device, jax.Device):
    raise TypeError(f"device must be a jax.Device, a str or None, got {type(device).__name__}")
  return device.device_kind
