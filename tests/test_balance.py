"""`quantile_histogram` against numpy, and what it gives `quantile_bias`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import oracle
import shapes
from jax_router import quantile_bias, quantile_histogram

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
SCORES = ("sigmoid", "sqrtsoftplus", "none")


@functools.cache
def compiled(**static):
  return jax.jit(
    lambda logits, cutoff, bounds, where: quantile_histogram(
      logits, cutoff, bounds=bounds, where=where, **static
    )
  )


@pytest.fixture
def histogram(implementation):
  """`quantile_histogram` under jit, as numpy."""

  def call(logits, cutoff, bounds, where=None, **static):
    function = compiled(**static, implementation=implementation)
    return np.asarray(function(logits, cutoff, np.asarray(bounds, np.float32), where))

  return call


def required(logits, cutoff, score) -> np.ndarray:
  """Required biases `[T, E]` in float64."""
  y = oracle.elementwise(oracle.widen(logits), score)[0]
  return np.asarray(cutoff, np.float64)[:, None] - y


def observed(cutoff, where) -> np.ndarray:
  seen = ~(np.asarray(cutoff) == -np.inf)
  return seen if where is None else seen & where


def count_bins(bins, num_bins, seen) -> np.ndarray:
  """Counts `[E, num_bins]` of bins `[T, E]`, from tokens that were seen."""
  counts = np.zeros((bins.shape[1], num_bins), np.int64)
  expert = np.broadcast_to(np.arange(bins.shape[1]), bins.shape)
  np.add.at(counts, (expert[seen], bins[seen]), 1)
  return counts


def exact_counts(scores, cutoff, bounds, num_bins, where=None) -> np.ndarray:
  """The rule in float32, for scores that need no rounding."""
  low, high = np.asarray(bounds, np.float32)
  y, cutoff = np.asarray(scores, np.float32), np.asarray(cutoff, np.float32)
  with np.errstate(invalid="ignore", over="ignore"):
    position = ((cutoff[:, None] - y) - low) * (np.float32(num_bins) / (high - low))
  position = np.where(position > 0, position, 0)
  bins = np.minimum(np.floor(position), num_bins - 1).astype(int)
  return count_bins(bins, num_bins, observed(cutoff, where))


def check(got, logits, cutoff, bounds, num_bins, score, where=None):
  """Counts as in float64, up to values within rounding of the edge of a bin; these are few."""
  assert got.dtype == np.int32 and got.shape == (logits.shape[-1], num_bins)
  seen = observed(cutoff, where)
  assert (got.sum(-1) == seen.sum()).all()
  low, high = np.asarray(bounds, np.float32).astype(np.float64)
  scale = num_bins / (high - low)
  r = required(logits, np.where(seen, cutoff, 0), score)
  magnitude = np.abs(r) + 2 * np.abs(np.where(seen, cutoff, 0))[:, None] + max(abs(low), abs(high))
  position, error = (r - low) * scale, 4e-7 * scale * magnitude
  first, last = (
    np.clip(np.floor(position + e), 0, num_bins - 1).astype(int) for e in (-error, error)
  )
  assert not seen.any() or (first == last)[seen].mean() > 0.9
  most, least = (np.cumsum(count_bins(x, num_bins, seen), -1) for x in (first, last))
  cumulative = np.cumsum(got, -1)
  assert (least <= cumulative).all() and (cumulative <= most).all()
  certain = count_bins(first, num_bins, seen[:, None] & (first == last))
  assert (got >= certain).all()


def make_case(tokens, experts, k, dtype=np.float32, score="sigmoid", shift=0.0, seed=0):
  """Logits, bias, the cutoff that follows in float64, and bounds.

  These lie askew, or the k + 1st expert, which requires its own bias, would be on an edge.
  """
  rng = np.random.default_rng([seed, tokens, experts, k])
  logits = rng.normal(size=(tokens, experts)).astype(dtype)
  bias = np.linspace(-0.2, 0.2, experts).astype(np.float32) + np.float32(shift)
  keys = np.sort(oracle.elementwise(oracle.widen(logits), score)[0] + bias, -1)
  cutoff = keys[:, experts - 1 - k].astype(np.float32)
  return logits, bias, cutoff, (bias.min() - 1.013, bias.max() + 1.007)


# ---- the histogram ----

SIGMA = np.array([[0.9, 0.6, 0.3, 0.1], [0.2, 0.8, 0.5, 0.7]], np.float32)
GOLDEN = [
  [0, 1, 0, 0, 0, 1, 0, 0], [0, 0, 2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 2, 0, 0, 0],
  [0, 0, 0, 1, 1, 0, 0, 0],
]  # fmt: skip


def test_golden_vector(histogram, implementation):
  routing, cutoff = jax_router.route_with_cutoff(
    SIGMA, 2, score="none", bias=np.zeros(4, np.float32), implementation=implementation
  )
  assert routing.experts.tolist() == [[0, 1], [1, 3]]
  assert cutoff.tolist() == [np.float32(0.3), 0.5]
  got = histogram(SIGMA, cutoff, (-1, 1), num_bins=8, score="none")
  assert got.tolist() == GOLDEN
  bias, bounds = quantile_bias(got, jnp.zeros(4), 2, bounds=(-1, 1))
  assert bias.tolist() == [-0.3125, -0.1875, 0.3125, 0.1875]
  assert bounds.tolist() == [-1.3125, 1.3125]


def test_ties_and_clamping(histogram, implementation):
  logits = np.array([[3, 3, 3, 2, 1, 0, -2, -3]], np.float32)
  routing, cutoff = jax_router.route_with_cutoff(logits, 2, implementation=implementation)
  assert routing.experts.tolist() == [[0, 1]]
  got = histogram(logits, cutoff, (-0.05, 0.05), num_bins=8)
  assert got.argmax(-1).tolist() == [4, 4, 4, 7, 7, 7, 7, 7]
  got = histogram(logits, cutoff - 0.5, (-0.05, 0.05), num_bins=8)
  assert got.argmax(-1).tolist() == [0, 0, 0, 0, 0, 0, 7, 7]
  assert (got.sum(-1) == 1).all()


@pytest.mark.parametrize("k", (8, 16))
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_router(histogram, k, dtype):
  logits, _, cutoff, bounds = make_case(257, 896, k, dtype)
  got = histogram(logits, cutoff, bounds, num_bins=1000)
  check(got, logits, cutoff, bounds, 1000, "sigmoid")


@pytest.mark.parametrize("num_bins", (1, 7, 1000, 4096))
@pytest.mark.parametrize("experts", (3, 7, 130))
def test_sizes(histogram, experts, num_bins):
  for i, k in enumerate((1, experts - 1)):
    score, shift = SCORES[(experts + num_bins + i) % 3], (0, -0.7, 12.5)[(num_bins + i) % 3]
    logits, _, cutoff, bounds = make_case(61, experts, k, DTYPES[num_bins % 3], score, shift)
    got = histogram(logits, cutoff, bounds, num_bins=num_bins, score=score)
    check(got, logits, cutoff, bounds, num_bins, score)


# Many tokens for few experts are counted in parts, bins that no cache holds in memory.
@pytest.mark.parametrize("tokens, experts, num_bins", ((9001, 20, 64), (1, 33, 9), (37, 5, 70001)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_scores_are_counted_exactly(histogram, rng, tokens, experts, num_bins, dtype):
  logits, _, cutoff, bounds = make_case(tokens, experts, 2, dtype, "none")
  where = rng.random(tokens) < 0.8
  for mask in (None, where):
    got = histogram(logits, cutoff, bounds, mask, num_bins=num_bins, score="none")
    np.testing.assert_array_equal(got, exact_counts(logits, cutoff, bounds, num_bins, mask))


@pytest.mark.parametrize("kind", shapes.FINITE_KINDS + shapes.SPECIAL_KINDS)
def test_kinds_of_logits(histogram, implementation, kind):
  logits = shapes.make_logits(kind, 48, 19)
  cutoff = jax_router.route_with_cutoff(logits, 4, implementation=implementation)[1]
  got = histogram(logits, cutoff, (-1.013, 1.007), num_bins=100)
  if kind == "dead":
    assert (np.asarray(cutoff) == -np.inf).all()
  check(got, logits, np.asarray(cutoff), (-1.013, 1.007), 100, "sigmoid")


def test_special_tokens(histogram):
  """All NaN: not counted. A NaN cutoff: bin 0. A NaN logit scores 0; a cutoff of inf: last bin."""
  nan, inf = np.nan, np.inf
  logits = np.array([[nan, nan], [0, nan], [0, -inf], [inf, 0]], np.float32)
  cutoff = np.array([-inf, nan, 0.25, inf], np.float32)
  got = histogram(logits, cutoff, (-1, 1), num_bins=8)
  assert got.tolist() == [[1, 0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1, 0, 1]]
  got = histogram(logits, np.full(4, -inf, np.float32), (-1, 1), num_bins=8)
  assert (got == 0).all()


def test_padding(histogram, rng):
  logits, _, cutoff, bounds = make_case(60, 11, 3)
  where = rng.random(60) < 0.5
  got = histogram(logits, cutoff, bounds, where, num_bins=50)
  want = histogram(logits[where], cutoff[where], bounds, num_bins=50)
  np.testing.assert_array_equal(got, want)
  assert (histogram(logits, cutoff, bounds, np.zeros(60, bool), num_bins=50) == 0).all()
  logits[~where], cutoff[~where] = np.nan, np.nan
  np.testing.assert_array_equal(histogram(logits, cutoff, bounds, where, num_bins=50), want)


def test_microbatches_add_up(histogram):
  logits, _, cutoff, bounds = make_case(320, 64, 8)
  parts = [histogram(logits[s], cutoff[s], bounds) for s in (slice(127), slice(127, None))]
  whole = histogram(logits, cutoff, bounds)
  assert whole.shape == (64, 1000) and (whole.sum(-1) == 320).all()
  np.testing.assert_array_equal(sum(parts), whole)


BAD_BOUNDS = ((1, 1), (1, -1), (np.nan, 1), (-1, np.nan), (-np.inf, 1), (-1, np.inf))


@pytest.mark.parametrize("bounds", BAD_BOUNDS)
def test_bad_bounds_give_zeros_and_leave_the_bias(histogram, bounds):
  logits, bias, cutoff, good = make_case(40, 6, 2)
  got = histogram(logits, cutoff, bounds, num_bins=20)
  assert (got == 0).all()
  assert (histogram(logits, cutoff, good, num_bins=20).sum(-1) == 40).all()
  for counts in (got, np.ones_like(got)):
    new, new_bounds = quantile_bias(counts, bias, 2, bounds=jnp.asarray(bounds, jnp.float32))
    np.testing.assert_array_equal(new, bias)
    np.testing.assert_array_equal(new_bounds, np.float32([bias.min() - 1, bias.max() + 1]))


def test_empty(histogram):
  for shape in ((0, 7), (0, 4, 7), (3, 0, 7)):
    got = histogram(np.zeros(shape, np.float32), np.zeros(shape[:-1], np.float32), (-1, 1))
    assert got.shape == (*shape[:-2], 7, 1000) and (got == 0).all()


def test_repeats_are_identical_and_fully_written(kernel):
  logits, _, cutoff, bounds = make_case(9001, 21, 4)
  function = compiled(num_bins=77, implementation=kernel)
  arguments = jax.device_put((logits, cutoff, np.asarray(bounds, np.float32), None))
  first = jax.device_get(function(*arguments))
  check(first, logits, cutoff, bounds, 77, "sigmoid")
  for i in range(10):
    # Freed arrays of the same size full of rubbish are what an unwritten result would show.
    rubbish = jax.block_until_ready(jnp.full(first.shape, 1 + i, jnp.int32))
    del rubbish
    np.testing.assert_array_equal(jax.device_get(function(*arguments)), first)


@pytest.mark.gpu
@pytest.mark.parametrize("score", SCORES)
def test_the_gpu_counts_as_the_cpu(cuda_device, score):
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  for tokens, experts, num_bins in ((8192, 256, 1000), (513, 33, 4096), (70, 5, 70001)):
    logits, _, cutoff, bounds = make_case(tokens, experts, 4, score=score)
    arguments = (logits, cutoff, np.asarray(bounds, np.float32), None)
    results = []
    for name, device in (("cuda", cuda_device), ("cpu", jax.devices("cpu")[0])):
      with jax.default_device(device):
        function = compiled(num_bins=num_bins, score=score, implementation=name)
        results.append(np.asarray(function(*jax.device_put(arguments, device))))
    np.testing.assert_array_equal(*results)


# ---- bad arguments ----

X, C = np.zeros((5, 12), np.float32), np.zeros(5, np.float32)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"logits": X[0], "cutoff": C[0]}, ValueError, r"logits must have shape \[\.\.\., T, E\]"),
    ({"logits": X.astype(int)}, TypeError, "logits must be one of float32"),
    ({"cutoff": C[:4]}, ValueError, r"cutoff must have shape .* got \(4,\)"),
    ({"cutoff": C.astype(int)}, TypeError, "cutoff must have a floating dtype, got int"),
    ({"cutoff": 0.5}, TypeError, "cutoff must be an array, got float"),
    ({"bounds": (1, -1)}, ValueError, "finite with lower < upper, got"),
    ({"bounds": np.float32([np.nan, 1])}, ValueError, "finite with lower < upper, got"),
    ({"bounds": (1, 2, 3)}, ValueError, r"bounds must have shape \(2,\), got \(3,\)"),
    ({"bounds": 3.0}, TypeError, "bounds must be an array, got float"),
    ({"bounds": ("a", "b")}, TypeError, "bounds must be an array or two numbers"),
    ({"bounds": np.array([0, 1])}, TypeError, "bounds must have a floating dtype"),
    ({"num_bins": 0}, ValueError, "num_bins must be between 1 and 16777216, got 0"),
    ({"num_bins": 2**24 + 1}, ValueError, "num_bins must be between 1 and 16777216"),
    ({"num_bins": 10.0}, TypeError, "num_bins must be a static integer, got float"),
    ({"score": "softmax"}, ValueError, "score must be one of 'sigmoid', .* got 'softmax'"),
    ({"where": C}, TypeError, "where must have dtype bool, got float32"),
    ({"where": np.ones(4, bool)}, ValueError, r"where must have shape .* got \(4,\)"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_histogram_arguments(arguments, exception, text):
  with pytest.raises(exception, match=text):
    quantile_histogram(**{"logits": X, "cutoff": C, "bounds": (-1, 1)} | arguments)
