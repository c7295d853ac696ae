"""`permute`, `combine` and their gradients against numpy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
import oracle_permute as oracle
from jax_router import combine, permute
from oracle_permute import DTYPES, PLAN_KINDS, make_experts, make_plan, make_rows

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)


@functools.cache
def compiled(implementation):
  """`(x, y, weights, plan, their cotangents) -> results and gradients` of both words."""

  @jax.jit
  def run(x, y, weights, plan, row_cotangent, token_cotangent):
    rows, pull_rows = jax.vjp(lambda x: permute(x, plan, implementation=implementation), x)
    tokens, pull_tokens = jax.vjp(
      lambda y, w: combine(y, w, plan, implementation=implementation), y, weights
    )
    return rows, pull_rows(row_cotangent)[0], tokens, pull_tokens(token_cotangent)

  return run


def make_case(kind, tokens, k, width, num_experts, dtype=np.float32, weight_dtype=np.float32):
  """Arguments of `compiled`."""
  rng = np.random.default_rng([tokens, k, width])
  plan = make_plan(make_experts(kind, tokens, k, num_experts), num_experts)
  x, cotangent = (make_rows(rng, tokens, width, dtype=dtype) for _ in range(2))
  y, row_cotangent = (make_rows(rng, tokens * k, width, dtype=dtype) for _ in range(2))
  weights = rng.normal(size=(tokens, k)).astype(weight_dtype)
  return x, y, weights, plan, row_cotangent, cotangent


def check(results, x, y, weights, plan, row_cotangent, token_cotangent):
  """All results of `compiled` against the oracle."""
  rows, x_gradient, tokens, (y_gradient, weights_gradient) = results
  assert rows.dtype == x.dtype
  np.testing.assert_array_equal(np.asarray(rows), oracle.permute(x, plan))
  oracle.permute_gradient(row_cotangent, plan, len(x)).check(x_gradient, x.dtype)
  oracle.combine(y, weights, plan).check(tokens, y.dtype)
  of_rows, of_weights = oracle.combine_gradients(token_cotangent, y, weights, plan)
  of_rows.check(y_gradient, y.dtype)
  of_weights.check(weights_gradient, weights.dtype)


# Tokens, k, width, experts: each side of a vector, of a warp, of a block and of the slots at once.
SHAPES = (
  (1, 1, 1, 1), (7, 3, 5, 4), (33, 8, 64, 16), (64, 2, 8, 8), (5, 4, 130, 7), (40, 6, 257, 33),
  (3, 9, 24, 40), (9, 1, 1024, 3), (6, 36, 96, 130), (2, 255, 16, 257), (50, 8, 513, 2304),
)  # fmt: skip
LARGE_SHAPES = ((130, 8, 2880, 32), (70, 5, 4096, 64), (300, 22, 1000, 512), (33, 3, 4099, 7))


@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grid(implementation, shape, dtype):
  case = make_case("outside", *shape, dtype)
  check(compiled(implementation)(*case), *case)


@DTYPE
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_larger_grid(kernel, shape, dtype):
  case = make_case("outside", *shape, dtype)
  check(compiled(kernel)(*case), *case)


@pytest.mark.parametrize("kind", PLAN_KINDS)
def test_plans(implementation, kind):
  case = make_case(kind, 45, 4, 40, 12)
  check(compiled(implementation)(*case), *case)
  if kind in ("random", "one expert", "repeated"):
    assert np.asarray(case[3].group_sizes).sum() == 45 * 4
  if kind == "no group":
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(compiled(implementation)(*case)))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@DTYPE
def test_dtypes_of_rows_and_weights_may_differ(implementation, dtype, weight_dtype):
  case = make_case("outside", 12, 3, 16, 5, dtype, weight_dtype)
  check(compiled(implementation)(*case), *case)


def test_the_plan_of_the_package(implementation):
  """A round trip of one row for each token and weights that add up to 1 is the identity."""
  x = make_rows(np.random.default_rng(0), 60, 24)
  experts = make_experts("padding", 60, 4, 9)
  plan = jax_router.plan(experts, 9)
  weights = np.full((60, 4), 0.25, np.float32)
  rows = permute(x, plan, implementation=implementation)
  np.testing.assert_array_equal(rows, oracle.permute(x, make_plan(experts, 9)))
  result = combine(rows, weights, plan, implementation=implementation)
  real = (experts < 9).all(axis=1)
  np.testing.assert_allclose(result, np.where(real[:, None], x, 0), rtol=1e-6)
  grouped = np.arange(240) < np.asarray(plan.group_sizes).sum()
  want = np.where(grouped[:, None], x[np.asarray(plan.order) // 4], 0)
  np.testing.assert_array_equal(rows, want)


@DTYPE
def test_special_values_in_groups_are_kept(implementation, dtype):
  """NaN and infinities go where their entries do, and into no other token."""
  x, y, weights, plan, row_cotangent, cotangent = make_case("outside", 20, 3, 16, 6, dtype)
  for i, special in enumerate((np.nan, np.inf, -np.inf)):
    for array in (x, y, row_cotangent, cotangent):
      array[3 + i, 2 + i] = special
  weights[10, 0], weights[11, 1] = np.inf, np.nan
  x[0] = jnp.finfo(dtype).smallest_subnormal
  rows, x_gradient, tokens, (y_gradient, _) = compiled(implementation)(
    x, y, weights, plan, row_cotangent, cotangent
  )
  want = oracle.permute(x, plan).astype(np.float32)
  assert np.isnan(want).any() and rows.dtype == dtype
  np.testing.assert_array_equal(np.asarray(rows).astype(np.float32), want)
  oracle.permute_gradient(row_cotangent, plan, 20).check(x_gradient, dtype)
  with np.errstate(invalid="ignore"):
    oracle.combine(y, weights, plan).check(tokens, dtype)
    oracle.combine_gradients(cotangent, y, weights, plan)[0].check(y_gradient, dtype)


@DTYPE
def test_entries_in_no_group_add_nothing(implementation, dtype):
  """Whatever their rows, weights and cotangents hold."""
  x, y, weights, plan, row_cotangent, cotangent = make_case("outside", 40, 3, 33, 6, dtype)
  total = int(plan.group_sizes.sum())
  outside = (plan.inverse >= total).reshape(40, 3)
  assert outside.any() and not outside.all()
  want = jax.device_get(compiled(implementation)(x, y, weights, plan, row_cotangent, cotangent))
  assert (np.asarray(want[0])[total:] == 0).all()
  assert (np.asarray(want[3][0])[total:] == 0).all()
  assert (np.asarray(want[3][1])[outside] == 0).all()
  for special in (np.nan, np.inf):
    y[total:], row_cotangent[total:], weights[outside] = special, special, special
    # A token without a group has no use for its row either.
    lost = outside.all(axis=1)
    x[lost], cotangent[lost] = special, special
    got = compiled(implementation)(x, y, weights, plan, row_cotangent, cotangent)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_array_equal(np.asarray(a), b)
  assert lost.any()


def test_sums_are_float32_in_the_order_of_the_slots(kernel):
  """Large terms that cancel leave what only this order leaves."""
  experts = np.arange(4, dtype=np.int32)[None]
  plan = make_plan(experts, 4)
  weights = np.ones((1, 4), np.float32)
  for terms, want in (((2**25, 1, -(2**25), 1), 1), ((1, 2**25, -(2**25), 1), 1), ((1,) * 4, 4)):
    y = np.repeat(np.array(terms, np.float32)[:, None], 9, axis=1)
    got = combine(y, weights, plan, implementation=kernel)
    np.testing.assert_array_equal(got, np.full((1, 9), want, np.float32))
    gradient = jax.vjp(lambda x: permute(x, plan, implementation=kernel), got)[1](jnp.asarray(y))[0]
    np.testing.assert_array_equal(gradient, np.full((1, 9), want, np.float32))


@pytest.mark.parametrize("shape", ((0, 3, 5), (4, 0, 5), (4, 3, 0), (0, 0, 0)), ids=str)
def test_empty(implementation, shape):
  tokens, k, width = shape
  case = make_case("random", tokens, k, width, 6)
  results = compiled(implementation)(*case)
  shapes = [x.shape for x in jax.tree.leaves(results)]
  n = tokens * k
  assert shapes == [(n, width), (tokens, width), (tokens, width), (n, width), (tokens, k)]
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(results))


@pytest.mark.parametrize("lead", ((3,), (2, 3), (0,)), ids=str)
def test_leading_dimensions_are_plans_of_their_own(implementation, lead, rng):
  experts = np.zeros((*lead, 10, 3), np.int32)
  for i, row in enumerate(np.ndindex(lead)):
    experts[row] = make_experts(PLAN_KINDS[i % len(PLAN_KINDS)], 10, 3, 5, seed=i)
  plan = make_plan(experts, 5)
  x, cotangent = make_rows(rng, *lead, 10, 12), make_rows(rng, *lead, 10, 12)
  y, row_cotangent = make_rows(rng, *lead, 30, 12), make_rows(rng, *lead, 30, 12)
  weights = make_rows(rng, *lead, 10, 3)
  arguments = x, y, weights, plan, row_cotangent, cotangent
  got = compiled(implementation)(*arguments)
  assert got[0].shape == (*lead, 30, 12) and got[2].shape == (*lead, 10, 12)
  for row in np.ndindex(lead):
    part = jax.tree.map(lambda a, row=row: np.asarray(a)[row], arguments)
    check(jax.tree.map(lambda a, row=row: np.asarray(a)[row], got), *part)
    if implementation != "reference":  # The same bits in every batch.
      alone = compiled(implementation)(*part)
      for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[row], np.asarray(b))


@DTYPE
def test_repeats_are_identical_and_fully_written(kernel, dtype):
  case = jax.device_put(make_case("outside", 200, 6, 390, 20, dtype))
  run = compiled(kernel)
  first = jax.device_get(run(*case))
  check(first, *jax.device_get(case))
  for _ in range(5):
    # Freed arrays of the same size full of NaN are what an unwritten result would show.
    rubbish = [jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.tree.leaves(first)]
    jax.block_until_ready(rubbish)
    del rubbish
    for a, b in zip(jax.tree.leaves(run(*case)), jax.tree.leaves(first), strict=True):
      np.testing.assert_array_equal(np.asarray(a), b)


def test_positions_out_of_range_are_skipped(implementation, rng):
  """A broken plan reads and writes nothing outside, and leaves the other entries alone."""
  plan = make_plan(make_experts("random", 8, 2, 5), 5)
  inverse = plan.inverse.copy()
  inverse[[1, 6, 9]] = (-1, 16, 2**31 - 1)
  inverse[12] = -(2**31)
  broken = np.isin(np.arange(16), (1, 6, 9, 12))
  x, y, weights = make_rows(rng, 8, 40), make_rows(rng, 16, 40), make_rows(rng, 8, 2)
  bad = plan._replace(inverse=inverse, group_sizes=np.full(5, 7, np.int32))
  rows, x_gradient, tokens, (_, weights_gradient) = compiled(implementation)(
    x, y, weights, bad, y, x
  )
  for p in plan.inverse[~broken]:
    np.testing.assert_array_equal(rows[p], x[plan.order[p] // 2])
  held = np.where(broken.reshape(8, 2), 0, weights)
  oracle.combine(y, held, plan).check(tokens, np.float32)
  oracle.combine(y, (~broken).reshape(8, 2).astype(np.float32), plan).check(x_gradient, np.float32)
  assert (np.asarray(weights_gradient)[broken.reshape(8, 2)] == 0).all()


@pytest.mark.parametrize("sizes", ((-5, 2), (-(2**31), 0), (0, 0)))
def test_negative_group_sizes_leave_no_group(implementation, sizes):
  case = make_case("random", 6, 2, 9, 2)
  plan = case[3]._replace(group_sizes=np.array(sizes, np.int32))
  results = compiled(implementation)(*case[:3], plan, *case[4:])
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(results))


# ---- bad arguments ----

X, W = np.zeros((6, 4), np.float32), np.zeros((6, 2), np.float32)
Y = np.zeros((12, 4), np.float32)
PLAN = make_plan(make_experts("random", 6, 2, 3), 3)
ORDER, INVERSE, SIZES = PLAN

BAD = (
  ({"rows": X[0]}, ValueError, r"x must have shape \[\.\.\., T, d\], got \(4,\)"),
  ({"rows": X.astype(int)}, TypeError, "x must be one of float32, bfloat16, float16, got int"),
  ({"rows": [[1.0]]}, TypeError, "x must be an array, got list"),
  ({"rows": X[:5]}, ValueError, r"x must have a number of tokens that divides the 12 .* got 5"),
  ({"rows": X[:0]}, ValueError, r"x must have a number of tokens that divides the 12 .* got 0"),
  ({"rows": X[None]}, ValueError, r"plan.order must have one dimension after .* \(1,\), got"),
  ({"plan": tuple(PLAN)}, TypeError, "plan must be a jax_router.Plan, got tuple"),
  ({"plan": (ORDER, INVERSE.astype(np.int16), SIZES)}, TypeError, "plan.inverse .* got int16"),
  ({"plan": (ORDER, INVERSE[:-1], SIZES)}, ValueError, r"plan.inverse must have shape .* got"),
  ({"plan": (ORDER, INVERSE, SIZES[None])}, ValueError, "plan.group_sizes must have one dimension"),
  ({"plan": (ORDER, INVERSE, 3)}, TypeError, "plan.group_sizes must be an array, got int"),
  ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
)


@pytest.mark.parametrize("changed, exception, text", BAD)
def test_bad_arguments_of_permute(changed, exception, text):
  plan = changed.get("plan", PLAN)
  if type(plan) is tuple and "Plan, got" not in text:
    plan = jax_router.Plan(*plan)
  with pytest.raises(exception, match=text):
    permute(changed.get("rows", X), plan, implementation=changed.get("implementation"))


@pytest.mark.parametrize(
  "y, weights, exception, text",
  (
    (Y[0], W, ValueError, r"y must have shape \[\.\.\., n, d\], got \(4,\)"),
    (Y.astype(int), W, TypeError, "y must be one of float32, bfloat16, float16, got int"),
    (Y, W[0], ValueError, r"weights must have shape \[\.\.\., T, k\], got \(2,\)"),
    (Y, W.astype(int), TypeError, "weights must be one of float32, .* got int"),
    (Y, W[None], ValueError, r"weights must have shape .* got \(1,\)"),
    (Y, W[:5], ValueError, r"weights must have shape .* T \* k = 12, .* got \(5, 2\)"),
    (Y[:11], W, ValueError, r"y must have shape \[\.\.\., n, d\] with n = 12, .* got \(11, 4\)"),
  ),
)
def test_bad_arguments_of_combine(y, weights, exception, text):
  with pytest.raises(exception, match=text):
    combine(y, weights, PLAN)


def test_too_many_entries_are_refused():
  """Positions are int32."""
  n = 2**31
  plan = jax_router.Plan(*(jax.ShapeDtypeStruct((s,), np.int32) for s in (n, n, 3)))
  x = jax.ShapeDtypeStruct((2**30, 1), np.float32)
  with pytest.raises(ValueError, match="plan must have at most 2147483647 entries, got 2147483648"):
    jax.eval_shape(permute, x, plan)
  plan = jax.tree.map(lambda s: jax.ShapeDtypeStruct((min(s.shape[0], n - 2),), np.int32), plan)
  x = jax.ShapeDtypeStruct((2**30 - 1, 1), np.float32)
  assert jax.eval_shape(permute, x, plan).shape == (n - 2, 1)
