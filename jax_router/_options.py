"""Result types and static options of the routing operations, and the checks of their arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
GROUP_SCORES = ("top2", "max", "sum")
MAP_FORMATS = ("bytemap", "bitmap")
IMPLEMENTATIONS = ("cpu", "cuda", "reference")
LOGITS_DTYPES = ("float32", "bfloat16", "float16")


class Routing(NamedTuple):
  """The experts of each token and their weights.

  Attributes:
    weights: `[..., k]` float32 (or the `weight_dtype` asked for); 0 for padding tokens.
    experts: `[..., k]` int32 (or the `index_dtype` asked for), best expert first; `num_experts` for
      padding tokens, an index that JAX scatters drop.
  """

  weights: jax.Array
  experts: jax.Array


class DenseRouting(NamedTuple):
  """The experts of each token as rows over all experts.

  Attributes:
    probs: `[..., E]` in the logits' dtype, the weights of the chosen experts, 0 elsewhere.
    routing_map: which experts were chosen: bool `[..., E]` ("bytemap"), or uint8
      `[..., ceil(E / 8)]`, least significant bit first, pad bits 0 ("bitmap").
  """

  probs: jax.Array
  routing_map: jax.Array


class RouterStats(NamedTuple):
  """What the balance of the experts is judged by, summed over the token axis alone.

  Of logits `[..., T, E]` with leading dimensions `...`:

  Attributes:
    expert_counts: `[..., E]` int32, how many tokens chose each expert, exact.
    score_sums: `[..., E]` float32, sum over the tokens of scores that add up to 1 over the experts:
      the probabilities for "softmax", y / (sum(y) + 1e-20) for other scores y.
    z_sum: `[...]` float32, sum over the tokens of logsumexp(logits)**2.
    num_tokens: `[...]` int32, how many tokens are not padding.
  """

  expert_counts: jax.Array
  score_sums: jax.Array
  z_sum: jax.Array
  num_tokens: jax.Array


class Groups(NamedTuple):
  """Group-limited routing: only experts of the best groups can be chosen.

  The E experts form `count` contiguous groups. The `keep` groups with the best scores stay, ties
  going to the lowest group; experts of the other groups have key -inf.

  Attributes:
    count: number of groups; it divides the number of experts.
    keep: how many groups stay, 1 <= keep <= count.
    score: score of a group. `"top2"`: the sum of its two largest keys (DeepSeek-V3; a group of one
      expert has no second key and scores -inf). `"max"`: its largest key (DeepSeek-V2). `"sum"`:
      the sum of its `k // keep` largest keys (TransformerEngine).
  """

  count: int  # pyright: ignore[reportIncompatibleMethodOverride]
  keep: int
  score: str = "top2"


class RouteOptions(NamedTuple):
  """The static options of `route`, checked. Hashable: they are the parameters of the primitives."""

  k: int
  score: str
  renormalize: bool
  scale: float
  groups: Groups | None

  @property
  def dense_gradient(self) -> bool:
    """Whether every expert gets a gradient, so that the backward must see the logits."""
    return self.score == "softmax" and not self.renormalize


def check_array(name: str, value: Any) -> jax.Array:
  """`value` as a jax.Array; TypeError if it is not an array."""
  if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
    raise TypeError(f"{name} must be an array, got {type(value).__name__}")
  return jnp.asarray(value)


def check_logits(logits: Any, name: str = "logits") -> jax.Array:
  """Logits as a jax.Array of at least one dimension and a supported dtype."""
  logits = check_array(name, logits)
  if logits.dtype.name not in LOGITS_DTYPES:
    raise TypeError(f"{name} must be one of {', '.join(LOGITS_DTYPES)}, got {logits.dtype.name}")
  if logits.ndim == 0:
    raise ValueError(f"{name} must have shape [..., E], got a scalar")
  if logits.shape[-1] < 1:
    raise ValueError(f"{name} must have at least one expert (last axis), got shape {logits.shape}")
  return logits


def check_int(name: str, value: Any, low: int, high: int, high_name: str = "") -> int:
  """`value` as a Python int with low <= value <= high."""
  if isinstance(value, (bool, np.bool_)):
    raise TypeError(f"{name} must be an integer, got {value!r}")
  try:
    value = operator.index(value)
  except TypeError:
    raise TypeError(f"{name} must be a static integer, got {type(value).__name__}") from None
  if not low <= value <= high:
    limit = f"{high_name} = {high}" if high_name else str(high)
    raise ValueError(f"{name} must be between {low} and {limit}, got {value}")
  return value


def check_bool(name: str, value: Any) -> bool:
  """`value` as a Python bool; arrays and other types are refused."""
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(f"{name} must be a static bool, got {type(value).__name__}")
  return bool(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
  """`value` as one of `choices`."""
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
  return value


def check_scale(scale: Any, name: str = "scale") -> float:
  """`scale` as a Python float that float32 can hold, and its inverse too unless it is 0."""
  if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
    raise TypeError(f"{name} must be a static Python number, got {type(scale).__name__}")
  smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
  if not (math.isfinite(scale) and (scale == 0 or smallest <= abs(scale) <= largest)):
    raise ValueError(f"{name} must be 0 or a finite normal float32, got {scale}")
  return float(np.float32(scale))


def check_groups(groups: Any, num_experts: int, k: int) -> Groups | None:
  """`groups` with every field checked against the number of experts and `k`."""
  if groups is None:
    return None
  if not isinstance(groups, Groups):
    raise TypeError(f"groups must be a jax_router.Groups or None, got {type(groups).__name__}")
  count = check_int("groups.count", groups.count, 1, num_experts, "num_experts")
  keep = check_int("groups.keep", groups.keep, 1, count, "groups.count")
  score = check_choice("groups.score", groups.score, GROUP_SCORES)
  if num_experts % count:
    raise ValueError(f"groups.count must divide num_experts = {num_experts}, got {count}")
  reachable = keep * (num_experts // count)
  if k > reachable:
    raise ValueError(
      f"k must be at most groups.keep * num_experts / groups.count = {reachable}, got {k}"
    )
  if score == "sum" and k < keep:
    raise ValueError(f"groups.score='sum' needs k >= groups.keep = {keep}, got k = {k}")
  return Groups(count, keep, score)


def check_index_dtype(index_dtype: Any, num_experts: int) -> np.dtype:
  """An integer dtype that holds `num_experts`, the index of padding tokens."""
  dtype = np.dtype(index_dtype)
  if not np.issubdtype(dtype, np.integer):
    raise TypeError(f"index_dtype must be an integer dtype, got {dtype.name}")
  if np.iinfo(dtype).max < num_experts:
    raise ValueError(
      f"index_dtype must hold num_experts = {num_experts} (the index of padding tokens), "
      f"got {dtype.name}"
    )
  if dtype.itemsize == 8 and not jax.config.jax_enable_x64:
    raise ValueError(f"index_dtype {dtype.name} needs jax_enable_x64, which is off")
  return dtype


def check_weight_dtype(weight_dtype: Any) -> np.dtype:
  """A floating dtype; None means float32."""
  dtype = np.dtype(np.float32 if weight_dtype is None else weight_dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"weight_dtype must be a floating dtype, got {dtype.name}")
  if dtype.itemsize == 8 and not jax.config.jax_enable_x64:
    raise ValueError(f"weight_dtype {dtype.name} needs jax_enable_x64, which is off")
  return dtype


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int], meaning: str) -> None:
  """ValueError unless `shape` is `expected`."""
  if tuple(shape) != tuple(expected):
    raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}, got {tuple(shape)}")


def route_options(
  num_experts: int, k: Any, score: Any, renormalize: Any, scale: Any, groups: Any
) -> RouteOptions:
  """Checks the static options of `route`."""
  k = check_int("k", k, 1, num_experts, "num_experts")
  return RouteOptions(
    k=k,
    score=check_choice("score", score, SCORES),
    renormalize=check_bool("renormalize", renormalize),
    scale=check_scale(scale),
    groups=check_groups(groups, num_experts, k),
  )
