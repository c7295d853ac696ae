"""`fused_topk_with_score_function` against float64: TransformerEngine's grids, then what they lack.

The gradient of a sum is next to zero wherever the probs are normalised, so every case has a random
cotangent as well.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import transformer_engine_oracle as oracle
from jax_router.compat.transformer_engine import (
  RoutingMapFormat,
  ScoreFunction,
  fused_topk_with_score_function,
)
from transformer_engine_oracle import SCORES, make_bias, make_logits, run

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


def assert_same_bits(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


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


# ---- what TransformerEngine's grids leave out ----

ODD_SIZES = [
  (tokens, experts, k)
  for tokens, experts in ((1, 1), (3, 7), (257, 33), (64, 130), (9, 896), (3, 2304))
  for k in sorted({1, 2, 3, experts - 1, experts})
  if 1 <= k <= experts
]
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


@pytest.mark.parametrize("tokens, experts, k", ODD_SIZES)
def test_odd_sizes(kernel, rng, tokens, experts, k):
  score = SCORES[(experts + k) % 3]
  logits = rng.normal(size=(tokens, experts)).astype(np.float32) * 3
  options = {"score_function": score, "scaling_factor": -2.5}
  if score == "softmax":
    options["use_pre_softmax"] = bool(k % 2)
  oracle.check_choice(kernel, logits, k, rng, **options)


@pytest.mark.parametrize("score", SCORES)
def test_no_tokens(implementation, score):
  for shape in ((0, 20), (0, 3, 20), (3, 0, 20)):
    logits = np.zeros(shape, np.float16)
    (probs, routing_map), (gradient,) = run(
      implementation, logits, 4, [logits], score_function=score, routing_map_format="bitmap_u8"
    )
    assert probs.shape == gradient.shape == shape and probs.dtype == np.float16
    assert routing_map.shape == (*shape[:-1], 3)
    results = run(implementation, logits, 4, score_function=score, topk_indices_dtype=np.int16)[0]
    assert results[1].shape == (*shape[:-1], 4)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("switch", (False, True))
def test_halves_are_right_to_the_last_bit(kernel, rng, dtype, score, switch):
  """All arithmetic is float32; a value is rounded once, when it is written."""
  logits = rng.permuted(np.arange(-48, 48).repeat(40).reshape(96, 40), axis=0).T / 16
  logits = logits.astype(dtype)  # every row has distinct values
  options = {"score_function": score, "scaling_factor": 1.2}
  if switch:
    bias = (rng.permutation(96) / 4).astype(ml_dtypes.bfloat16)
    options |= {"use_pre_softmax": True} if score == "softmax" else {"expert_bias": bias}
  want = oracle.choose(logits, 6, **options)
  cotangent = rng.normal(size=logits.shape).astype(dtype)
  (probs, routing_map), (gradient,) = run(kernel, logits, 6, [cotangent], **options)
  np.testing.assert_array_equal(routing_map, want.routing_map)
  assert probs.dtype == gradient.dtype == dtype
  ulp = float(ml_dtypes.finfo(dtype).eps)
  rounded = want.probs.astype(dtype).astype(np.float64)
  assert (np.abs(np.asarray(probs, np.float64) - rounded) <= ulp * np.abs(rounded)).all()
  want_gradient = oracle.choice_gradient(logits, want, cotangent, **options)
  error = np.abs(np.asarray(gradient, np.float64) - want_gradient)
  assert (error <= ulp * np.abs(want_gradient) + 1e-6).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("groups", ((), (8, 4), (8, 8), (4, 2)))
def test_whole_groups_and_all_groups(kernel, rng, score, groups):
  """8 of 16 experts: with 8 groups, 4 kept, they are chosen whole."""
  logits = rng.normal(size=(65, 16)).astype(np.float32)
  options = {"score_function": score}
  if groups:
    options |= dict(zip(("num_groups", "group_topk"), groups, strict=True))
  oracle.check_choice(kernel, logits, 8, rng, **options)


def test_ties_go_to_the_lowest_expert(kernel, rng):
  rows = [np.zeros((4, 64)), rng.integers(0, 3, size=(64, 64)), rng.normal(size=(64, 64))]
  logits = np.concatenate(rows).astype(ml_dtypes.bfloat16)
  _, want = jax.lax.top_k(jnp.asarray(logits), 8)
  for score in SCORES:
    options = {"score_function": score, "topk_indices_dtype": np.int16}
    np.testing.assert_array_equal(run(kernel, logits, 8, **options)[0][1], want)
    _, routing_map = run(kernel, logits, 8, score_function=score)[0]
    np.testing.assert_array_equal(routing_map, oracle.mark(np.asarray(want), 64))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("hole", (-np.inf, np.nan))
def test_masked_experts_spoil_nothing(kernel, rng, score, hole):
  """Experts of logit -inf or NaN are as good as absent, be they first in a row or elsewhere."""
  logits = rng.normal(size=(40, 64)).astype(np.float32)
  alive = np.sort(rng.permuted(np.tile(np.arange(64), (40, 1)), axis=1)[:, :20], axis=1)
  masked = np.full(logits.shape, hole, np.float32)
  np.put_along_axis(masked, alive, np.take_along_axis(logits, alive, 1), 1)
  for pre in (False, True):
    options = {"score_function": score, "use_pre_softmax": pre}
    want = oracle.choose(np.take_along_axis(logits, alive, 1), 6, **options)
    cotangent = rng.normal(size=logits.shape).astype(np.float32)
    (probs, routing_map), (gradient,) = run(kernel, masked, 6, [cotangent], **options)
    inside = np.take_along_axis(np.asarray(probs), alive, 1)
    oracle.check_close(inside, want.probs)
    np.testing.assert_array_equal(
      np.take_along_axis(np.asarray(routing_map), alive, 1), want.routing_map
    )
    assert np.asarray(routing_map).sum() == want.routing_map.sum()
    want_gradient = oracle.choice_gradient(
      np.take_along_axis(logits, alive, 1), want, np.take_along_axis(cotangent, alive, 1), **options
    )
    oracle.check_close(np.take_along_axis(np.asarray(gradient), alive, 1), want_gradient)
    assert np.isfinite(gradient).all() and np.count_nonzero(gradient) <= alive.size


def test_rows_with_too_few_logits_have_distinct_experts(implementation):
  logits = np.full((3, 8), -np.inf, np.float32)
  logits[0, [7, 3]] = 1, 0
  logits[1] = np.nan
  options = {"topk_indices_dtype": np.int32}
  (probs, indices), _ = run(implementation, logits, 4, **options)
  assert indices.tolist() == [[7, 3, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
  assert np.isfinite(probs).all() and not np.signbit(probs).any()
  (dense, routing_map), _ = run(implementation, logits, 4)
  assert_same_bits(dense, probs)
  np.testing.assert_array_equal(routing_map, oracle.mark(np.asarray(indices), 8))


@pytest.mark.parametrize("form", ({}, {"topk_indices_dtype": np.int16}))
def test_cotangents_of_others_are_ignored(implementation, rng, form):
  logits = rng.normal(size=(33, 20)).astype(np.float32)
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  chosen = oracle.choose(logits, 5).routing_map
  spoiled = np.where(chosen, cotangent, np.where(rng.random(chosen.shape) < 0.5, np.nan, np.inf))
  _, (want, got) = run(implementation, logits, 5, [cotangent, spoiled.astype(np.float32)], **form)
  assert_same_bits(got, want)
  assert np.count_nonzero(want) == 33 * 5


@pytest.mark.parametrize("form", ({}, {"topk_indices_dtype": np.int32}))
def test_leading_dimensions(kernel, rng, form):
  """Shapes [128, 2, 32] and others have the values of the same tokens in one dimension."""
  logits = make_logits(256, 32, "sigmoid")
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  options = {"score_function": "sigmoid", "expert_bias": make_bias(32)} | form
  want = run(kernel, logits, 4, [cotangent], **options)
  for lead in ((128, 2), (4, 8, 8)):
    got = run(kernel, logits.reshape(*lead, 32), 4, [cotangent.reshape(*lead, 32)], **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      assert a.shape == (*lead, b.shape[-1])
      assert_same_bits(a, b)
  one = run(kernel, logits[7], 4, [cotangent[7]], **options)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(want), strict=True):
    assert_same_bits(a, b[7])
