"""`aux_scores`: values and gradients against the float64 oracle and golden vectors, bad arguments.

Normalized scores are the weights of a routing to all experts, so the oracle of `route` gives them:
every expert is chosen that has a number and is no padding.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import oracle
import shapes

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
SCORES = oracle.SCORES
POISON = np.array((np.nan, np.inf, -np.inf), np.float32)

each_score = pytest.mark.parametrize("score", SCORES)


@functools.cache
def _compiled(score: str, implementation: str):
  function = functools.partial(jax_router.aux_scores, score=score, implementation=implementation)

  def scores_and_gradient(logits, cotangent, where):
    scores, pull_back = jax.vjp(lambda x: function(x, where=where), logits)
    return scores, pull_back(cotangent)[0]

  return jax.jit(scores_and_gradient)


def _runner(implementation: str):
  def run(logits, cotangent, score, where=None):
    results = _compiled(score, implementation)(logits, cotangent, where)
    return tuple(np.asarray(x) for x in results)

  return run


@pytest.fixture
def run(implementation):
  """`(logits, cotangent, score, where) -> (scores, gradient of the logits)`, under jit."""
  return _runner(implementation)


@pytest.fixture
def run_kernel(kernel):
  """`run` of the kernels only."""
  return _runner(kernel)


def choice_of_all(logits, score: str, where=None) -> tuple[oracle.Choice, np.ndarray]:
  """The routing to all experts, and how far float32 may be from its weights."""
  x = oracle.widen(logits)
  active = x > -np.inf
  if where is not None:
    active &= where[..., None]
  experts = np.broadcast_to(np.arange(x.shape[-1]), x.shape)
  weighed = oracle.weigh(x, experts, active, score, True)
  flags = np.zeros(x.shape[:-1], bool)
  tolerance = np.where(active, 2 * weighed.tolerance, 0)
  return oracle.Choice(weighed.p, experts, active, flags, tolerance, ~flags), tolerance


def check_scores(scores, logits, score, where=None) -> oracle.Choice:
  """Compares with the oracle; returns the routing to all experts."""
  choice, tolerance = choice_of_all(logits, score, where)
  assert scores.dtype == np.float32 and scores.shape == logits.shape
  wrong = ~(np.abs(scores - choice.weights) <= tolerance)
  assert not wrong.any(), (
    f"{wrong.sum()} of {wrong.size} are off: {scores[wrong][:4]} instead of "
    f"{choice.weights[wrong][:4]}, allowed {tolerance[wrong][:4]}"
  )
  return choice


def check(run, rng, logits, score, where=None) -> tuple[np.ndarray, oracle.Choice]:
  """Values and gradient against the oracle, with NaN and infinite cotangents where there is no
  score; returns the gradient."""
  choice, _ = choice_of_all(logits, score, where)
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  cotangent = np.where(choice.active, cotangent, rng.choice(POISON, size=logits.shape))
  scores, gradient = run(logits, cotangent, score, where)
  check_scores(scores, logits, score, where)
  finite = np.isfinite(logits.astype(np.float32))
  assert (gradient[~(choice.active & finite)] == 0).all()
  want, _ = oracle.gradient(logits, choice, cotangent, score=score)
  compared = np.where(finite, gradient, want.astype(gradient.dtype))
  oracle.check_gradient(compared, logits, choice, cotangent, score=score)
  return gradient, choice


def make_logits(kind: str, tokens: int, experts: int, score: str, dtype=np.float32):
  """Logits that float32 can add up: under "none" a sum that cancels is not accurate."""
  logits = shapes.make_logits(kind, tokens, experts, dtype)
  if score == "none":
    minus_infinite = np.isneginf(logits)
    logits = np.abs(logits)
    logits[minus_infinite] = -np.inf
  return logits


# ---- golden vectors ----

GOLDEN_LOGITS = np.array([0.5, -1, 2, 0, 1.5, -0.5, 1, 0.25], np.float32)
GOLDEN_COTANGENT = np.arange(1, 9, dtype=np.float32) / 10
GOLDEN = {
  "softmax": (
    (0.0845664, 0.0188693, 0.3790001, 0.0512921, 0.2298752, 0.0311102, 0.1394264, 0.0658603),
    (-0.0279355, -0.0043463, -0.0493981, -0.0015561, 0.0160136, 0.0052782, 0.0375980, 0.0243461),
  ),
  "sigmoid": (
    (0.1307537, 0.0564938, 0.1850201, 0.1050299, 0.1717396, 0.0793061, 0.1535661, 0.1180907),
    (-0.0176388, -0.0106272, -0.0034696, -0.0030099, 0.0013373, 0.0070437, 0.0100230, 0.0177178),
  ),
}  # fmt: skip


@pytest.mark.parametrize("score", GOLDEN)
def test_golden_vectors(run, score):
  scores, gradient = run(GOLDEN_LOGITS, GOLDEN_COTANGENT, score)
  np.testing.assert_allclose(scores, GOLDEN[score][0], atol=1e-7)
  np.testing.assert_allclose(gradient, GOLDEN[score][1], atol=1e-7)


@each_score
def test_oracle_agrees_with_central_differences(rng, score):
  """The gradients below rest on the oracle's formulas; this one rests on its scores alone."""
  logits = make_logits("random", 5, 9, score) / 3
  logits[1, :6], logits[2, 3], logits[3] = -np.inf, np.nan, np.nan
  cotangent = rng.normal(size=logits.shape)
  choice, _ = choice_of_all(logits, score)
  got, _ = oracle.gradient(logits, choice, cotangent, score=score)
  x, step = oracle.widen(logits), 1e-5
  for e in range(9):
    sums = []
    for sign in (1, -1):
      moved = x.copy()
      moved[:, e] += sign * step
      p = oracle.weigh(moved, choice.experts, choice.active, score, True).p
      sums.append((p * np.where(choice.active, cotangent, 0)).sum(-1))
    np.testing.assert_allclose(got[:, e], (sums[0] - sums[1]) / (2 * step), rtol=1e-6, atol=1e-8)


# ---- sizes, dtypes, kinds of logits ----

EXPERTS = (1, 2, 7, 16, 33, 64, 130, 257, 512, 896, 2304, 4096, 8192)


@each_score
@pytest.mark.parametrize("experts", EXPERTS)
def test_experts(run_kernel, rng, score, experts):
  gradient, _ = check(run_kernel, rng, make_logits("random", 5, experts, score), score)
  assert gradient.any() or experts == 1


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("experts", (8193, 20000))
@each_score
def test_rows_too_long_for_the_registers_of_a_gpu(run_kernel, rng, score, experts, dtype):
  where = np.array([True, False, True])
  check(run_kernel, rng, make_logits("nan", 3, experts, score, dtype), score, where)


@pytest.mark.parametrize("experts", (8192, 16384))
@pytest.mark.parametrize("score", SCORES[1:3])
def test_rounding_errors_of_long_rows_do_not_add_up(run_kernel, rng, score, experts):
  """Equal terms are rounded the same way with every addition."""
  logits = np.broadcast_to(rng.normal(size=(16, 1)), (16, experts)).astype(np.float32)
  scores, _ = run_kernel(logits, logits, score)
  np.testing.assert_allclose(scores, 1 / experts, rtol=1e-6)


@pytest.mark.parametrize("tokens", (0, 1, 3, 257))
@each_score
def test_tokens(run, rng, score, tokens):
  check(run, rng, make_logits("random", tokens, 33, score), score)


@pytest.mark.parametrize("tokens", (0, 1, 3, 257))
@pytest.mark.parametrize("experts", (7, 130, 896))
@each_score
def test_tokens_and_experts(run_kernel, rng, score, experts, tokens):
  check(run_kernel, rng, make_logits("random", tokens, experts, score), score)


@pytest.mark.parametrize("dtype", DTYPES)
@each_score
def test_kinds_of_logits(run, rng, score, dtype):
  """Also: rows with a number have scores that add up to 1, other rows have none."""
  kinds = ("random", "tied", "equal", "quantized", "lane", "ascending", *shapes.SPECIAL_KINDS)
  for kind in kinds:
    logits = make_logits(kind, 24, 48, score, dtype)
    where = np.arange(24) % 5 > 0
    gradient, choice = check(run, rng, logits, score, where)
    assert np.isfinite(gradient.astype(np.float32)).all()
    scores, _ = run(logits, np.zeros(logits.shape, np.float32), score, where)
    if kind != "plus_inf" or score != "none":
      want = choice.active.any(-1)
      np.testing.assert_allclose(scores.sum(-1), want, rtol=1e-5)
      assert want.any() and not want.all()


@pytest.mark.parametrize("dtype", DTYPES)
@each_score
def test_extreme_logits_have_finite_scores(run, score, dtype):
  for kind in ("extreme", "zeros"):
    logits = np.abs(shapes.make_logits(kind, 24, 48, dtype))
    scores, gradient = run(logits, np.ones(logits.shape, np.float32), score)
    assert np.isfinite(gradient.astype(np.float32)).all()
    check_scores(scores, logits, score)


@pytest.mark.parametrize("offset", (4096.0, -4096.0, 2.0**30))
def test_softmax_does_not_depend_on_a_common_offset(run, rng, offset):
  logits = rng.integers(-2, 3, size=(20, 40)).astype(np.float32) * np.float32(128)
  if offset < 2**20:
    logits = logits / 128
  moved = logits + np.float32(offset)
  np.testing.assert_array_equal(moved - np.float32(offset), logits)
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  plain, plain_gradient = run(logits, cotangent, "softmax")
  scores, gradient = run(moved, cotangent, "softmax")
  np.testing.assert_array_equal(scores, plain)
  np.testing.assert_array_equal(gradient, plain_gradient)
  check_scores(scores, logits, "softmax")
  assert gradient.any()


@pytest.mark.parametrize("magnitude", (1e30, 3e38, -1e30))
@each_score
def test_huge_logits_have_finite_gradients(run, rng, score, magnitude):
  logits = np.full((3, 100), magnitude, np.float32)
  logits[1, ::2] = 1.0
  logits[2, 3:] = 0.0
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  scores, gradient = run(logits, cotangent, score)
  assert np.isfinite(scores).all() and np.isfinite(gradient).all()
  if score != "none":
    check(run, rng, logits, score)


@pytest.mark.parametrize("score", SCORES[:3])
def test_several_infinite_logits(run, rng, score):
  """They share the scores, and are at the end of the scale: no gradient."""
  logits = shapes.make_logits("random", 20, 40)
  logits[:, 3:6] = np.inf
  gradient, choice = check(run, rng, logits, score)
  assert (choice.weights[:, 3:6] > 0.02).all()
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize("score, offset", (("sigmoid", -44.0), ("sigmoid", -70.0), ("none", 1e-19)))
def test_tiny_sums(run, rng, score, offset):
  """Scores whose sum is as small as the 1e-20 beside it, or much smaller."""
  logits = (rng.random(size=(20, 40)) * np.abs(offset) / 40 + offset).astype(np.float32)
  if score == "none":
    logits *= np.float32(10.0) ** -np.arange(20, dtype=np.float32)[:, None] / 4
    logits = logits[:12]
  gradient, choice = check(run, rng, logits, score)
  assert gradient.any() and (choice.weights.sum(-1) < 0.999).any()


def test_sqrtsoftplus_of_very_negative_logits(run, rng):
  """Scores down to exp(-43) keep their relative accuracy."""
  logits = -rng.uniform(20, 86, size=(20, 40)).astype(np.float32)
  scores, gradient = run(logits, np.eye(1, 40, dtype=np.float32).repeat(20, 0), "sqrtsoftplus")
  y = np.sqrt(np.log1p(np.exp(logits.astype(np.float64))))
  p = y / (y.sum(-1, keepdims=True) + 1e-20)
  np.testing.assert_allclose(scores, p, rtol=1e-5)
  slope = np.exp(logits.astype(np.float64)) / (2 * y)
  want = (np.eye(1, 40) - p[:, :1]) / (y.sum(-1, keepdims=True) + 1e-20) * slope
  np.testing.assert_allclose(gradient, want, rtol=2e-5)


def test_sigmoid_gradient_of_large_logits(run_kernel, rng):
  """y (1 - y) would be 0 or have few digits left here."""
  logits = rng.uniform(12, 40, size=(20, 40)).astype(np.float32)
  cotangent = np.eye(1, 40, dtype=np.float32).repeat(20, 0)
  _, gradient = run_kernel(logits, cotangent, "sigmoid")
  e = np.exp(-logits.astype(np.float64))
  y = 1 / (1 + e)
  total = y.sum(-1, keepdims=True)
  want = (np.eye(1, 40) - y[:, :1] / total) / total * e * y * y
  np.testing.assert_allclose(gradient, want, rtol=1e-5)


def test_leading_dimensions(run_kernel, rng):
  logits = shapes.make_logits("random", 24, 12)
  where = rng.random(24) < 0.7
  want = run_kernel(logits, logits, "sigmoid", where)
  for shape in ((2, 12), (2, 3, 4)):
    folded = logits.reshape(*shape, 12)
    got = run_kernel(folded, folded, "sigmoid", where.reshape(shape))
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b.reshape(*shape, 12))
  got = run_kernel(logits[3], logits[3], "sigmoid", where[3])
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b[3])


def test_a_row_has_the_same_bits_in_every_batch(run_kernel, rng):
  for experts, score in itertools.product((24, 100, 896), SCORES):
    logits = make_logits("random", 130, experts, score)
    cotangent = rng.normal(size=logits.shape).astype(np.float32)
    whole = run_kernel(logits, cotangent, score)
    part = run_kernel(logits[37:66], cotangent[37:66], score)
    for a, b in zip(part, whole, strict=True):
      assert a.tobytes() == b[37:66].tobytes()


def test_repeats_have_the_same_bits(run_kernel, rng):
  for experts, score in ((96, "softmax"), (700, "sigmoid"), (9000, "sqrtsoftplus")):
    logits = make_logits("random", 65, experts, score)
    cotangent = rng.normal(size=logits.shape).astype(np.float32)
    first = run_kernel(logits, cotangent, score)
    for _ in range(20):
      for a, b in zip(run_kernel(logits, cotangent, score), first, strict=True):
        assert a.tobytes() == b.tobytes()


# ---- TransformerEngine's grid ----

GRID = ((128, 32), (2048, 128), (2048, 256), (7168, 128), (7168, 32))


@pytest.mark.parametrize("tokens, experts", GRID)
@pytest.mark.parametrize("score", SCORES[:3])
def test_transformer_engine_grid(run, rng, score, tokens, experts):
  if score == "softmax":
    count = tokens * experts
    logits = (np.arange(-count // 2, count // 2) * 1e-4).reshape(tokens, experts)
  else:
    row, column = np.arange(tokens)[:, None], np.arange(-experts // 2, experts // 2)
    logits = column * 1e-2 + (row - tokens / 2) * 1e-4
  logits = logits.astype(np.float32)
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  scores, gradient = run(logits, cotangent, score)
  choice, _ = choice_of_all(logits, score)
  want, _ = oracle.gradient(logits, choice, cotangent, score=score)
  np.testing.assert_allclose(scores, choice.weights, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


# ---- bad arguments ----

LOGITS = jax.ShapeDtypeStruct((5, 12), jnp.float32)
BAD = (
  ({"score": "softmin"}, ValueError, "score must be .*'none', got 'softmin'"),
  ({"score": None}, ValueError, "score must be .*, got None"),
  ({"where": np.ones(4, bool)}, ValueError, r"where must have shape .* = \(5,\), got \(4,\)"),
  ({"where": np.ones((5, 12), bool)}, ValueError, r"where must have shape .*, got \(5, 12\)"),
  ({"where": np.ones(5, np.int32)}, TypeError, "where must have dtype bool, got int32"),
  ({"where": [True] * 5}, TypeError, "where must be an array, got list"),
  ({"implementation": "tpu"}, ValueError, "implementation must be .*, got 'tpu'"),
)
BAD_LOGITS = (
  (jax.ShapeDtypeStruct((5, 12), jnp.int32), TypeError, "logits must be .*, got int32"),
  (jax.ShapeDtypeStruct((), jnp.float32), ValueError, "logits must have shape .*, got a scalar"),
  (jax.ShapeDtypeStruct((5, 0), jnp.float32), ValueError, r"logits must .*, got shape \(5, 0\)"),
)


@pytest.mark.parametrize("arguments, exception, message", BAD)
def test_bad_arguments_are_refused_while_tracing(arguments, exception, message):
  function = functools.partial(jax_router.aux_scores, **arguments)
  with pytest.raises(exception, match=message):
    jax.eval_shape(function, LOGITS)


@pytest.mark.parametrize("logits, exception, message", BAD_LOGITS)
def test_bad_logits_are_refused_while_tracing(logits, exception, message):
  with pytest.raises(exception, match=message):
    jax.eval_shape(jax_router.aux_scores, logits)


def test_logits_must_be_an_array():
  with pytest.raises(TypeError, match="logits must be an array, got list"):
    jax_router.aux_scores([[1.0, 2.0]])  # pyright: ignore[reportArgumentType]


def test_where_is_keyword_only():
  with pytest.raises(TypeError, match="positional"):
    jax_router.aux_scores(np.zeros((5, 12), np.float32), "softmax", np.ones(5, bool))
