"""vLLM's routing by its names against float64, with its ties, NaN and groups."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from jax_router import Groups, Routing
from jax_router.compat import vllm


@functools.cache
def compiled(name: str, k: int, renormalize: bool, **static):
  function = getattr(vllm, name)
  if name == "grouped_topk":
    return jax.jit(
      lambda x, bias: function(None, x, k, renormalize, e_score_correction_bias=bias, **static)
    )
  return jax.jit(lambda x, bias: function(x, k, renormalize, bias, **static))


def check_topk(name, implementation, logits, k, renormalize, bias=None):
  weights, ids, indices = compiled(name, k, renormalize, implementation=implementation)(
    logits, bias
  )
  assert weights.dtype == jnp.float32 and ids.dtype == indices.dtype == jnp.int32
  tokens = len(logits)
  assert indices.tolist() == [[j * tokens + t for j in range(k)] for t in range(tokens)]
  return oracle.check_route(
    Routing(weights, ids), logits, k, score=name.removeprefix("topk_"), renormalize=renormalize,
    bias=bias,
  )  # fmt: skip


def check_grouped(
  implementation, logits, k, renormalize, count, keep, score, scale=1.0, bias=None, groups=True
):
  weights, ids = compiled(
    "grouped_topk", k, renormalize, num_expert_group=count, topk_group=keep, scoring_func=score,
    routed_scaling_factor=scale, implementation=implementation,
  )(logits, bias)  # fmt: skip
  assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32
  limit = Groups(count, keep, "max" if bias is None else "top2") if groups else None
  return oracle.check_route(
    Routing(weights, ids), logits, k, score=score, renormalize=renormalize, scale=scale, bias=bias,
    groups=limit,
  )  # fmt: skip


# ---- topk_softmax, topk_sigmoid, fused_topk ----


@pytest.mark.parametrize("name", ("topk_softmax", "topk_sigmoid"))
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize(
  "tokens, num_experts, k", ((1, 1, 1), (33, 6, 3), (56, 16, 4), (64, 257, 9))
)
def test_topk(implementation, rng, name, renormalize, tokens, num_experts, k):
  for dtype in (np.float32, jnp.bfloat16, np.float16):
    logits = rng.normal(size=(tokens, num_experts)).astype(dtype)
    check_topk(name, implementation, logits, k, renormalize)
  bias = rng.normal(size=num_experts).astype(np.float32)
  check_topk(name, implementation, rng.normal(size=logits.shape).astype(np.float32), k,
             renormalize, bias)  # fmt: skip


@pytest.mark.parametrize("name", ("topk_softmax", "topk_sigmoid"))
def test_rows_of_nan_and_infinities(implementation, name):
  """Ids stay distinct and weights finite."""
  nan, inf = np.nan, np.inf
  logits = np.array(
    [[1, 2, 2, 1], [nan, 0, -inf, 0], [nan] * 4, [-inf] * 4, [inf, 0, 1, nan], [nan, 5, nan, nan]],
    np.float32,
  )
  for renormalize in (True, False):
    want = check_topk(name, implementation, logits, 3, renormalize)
    assert all(len(set(row)) == 3 for row in want.experts.tolist())


@pytest.mark.parametrize("dtype", (np.int32, np.uint32))
def test_types_of_indices(rng, dtype):
  logits = rng.normal(size=(5, 9)).astype(np.float32)
  want = vllm.topk_softmax(logits, 3)
  got = vllm.topk_softmax(logits, 3, indices_type=dtype)
  assert got[1].dtype == dtype and got[2].dtype == np.int32
  np.testing.assert_array_equal(got[1], np.asarray(want[1]).astype(dtype))


def test_int64_indices(rng):
  logits = rng.normal(size=(5, 9)).astype(np.float32)
  with jax.enable_x64(True):
    got = vllm.fused_topk(None, logits, 3, False, jnp.int64)[1]
    assert got.dtype == np.int64
    assert got.tolist() == oracle.route(logits, 3).experts.tolist()


@pytest.mark.parametrize("scoring_func", ("softmax", "sigmoid"))
def test_fused_topk(implementation, rng, scoring_func):
  logits = rng.normal(size=(33, 16)).astype(np.float32)
  hidden = rng.normal(size=(33, 5)).astype(np.float32)
  got = vllm.fused_topk(
    hidden, logits, 4, True, scoring_func=scoring_func, implementation=implementation
  )
  name = f"topk_{scoring_func}"
  want = getattr(vllm, name)(logits, 4, True, implementation=implementation)
  check_topk(name, implementation, logits, 4, True)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


# ---- grouped_topk ----

SCORED = [("softmax", False), ("sigmoid", False), ("sigmoid", True), ("softmax", True)]


@pytest.mark.parametrize("score, biased", SCORED)
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize(
  "tokens, num_experts, k, count, keep",
  ((1, 16, 2, 8, 2), (33, 16, 2, 8, 2), (64, 16, 2, 8, 2), (40, 256, 8, 8, 4), (17, 160, 6, 8, 3),
   (21, 384, 8, 1, 1)),
)  # fmt: skip
def test_grouped(
  implementation, rng, score, biased, renormalize, tokens, num_experts, k, count, keep
):
  logits = rng.normal(size=(tokens, num_experts)).astype(np.float32)
  bias = rng.normal(size=num_experts).astype(np.float32) * np.float32(0.1) if biased else None
  check_grouped(implementation, logits, k, renormalize, count, keep, score, 2.5, bias)


def test_golden_groups(implementation):
  """Largest keys decide without a bias, sums of two with one, also where all keys are negative."""
  scores = np.array([[0.9, 0.1, 0.5, 0.45, 0.6, 0.3, 0.2, 0.55]])
  logits = np.log(scores / (1 - scores)).astype(np.float32)

  def grouped(k, renormalize, bias, scale):
    bias = None if bias is None else np.full(8, bias, np.float32)
    weights, ids = vllm.grouped_topk(
      None, logits, k, renormalize, 4, 2, "sigmoid", scale, bias, implementation=implementation
    )
    return ids[0].tolist(), weights[0]

  for bias in (0, -1):
    ids, weights = grouped(3, True, bias, 2.5)
    assert ids == [0, 2, 3]
    np.testing.assert_allclose(weights, [1.2162162, 0.6756757, 0.6081081], rtol=3e-7)
    ids, weights = grouped(3, False, bias, 2.5)
    assert ids == [0, 2, 3]
    np.testing.assert_allclose(weights, [2.25, 1.25, 1.125], rtol=3e-7)
  ids, weights = grouped(3, False, None, 1.0)
  assert ids == [0, 4, 5]
  np.testing.assert_allclose(weights, [0.9, 0.6, 0.3], rtol=3e-7)


def test_rows_without_a_choice(implementation):
  """All NaN, and fewer groups above -inf than are kept: experts 0 .. k-1, 1/k each, unscaled."""
  logits = np.zeros((2, 8), np.float32)
  logits[0] = np.nan
  bias = np.full(8, -np.inf, np.float32)
  bias[:2] = 0
  for row_bias in (np.zeros(8, np.float32), bias):
    weights, ids = vllm.grouped_topk(
      None, logits, 2, True, 4, 2, "sigmoid", 2.5, row_bias, implementation=implementation
    )
    rows = slice(0, 1) if row_bias is not bias else slice(None)
    assert ids.tolist() == [[0, 1], [0, 1]]
    np.testing.assert_array_equal(weights[rows], np.full((2, 2), 0.5, np.float32)[rows])


@pytest.mark.parametrize("count, keep", ((0, 0), (-1, 3), (5, 2), (16, 2), (17, 1), (32, 40)))
@pytest.mark.parametrize("biased", (True, False))
def test_groups_that_cannot_be_limit_nothing(implementation, rng, count, keep, biased):
  """The scoring function and the scale stay what they are."""
  logits = rng.normal(size=(9, 16)).astype(np.float32)
  bias = rng.normal(size=16).astype(np.float32) if biased else None
  check_grouped(implementation, logits, 3, True, count, keep, "sigmoid", 1.5, bias, groups=False)


def test_tied_groups_and_experts(implementation):
  logits = np.zeros((3, 12), np.float32)
  for bias in (None, np.zeros(12, np.float32)):
    weights, ids = vllm.grouped_topk(
      None, logits, 4, True, 4, 2, "sigmoid", 1.0, bias, implementation=implementation
    )
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    np.testing.assert_allclose(weights, 0.25, rtol=1e-6)


def test_no_tokens(implementation):
  logits = np.zeros((0, 16), np.float32)
  got = vllm.grouped_topk(None, logits, 4, True, 4, 2, implementation=implementation)
  assert [x.shape for x in got] == [(0, 4), (0, 4)]
  got = vllm.topk_softmax(logits, 4, implementation=implementation)
  assert [x.shape for x in got] == [(0, 4)] * 3
