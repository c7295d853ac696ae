"""Load balance by a bias: histograms of required biases, and the updates of the bias."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jax_router import _compat, _native, _options, _reference_balance
from jax_router._options import SCORES
from jax_router._primitive import Operation, Result, make_primitive

# A softmax has no required bias of its own: raising one expert lowers all others.
HISTOGRAM_SCORES = ("sigmoid", "sqrtsoftplus", "none")
_MOST_BINS = 2**24  # float32 numbers them exactly
_MOST_EXPERTS = 2**16  # their square is below 2**32


def quantile_histogram(
  logits: jax.Array | np.ndarray,
  cutoff: jax.Array | np.ndarray,
  *,
  bounds: jax.Array | np.ndarray | Sequence[float],
  num_bins: int = 1000,
  score: str = "sigmoid",
  where: jax.Array | np.ndarray | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Counts, for every expert, the biases that the tokens would require to choose it.

  With y = score(logits), [lo, hi] = `bounds`, for every token and every expert, chosen or not:

      r   = cutoff - y
      bin = clamp(floor((r - lo) * (num_bins / (hi - lo))), 0, num_bins - 1)

  and the result counts each expert's bins. It is an increment: add it up over micro-batches and
  devices (`jax.lax.psum`) and give the sum to `quantile_bias` once a step. If the cutoff was made
  with a bias b, then bounds of min(b) - 1 and max(b) + 1 contain every r of a sigmoid.

  A NaN logit scores 0, a NaN cutoff counts in bin 0. Tokens with `where=False` or a cutoff of -inf
  (no expert was left out, or all were NaN) are not counted. Bounds that are not finite or not
  increasing give zeros. The integers are the same on the CPU and on the GPU, on every run. Nothing
  here has a gradient.

  Sharding: with batch dimensions sharded, and in `shard_map`, no collective. Under plain jit with
  Auto axes the tokens are cut into as many groups as there are devices, so that sharded tokens
  are not gathered; this takes the memory of one result for each, and an all-reduce.

  Args:
    logits: `[..., T, E]` float32, bfloat16 or float16. All arithmetic is float32.
    cutoff: `[..., T]` floating, from `route_with_cutoff` with the same logits and score.
    bounds: `[2]` floating, lower and upper; may be traced.
    num_bins: static, 1 <= num_bins <= 2**24.
    score: "sigmoid", "sqrtsoftplus" or "none" (the input is already a score). For a softmax give
      its probabilities and "none".
    where: `[..., T]` bool, False marks padding.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `[..., E, num_bins]` int32.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; bounds given as numpy array or
      Python numbers that are not finite and increasing; an implementation that is not there; with
      Explicit sharding, tokens or experts sharded.

  Source: Quantile Balancing as in TransformerEngine's fused router (pull request 3395).

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> scores = jnp.array([[0.9, 0.6, 0.3, 0.1]])
    >>> cutoff = jnp.array([0.3])
    >>> counts = jax_router.quantile_histogram(
    ...   scores, cutoff, bounds=(-1.0, 1.0), num_bins=8, score="none")
    >>> counts.argmax(-1).tolist()
    [1, 2, 4, 4]
  """
  logits = _options.check_logits(logits)
  if logits.ndim < 2:
    raise ValueError(f"logits must have shape [..., T, E], got {logits.shape}")
  cutoff = _float32("cutoff", cutoff)
  _options.check_shape("cutoff", cutoff.shape, logits.shape[:-1], "logits.shape[:-1]")
  bounds = _check_bounds(bounds, ((2,),))
  num_bins = _options.check_int("num_bins", num_bins, 1, _MOST_BINS)
  score = _options.check_choice("score", score, HISTOGRAM_SCORES)
  if where is not None:
    where = _options.check_array("where", where)
    if where.dtype != np.bool_:
      raise TypeError(f"where must have dtype bool, got {where.dtype.name}")
    _options.check_shape("where", where.shape, logits.shape[:-1], "logits.shape[:-1]")
  if implementation is not None:
    _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
    _native.check_implementation(implementation)
  operands, groups = _group_tokens(logits, cutoff, bounds, where)
  operands = [jax.lax.stop_gradient(x) for x in operands]
  params = {"score": score, "num_bins": num_bins, "has_where": where is not None}
  if implementation == "reference":
    (counts,) = _histogram_reference(*operands, **params)
  else:
    (counts,) = _bind_histogram(*operands, **params, implementation=implementation)
  return jnp.sum(counts, axis=-3, dtype=jnp.int32) if groups else counts


def quantile_bias(
  histogram: jax.Array | np.ndarray,
  bias: jax.Array | np.ndarray,
  k: int,
  *,
  bounds: jax.Array | np.ndarray | Sequence[float],
) -> tuple[jax.Array, jax.Array]:
  """Solves for the bias that balances the load, and the bounds of the next histogram.

  An expert with bias b receives the tokens whose required bias is at most b; a balanced one
  receives k / E of all. With H[e] the counts of expert e, [lo, hi] = `bounds`, B bins:

      target = sum(H[e]) * k / E
      i      = first bin where the cumulative count C[i] >= target
      new[e] = lo + (i + (target - C[i - 1]) / H[e, i]) * (hi - lo) / B
      new   -= mean(new)                  (only differences matter)
      bounds = [min(new) - 1, max(new) + 1]

  An expert without counts keeps its bias; if none has any, or the bounds are not finite and
  increasing, the bias stays as it is. Counts stay integers, so that totals up to 2**31 - 1 lose
  nothing. The sum over micro-batches and over all devices that hold tokens is the caller's, once.

  Args:
    histogram: `[..., E, B]` int32, E <= 65536, summed from `quantile_histogram`.
    bias: `[..., E]` float32, that of the forward pass.
    k: static, 1 <= k < E.
    bounds: `[2]` or `[..., 2]` floating, those of the histogram.

  Returns:
    The new bias `[..., E]` and the new bounds `[..., 2]`, both float32.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape; bounds as in `quantile_histogram`.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> counts = jnp.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 2, 0]], jnp.int32)
    >>> bias, bounds = jax_router.quantile_bias(counts, jnp.zeros(3), 1, bounds=(-1.0, 1.0))
    >>> [round(b, 3) for b in bias.tolist()], [round(b, 3) for b in bounds.tolist()]
    ([-0.444, 0.056, 0.389], [-1.444, 1.389])
  """
  histogram = _options.check_array("histogram", histogram)
  if histogram.dtype != np.int32:
    raise TypeError(f"histogram must have dtype int32, got {histogram.dtype.name}")
  if histogram.ndim < 2 or 0 in histogram.shape[-2:]:
    raise ValueError(f"histogram must have shape [..., E, bins], got {histogram.shape}")
  *lead, num_experts, num_bins = histogram.shape
  bias = _check_bias(bias)
  _options.check_shape("bias", bias.shape, (*lead, num_experts), "histogram.shape[:-1]")
  k = _options.check_int("k", k, 1, num_experts - 1, "num_experts - 1")
  if num_experts > _MOST_EXPERTS:
    raise ValueError(f"histogram must have at most {_MOST_EXPERTS} experts, got {num_experts}")
  bounds = _check_bounds(bounds, ((2,), (*lead, 2)))
  bounds = jnp.broadcast_to(bounds, (*lead, 2))
  low, high = bounds[..., :1], bounds[..., 1:]
  total = jnp.sum(histogram, axis=-1, dtype=jnp.int32)
  whole, part = _divided(total, k, num_experts)
  cumulative = jnp.cumsum(histogram, axis=-1, dtype=jnp.int32)
  short = cumulative < (whole + (part > 0).astype(jnp.int32))[..., None]
  index = jnp.sum(short, axis=-1, dtype=jnp.int32)
  below = jnp.max(jnp.where(short, cumulative, 0), axis=-1)
  reached = jnp.min(jnp.where(short, total[..., None], cumulative), axis=-1)
  missing = (whole - below).astype(jnp.float32) + part
  fraction = missing / jnp.maximum(reached - below, 1).astype(jnp.float32)
  width = (high - low) / np.float32(num_bins)
  solved = low + (index.astype(jnp.float32) + fraction) * width
  valid = jnp.isfinite(low) & jnp.isfinite(high) & (low < high)
  observed = (total > 0) & valid
  new = jnp.where(observed, solved, bias)
  mean = jnp.mean(new, axis=-1, keepdims=True)
  new = jnp.where(observed.any(axis=-1, keepdims=True), new - mean, bias)
  one = np.float32(1)
  return new, jnp.stack([jnp.min(new, axis=-1) - one, jnp.max(new, axis=-1) + one], axis=-1)


def update_bias(
  bias: jax.Array | np.ndarray,
  expert_counts: jax.Array | np.ndarray,
  rate: float | jax.Array = 0.001,
) -> jax.Array:
  """One step of loss-free balancing: the bias of an overloaded expert falls, of others rises.

      bias + rate * sign(mean(expert_counts) - expert_counts)

  The sign is exact: counts are compared as integers, and an expert at the mean stays.

  Args:
    bias: `[..., E]` float32.
    expert_counts: `[..., E]` integer, the tokens that chose each expert, summed over all devices
      that hold tokens.
    rate: a number, or a scalar array such as a schedule's value.

  Returns:
    The new bias `[..., E]` float32.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a shape that does not fit.

  Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), as DeepSeek-V3 uses it.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> counts = jnp.array([4, 1, 0, 3], jnp.int32)
    >>> jax_router.update_bias(jnp.zeros(4), counts, rate=0.5).tolist()
    [-0.5, 0.5, 0.5, -0.5]
  """
  bias = _check_bias(bias)
  counts = _options.check_array("expert_counts", expert_counts)
  if not jnp.issubdtype(counts.dtype, jnp.integer):
    raise TypeError(f"expert_counts must have an integer dtype, got {counts.dtype.name}")
  _options.check_shape("expert_counts", counts.shape, bias.shape, "bias.shape")
  if isinstance(rate, bool) or not isinstance(rate, (int, float, np.number, np.ndarray, jax.Array)):
    raise TypeError(f"rate must be a number or a scalar array, got {type(rate).__name__}")
  step = jnp.asarray(rate).astype(jnp.float32)
  _options.check_shape("rate", step.shape, (), "a scalar")
  if counts.dtype.itemsize < 4:
    counts = counts.astype(jnp.int32)
  num_experts = jnp.asarray(counts.shape[-1], counts.dtype)
  # mean = whole + rest / E, without a sum or a product that could overflow.
  quotient, remainder = jnp.divmod(counts, num_experts)
  left = jnp.sum(remainder, axis=-1, keepdims=True, dtype=counts.dtype)
  whole = jnp.sum(quotient, axis=-1, keepdims=True, dtype=counts.dtype) + left // num_experts
  rest = left % num_experts
  below = (counts < whole) | ((counts == whole) & (rest > 0))
  sign = below.astype(jnp.float32) - (counts > whole).astype(jnp.float32)
  return bias + step * sign


# ---- arguments ----


def _float32(name: str, value: Any) -> jax.Array:
  """`value`, of a floating dtype, as float32."""
  value = _options.check_array(name, value)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(f"{name} must have a floating dtype, got {value.dtype.name}")
  return value.astype(jnp.float32)


def _check_bias(bias: Any) -> jax.Array:
  """A float32 bias: a narrower one would swallow small steps."""
  bias = _options.check_array("bias", bias)
  if bias.dtype != np.float32:
    raise TypeError(f"bias must have dtype float32, got {bias.dtype.name}")
  if bias.ndim == 0 or bias.shape[-1] < 1:
    raise ValueError(f"bias must have shape [..., E], got {bias.shape}")
  return bias


def _check_bounds(bounds: Any, allowed: Sequence[tuple[int, ...]]) -> jax.Array:
  """Bounds as float32; the values only where they are known without asking a device."""
  if isinstance(bounds, (tuple, list)):
    if not all(isinstance(x, (int, float, np.number)) for x in bounds):
      raise TypeError(f"bounds must be an array or two numbers, got {bounds!r}")
    bounds = np.asarray(bounds, np.float32)
  array = _float32("bounds", bounds)
  if array.shape not in allowed:
    shapes = " or ".join(map(str, dict.fromkeys(allowed)))
    raise ValueError(f"bounds must have shape {shapes}, got {array.shape}")
  if isinstance(bounds, np.ndarray):
    known = bounds.astype(np.float32)
    if not (np.isfinite(known).all() and (known[..., 0] < known[..., 1]).all()):
      raise ValueError(f"bounds must be finite with lower < upper, got {bounds.tolist()}")
  return array


def _divided(total: jax.Array, k: int, num_experts: int) -> tuple[jax.Array, jax.Array]:
  """`total * k / num_experts` as an exact int32 and a float32 fraction below 1."""
  quotient, rest = jnp.divmod(total, np.int32(num_experts))
  product = rest.astype(jnp.uint32) * np.uint32(k)
  whole, left = jnp.divmod(product, np.uint32(num_experts))
  part = left.astype(jnp.float32) / np.float32(num_experts)
  return quotient * np.int32(k) + whole.astype(jnp.int32), part


# ---- the histogram ----


def _hidden_shards(x: jax.Array) -> int:
  """Over how many devices the compiler may spread `x` without its type saying so."""
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty:
    mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count()
  sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
  return math.prod(size for size, kind in sizes if kind == AxisType.Auto)


def _group_tokens(logits, cutoff, bounds, where) -> tuple[list[jax.Array], int]:
  """Operands of the primitive, and the number of groups if their counts are still to be summed.

  The result has no token dimension for the partitioner to split by, so the tokens are cut into as
  many groups as there may be shards.
  """
  spec = _compat.spec_of(jax.typeof(logits))
  if spec[-1] is not None or spec[-2] is not None:
    raise ValueError(
      "logits must not be sharded along their tokens or experts (last two axes), got "
      f"{jax.typeof(logits)}; call quantile_histogram in jax.shard_map and psum the result, or "
      "give the logits a leading dimension that carries the sharding, and sum over it"
    )
  batch, tokens = logits.shape[:-2], logits.shape[-2]
  groups = 0
  devices = _hidden_shards(logits)
  if devices > 1 and isinstance(tokens, int):
    groups = math.gcd(tokens, devices)
    batch = (*batch, groups)
    logits = logits.reshape(*batch, tokens // groups, logits.shape[-1])
    cutoff = cutoff.reshape(*batch, tokens // groups)
    where = None if where is None else where.reshape(cutoff.shape)
  bounds = jnp.broadcast_to(bounds[(None,) * len(batch)], (*batch, 2))
  operands = [logits, cutoff, bounds] + ([] if where is None else [where])
  return operands, groups


def _histogram_attributes(*, score: str, num_bins: int, has_where: bool) -> dict[str, Any]:
  del num_bins
  return {"score": SCORES.index(score), "has_where": has_where}


def _histogram_reference(*operands, has_where: bool, **params: Any):
  logits, cutoff, bounds = operands[:3]
  where = operands[3] if has_where else None
  return [_reference_balance.quantile_histogram(logits, cutoff, bounds, where, **params)]


_bind_histogram = make_primitive(
  Operation(
    name="quantile_histogram",
    batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
    results=lambda shapes, *, num_bins, **_: [
      Result((shapes[0][-1], num_bins), np.dtype(np.int32))
    ],
    attributes=_histogram_attributes,
    reference=_histogram_reference,
    tangents=lambda *_, **__: [None],
  )
)
