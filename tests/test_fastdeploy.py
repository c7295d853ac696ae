"""FastDeploy's operators against its rules in float64, over the grids of its own tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType

import oracle_replicas
import shapes
from jax_router.compat import fastdeploy
from programs import assert_equal, collectives, put

# E, n_group, topk_group, topk, renormalize, scale
GLM, V3 = (128, 1, 1, 8, True, 1.0), (256, 8, 4, 8, True, 2.5)
QWEN, KIMI = (128, 4, 2, 8, False, 1.0), (384, 8, 2, 8, False, 1.0)
MODELS = (GLM, V3, QWEN, KIMI)


@functools.cache
def compiled(name: str, implementation: str, options: tuple):
  function = getattr(fastdeploy, name)
  return jax.jit(lambda *arrays: function(*arrays, *options, implementation=implementation))


@pytest.fixture
def run(implementation):
  """`(name, arrays, options) -> results` under jit, as numpy."""

  def call(name, arrays, *options):
    return jax.device_get(compiled(name, implementation, options)(*arrays))

  return call


def sigmoid(x) -> np.ndarray:
  with np.errstate(over="ignore"):
    return 1 / (1 + np.exp(-np.asarray(x).astype(np.float64)))


def rule(scores, keys, n_group, topk_group, topk, renormalize, scale):
  """Dense scores, values, indices, and which tokens are degenerate; float64."""
  tokens, num_experts = keys.shape
  dense = np.zeros((tokens, num_experts))
  values = np.full((tokens, topk), 1 / topk)
  indices = np.tile(np.arange(topk), (tokens, 1))
  dead = np.zeros(tokens, bool)
  for t in range(tokens):
    key = [k if np.isfinite(k) else -np.inf for k in keys[t]]
    size = num_experts // n_group
    groups = [sorted(key[g * size : (g + 1) * size])[::-1] for g in range(n_group)]
    totals = [-np.inf if len(g) < 2 else g[0] + g[1] for g in groups]
    kept = sorted(range(n_group), key=lambda g: (-totals[g], g))[:topk_group]
    dead[t] = totals[kept[-1]] == -np.inf
    if dead[t]:
      continue
    key = [k if e // size in kept else -np.inf for e, k in enumerate(key)]
    indices[t] = sorted(range(num_experts), key=lambda e: (-key[e], e))[:topk]
    chosen = [scores[t, e] if key[e] > -np.inf else 0 for e in indices[t]]
    divisor = sum(chosen) + 1e-20 if renormalize else 1
    values[t] = [v * scale / divisor for v in chosen]
    dense[t, indices[t]] = values[t]
  return dense, values, indices, dead


def check(got, scores, keys, *options):
  """Results of `grouped_topk` or `noaux_tc`; `keys` as the operator compares them, or exact."""
  dense, values, indices, dead = rule(scores, keys, *options)
  index_dtype = np.int64 if jax.config.jax_enable_x64 else np.int32
  assert [x.dtype for x in got] == [np.float32, np.float32, index_dtype]
  np.testing.assert_array_equal(got[2], indices)
  np.testing.assert_allclose(got[1], values, rtol=2e-6, atol=1e-12)
  np.testing.assert_allclose(got[0], dense, rtol=2e-6, atol=1e-12)
  assert ((got[0] == 0) | (dense != 0)).all()
  return dead


def make_case(rng, tokens, experts, dtype=np.float32):
  """Logits and a bias whose keys lie far enough apart for float32, and scores in float64."""
  ranks = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
  logits = ((ranks - experts / 2) / (experts / 8)).astype(dtype)
  bias = rng.permutation(experts).astype(np.float32) / 2**9
  return logits, bias, sigmoid(logits)


def clear(scores, keys, *options):
  """Tokens whose result does not change where keys move by a rounding."""
  wobble = np.random.default_rng(1).uniform(-1, 1, keys.shape) * 3e-7
  results = [rule(scores, keys + s * wobble, *options)[2] for s in (-1, 0, 1)]
  return (results[0] == results[1]).all(-1) & (results[1] == results[2]).all(-1)


# ---- grids ----


@pytest.mark.parametrize("tokens", (1, 3, 33, 128))
@pytest.mark.parametrize("model", MODELS)
def test_grouped_topk(run, rng, model, tokens):
  experts, *options = model
  logits, bias, scores = make_case(rng, tokens, experts)
  keys = scores + bias
  certain = clear(scores, keys, *options)
  assert certain.mean() > 0.5
  for b in (bias, bias[None]):
    got = run("grouped_topk", (logits, b), *options)
    dead = check([x[certain] for x in got], scores[certain], keys[certain], *options)
    assert not dead.any()
  assert all(len(set(row)) == options[2] for row in got[2].tolist())
  if options[3]:
    np.testing.assert_allclose(got[1].sum(-1), options[4], rtol=1e-5)


@pytest.mark.parametrize("dtype", (ml_dtypes.bfloat16, np.float16))
@pytest.mark.parametrize("model", (V3, KIMI))
def test_narrow_logits(run, rng, model, dtype):
  """Ties of rounded logits go to the lowest expert; scores are float32."""
  experts, *options = model
  logits, _, _ = make_case(rng, 65, experts, dtype)
  scores = sigmoid(logits.astype(np.float32))
  certain = clear(scores, scores, *options)
  got = run("grouped_topk", (logits, np.zeros(experts, np.float32)), *options)
  keys = np.asarray(scores, np.float32).astype(np.float64)
  stable = certain & (rule(keys, keys, *options)[2] == rule(scores, scores, *options)[2]).all(-1)
  check([x[stable] for x in got], scores[stable], keys[stable], *options)
  assert all(len(set(row)) == options[2] for row in got[2].tolist())


@pytest.mark.parametrize("tokens", (1, 32, 64))
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("model", (GLM, V3))
def test_noaux_tc(run, rng, model, tokens, renormalize):
  """Keys are given, so the choice is exact; they need not be scores and a bias of the experts."""
  experts, n_group, topk_group, topk, _, scale = model
  options = (n_group, topk_group, topk, renormalize, scale)
  scores = rng.uniform(size=(tokens, experts)).astype(np.float32)
  for keys in (scores, scores + rng.permutation(experts) / 64, rng.normal(size=scores.shape)):
    keys = (np.round(keys * 1024) / 1024).astype(np.float32)  # their sums are exact
    assert not check(run("noaux_tc", (scores, keys), *options), scores, keys, *options).any()


def test_golden_vectors(run):
  s = np.float32([[0.9, 0.1, 0.5, 0.45, 0.6, 0.3, 0.2, 0.55]])
  logits, zeros = np.log(s / (1 - s)), np.zeros(8, np.float32)
  cases = [("grouped_topk", (logits, zeros)), ("noaux_tc", (s, s))]
  cases += [("grouped_topk", (logits, zeros - 1)), ("noaux_tc", (s, s - 1))]
  for name, arrays in cases:
    dense, values, indices = run(name, arrays, 4, 2, 3, True, 2.5)
    assert indices.tolist() == [[0, 2, 3]]
    np.testing.assert_allclose(values, [[1.2162162, 0.6756757, 0.6081081]], rtol=3e-7)
    want = [[1.2162162, 0, 0.6756757, 0.6081081, 0, 0, 0, 0]]
    np.testing.assert_allclose(dense, want, rtol=3e-7)
    values = run(name, arrays, 4, 2, 3, False, 2.5)[1]
    np.testing.assert_allclose(values, [[2.25, 1.25, 1.125]], rtol=3e-7)


# ---- ties, numbers that are not finite, degenerate tokens ----


def test_ties_go_to_the_lowest(run):
  scores = np.full((2, 64), 0.5, np.float32)
  scores[1, 40:48] = 0.75
  for options in ((8, 2, 5, True, 2.5), (1, 1, 5, False, 1.0), (8, 8, 32, True, 1.0)):
    check(run("noaux_tc", (scores, scores), *options), scores, scores, *options)
    logits = np.log(scores / (1 - scores))
    got = run("grouped_topk", (logits, np.zeros(64, np.float32)), *options)
    check(got, scores, scores, *options)


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("name", ("grouped_topk", "noaux_tc"))
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("n_group, topk_group, topk", ((4, 2, 3), (1, 1, 4), (8, 8, 4), (2, 1, 6)))
def test_numbers_that_are_not_finite(run, name, renormalize, n_group, topk_group, topk):
  """Tokens with none, one, two or more finite keys, in one group or in several."""
  options = (n_group, topk_group, topk, renormalize, 2.5)
  rng = np.random.default_rng(n_group)
  logits = rng.integers(-64, 64, (80, 16)).astype(np.float32) / 16
  for t in range(80):
    gone = rng.permutation(16)[: 16 - t % 8] if t < 64 else []
    logits[t, gone] = rng.choice([NAN, -NAN], len(gone))
  logits[70:, 3] = INF, *[-INF] * 9
  scores = sigmoid(logits)
  bias = np.zeros(16, np.float32)
  if name == "noaux_tc":
    scores = np.float32(scores)
    keys = np.where(rng.random(scores.shape) < 0.1, np.float32(INF), np.round(scores * 512) / 512)
    dead = check(run(name, (scores, keys), *options), scores, keys, *options)
  else:
    bias[[5, 6]] = INF, NAN
    keys = np.float32(scores) + bias
    certain = clear(scores, scores + bias, *options)
    got = run(name, (logits, bias), *options)
    dead = rule(scores, keys, *options)[3]
    check([x[certain] for x in got], scores[certain], keys[certain], *options)
    assert np.isfinite(got[1]).all() and np.isfinite(got[0]).all()
  assert dead.any() and (dead.mean() < 1 or n_group == 8)


def test_degenerate_tokens(run):
  """1 / k, not scaled, and no dense scores; also where two experts of one group are finite."""
  nothing = np.full((3, 8), NAN, np.float32)
  bias = np.full(8, -INF, np.float32)
  bias[:2] = 0
  for arrays in ((nothing, np.zeros(8, np.float32)), (np.zeros((3, 8), np.float32), bias)):
    dense, values, indices = run("grouped_topk", arrays, 4, 2, 2, True, 2.5)
    assert indices.tolist() == [[0, 1]] * 3 and (values == 0.5).all() and (dense == 0).all()
  dense, values, indices = run("noaux_tc", (nothing, nothing), 4, 2, 2, True, 2.5)
  assert indices.tolist() == [[0, 1]] * 3 and (values == 0.5).all() and (dense == 0).all()
  # A group of one expert has no second key.
  ones = np.ones((3, 8), np.float32)
  assert (run("noaux_tc", (ones, ones), 8, 2, 2, True, 2.5)[1] == 0.5).all()


def test_large_logits_and_one_expert(run, rng):
  logits, bias, scores = make_case(rng, 20, 64)
  got = run("grouped_topk", (logits * 50, bias), 8, 4, 8, True, 2.5)
  assert all(np.isfinite(x).all() for x in got)
  got = run("grouped_topk", (logits, bias), 1, 1, 1, True, 1.0)
  np.testing.assert_allclose(got[1], 1, rtol=1e-6)
  np.testing.assert_array_equal(got[2][:, 0], (scores + bias).argmax(-1))


def test_groups_that_are_not_positive_count_as_one(run, rng):
  logits, bias, _ = make_case(rng, 9, 64)
  want = run("grouped_topk", (logits, bias), 1, 1, 8, True, 2.5)
  for n_group, topk_group in ((0, 0), (-1, -1), (1, 0)):
    assert_equal(run("grouped_topk", (logits, bias), n_group, topk_group, 8, True, 2.5), want)


def test_empty(run):
  dense, values, indices = run(
    "grouped_topk", (np.zeros((0, 8), np.float32), np.zeros(8, np.float32)), 2, 1, 3, True, 1.0
  )
  assert dense.shape == (0, 8) and values.shape == indices.shape == (0, 3)


def test_indices_are_int64_with_x64():
  logits = shapes.make_logits("random", 5, 16)
  want = fastdeploy.grouped_topk(logits, np.zeros(16, np.float32), 4, 2, 3, True, 1.0)
  assert want[2].dtype == np.int32
  with jax.enable_x64(True):
    got = fastdeploy.grouped_topk(logits, np.zeros(16, np.float32), 4, 2, 3, True, 1.0)
  assert got[2].dtype == np.int64 and got[1].dtype == got[0].dtype == np.float32
  assert_equal(got, want)


# ---- replicas ----


@pytest.mark.parametrize("name", ("noaux_tc_redundant", "grouped_topk_redundant"))
@pytest.mark.parametrize("model", MODELS)
def test_replicas(run, rng, model, name):
  """Physical slots by FastDeploy's draw, counts by expert; all else as without replicas."""
  experts, *options = model
  logits, bias, scores = make_case(rng, 70, experts)
  logits[:3] = NAN  # degenerate tokens are counted too
  if name.startswith("noaux"):
    scores = np.float32(sigmoid(logits))
    base, arrays = "noaux_tc", (scores, scores + bias)
  else:
    base, arrays = "grouped_topk", (logits, bias)
  dense, values, indices = run(base, arrays, *options)
  table, counts, num_physical = oracle_replicas.make_table(rng, experts, 3)
  stats = rng.integers(0, 100, experts).astype(np.int32)
  got = run(name, (*arrays, table, counts, stats), *options, 3)
  assert_equal(got[:2], (dense, values))
  physical, load = oracle_replicas.assign(
    indices, table, counts, num_physical=num_physical, policy="xorshift"
  )
  np.testing.assert_array_equal(got[2], physical)
  np.testing.assert_array_equal(got[3], stats + load)
  assert got[2].dtype == indices.dtype and got[3].dtype == np.int32
  assert load.sum() == 70 * options[2] and load[: options[2]].min() >= 3


def test_identity_map(run, rng):
  experts, *options = V3
  logits, bias, _ = make_case(rng, 33, experts)
  want = run("grouped_topk", (logits, bias), *options)
  table, ones = np.arange(256, dtype=np.int32)[:, None], np.ones(256, np.int32)
  got = run("grouped_topk_redundant", (logits, bias, table, ones, ones), *options, 1)
  assert_equal(got[:3], want)
  np.testing.assert_array_equal(got[3], 1 + np.bincount(want[2].reshape(-1), minlength=256))


def test_traced_counts_of_zero_give_minus_one(run):
  scores = np.zeros((4, 4), np.float32)
  table, stats = np.zeros((4, 2), np.int32), np.zeros(4, np.int32)
  counts = np.int32([1, 0, 1, 1])
  got = run("noaux_tc_redundant", (scores, scores, table, counts, stats), 1, 1, 2, True, 1.0, 2)
  assert got[2].tolist() == [[0, -1]] * 4 and got[3].tolist() == [4, 0, 0, 0]


# ---- programs ----


def test_sharded_tokens_are_not_gathered(make_mesh, rng):
  experts, *options = V3
  logits, bias, _ = make_case(rng, 64, experts)
  want = fastdeploy.grouped_topk(logits, bias, *options)
  mesh = make_mesh(AxisType.Auto)
  with jax.set_mesh(mesh):
    args = put(mesh, logits, "d", None), put(mesh, bias)
    function = compiled("grouped_topk", None, tuple(options))
    assert collectives(function, *args) == set()
    assert_equal(function(*args), want)


def test_repeats_are_identical(run, rng):
  experts, *options = V3
  arrays = make_case(rng, 900, experts)[:2]
  first = run("grouped_topk", arrays, *options)
  for _ in range(3):
    assert_equal(run("grouped_topk", arrays, *options), first)


# ---- bad arguments ----

X, B = np.zeros((4, 64), np.float32), np.zeros(64, np.float32)
GOOD = {
  "n_group": 8, "topk_group": 4, "topk": 8, "renormalize": True, "routed_scaling_factor": 2.5
}  # fmt: skip
TABLE, ONES = np.zeros((64, 2), np.int32), np.ones(64, np.int32)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"gating_output": X[0]}, ValueError, r"gating_output must have shape \[T, E\]"),
    ({"gating_output": X.astype(int)}, TypeError, "gating_output must be one of float32"),
    ({"e_score_correction_bias": B[:3]}, ValueError, r"e_score_correction_bias must have shape"),
    ({"e_score_correction_bias": X}, ValueError, r"E = 64, got \(4, 64\)"),
    ({"e_score_correction_bias": ONES}, TypeError, "must have a floating dtype, got int32"),
    ({"n_group": 7}, ValueError, "n_group must divide the number of experts 64, got 7"),
    ({"n_group": 64}, ValueError, "n_group must be between .* and 32, got 64"),
    ({"topk_group": 9}, ValueError, "topk_group must be between .* n_group = 8, got 9"),
    ({"topk": 33}, ValueError, "topk must be between 1 and 32, got 33"),
    ({"topk": 9, "topk_group": 1}, ValueError, "topk must be between 1 and 8, got 9"),
    ({"topk": 0}, ValueError, "topk must be between 1 and 32, got 0"),
    ({"renormalize": 1}, TypeError, "renormalize must be a static bool, got int"),
    ({"routed_scaling_factor": "2"}, TypeError, "routed_scaling_factor must be a Python int or"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_arguments(arguments, exception, text):
  with pytest.raises(exception, match=text):
    fastdeploy.grouped_topk(**{"gating_output": X, "e_score_correction_bias": B} | GOOD | arguments)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"scores": X[0]}, ValueError, r"scores must have shape \[T, E\]"),
    ({"scores_with_bias": X[:3]}, ValueError, r"scores_with_bias must have shape .* got \(3, 64\)"),
    ({"expert_id_to_ep_rank_array": TABLE[1:]}, ValueError, r"expert_id_to_ep_rank_array must"),
    ({"redundant_ep_rank_num_plus_one": 3}, ValueError, r"= \(64, 3\), got \(64, 2\)"),
    ({"expert_in_rank_num_list": ONES[1:]}, ValueError, "expert_in_rank_num_list must have shape"),
    ({"expert_in_rank_num_list": 0 * ONES}, ValueError, "got 0 for expert 0"),
    ({"expert_id_to_ep_rank_array": TABLE - 1}, ValueError, "got -1 for expert 0, replica 0"),
    ({"tokens_per_expert_stats_list": B}, TypeError, "stats_list must have dtype int32, got float"),
  ),
)
def test_bad_arguments_of_replicas(arguments, exception, text):
  given = {
    "scores": X, "scores_with_bias": X, "expert_id_to_ep_rank_array": TABLE,
    "expert_in_rank_num_list": ONES, "tokens_per_expert_stats_list": ONES,
    "redundant_ep_rank_num_plus_one": 2,
  }  # fmt: skip
  with pytest.raises(exception, match=text):
    fastdeploy.noaux_tc_redundant(**given | GOOD | arguments)


def test_gradients_reach_the_logits(implementation):
  logits = jnp.asarray(shapes.make_logits("random", 6, 16))
  bias = np.zeros(16, np.float32)

  def loss(x):
    _, values, indices = fastdeploy.grouped_topk(
      x, bias, 4, 2, 3, False, 2.0, implementation=implementation
    )
    return values.sum(), indices

  gradient, indices = jax.grad(loss, has_aux=True)(logits)
  y = sigmoid(logits)
  want = np.zeros((6, 16))
  np.put_along_axis(want, np.asarray(indices), 1, axis=1)
  np.testing.assert_allclose(gradient, 2 * want * y * (1 - y), rtol=1e-5, atol=1e-7)
