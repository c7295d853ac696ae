"""`fused_topk_with_score_function` against float64: TransformerEngine's grids and formats.

The gradient of a sum is next to zero wherever the probs are normalised, so every case has a random
cotangent as well.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import transformer_engine_oracle as oracle
from jax_router.compat.transformer_engine import (
  RoutingMapFormat,
  ScoreFunction,
  fused_topk_with_score_function,
)
from transformer_engine_oracle import SCORES, assert_same_bits, make_bias, make_logits, run

INDEX_DTYPES = (np.int16, np.int32)


def grid(sizes, scores=SCORES):
  """(tokens, experts, k), then options: pre-softmax or bias, groups, scale."""
  cases = []
  for size, score, switch, groups, scale in itertools.product(
    sizes, scores, (False, True), (False, True), (1.0, 1.2)
  ):
    options = {"score_function": score, "scaling_factor": scale}
    if groups:
      options |= {"num_groups": 8, "group_topk": 4}
      if size[2] % 4 or size[2] // 4 > size[1] // 8:
        continue
    if switch:
      options |= {"use_pre_softmax": True} if score == "softmax" else {"biased": True}
    name = [score, "x".join(map(str, size)), *(["groups"] if groups else [])]
    name += (["pre" if score == "softmax" else "bias"] if switch else []) + [str(scale)]
    cases.append(pytest.param(*size, options, id="-".join(name)))
  return cases


def with_bias(options: dict, experts: int) -> dict:
  options = dict(options)
  if options.pop("biased", False):
    options["expert_bias"] = make_bias(experts)
  return options


def check_grid_case(implementation, rng, tokens, experts, k, options):
  logits = make_logits(tokens, experts, options["score_function"])
  oracle.check_choice(implementation, logits, k, rng, **with_bias(options, experts))


JAX_SIZES = ((128, 32, 4), (2048, 32, 4), (2048, 128, 8), (7168, 128, 4), (7168, 32, 8))


@pytest.mark.parametrize("tokens, experts, k, options", grid(JAX_SIZES))
def test_jax_grid(kernel, rng, tokens, experts, k, options):
  check_grid_case(kernel, rng, tokens, experts, k, options)


@pytest.mark.parametrize("tokens, experts, k, options", grid([(128, 32, 4)])[::3])
def test_part_of_the_jax_grid_by_every_implementation(
  implementation, rng, tokens, experts, k, options
):
  check_grid_case(implementation, rng, tokens, experts, k, options)


# K = E and groups that are chosen whole are in the grid too, which TransformerEngine leaves out.
PYTORCH_SIZES = [(e, k) for e in (1024, 128, 32) for k in (4, 8, 16, 32)]


@pytest.mark.slow
@pytest.mark.parametrize("experts, k", PYTORCH_SIZES)
@pytest.mark.parametrize(
  "score, tokens",
  [("softmax", t) for t in (2048, 7168, 14234)]
  + [(score, t) for score in SCORES[1:] for t in (2048, 7168, 8992)],
)
def test_pytorch_grid(kernel, rng, score, tokens, experts, k):
  for case in grid([(tokens, experts, k)], (score,)):
    *size, options = case.values
    check_grid_case(kernel, rng, *size, options)
    check_indices(kernel, *size, options)


@pytest.mark.parametrize(
  "tokens, experts, k, options",
  [
    *grid([(2048, 1024, 32)], ("softmax",)),
    *grid([(2048, 128, 16)], SCORES[1:])[1::3],
    *grid([(2048, 32, 32), (2048, 32, 16)])[1::3],
  ],
)
def test_part_of_the_pytorch_grid(kernel, rng, tokens, experts, k, options):
  check_grid_case(kernel, rng, tokens, experts, k, options)


# ---- golden vectors ----

LOGITS = np.array([[0.5, -1, 2, 0, 1.5, -0.5, 1, 0.25]], np.float32)
BIAS = np.array([0, 0.9, -0.3, 0, -0.2, 0.1, 0, 0.6], np.float32)
COTANGENT = np.arange(1, 9, dtype=np.float32)[None] / 10
GROUPS = {"num_groups": 4, "group_topk": 2}

# k, options, chosen experts in descending key order, their probs, the gradient: of the chosen, of
# all experts, or not stated.
GOLDEN = {
  "post": (3, {}, (2, 4, 6), (0.6077765, 0.3686351, 0.2235885), (-0.0826386, 0.0236042, 0.0590344)),
  "pre": (
    3, {"use_pre_softmax": True}, (2, 4, 6), (0.4548002, 0.2758502, 0.1673116),
    (-0.0331063, -0.0073870, -0.0119322, -0.0200800, 0.0479328, -0.0121791, 0.0625350, -0.0257832),
  ),
  "sigmoid": (
    3, {"score_function": "sigmoid"}, (2, 4, 6), (0.4350635, 0.4038352, 0.3611013),
    (-0.0097329, 0.0009081, 0.0206202),
  ),
  "sqrtsoftplus": (
    3, {"score_function": "sqrtsoftplus"}, (2, 4, 6), (0.4477328, 0.4004492, 0.3518181),
    (-0.0170594, 0.0015380, 0.0211502),
  ),
  "sigmoid and bias": (
    3, {"score_function": "sigmoid", "expert_bias": BIAS}, (1, 7, 6),
    (0.2065898, 0.4318410, 0.5615693), (-0.0679492, 0.0283780, 0.0075654),
  ),
  "sqrtsoftplus and bias": (
    3, {"score_function": "sqrtsoftplus", "expert_bias": BIAS}, (7, 1, 2),
    (0.3726028, 0.2294699, 0.5979273), (0.0461412, -0.0232592, -0.0168535),
  ),
  "sigmoid, k = 1": (1, {"score_function": "sigmoid"}, (2,), (1.0569565,), (0.0377977,)),
  "sigmoid and bias, k = 1": (
    1, {"score_function": "sigmoid", "expert_bias": BIAS}, (1,), (0.3227297,), (0.0471869,)
  ),
  "post, groups": (
    4, GROUPS, (2, 6, 7, 3), (0.7155683, 0.2632429, 0.1243471, 0.0968416), None
  ),
  "pre, groups": (
    4, GROUPS | {"use_pre_softmax": True}, (2, 4, 3, 5),
    (0.4548002, 0.2758502, 0.0615505, 0.0373323), None,
  ),
  "sigmoid and bias, groups": (
    4, GROUPS | {"score_function": "sigmoid", "expert_bias": BIAS}, (1, 7, 6, 0),
    (0.1477270, 0.3087983, 0.4015636, 0.3419111), None,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(implementation, name):
  k, options, experts, probs, gradient = GOLDEN[name]
  options = options | {"scaling_factor": 1.2}
  (got, routing_map), (got_gradient,) = run(implementation, LOGITS, k, [COTANGENT], **options)
  want = np.zeros(8)
  want[list(experts)] = probs
  np.testing.assert_allclose(got[0], want, rtol=2e-7, atol=1e-7)
  assert set(np.flatnonzero(routing_map[0])) == set(experts)
  if gradient is not None:
    want = np.zeros(8)
    want[list(experts) if len(gradient) == k else slice(None)] = gradient
    np.testing.assert_allclose(got_gradient[0], want, rtol=1e-6, atol=1.1e-7)


# ---- formats ----


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
  "tokens, experts, k", ((128, 32, 4), (256, 128, 8), (256, 130, 8), (128, 1024, 16))
)
def test_bitmap_equals_bytemap(kernel, rng, tokens, experts, k, score):
  logits = make_logits(tokens, experts, score)
  cotangents = [rng.normal(size=logits.shape).astype(np.float32)]
  (probs, byte), gradients = run(kernel, logits, k, cotangents, score_function=score)
  options = {"score_function": score, "routing_map_format": "bitmap_u8"}
  (got, bits), got_gradients = run(kernel, logits, k, cotangents, **options)
  assert_same_bits((got, got_gradients), (probs, gradients))
  assert_same_bits(bits, np.packbits(byte, axis=-1, bitorder="little"))


def check_indices(implementation, tokens, experts, k, options, dtypes=INDEX_DTYPES):
  """Dense indices against the map and the oracle; probs and gradient are those of the map form."""
  options = with_bias(options, experts)
  logits = make_logits(tokens, experts, options["score_function"])
  cotangents = [np.random.default_rng(k).normal(size=logits.shape).astype(np.float32)]
  (probs, routing_map), gradients = run(implementation, logits, k, cotangents, **options)
  want = oracle.choose(logits, k, **options)
  for dtype in dtypes:
    (got, indices), got_gradients = run(
      implementation, logits, k, cotangents, topk_indices_dtype=dtype, **options
    )
    assert_same_bits((got, got_gradients), (probs, gradients))
    assert indices.dtype == dtype and indices.shape == (tokens, k)
    np.testing.assert_array_equal(oracle.mark(np.asarray(indices), experts), routing_map)
    np.testing.assert_array_equal(indices, want.indices)


INDEX_CASES = grid([(256, 128, 8), (64, 32, 32)])


@pytest.mark.parametrize("tokens, experts, k, options", INDEX_CASES[::2])
def test_indices_equal_the_map(kernel, tokens, experts, k, options):
  check_indices(kernel, tokens, experts, k, options, dtypes=(INDEX_DTYPES[k > 8],))


def test_int64_indices(implementation):
  with jax.enable_x64(True):
    options = {"score_function": "sigmoid"}
    check_indices(implementation, 32, 16, 4, options, dtypes=(np.int64, np.int32, np.int16))


@pytest.mark.parametrize("score", SCORES)
def test_names_and_numbers_of_enumerations(kernel, score):
  member = ScoreFunction[score.upper()]
  want = run(kernel, LOGITS, 2, score_function=score)
  for name in (member, int(member), score.upper(), score.capitalize()):
    assert_same_bits(run(kernel, LOGITS, 2, score_function=name), want)


def test_names_and_numbers_of_map_formats():
  for member in RoutingMapFormat:
    want = fused_topk_with_score_function(LOGITS, 2, routing_map_format=member)
    for name in (int(member), member.name, member.name.lower(), member.name.capitalize()):
      got = fused_topk_with_score_function(LOGITS, 2, routing_map_format=name)
      assert_same_bits(got, want)
  assert want[1].tolist() == [[20]]


def test_positional_arguments_and_defaults():
  """The order of the arguments is TransformerEngine's."""
  got = fused_topk_with_score_function(
    LOGITS, 4, False, 4, 2, 1.2, "sigmoid", BIAS, False, "bitmap_u8"
  )
  options = GROUPS | {"scaling_factor": 1.2, "score_function": "sigmoid", "expert_bias": BIAS}
  want = fused_topk_with_score_function(LOGITS, 4, **options, routing_map_format="bitmap_u8")
  assert_same_bits(got, want)
  plain = oracle.choose(LOGITS, 3)
  for off in (-1, 0, None):
    got = fused_topk_with_score_function(LOGITS, 3, num_groups=8, group_topk=off)
    oracle.check_close(got[0], plain.probs)
    np.testing.assert_array_equal(got[1], plain.routing_map)
