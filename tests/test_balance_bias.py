"""`quantile_bias` and `update_bias` against numpy, and that they balance the load."""

from __future__ import annotations

import doctest
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router import (
  _balance,
  _cutoff,
  quantile_bias,
  quantile_histogram,
  route,
  route_with_cutoff,
  update_bias,
)
from test_balance import make_case, required

# ---- quantile_bias ----


@pytest.mark.parametrize("tokens, experts, k", ((2000, 8, 2), (999, 33, 5), (64, 3, 2), (50, 7, 6)))
def test_bias_is_the_quantile_of_the_required_biases(tokens, experts, k):
  logits, bias, cutoff, bounds = make_case(tokens, experts, k)
  counts = quantile_histogram(logits, cutoff, bounds=bounds)
  new, new_bounds = quantile_bias(counts, bias, k, bounds=bounds)
  r = required(logits, cutoff, "sigmoid")
  want = np.quantile(r, k / experts, axis=0, method="inverted_cdf")
  # Quantile and solution lie in the same bin, and so do their means.
  width = (bounds[1] - bounds[0]) / 1000
  assert np.abs(new - (want - want.mean())).max() < 2 * width
  assert abs(np.mean(new)) < 1e-6
  np.testing.assert_array_equal(new_bounds, [new.min() - np.float32(1), new.max() + np.float32(1)])


def solve(histogram, k, bounds) -> np.ndarray:
  """The rule in Python integers and float64, before the mean is taken off."""
  low, high = bounds
  solved = []
  for row in np.asarray(histogram).tolist():
    target, num_bins, experts = sum(row) * k, len(row), len(histogram)
    index = cumulative = 0
    while (cumulative + row[index]) * experts < target:
      cumulative += row[index]
      index += 1
    fraction = (target - cumulative * experts) / (row[index] * experts)
    solved.append(low + (index + fraction) * (high - low) / num_bins)
  return np.array(solved)


def test_bias_solves_in_integers():
  """A float32 target would miss counts past 2**24."""
  rng = np.random.default_rng(5)
  for top in (3, 1000, 2**26):
    histogram = rng.integers(0, top, size=(24, 30)).astype(np.int32)
    # The target lies one count within a bin of two, in the midst of millions.
    histogram[0] = 0
    histogram[0, [3, 4, 5]] = [top * 5 - 1, 2, top * 19 - 1]
    for k in (1, 5, 23):
      want = solve(histogram, k, (-1, 2))
      got = quantile_bias(histogram, jnp.zeros(24), k, bounds=(-1, 2))[0]
      np.testing.assert_allclose(got, want - want.mean(), atol=1e-6)
  assert abs(solve(histogram, 5, (-1, 2))[0] - (-1 + 4.5 * 0.1)) < 1e-9


def test_bias_without_counts_stays():
  bias = np.array([0.5, 1.5, -0.25], np.float32)
  histogram = np.zeros((3, 4), np.int32)
  new, bounds = quantile_bias(histogram, bias, 1, bounds=(-1, 1))
  assert new.tolist() == bias.tolist() and bounds.tolist() == [-1.25, 2.5]
  histogram[0] = [3, 0, 0, 0]  # -1 + 1/3 of a bin
  new = quantile_bias(histogram, bias, 1, bounds=(-1, 1))[0]
  want = np.array([-1 + 0.5 / 3, 1.5, -0.25])
  np.testing.assert_allclose(new, want - want.mean(), atol=1e-7)


def test_bias_of_layers():
  rng = np.random.default_rng(0)
  histogram = rng.integers(0, 9, size=(2, 3, 6, 12)).astype(np.int32)
  bias = rng.normal(size=(2, 3, 6)).astype(np.float32)
  each = np.stack([np.full((2, 3), -1), rng.random((2, 3))], -1).astype(np.float32)
  for bounds in (np.float32([-1, 1]), each):
    new, new_bounds = quantile_bias(histogram, bias, 2, bounds=bounds)
    assert new.shape == (2, 3, 6) and new_bounds.shape == (2, 3, 2)
    for i in np.ndindex(2, 3):
      own = bounds if bounds.ndim == 1 else bounds[i]
      want, want_bounds = quantile_bias(histogram[i], bias[i], 2, bounds=own)
      np.testing.assert_allclose(new[i], want, atol=1e-6)
      np.testing.assert_allclose(new_bounds[i], want_bounds, atol=1e-6)


# ---- update_bias ----


def test_update_bias_follows_the_exact_sign():
  rng = np.random.default_rng(1)
  bias = rng.normal(size=(5, 7)).astype(np.float32)
  big = 2**31 - 1
  counts = rng.integers(0, 5, size=(5, 7))
  counts[1] = 4
  counts[2] = [big - 1, big, big, big, big, big, big]  # a sum past 2**31, means between neighbours
  counts[3] = [2**25, 2**25 + 1, 2**25 + 2, 2**25 + 1, 2**25, 2**25 + 2, 2**25 + 1]
  sign = np.sign(counts.sum(-1, keepdims=True) - 7 * counts).astype(np.float32)
  assert {-1, 0, 1} == set(sign.ravel()) and sign[2].tolist() == [1] + [-1] * 6
  for rate in (0.001, jnp.float32(0.25)):
    got = jax.jit(update_bias)(bias, counts.astype(np.int32), rate)
    np.testing.assert_array_equal(got, bias + np.float32(rate) * sign)
  got = update_bias(bias, counts.astype(np.uint32))
  np.testing.assert_array_equal(got, bias + np.float32(0.001) * sign)
  few = rng.integers(0, 9, size=300).astype(np.int8)
  want = np.sign(int(few.sum()) - 300 * few.astype(int)).astype(np.float32)
  np.testing.assert_array_equal(update_bias(np.zeros(300, np.float32), few, 1.0), want)


# ---- convergence ----


def test_quantile_balancing_converges_without_retracing():
  """Skewed logits: within 20 steps every expert gets the mean load to a tenth."""
  tokens, experts, k = 4096, 16, 2
  traces = []

  @jax.jit
  def step(key, bias, bounds):
    traces.append(None)
    skew = jnp.linspace(-1, 1, experts)
    logits = jax.random.normal(key, (tokens, experts)) + skew[None]
    routing, cutoff = route_with_cutoff(logits, k, bias=bias)
    load = jnp.zeros(experts, jnp.int32).at[routing.experts].add(1)
    histogram = quantile_histogram(logits, cutoff, bounds=bounds)
    return load, *quantile_bias(histogram, bias, k, bounds=bounds)

  bias, bounds = jnp.zeros(experts), jnp.array([-1.0, 1.0])
  loads = []
  for i in range(20):
    load, bias, bounds = step(jax.random.key(i), bias, bounds)
    assert load.sum() == tokens * k
    loads.append(load.max() * experts / (tokens * k))
  assert len(traces) == 1
  assert loads[0] > 2.5 and loads[-1] < 1.1


def test_sign_updates_converge():
  experts, k, skew = 16, 2, np.linspace(-1, 1, 16).astype(np.float32)
  logits = np.random.default_rng(0).normal(size=(4096, experts)).astype(np.float32) + skew

  @jax.jit
  def step(bias):
    chosen = route(logits, k, score="sigmoid", bias=bias).experts
    counts = jnp.zeros(experts, jnp.int32).at[chosen].add(1)
    return update_bias(bias, counts, 0.01), counts

  bias, first = step(jnp.zeros(experts))
  for _ in range(100):
    bias, counts = step(bias)
  assert int(first.max()) > 2.5 * 4096 * k / experts
  assert int(counts.max()) < 1.2 * 4096 * k / experts


def test_documentation_runs():
  """The checks of the load in the page, and the examples in the docstrings."""
  for module in (_balance, _cutoff):
    results = doctest.testmod(module)
    assert results.attempted >= 4 and results.failed == 0
  path = pathlib.Path(__file__).parents[1] / "docs" / "balancing.md"
  blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
  assert len(blocks) == 4
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for block in blocks:
      assert "assert " in block
      exec(compile(block, str(path), "exec"), {})


# ---- bad arguments ----

H, Z, B = np.zeros((12, 20), np.int32), np.zeros(12, np.float32), (-1, 1)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"k": 12}, ValueError, "k must be between 1 and num_experts - 1 = 11, got 12"),
    ({"k": 0}, ValueError, "k must be between 1 and"),
    ({"histogram": H.astype(np.float32)}, TypeError, "histogram must have dtype int32, got float"),
    ({"histogram": H[0]}, ValueError, r"histogram must have shape \[\.\.\., E, bins\]"),
    ({"histogram": np.zeros((70000, 1), np.int32)}, ValueError, "bias must have shape"),
    ({"bias": Z[:3]}, ValueError, r"bias must have shape .* got \(3,\)"),
    ({"bias": Z.astype(np.float16)}, TypeError, "bias must have dtype float32, got float16"),
    ({"bounds": (2, 1)}, ValueError, "finite with lower < upper"),
    ({"bounds": np.zeros((3, 2))}, ValueError, r"bounds must have shape \(2,\), got \(3, 2\)"),
  ),
)
def test_bad_bias_arguments(arguments, exception, text):
  with pytest.raises(exception, match=text):
    quantile_bias(**{"histogram": H, "bias": Z, "k": 2, "bounds": B} | arguments)


def test_too_many_experts_for_exact_integers():
  many = np.zeros((2**16 + 1, 1), np.int32)
  with pytest.raises(ValueError, match="histogram must have at most 65536 experts, got 65537"):
    quantile_bias(many, np.zeros(2**16 + 1, np.float32), 2, bounds=B)


@pytest.mark.parametrize(
  "bias, counts, rate, exception, text",
  (
    (Z, Z, 0.1, TypeError, "expert_counts must have an integer dtype, got float32"),
    (Z, H[0], 0.1, ValueError, "expert_counts must have shape bias.shape"),
    (H[:, 0], H[:, 0], 0.1, TypeError, "bias must have dtype float32, got int32"),
    (np.float32(0), H[0, 0], 0.1, ValueError, r"bias must have shape \[\.\.\., E\]"),
    (Z, H[:, 0], "a", TypeError, "rate must be a number or a scalar array, got str"),
    (Z, H[:, 0], Z, ValueError, r"rate must have shape a scalar"),
  ),
)
def test_bad_update_arguments(bias, counts, rate, exception, text):
  with pytest.raises(exception, match=text):
    update_bias(bias, counts, rate)
