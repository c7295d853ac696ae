"""Group-limited routing: values of `route(groups=...)`."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

import oracle
import shapes
from jax_router import Groups

# experts, count, keep, k: group sizes 1, 2, 3, 32 and others; all groups kept; every expert of the
# kept groups chosen; more than two experts from each group.
LAYOUTS = (
  (8, 8, 3, 3),
  (16, 8, 4, 5),
  (16, 8, 4, 8),
  (33, 11, 4, 4),
  (33, 11, 5, 15),
  (64, 2, 1, 20),
  (128, 4, 4, 8),
  (130, 13, 3, 30),
  (256, 8, 4, 8),
  (7, 1, 1, 7),
)


@pytest.mark.parametrize("group_score", ("top2", "max", "sum"))
@pytest.mark.parametrize("experts, count, keep, k", LAYOUTS)
def test_layouts(route, rng, experts, count, keep, k, group_score):
  case = 3 * LAYOUTS.index((experts, count, keep, k)) + len(group_score)
  score, renormalize = oracle.VARIANTS[case % len(oracle.VARIANTS)]
  bias = rng.normal(size=experts).astype(np.float32) if case % 3 else None
  groups = Groups(count, keep, group_score)
  options = {"score": score, "renormalize": renormalize, "groups": groups, "bias": bias}
  logits = shapes.make_logits("random", 40, experts, ml_dtypes.bfloat16)
  oracle.check_route(route(logits, k, **options), logits, k, **options)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
@pytest.mark.parametrize("group_score", ("top2", "max", "sum"))
def test_layouts_for_every_variant(kernel_route, rng, group_score, score, renormalize):
  for i, (experts, count, keep, k) in enumerate(LAYOUTS):
    bias = rng.normal(size=experts).astype(np.float32) if (i + renormalize) % 2 else None
    groups = Groups(count, keep, group_score)
    options = {"score": score, "renormalize": renormalize, "groups": groups, "bias": bias}
    logits = shapes.make_logits("random", 20, experts)
    oracle.check_route(kernel_route(logits, k, **options), logits, k, **options)


@pytest.mark.slow
@pytest.mark.parametrize("score", oracle.SCORES)
@pytest.mark.parametrize("group_score", ("top2", "max", "sum"))
def test_layouts_for_every_variant_and_kind(route, rng, group_score, score):
  # Beside the largest magnitudes a bias or a second term of a sum vanishes in rounding.
  kinds = {*shapes.FINITE_KINDS, "nan", "minus_inf", "dead"} - {"extreme"}
  for (experts, count, keep, k), kind in itertools.product(LAYOUTS, sorted(kinds)):
    biases = (None, rng.normal(size=experts).astype(np.float32))
    for renormalize, bias in itertools.product((True, False), biases):
      groups = Groups(count, keep, group_score)
      options = {"score": score, "renormalize": renormalize, "groups": groups, "bias": bias}
      logits = shapes.make_logits(kind, 20, experts)
      oracle.check_route(route(logits, k, **options), logits, k, **options)


@pytest.mark.parametrize("score, renormalize", (*oracle.VARIANTS[::3], ("softmax", False)))
@pytest.mark.parametrize("group_score", ("top2", "max", "sum"))
def test_ties_nan_and_dead_groups(route, group_score, score, renormalize):
  groups = Groups(6, 3, group_score)
  options = {"score": score, "renormalize": renormalize, "groups": groups}
  for kind in ("tied", "equal", "zeros", "nan", "minus_inf", "dead"):
    logits = shapes.make_logits(kind, 60, 24)
    want = oracle.check_route(route(logits, 7, **options), logits, 7, **options)
    # Sums of scores of different experts can be equal but for their rounding.
    assert want.clear.all() or group_score != "max"
    assert want.degenerate.any() if kind == "dead" else not want.degenerate.all()


def test_permutations_are_exact(route, rng):
  """Logits without ties, in a grid of real group layouts."""
  for experts, count, keep, k in ((256, 8, 4, 8), (128, 4, 2, 4), (512, 16, 8, 16), (384, 1, 1, 8)):
    logits = rng.permuted(np.tile(np.arange(experts), (64, 1)), axis=1).astype(np.float32) / 64
    for group_score in ("top2", "max", "sum"):
      options = {"score": "none", "groups": Groups(count, keep, group_score), "scale": 2.5}
      want = oracle.check_route(route(logits, k, **options), logits, k, **options)
      assert want.clear.all()


def test_one_group_is_no_limit(route, rng):
  logits = shapes.make_logits("quantized", 50, 48)
  bias = rng.normal(size=48).astype(np.float32)
  for options in ({}, {"score": "sigmoid", "bias": bias}, {"renormalize": False}):
    free = route(logits, 9, **options)
    for groups in (Groups(1, 1, "max"), Groups(1, 1), Groups(6, 6, "max")):
      limited = route(logits, 9, groups=groups, **options)
      np.testing.assert_array_equal(limited.experts, free.experts)
      np.testing.assert_array_equal(limited.weights, free.weights)


def test_groups_of_one_expert_score_minus_inf_for_top2(route):
  logits = shapes.make_logits("random", 10, 12)
  got = route(logits, 4, groups=Groups(12, 6))
  assert (np.asarray(got.experts) == np.arange(4)).all()
  assert (np.asarray(got.weights) == 0.25).all()
  limited = route(logits, 4, groups=Groups(12, 6, "max"))
  np.testing.assert_array_equal(limited.experts, route(logits, 4).experts)


def test_short_groups_are_filled_with_the_lowest_experts_left(route):
  """Kept groups hold two numbers each, so four slots hold experts of any group at weight 0."""
  logits = np.full((2, 16), -np.inf, np.float32)
  logits[0, [4, 6, 12, 15]] = (1, 2, 4, 3)
  logits[1, [0, 1, 14, 15]] = (1, 2, 4, 3)
  got = route(logits, 8, groups=Groups(4, 2))
  assert got.experts.tolist() == [[12, 15, 6, 4, 0, 1, 2, 3], [14, 15, 1, 0, 2, 3, 4, 5]]
  assert (np.asarray(got.weights)[:, 4:] == 0).all()
  np.testing.assert_allclose(np.asarray(got.weights)[:, :4].sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("group_score", ("top2", "sum"))
def test_group_of_opposite_infinities_scores_minus_inf(route, group_score):
  """+inf and -inf have no sum; like a NaN it is never kept while another group is left."""
  logits = np.array([[np.inf, -np.inf, 0, -5, -1, -2, -9, -np.inf]], np.float32)
  options = {"groups": Groups(4, 2, group_score), "score": "none", "renormalize": False}
  got = route(logits, 4, **options)
  assert got.experts.tolist() == [[2, 4, 5, 3]]
  oracle.check_route(got, logits, 4, **options)


def test_denormal_sums_of_keys_are_zero(kernel_route):
  """Whether or not the processor flushes denormals, so that every kernel chooses alike."""
  logits = np.array([[0, 0, 1e-40, 1e-40], [0, 0, 2e-38, 2e-38]], np.float32)
  got = kernel_route(logits, 1, score="none", groups=Groups(2, 1))
  assert np.asarray(got.experts).tolist() == [[0], [2]]


@pytest.mark.parametrize("most", (1, 2, 3, 40, 1000))
def test_keys_a_rounding_apart(kernel_route, rng, most):
  """Scores of 1/2 and biases of whole units in the last place: every sum is exact."""
  for experts, groups, k in (
    (256, (8, 4), 8),
    (256, (64, 5), 8),
    (128, (4, 2), 4),
    (160, (8, 3), 6),
    (512, (16, 8), 16),
    (896, (1, 1), 16),
  ):
    units = rng.integers(most, size=experts)
    bias = (units * 2.0**-23).astype(np.float32)
    got = kernel_route(
      np.zeros((9, experts), np.float32), k, score="sigmoid", bias=bias, groups=Groups(*groups)
    )
    count, keep = groups
    best = np.sort(units.reshape(count, -1), axis=1)[:, -2:].sum(axis=1)
    kept = np.argsort(-best, kind="stable")[:keep]
    inside = np.isin(np.arange(experts) // (experts // count), kept)
    want = np.argsort(np.where(inside, -units, experts * most), kind="stable")[:k]
    np.testing.assert_array_equal(got.experts, np.tile(want, (9, 1)))


@pytest.mark.parametrize("score", oracle.SCORES)
def test_nan_in_the_bias_counts_as_minus_infinity(kernel_route, rng, score):
  for experts, groups, k in (
    (256, (8, 4), 8),
    (160, (8, 3), 6),
    (512, (16, 8), 16),
    (48, (1, 1), 8),
    (384, None, 8),
  ):
    logits = shapes.make_logits("nan", 30, experts)
    bias = rng.normal(size=experts).astype(np.float32)
    bad = rng.random(experts) < 0.2
    options = {"score": score, "groups": groups and Groups(*groups)}
    got, want = (
      kernel_route(logits, k, bias=np.where(bad, x, bias).astype(np.float32), **options)
      for x in (np.nan, -np.inf)
    )
    np.testing.assert_array_equal(got.experts, want.experts)
    np.testing.assert_array_equal(got.weights, want.weights)
    assert not np.isin(np.asarray(got.experts), np.flatnonzero(bad)).any()


@pytest.mark.parametrize("group_score", ("top2", "max"))
@pytest.mark.parametrize("count, keep", ((1, 1), (4, 4)))
def test_all_groups_stay(kernel_route, group_score, count, keep):
  """Nothing is left out, but a row may still have too few groups with a score."""
  options = {"score": "sigmoid", "groups": Groups(count, keep, group_score)}
  bias = np.linspace(-0.1, 0.1, 128).astype(np.float32)
  logits = shapes.make_logits("random", 40, 128)
  logits[::2] = -1
  logits[::2, 1:][:, :: 128 // count] = 2
  logits[::4, 1:] = np.nan
  logits[1::4] = np.nan
  logits[1::4, 7] = 0
  want = oracle.check_route(
    kernel_route(logits, 8, bias=bias, **options), logits, 8, bias=bias, **options
  )
  degenerate = np.zeros(40, bool)
  if count > 1 or group_score == "top2":
    degenerate[::4] = degenerate[1::4] = True
  np.testing.assert_array_equal(want.degenerate, degenerate)
