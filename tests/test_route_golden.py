"""Vectors worked out by hand or in float64, and input patterns of other routers' tests."""

from __future__ import annotations

import numpy as np
import pytest

import oracle
from jax_router import Groups

LOGITS = np.array([0.5, -1, 2, 0, 1.5, -0.5, 1, 0.25], np.float32)
BIAS = np.array([0, 0.9, -0.3, 0, -0.2, 0.1, 0, 0.6], np.float32)
COTANGENT = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], np.float32)  # of each expert
SCALE = 1.2
SUM = Groups(4, 2, "sum")

# name: (k, options, experts, weights, gradient as {expert: value} or for all experts)
CASES = {
  "softmax of the chosen": (
    3, {}, [2, 4, 6], [0.6077765, 0.3686351, 0.2235885],
    {2: -0.0826386, 4: 0.0236042, 6: 0.0590344},
  ),
  "softmax of all": (
    3, {"renormalize": False}, [2, 4, 6], [0.4548002, 0.2758502, 0.1673116],
    dict(enumerate([-0.0331063, -0.0073870, -0.0119322, -0.0200800, 0.0479328, -0.0121791,
                    0.0625350, -0.0257832])),
  ),
  "sigmoid": (
    3, {"score": "sigmoid"}, [2, 4, 6], [0.4350635, 0.4038352, 0.3611013],
    {2: -0.0097329, 4: 0.0009081, 6: 0.0206202},
  ),
  "sqrtsoftplus": (
    3, {"score": "sqrtsoftplus"}, [2, 4, 6], [0.4477328, 0.4004492, 0.3518181],
    {2: -0.0170594, 4: 0.0015380, 6: 0.0211502},
  ),
  "sigmoid with bias": (
    3, {"score": "sigmoid", "bias": BIAS}, [1, 7, 6], [0.2065898, 0.4318410, 0.5615693],
    {1: -0.0679492, 7: 0.0283780, 6: 0.0075654},
  ),
  "sqrtsoftplus with bias": (
    3, {"score": "sqrtsoftplus", "bias": BIAS}, [7, 1, 2], [0.3726028, 0.2294699, 0.5979273],
    {7: 0.0461412, 1: -0.0232592, 2: -0.0168535},
  ),
  "sigmoid, one expert": (
    1, {"score": "sigmoid", "renormalize": False}, [2], [1.0569565], {2: 0.0377977},
  ),
  "sigmoid with bias, one expert": (
    1, {"score": "sigmoid", "renormalize": False, "bias": BIAS}, [1], [0.3227297], {1: 0.0471869},
  ),
  "softmax of the chosen, groups by logits": (
    4, {"groups": SUM}, [2, 6, 7, 3], [0.7155683, 0.2632429, 0.1243471, 0.0968416], None,
  ),
  "softmax of all, groups by probabilities": (
    4, {"groups": SUM, "renormalize": False}, [2, 4, 3, 5],
    [0.4548002, 0.2758502, 0.0615505, 0.0373323], None,
  ),
  "sigmoid with bias, groups": (
    4, {"groups": SUM, "score": "sigmoid", "bias": BIAS}, [1, 7, 6, 0],
    [0.1477270, 0.3087983, 0.4015636, 0.3419111], None,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_golden_vectors(route_and_gradient, name):
  k, options, experts, weights, slots = CASES[name]
  cotangent = COTANGENT[experts]
  got, gradient = route_and_gradient(LOGITS, k, cotangent, scale=SCALE, **options)
  assert got.experts.tolist() == experts
  np.testing.assert_allclose(got.weights, weights, rtol=2e-7, atol=1e-7)
  if slots is not None:
    want = [slots.get(e, 0) for e in range(8)]
    np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1.1e-7)
  oracle.check_route(got, LOGITS, k, scale=SCALE, **options)


@pytest.mark.parametrize("name", CASES)
def test_oracle_golden_vectors(name):
  k, options, experts, weights, slots = CASES[name]
  want = oracle.route(LOGITS, k, scale=SCALE, **options)
  assert want.experts.tolist() == experts and want.clear
  np.testing.assert_allclose(want.weights, weights, rtol=0, atol=1e-7)
  if slots is not None:
    static = {n: v for n, v in options.items() if n in ("score", "renormalize")}
    gradient, _ = oracle.gradient(LOGITS, want, COTANGENT[experts], scale=SCALE, **static)
    np.testing.assert_allclose(gradient, [slots.get(e, 0) for e in range(8)], rtol=0, atol=1.1e-7)


# Scores of 8 experts in 4 groups of two.
PROBABILITIES = np.array([0.9, 0.1, 0.5, 0.45, 0.6, 0.3, 0.2, 0.55])
GROUPED = np.log(PROBABILITIES / (1 - PROBABILITIES)).astype(np.float32)


@pytest.mark.parametrize(
  "k, groups, options, experts, weights",
  (
    (3, Groups(4, 2), {"scale": 2.5}, [0, 2, 3], [1.2162162, 0.6756757, 0.6081081]),
    (3, Groups(4, 2), {"scale": 2.5, "renormalize": False}, [0, 2, 3], [2.25, 1.25, 1.125]),
    (3, Groups(4, 2, "max"), {"renormalize": False}, [0, 4, 5], [0.9, 0.6, 0.3]),
    (2, Groups(4, 2, "sum"), {"renormalize": False}, [0, 4], [0.9, 0.6]),
    # All keys are negative: experts outside kept groups must rank below them, not at 0.
    (3, Groups(4, 2), {"scale": 2.5, "bias": -1}, [0, 2, 3], [1.2162162, 0.6756757, 0.6081081]),
  ),
)
def test_golden_groups(route, k, groups, options, experts, weights):
  if "bias" in options:
    options = options | {"bias": np.full(8, options["bias"], np.float32)}
  got = route(GROUPED, k, score="sigmoid", groups=groups, **options)
  assert got.experts.tolist() == experts
  np.testing.assert_allclose(got.weights, weights, rtol=3e-7)


def test_golden_degenerate_rows(route):
  nothing = route(
    np.full(8, np.nan, np.float32), 2, score="sigmoid", groups=Groups(4, 2), scale=2.5
  )
  assert nothing.experts.tolist() == [0, 1] and nothing.weights.tolist() == [0.5, 0.5]
  # Two experts have finite keys, but only one group has a score above -inf.
  bias = np.full(8, -np.inf, np.float32)
  bias[:2] = 0
  for logits in (GROUPED, GROUPED[::-1]):
    got = route(logits, 2, score="sigmoid", groups=Groups(4, 2), bias=bias, scale=2.5)
    assert got.experts.tolist() == [0, 1] and got.weights.tolist() == [0.5, 0.5]


def test_golden_equal_groups_keep_the_lowest(route):
  got = route(np.zeros(8, np.float32), 3, score="sigmoid", groups=Groups(4, 2))
  assert got.experts.tolist() == [0, 1, 2]


# ---- ramps: monotone rows with a constant gap ----


@pytest.mark.parametrize("keep", (None, 4))
@pytest.mark.parametrize("tokens, experts, k", ((32, 128, 8), (24, 1024, 16)))
@pytest.mark.parametrize(
  "score, renormalize",
  (("softmax", True), ("softmax", False), ("sigmoid", True), ("sqrtsoftplus", True)),
)
def test_ramps(kernel_route_and_gradient, score, renormalize, tokens, experts, k, keep):
  if score == "softmax":
    n = tokens * experts
    logits = (np.arange(-n // 2, n // 2) * 1e-4).reshape(tokens, experts).astype(np.float32)
    biases = (None,)
  else:
    ramp = np.arange(-experts // 2, experts // 2) * 1e-2
    logits = (ramp + (np.arange(tokens)[:, None] - tokens / 2) * 1e-4).astype(np.float32)
    biases = (None, (np.arange(experts)[::-1] * 0.1).astype(np.float32))
  groups = None if keep is None else Groups(8, keep, "sum")
  cotangent = np.random.default_rng(0).normal(size=(tokens, k)).astype(np.float32)
  static = {"score": score, "renormalize": renormalize, "scale": 1.2}
  for bias in biases:
    options = {"bias": bias, "groups": groups}
    got, gradient = kernel_route_and_gradient(logits, k, cotangent, **static, **options)
    want = oracle.check_route(got, logits, k, **static, **options)
    assert want.clear.all()
    oracle.check_gradient(gradient, logits, want, cotangent, **static)
