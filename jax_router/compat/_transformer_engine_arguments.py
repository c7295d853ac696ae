"""Enumerations of TransformerEngine's router and the checks of its arguments."""

from __future__ import annotations

import enum
import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_router import _options
from jax_router._options import Groups

_INDEX_DTYPES = ("int16", "int32", "int64")
_LARGEST_INT = 2**63 - 1


class ScoreFunction(enum.IntEnum):
  """How logits become scores."""

  SIGMOID = 0
  SOFTMAX = 1
  SQRTSOFTPLUS = 2


class RoutingMapFormat(enum.IntEnum):
  """Layout of the routing map.

  BYTEMAP: bool `[..., E]`. BITMAP_U8: uint8 `[..., ceil(E / 8)]`; bit e % 8 of byte e // 8, the
  least significant bit first, stands for expert e.
  """

  BYTEMAP = 0
  BITMAP_U8 = 1


class Balancing(NamedTuple):
  """The operands of quantile balancing, checked."""

  histogram: jax.Array  # [E, num_bins] int32
  bounds: jax.Array  # [2] float32


_Member = TypeVar("_Member", bound=enum.IntEnum)


def check_member(name: str, value: Any, members: type[_Member]) -> _Member:
  """`value`, a member of the enumeration, its name in any case, or its number."""
  if isinstance(value, members):
    return value
  if isinstance(value, str) and value.upper() in members.__members__:
    return members[value.upper()]
  if type(value) is int and value in tuple(members):
    return members(value)
  names = ", ".join(f"{m.name.lower()!r}" for m in members)
  numbers = ", ".join(str(m.value) for m in members)
  raise ValueError(
    f"{name} must be one of {names} (in any case), a {members.__name__} or its number "
    f"({numbers}), got {value!r}"
  )


def check_number(name: str, value: Any) -> float:
  """A Python int or float that is 0 or a finite normal float32."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise TypeError(f"{name} must be a Python int or float, got {type(value).__name__}")
  limits = np.finfo(np.float32)
  if value != 0 and not float(limits.tiny) <= abs(value) <= float(limits.max):
    raise ValueError(f"{name} must be 0 or a finite normal float32, got {value}")
  return float(value)


def check_index_dtype(value: Any, num_experts: int) -> np.dtype | None:
  if value is None:
    return None
  try:
    dtype = np.dtype(value)
  except TypeError:
    dtype = None
  if dtype is None or dtype.name not in _INDEX_DTYPES:
    raise TypeError(f"topk_indices_dtype must be one of {', '.join(_INDEX_DTYPES)}, got {value!r}")
  if dtype.name == "int16" and num_experts > np.iinfo(np.int16).max:
    raise ValueError(f"topk_indices_dtype int16 needs at most 32767 experts, got {num_experts}")
  if dtype.name == "int64" and not jax.config.jax_enable_x64:
    raise ValueError("topk_indices_dtype int64 needs jax_enable_x64, which is off")
  return dtype


def check_bias(value: Any, score: ScoreFunction, num_experts: int) -> jax.Array | None:
  if value is None:
    return None
  if score == ScoreFunction.SOFTMAX:
    raise ValueError(
      "expert_bias only goes with score_function 'sigmoid' or 'sqrtsoftplus', got 'softmax'"
    )
  bias = _options.check_array("expert_bias", value)
  if not jnp.issubdtype(bias.dtype, jnp.floating):
    raise TypeError(f"expert_bias must have a floating dtype, got {bias.dtype.name}")
  _options.check_shape("expert_bias", bias.shape, (num_experts,), "[E]")
  return bias


def check_groups(num_groups: Any, group_topk: Any, num_experts: int, topk: int) -> Groups | None:
  """The groups, None where they are off: `num_groups` alone limits nothing."""
  off = -1
  keep = off if group_topk is None else group_topk
  keep = _options.check_int("group_topk", keep, -_LARGEST_INT, num_experts, "num_experts")
  count = off if num_groups is None else num_groups
  count = _options.check_int("num_groups", count, -_LARGEST_INT, num_experts, "num_experts")
  if keep <= 0:
    return None
  if count <= 0:
    raise ValueError(f"num_groups must be positive where group_topk = {keep} is, got {num_groups}")
  _options.check_int("group_topk", keep, 1, count, "num_groups")
  if num_experts % count:
    raise ValueError(f"num_groups must divide num_experts = {num_experts}, got {count}")
  if topk % keep:
    raise ValueError(f"group_topk must divide topk = {topk}, got {keep}")
  if topk // keep > num_experts // count:
    raise ValueError(
      f"topk / group_topk must be at most num_experts / num_groups = {num_experts // count}, "
      f"got {topk} / {keep}"
    )
  return Groups(count, keep, "sum")


def check_balancing(histogram: Any, bounds: Any, num_experts: int) -> Balancing | None:
  if histogram is None and bounds is None:
    return None
  if histogram is None or bounds is None:
    missing = "qb_histogram" if histogram is None else "qb_bounds"
    raise ValueError(f"qb_histogram and qb_bounds must be provided together, {missing} is None")
  counted = _options.check_array("qb_histogram", histogram)
  if counted.dtype != np.int32:
    raise TypeError(f"qb_histogram must have dtype int32, got {counted.dtype.name}")
  if counted.ndim != 2 or counted.shape[0] != num_experts or counted.shape[1] < 1:
    raise ValueError(
      f"qb_histogram must have shape [E, num_bins] with E = {num_experts} and num_bins >= 1, "
      f"got {counted.shape}"
    )
  limits = _options.check_array("qb_bounds", bounds)
  if limits.dtype != np.float32:
    raise TypeError(f"qb_bounds must have dtype float32, got {limits.dtype.name}")
  _options.check_shape("qb_bounds", limits.shape, (2,), "[2]")
  # Traced bounds have no values yet: the histogram counts nothing with bounds that are not valid.
  if not isinstance(bounds, Tracer):
    lower, upper = np.asarray(bounds).tolist()
    if not (np.isfinite([lower, upper]).all() and lower < upper):
      raise ValueError(f"qb_bounds must be finite with lower < upper, got [{lower}, {upper}]")
  return Balancing(counted, limits)


def check_balanced_choice(
  score: ScoreFunction, pre_softmax: bool, groups: Groups | None, bias: Any, topk: int, experts: int
) -> None:
  """What quantile balancing asks of the choice."""
  if score != ScoreFunction.SIGMOID:
    name = score.name.lower()
    raise ValueError(f"quantile balancing only supports score_function 'sigmoid', got {name!r}")
  if pre_softmax:
    raise ValueError("quantile balancing only supports use_pre_softmax=False, got True")
  if groups is not None:
    raise ValueError(
      "quantile balancing only supports a choice without groups, "
      f"got num_groups = {groups.count}, group_topk = {groups.keep}"
    )
  if bias is None or bias.dtype != np.float32:
    got = "None" if bias is None else bias.dtype.name
    raise ValueError(f"quantile balancing only supports a float32 expert_bias, got {got}")
  if topk == experts:
    raise ValueError(f"quantile balancing only supports topk < num_experts = {experts}, got {topk}")


def check_total(value: Any, probs: jax.Array) -> jax.Array | np.float32:
  """The number of tokens of the loss as a float32."""
  if value is None:
    rows = math.prod(probs.shape[:-1])
    return np.float32(rows) if isinstance(rows, int) else jnp.asarray(rows).astype(jnp.float32)
  if isinstance(value, (int, np.integer)):
    return np.float32(_options.check_int("total_num_tokens", value, 1, _LARGEST_INT))
  total = _options.check_array("total_num_tokens", value)
  if not jnp.issubdtype(total.dtype, jnp.integer):
    raise TypeError(f"total_num_tokens must be an integer, got {total.dtype.name}")
  _options.check_shape("total_num_tokens", total.shape, (), "()")
  return total.astype(jnp.float32)
