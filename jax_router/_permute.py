"""Rows of tokens into the order of a plan, and back with their weights."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jax_router import _compat, _native, _operands, _options, _reference_permute
from jax_router._plan import Plan
from jax_router._primitive import (
  Operation,
  Result,
  check_whole_tokens,
  make_primitive,
  reference_tangents,
)

_ROW_DTYPES = ("float32", "bfloat16", "float16")
_MOST_ENTRIES = 2**31 - 1


def permute(
  x: jax.Array | np.ndarray,
  plan: Plan,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Copies the row of every token to the positions of its entries, so that experts lie together.

  With n = T * k entries, k of each token, and N = sum(plan.group_sizes) of them in a group:

      result[p] = x[plan.order[p] // k]   for p < N
      result[p] = 0                       for p >= N

  or, the same from the side of the tokens, which is how the kernels go about it: row t of `x` is
  read once and written to positions plan.inverse[t * k + j]. The gradient is

      dx[t] = sum over the slots j, in order, of dresult[plan.inverse[t * k + j]]

  of those positions below N, in float32, rounded once: a gather, with no sort and no atomics, the
  same bits in every run. Differentiable in `x` in reverse mode, twice; for forward mode use
  `implementation="reference"`. The backward keeps the plan alone, under the name "jax_router" of
  `jax.checkpoint` policies.

  Only `plan.inverse` and `plan.group_sizes` are looked at. A position outside [0, n) is skipped,
  never followed. Rows that no entry goes to, which no result of `plan` has, are undefined.

  Sharding: as `jax_router.plan`. Leading dimensions may be sharded, tokens may not.

  Args:
    x: `[..., T, d]` float32, bfloat16 or float16.
    plan: the `Plan` of these tokens, of experts `[..., T, k]`; k is n / T.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `[..., n, d]` in the dtype of `x`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a shape that does not fit, an n that T does not divide; an implementation that is
      not there; tokens sharded along Explicit axes; when it is compiled: no leading dimension in a
      computation over several devices whose sharding the types do not tell.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> plan = jax_router.plan(jnp.array([[2, 0], [1, 2]]), 3)
    >>> jax_router.permute(jnp.array([[1.0], [5.0]]), plan).ravel().tolist()
    [1.0, 5.0, 1.0, 5.0]
  """
  x = _check_rows("permute", "x", x, "[..., T, d]")
  lead, tokens = x.shape[:-2], x.shape[-2]
  inverse, group_sizes = _check_plan("permute", plan, lead)
  entries = inverse.shape[-1]
  inverse = inverse.reshape(*lead, tokens, _slots(entries, tokens))
  _check_implementation(implementation)
  if implementation == "reference":
    return _reference_permute.permute(x, inverse, group_sizes)[0]
  return _permute(implementation, *_compat.join_varying_axes((x, inverse, group_sizes)))


def combine(
  y: jax.Array | np.ndarray,
  weights: jax.Array | np.ndarray,
  plan: Plan,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """Brings rows in the order of a plan back to their tokens and adds them up with their weights.

  With p = plan.inverse[t * k + j] and N = sum(plan.group_sizes):

      result[t] = sum over the slots j, in order, with p < N, of weights[t, j] * y[p]

  in float32, rounded once to the dtype of `y`. An entry in no group adds nothing, whatever its
  weight and its row of `y` are, even NaN. The gradients are

      dy[p]         = weights[t, j] * dresult[t]             (0 for p >= N)
      dweights[t, j] = sum over d of dresult[t] * y[p]       (0 for p >= N)

  in one kernel that reads dresult and `y` once, the sum in float32 in an order that depends on d
  and the dtype alone. There are no atomics: the same bits in every run, at any number of threads,
  whatever the batching. What is not differentiated costs nothing: if `weights` are constant, `y` is
  neither kept nor read. Differentiable in reverse mode, twice; for forward mode use
  `implementation="reference"`. Of the residuals the plan has the name "jax_router" of
  `jax.checkpoint` policies; `y` and `weights` keep the names they may have.

  Only `plan.inverse` and `plan.group_sizes` are looked at. A position outside [0, n) is skipped,
  never followed. Rows of dy that no entry goes to, which no result of `plan` has, are undefined.

  Sharding: as `jax_router.plan`. Leading dimensions may be sharded, tokens may not.

  Args:
    y: `[..., n, d]` float32, bfloat16 or float16, n = T * k: row p belongs to entry plan.order[p].
    weights: `[..., T, k]` float32, bfloat16 or float16, as `route` gives them.
    plan: the `Plan` of experts `[..., T, k]`.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `[..., T, d]` in the dtype of `y`.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a shape that does not fit; an implementation that is not there; tokens sharded along
      Explicit axes; when it is compiled: no leading dimension in a computation over several devices
      whose sharding the types do not tell.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> plan = jax_router.plan(jnp.array([[2, 0], [1, 2]]), 3)
    >>> y = jnp.array([[1.0], [2.0], [4.0], [8.0]])
    >>> weights = jnp.array([[0.5, 1.0], [1.0, 0.25]])
    >>> jax_router.combine(y, weights, plan).ravel().tolist()
    [3.0, 4.0]
  """
  y = _check_rows("combine", "y", y, "[..., n, d]")
  weights = _check_rows("combine", "weights", weights, "[..., T, k]")
  lead, entries = y.shape[:-2], y.shape[-2]
  tokens, slots = weights.shape[-2:]
  _options.check_shape("weights", weights.shape[:-2], lead, "y.shape[:-2] + (T, k); its first axes")
  inverse, group_sizes = _check_plan("combine", plan, lead)
  if inverse.shape[-1] != tokens * slots:
    raise ValueError(
      f"weights must have shape [..., T, k] with T * k = {inverse.shape[-1]}, the number of "
      f"entries of the plan, got {weights.shape}"
    )
  if entries != tokens * slots:
    raise ValueError(
      f"y must have shape [..., n, d] with n = {inverse.shape[-1]}, the number of entries of the "
      f"plan, got {y.shape}"
    )
  inverse = inverse.reshape(*lead, tokens, slots)
  weights = weights.astype(jnp.float32)
  _check_implementation(implementation)
  if implementation == "reference":
    return _reference_permute.combine(y, weights, inverse, group_sizes)[0]
  operands = _compat.join_varying_axes((y, weights, inverse, group_sizes))
  return _combine(implementation, *operands)


# ---- arguments ----


def _check_rows(word: str, name: str, value: Any, shape: str) -> jax.Array:
  value = _options.check_array(name, value)
  if value.dtype.name not in _ROW_DTYPES:
    raise TypeError(f"{name} must be one of {', '.join(_ROW_DTYPES)}, got {value.dtype.name}")
  if value.ndim < 2:
    raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
  check_whole_tokens(word, name, value, value.ndim - 2)
  return value


def _check_plan(word: str, plan: Any, lead: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Inverse `[*lead, n]` and group sizes `[*lead, E]` of a plan."""
  if not isinstance(plan, Plan):
    raise TypeError(f"plan must be a jax_router.Plan, got {type(plan).__name__}")
  arrays = []
  for field, value in plan._asdict().items():
    name = f"plan.{field}"
    value = _options.check_array(name, value)
    if value.dtype != np.int32:
      raise TypeError(f"{name} must have dtype int32, got {value.dtype.name}")
    if value.ndim != len(lead) + 1 or value.shape[:-1] != lead:
      raise ValueError(
        f"{name} must have one dimension after leading dimensions {lead}, got shape {value.shape}"
      )
    check_whole_tokens(word, name, value, value.ndim - 1)
    arrays.append(value)
  order, inverse, group_sizes = arrays
  _options.check_shape("plan.inverse", inverse.shape, order.shape, "plan.order.shape")
  entries = inverse.shape[-1]
  if isinstance(entries, int) and entries > _MOST_ENTRIES:
    raise ValueError(f"plan must have at most {_MOST_ENTRIES} entries, got {entries}")
  return inverse, group_sizes


def _slots(entries: Any, tokens: Any) -> Any:
  """How many entries each token has."""
  none = isinstance(tokens, int) and tokens == 0
  slots = 0 if none else entries // tokens
  if entries != tokens * slots:
    raise ValueError(
      f"x must have a number of tokens that divides the {entries} entries of the plan, got {tokens}"
    )
  return slots


def _check_implementation(implementation: str | None) -> None:
  if implementation is not None:
    _options.check_choice("implementation", implementation, _options.IMPLEMENTATIONS)
    _native.check_implementation(implementation)


# ---- the primitives ----

# Operands: x [*B, T, d], rows [*B, n, d], weights [*B, T, k], inverse [*B, T, k] and group sizes
# [*B, E]. The shape of the inverse tells T and k. The kernels add up the group sizes themselves:
# that is cheaper than one more kernel that does.


def _make(name: str, results, reference, attributes=lambda **_: {}):
  return make_primitive(
    Operation(
      name=name,
      batch_ndim=lambda shapes, **_: len(shapes[0]) - 2,
      results=results,
      attributes=attributes,
      reference=reference,
      tangents=reference_tangents(reference),
      whole_tokens=True,
    )
  )


def _token_rows(shapes, inverse: int, dtype) -> list[Result]:
  return [Result((shapes[inverse][-2], shapes[0][-1]), dtype)]


def _entry_rows(shapes, inverse: int, dtype) -> list[Result]:
  return [Result((shapes[inverse][-2] * shapes[inverse][-1], shapes[0][-1]), dtype)]


def _without_dtype(reference):
  return lambda *operands, dtype: reference(*operands)


_bind_permute = _make(
  "permute",
  lambda shapes, *, dtype: _entry_rows(shapes, 1, dtype),
  _without_dtype(_reference_permute.permute),
)

_bind_permute_backward = _make(
  "permute_backward",
  lambda shapes, *, dtype: _token_rows(shapes, 1, dtype),
  _without_dtype(_reference_permute.permute_backward),
)

_bind_combine = _make(
  "combine",
  lambda shapes, *, dtype: _token_rows(shapes, 2, dtype),
  _without_dtype(_reference_permute.combine),
)


def _combine_backward_results(shapes, *, of_rows: bool, of_weights: bool, dtype):
  """Of operands cotangent, inverse, group sizes, then rows and weights where they are needed."""
  results = _entry_rows(shapes, 1, dtype) if of_rows else []
  return results + ([Result(shapes[1][-2:], np.dtype(np.float32))] if of_weights else [])


def _combine_backward_reference(*operands, of_rows: bool, of_weights: bool, dtype):
  del dtype
  cotangent, inverse, group_sizes, *rest = operands
  rows = rest[0] if of_weights else None
  weights = rest[-1] if of_rows else None
  return _reference_permute.combine_backward(cotangent, inverse, group_sizes, rows, weights)


_bind_combine_backward = _make(
  "combine_backward",
  _combine_backward_results,
  _combine_backward_reference,
  lambda *, dtype, **gradients: gradients,
)


# ---- the differentiable functions ----


def _save_plan(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Named inside the rule of a custom_vjp, or jax.checkpoint would sort again in the backward."""
  return tuple(checkpoint_name(x, _operands.CHECKPOINT_NAME) for x in arrays)


def _run_permute(implementation: str | None, x, inverse, group_sizes):
  params = {"dtype": x.dtype, "implementation": implementation}
  return _bind_permute(x, inverse, group_sizes, **params)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(implementation: str | None, x, inverse, group_sizes):
  return _run_permute(implementation, x, inverse, group_sizes)


def _permute_forward(implementation: str | None, x, inverse, group_sizes):
  return _run_permute(implementation, x, inverse, group_sizes), _save_plan(inverse, group_sizes)


def _permute_backward(implementation: str | None, plan, cotangent):
  params = {"dtype": cotangent.dtype, "implementation": implementation}
  return _bind_permute_backward(cotangent, *plan, **params)[0], None, None


_permute.defvjp(_permute_forward, _permute_backward)


class _Residuals(NamedTuple):
  """What the gradients of `combine` need: weights for that of the rows, rows for the weights'."""

  inverse: jax.Array
  group_sizes: jax.Array
  rows: jax.Array | None
  weights: jax.Array | None


def _run_combine(implementation: str | None, y, weights, inverse, group_sizes):
  params = {"dtype": y.dtype, "implementation": implementation}
  return _bind_combine(y, weights, inverse, group_sizes, **params)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(implementation: str | None, y, weights, inverse, group_sizes):
  return _run_combine(implementation, y, weights, inverse, group_sizes)


def _combine_forward(implementation: str | None, y, weights, inverse, group_sizes):
  result = _run_combine(implementation, y.value, weights.value, inverse.value, group_sizes.value)
  rows = y.value if weights.perturbed else None
  saved_weights = weights.value if y.perturbed else None
  saved_inverse, saved_sizes = _save_plan(inverse.value, group_sizes.value)
  return result, _Residuals(saved_inverse, saved_sizes, rows, saved_weights)


def _combine_backward(implementation: str | None, residuals: _Residuals, cotangent):
  inverse, group_sizes, rows, weights = residuals
  if isinstance(cotangent, SymbolicZero):
    return None, None, None, None
  present = (x for x in (rows, weights) if x is not None)
  gradients = iter(
    _bind_combine_backward(
      cotangent,
      inverse,
      group_sizes,
      *present,
      of_rows=weights is not None,
      of_weights=rows is not None,
      dtype=cotangent.dtype,
      implementation=implementation,
    )
  )
  of_rows = None if weights is None else next(gradients)
  return of_rows, None if rows is None else next(gradients), None, None


_combine.defvjp(_combine_forward, _combine_backward, symbolic_zeros=True)
