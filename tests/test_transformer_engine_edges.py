"""`fused_topk_with_score_function` where TransformerEngine's grids do not reach: odd sizes, halves,
ties, groups of random logits, logits that are no numbers, leading dimensions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import transformer_engine_oracle as oracle
from transformer_engine_oracle import SCORES, assert_same_bits, make_bias, make_logits, run

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
  scattered = run(kernel, logits, 6, [cotangent], topk_indices_dtype=np.int16, **options)
  assert_same_bits((scattered[0][0], scattered[1]), (probs, [gradient]))
  ulp = float(ml_dtypes.finfo(dtype).eps)
  rounded = want.probs.astype(dtype).astype(np.float64)
  assert (np.abs(np.asarray(probs, np.float64) - rounded) <= ulp * np.abs(rounded)).all()
  want_gradient = oracle.choice_gradient(logits, want, cotangent, **options)
  error = np.abs(np.asarray(gradient, np.float64) - want_gradient)
  assert (error <= ulp * np.abs(want_gradient) + 1e-6).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
  "experts, k, num_groups, group_topk",
  ((16, 8, 8, 4), (16, 8, 8, 8), (16, 8, 4, 2), (48, 6, 8, 2), (48, 6, 8, 6), (48, 12, 4, 1)),
)
def test_groups_of_random_logits(kernel, rng, score, experts, k, num_groups, group_topk):
  """Sums of 1, 2, 3, 4 and 12 keys, some of them of whole groups; in the grids all rows rise."""
  logits = rng.normal(size=(65, experts)).astype(np.float32)
  options = {"score_function": score, "num_groups": num_groups, "group_topk": group_topk}
  oracle.check_choice(kernel, logits, k, rng, **options)
  (_, indices), _ = run(kernel, logits, k, topk_indices_dtype=np.int32, **options)
  np.testing.assert_array_equal(indices, oracle.choose(logits, k, **options).indices)
  steered = {"expert_bias": rng.normal(size=experts).astype(np.float32) / 4}
  options |= {"use_pre_softmax": True} if score == "softmax" else steered
  oracle.check_choice(kernel, logits, k, rng, **options)


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
