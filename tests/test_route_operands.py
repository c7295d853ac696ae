"""The optional operands of `route`: bias, where, given experts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import oracle
import shapes
from jax_router import Groups

# ---- bias ----


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_bias_steers_the_choice_only(route, rng, score, renormalize):
  for experts, k, dtype in ((7, 3, np.float32), (64, 8, ml_dtypes.bfloat16), (300, 36, np.float16)):
    logits = shapes.make_logits("random", 60, experts, dtype)
    for bias in (rng.normal(size=experts) / 3, -np.abs(rng.normal(size=experts)) - 2):
      bias = bias.astype(np.float32)
      options = {"score": score, "renormalize": renormalize, "bias": bias}
      oracle.check_route(route(logits, k, **options), logits, k, **options)


@pytest.mark.parametrize("experts, k", ((1, 1), (33, 33), (130, 129), (2304, 36), (8192, 8)))
def test_bias_sizes(route, rng, experts, k):
  logits = shapes.make_logits("random", 12, experts)
  bias = (rng.permutation(experts) / 4).astype(np.float32)
  options = {"score": "sqrtsoftplus", "bias": bias}
  oracle.check_route(route(logits, k, **options), logits, k, **options)


def test_large_bias_does_not_spoil_weights(route):
  """Weights are gathered scores, not keys with the bias taken off again."""
  logits = shapes.make_logits("random", 40, 64)
  bias = np.zeros(64, np.float32)
  bias[[3, 9, 40]] = (1e6, 2e6, 3e6)
  for score, renormalize in (("sigmoid", True), ("sigmoid", False), ("softmax", False)):
    options = {"score": score, "renormalize": renormalize, "bias": bias}
    got = route(logits, 3, **options)
    assert (np.asarray(got.experts) == [40, 9, 3]).all()
    oracle.check_route(got, logits, 3, **options)


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16))
def test_bias_of_lower_precision_is_widened(route, rng, dtype):
  logits = shapes.make_logits("random", 20, 64)
  bias = rng.normal(size=64).astype(dtype)
  got = route(logits, 5, score="sigmoid", bias=bias)
  want = route(logits, 5, score="sigmoid", bias=bias.astype(np.float32))
  np.testing.assert_array_equal(got.experts, want.experts)
  np.testing.assert_array_equal(got.weights, want.weights)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_infinite_and_nan_bias_and_logits(route, rng, score, renormalize):
  """A NaN bias or NaN logit is never chosen; a -inf logit can be, where its score is 0."""
  for kind in ("random", "nan", "minus_inf", "dead"):
    logits = shapes.make_logits(kind, 48, 32)
    bias = rng.normal(size=32).astype(np.float32)
    bias[[1, 8]], bias[[2, 20]], bias[5] = np.nan, -np.inf, np.inf
    options = {"score": score, "renormalize": renormalize, "bias": bias}
    got = route(logits, 6, **options)
    oracle.check_route(got, logits, 6, **options)


def test_bias_chooses_a_masked_expert_at_weight_zero(route):
  logits = np.array([[0.0, -np.inf, 1.0, np.nan]], np.float32)
  bias = np.array([0, 9, 0, 99], np.float32)
  got = route(logits, 2, score="sigmoid", bias=bias)
  assert got.experts.tolist() == [[1, 2]] and got.weights.tolist() == [[0, 1]]
  raw = route(logits, 3, score="none", bias=bias)
  assert raw.experts.tolist() == [[2, 0, 1]] and raw.weights.tolist() == [[1, 0, 0]]


def test_bias_without_any_key_is_degenerate(route):
  logits = shapes.make_logits("random", 5, 16)
  got = route(logits, 4, score="sigmoid", scale=3.0, bias=np.full(16, -np.inf, np.float32))
  assert (np.asarray(got.experts) == np.arange(4)).all()
  assert (np.asarray(got.weights) == 0.25).all()


# ---- where ----


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_padding_gets_no_expert_and_no_weight(route, rng, score, renormalize):
  logits = shapes.make_logits("dead", 90, 40, ml_dtypes.bfloat16)
  where = rng.random(90) < 0.6
  plain = route(logits, 6, score=score, renormalize=renormalize)
  for mask in (where, np.ones(90, bool), np.zeros(90, bool)):
    options = {"score": score, "renormalize": renormalize, "where": mask}
    got = route(logits, 6, **options)
    oracle.check_route(got, logits, 6, **options)
    assert (np.asarray(got.experts)[~mask] == 40).all()
    assert (np.asarray(got.weights)[~mask] == 0).all()
    np.testing.assert_array_equal(np.asarray(got.experts)[mask], np.asarray(plain.experts)[mask])
    np.testing.assert_allclose(
      np.asarray(got.weights)[mask], np.asarray(plain.weights)[mask], rtol=3e-7, atol=0
    )


def test_where_with_bias_and_groups(route, rng):
  logits = shapes.make_logits("nan", 90, 40)
  options = {
    "score": "sigmoid",
    "bias": rng.normal(size=40).astype(np.float32),
    "groups": Groups(8, 3),
    "where": rng.random(90) < 0.6,
    "scale": 2.5,
  }
  want = oracle.check_route(route(logits, 6, **options), logits, 6, **options)
  assert want.clear.all()


# ---- given experts ----


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_replay_reproduces_weights_exactly(route, rng, score, renormalize):
  """Experts of an earlier call give the same weights, to the bit in a kernel."""
  where = rng.random(60) < 0.8
  for kind in ("random", "tied", "extreme", "nan", "minus_inf", "dead"):
    logits = shapes.make_logits(kind, 60, 40)
    options = {"score": score, "renormalize": renormalize, "where": where, "scale": 2.5}
    first = route(logits, 6, **options)
    again = route(logits, 6, experts=first.experts, **options)
    np.testing.assert_array_equal(again.experts, first.experts)
    np.testing.assert_array_equal(again.weights, first.weights)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_replay_of_a_biased_choice(route, rng, score, renormalize):
  logits = shapes.make_logits("random", 60, 40)
  bias = rng.normal(size=40).astype(np.float32)
  options = {"score": score, "renormalize": renormalize}
  first = route(logits, 6, bias=bias, groups=Groups(4, 2), **options)
  again = route(logits, 6, experts=first.experts, **options)
  steered = route(logits, 6, experts=first.experts, bias=-bias, groups=Groups(4, 2), **options)
  np.testing.assert_array_equal(again.weights, first.weights)
  np.testing.assert_array_equal(steered.weights, first.weights)
  np.testing.assert_array_equal(steered.experts, first.experts)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_given_experts_out_of_range_and_twice(route, rng, score, renormalize):
  for kind in ("random", "nan", "dead"):
    logits = shapes.make_logits(kind, 60, 40)
    experts = rng.integers(-3, 44, size=(60, 6)).astype(np.int32)
    experts[:4] = [[5] * 6, [40] * 6, [-1] * 6, [2, 2, -(2**31), 2**31 - 1, 7, 2]]
    options = {"score": score, "renormalize": renormalize, "experts": experts, "scale": 0.5}
    got = route(logits, 6, **options)
    want = oracle.check_route(got, logits, 6, **options)
    assert (want.experts == 40).any() and want.active.any()


@pytest.mark.parametrize("dtype", (np.int8, np.uint8, np.int16, np.uint16, np.uint32))
def test_given_experts_of_any_integer_dtype(route, dtype):
  logits = shapes.make_logits("random", 30, 100)
  experts = np.asarray(route(logits, 5).experts).astype(dtype)
  experts[0] = np.iinfo(dtype).max
  got = route(logits, 5, experts=experts)
  oracle.check_route(got, logits, 5, experts=experts)
  assert got.experts.dtype == np.int32 and (np.asarray(got.experts)[0] == 100).all()


@pytest.mark.parametrize("dtype, num_experts", ((np.uint8, 256), (np.int8, 128), (np.int8, 200)))
def test_given_experts_whose_dtype_cannot_hold_their_number(route, dtype, num_experts):
  """The number of experts itself, the sentinel, must not be cut down to the dtype."""
  logits = shapes.make_logits("random", 20, num_experts)
  experts = np.arange(100).astype(dtype).reshape(20, 5) + dtype(np.iinfo(dtype).max - 99)
  got = route(logits, 5, experts=experts)
  np.testing.assert_array_equal(got.experts, experts)
  oracle.check_route(got, logits, 5, experts=experts.astype(np.int32))


def test_more_slots_than_numbers_in_given_experts(route):
  """Given experts keep their slots; those without a number weigh 0, the others share 1."""
  logits = np.array([[np.nan, 1.0, -np.inf, 1.0], [np.nan, -np.inf, np.nan, np.nan]], np.float32)
  experts = np.array([[0, 3, 2, 1], [1, 0, 9, 2]], np.int32)
  got = route(logits, 4, experts=experts, scale=8.0)
  assert got.weights.tolist() == [[0, 4, 0, 4], [0.25, 0.25, 0, 0.25]]
  assert got.experts.tolist() == [[0, 3, 2, 1], [1, 0, 4, 2]]
