"""Gradients of `route_with_stats`: the float64 oracle, second order, and what is not computed."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import oracle
import oracle_stats
import programs
import shapes
from jax_router import Groups, _options, _reference_stats

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
ALL = ("weights", "score_sums", "z_sum")
SUBSETS = tuple(names for n in (1, 2, 3) for names in itertools.combinations(ALL, n))
VARIANTS = pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)


def random_cotangents(rng, shape, k: int, names=ALL) -> dict[str, np.ndarray]:
  """Cotangents for logits of a shape `(..., T, E)`."""
  of = {"weights": (*shape[:-1], k), "score_sums": (*shape[:-2], shape[-1]), "z_sum": shape[:-2]}
  return {name: np.asarray(rng.normal(size=of[name]), np.float32) for name in names}


def make_logits(kind, tokens, experts, score, dtype=np.float32):
  """Logits of which "none" has scores without cancellation."""
  logits = shapes.make_logits(kind, tokens, experts, dtype)
  if score == "none":
    logits = np.abs(logits)  # A sum that cancels has no accurate gradient.
    logits[np.isposinf(logits.astype(np.float32))] = -np.inf
  return logits


def check(stats_and_gradient, logits, k, cotangents, **options):
  """Compares values and gradient with the oracle; returns the gradient and the oracle's choice."""
  result, gradient = stats_and_gradient(logits, k, cotangents, **options)
  choice = oracle_stats.check_call(result, logits, k, **options)
  assert choice.clear.all()
  names = ("score", "renormalize", "scale", "where")
  static = {name: options[name] for name in names if name in options}
  oracle_stats.check_gradient(gradient, logits, choice, cotangents, **static)
  return np.asarray(gradient), choice


@VARIANTS
def test_oracle_gradient_agrees_with_central_differences(rng, score, renormalize):
  """The tests below rest on the oracle's formulas; this one rests on its values alone."""
  logits = np.abs(shapes.make_logits("random", 12, 9)).reshape(2, 6, 9) / 3
  logits[0, 1, :6], logits[0, 2, 3], logits[1, 3] = -np.inf, np.nan, np.nan
  where = np.arange(12).reshape(2, 6) != 5
  static = {"score": score, "renormalize": renormalize}
  choice = oracle.route(logits, 3, where=where, **static)
  cotangents = random_cotangents(rng, logits.shape, 3)
  got, tolerance = oracle_stats.gradient(logits, choice, cotangents, where=where, **static)
  assert (tolerance < 1e-3 * np.maximum(1, np.abs(got))).all()
  alive = oracle_stats.with_statistics(logits, where)

  def value(x):
    """Of each row on its own, what it adds to the sums."""
    weights = oracle.weigh(x, choice.experts, choice.active, score, renormalize).p
    total = (weights * cotangents["weights"] * choice.active).sum(-1)
    shares = oracle_stats.shares(x, score).values
    total += alive * (shares * cotangents["score_sums"][:, None]).sum(-1)
    return total + alive * cotangents["z_sum"][:, None] * oracle_stats.logsumexp(x)[0] ** 2

  x, step = oracle.widen(logits), 1e-5
  for e in range(9):
    up, down = x.copy(), x.copy()
    up[..., e] += step
    down[..., e] -= step
    want = (value(up) - value(down)) / (2 * step)
    np.testing.assert_allclose(got[..., e], want, rtol=1e-6, atol=1e-7)


# ---- joint gradients ----


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@VARIANTS
def test_every_subset_of_cotangents(kernel_stats_and_gradient, rng, score, renormalize, names):
  shape = (33, 40) if (len(names) + len(score) + renormalize) % 2 else (3, 22, 40)
  logits = make_logits("random", int(np.prod(shape[:-1])), 40, score).reshape(shape)
  cotangents = random_cotangents(rng, shape, 8, names)
  options = {"score": score, "renormalize": renormalize, "scale": 2.5}
  gradient, _ = check(kernel_stats_and_gradient, logits, 8, cotangents, **options)
  assert np.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[:3] + oracle.VARIANTS[5:7])
def test_every_implementation(stats_and_gradient, rng, score, renormalize):
  logits = make_logits("dead", 24, 30, score)
  logits[::2] = make_logits("nan", 12, 30, score)
  options = {"score": score, "renormalize": renormalize, "where": np.arange(24) % 5 > 0}
  cotangents = random_cotangents(rng, logits.shape, 5)
  gradient, _ = check(stats_and_gradient, logits, 5, cotangents, **options)
  assert np.isfinite(gradient).all() and not gradient[::5].any()


@pytest.mark.parametrize("experts, k", ((1, 1), (33, 1), (33, 8), (130, 8), (130, 70), (2304, 8)))
@VARIANTS
def test_sizes(kernel_stats_and_gradient, rng, score, renormalize, experts, k):
  logits = make_logits("random", 5, experts, score)
  cotangents = random_cotangents(rng, logits.shape, k)
  options = {"score": score, "renormalize": renormalize}
  check(kernel_stats_and_gradient, logits, k, cotangents, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@VARIANTS
def test_kinds_of_logits(kernel_stats_and_gradient, rng, score, renormalize, dtype):
  options = {"score": score, "renormalize": renormalize, "where": np.arange(24) % 7 > 0}
  for kind in ("tied", "equal", "quantized", "lane", "nan", "minus_inf", "dead"):
    logits = make_logits(kind, 24, 48, score, dtype)
    cotangents = random_cotangents(rng, logits.shape, 6)
    gradient, _ = check(kernel_stats_and_gradient, logits, 6, cotangents, **options)
    x = logits.astype(np.float32)
    assert np.isfinite(gradient.astype(np.float32)).all()
    assert not gradient[~options["where"]].any() and not gradient[~np.isfinite(x)].any()


@VARIANTS
def test_rows_without_a_choice_still_have_statistics(
  kernel_stats_and_gradient, rng, score, renormalize
):
  """By groups and bias no expert is left in some rows: the gradient is that of the sums alone."""
  logits = make_logits("random", 20, 12, score)
  logits[::2, 3:] = np.nan  # One group of four is left, two must be kept.
  options = {
    "score": score,
    "renormalize": renormalize,
    "groups": Groups(4, 2),
    "bias": rng.normal(size=12).astype(np.float32),
    "where": np.arange(20) % 5 > 0,
  }
  cotangents = random_cotangents(rng, logits.shape, 4)
  gradient, choice = check(kernel_stats_and_gradient, logits, 4, cotangents, **options)
  assert choice.degenerate[::2].all() and not choice.degenerate[1::2].any()
  for t in range(20):
    assert gradient[t, :3].any() == (t % 5 > 0)


@VARIANTS
def test_given_experts_twice_add_up(kernel_stats_and_gradient, rng, score, renormalize):
  logits = make_logits("nan", 60, 24, score)
  experts = rng.integers(-2, 27, size=(60, 6)).astype(np.int32)
  experts[:4] = [[3] * 6, [24] * 6, [1, 1, 2, 2, 1, -1], [23, 0, 23, 0, 23, 0]]
  options = {"score": score, "renormalize": renormalize, "experts": experts}
  cotangents = random_cotangents(rng, logits.shape, 6)
  check(kernel_stats_and_gradient, logits, 6, cotangents, **options)


@pytest.mark.parametrize("poison", (np.nan, np.inf))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[1:3])
def test_cotangents_without_an_expert_do_not_leak(
  stats_and_gradient, rng, score, renormalize, poison
):
  """Of slots without gradient, and of the statistics of a sequence that has none."""
  dead = make_logits("dead", 30, 24, score)
  dead[::2] = make_logits("random", 15, 24, score)
  logits = np.stack([dead, np.full((30, 24), -np.inf, np.float32), dead])
  where = np.stack([np.arange(30) % 4 > 0, np.ones(30, bool), np.zeros(30, bool)])
  options = {"score": score, "renormalize": renormalize, "where": where}
  choice = oracle.route(logits, 5, **options)
  cotangents = random_cotangents(rng, logits.shape, 5)
  cotangents["weights"] = np.where(choice.active, cotangents["weights"], np.float32(poison))
  cotangents["score_sums"][1:], cotangents["z_sum"][1:] = poison, poison
  _, gradient = stats_and_gradient(logits, 5, cotangents, **options)
  assert not np.asarray(gradient[1:]).any()
  first = {name: value[0] for name, value in cotangents.items()}
  one = oracle.route(logits[0], 5, **options | {"where": where[0]})
  static = {"score": score, "renormalize": renormalize, "where": where[0]}
  oracle_stats.check_gradient(gradient[0], logits[0], one, first, **static)


@pytest.mark.parametrize("magnitude", (1e18, 3e38, -1e18))
@pytest.mark.parametrize("score", oracle.SCORES)
def test_gradients_of_huge_logits_are_finite(kernel_stats_and_gradient, rng, score, magnitude):
  if score == "none":
    magnitude = np.clip(magnitude, -1e18, 1e37)  # The sum of the scores given must not overflow.
  logits = np.full((2, 12), magnitude, np.float32)
  logits[1, ::2] = np.sign(magnitude)
  cotangents = random_cotangents(rng, logits.shape, 4, ("weights", "score_sums"))
  _, gradient = kernel_stats_and_gradient(logits, 4, cotangents, score=score)
  assert np.isfinite(gradient).all()
  z = {"z_sum": np.float32(1e-6)}
  _, gradient = kernel_stats_and_gradient(logits, 4, z, score=score)
  choice = oracle.route(logits, 4, score=score)
  oracle_stats.check_gradient(gradient, logits, choice, z, score=score)


def test_gradients_repeat_to_the_bit(kernel_stats_and_gradient, rng):
  logits = shapes.make_logits("random", 130, 96)
  cotangents = random_cotangents(rng, logits.shape, 8)
  for options in ({}, {"renormalize": False}, {"score": "sigmoid"}):
    first = np.asarray(kernel_stats_and_gradient(logits, 8, cotangents, **options)[1])
    for _ in range(20):
      again = np.asarray(kernel_stats_and_gradient(logits, 8, cotangents, **options)[1])
      assert again.tobytes() == first.tobytes()


def test_bias_gets_no_gradient():
  logits = jnp.asarray(shapes.make_logits("random", 6, 8))

  def loss(logits, bias):
    routing, stats = jax_router.route_with_stats(logits, 2, score="sigmoid", bias=bias)
    return jnp.sum(routing.weights**2) + jnp.sum(stats.score_sums**2) + stats.z_sum

  by_logits, by_bias = jax.grad(loss, argnums=(0, 1))(logits, jnp.linspace(0, 1, 8))
  assert by_logits.any() and not by_bias.any()


# ---- second order ----


def losses_of(logits, implementation, **options) -> jax.Array:
  routing, stats = jax_router.route_with_stats(logits, 4, implementation=implementation, **options)
  weights = jnp.sum(jnp.sin(3 * routing.weights) * jnp.arange(1, 5, dtype=jnp.float32)[None])
  factor = jnp.linspace(0.5, 1, stats.score_sums.shape[-1], dtype=jnp.float32)
  return weights + jnp.sum(factor * jnp.sin(stats.score_sums)) + jnp.sin(stats.z_sum / 50)


# An odd number of tokens is one group, an even one several.
DEFAULT = (("softmax", True, 7), ("softmax", False, 8), ("sigmoid", True, 8))
SECOND_ORDER = [
  pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow)
  for case in ((*variant, tokens) for variant in oracle.VARIANTS for tokens in (7, 8))
]


@pytest.mark.parametrize("score, renormalize, tokens", SECOND_ORDER)
def test_second_order_is_the_references(kernel, rng, score, renormalize, tokens):
  logits = np.abs(rng.normal(size=(tokens, 10))).astype(np.float32) + np.float32(0.1)
  logits[4], logits[5, 1:], logits[6, 3] = np.nan, -np.inf, np.nan
  direction = rng.normal(size=logits.shape).astype(np.float32)
  options = {"score": score, "renormalize": renormalize, "where": np.arange(tokens) != 2}

  @functools.partial(jax.jit, static_argnums=1)
  def derivatives(logits, implementation):
    loss = functools.partial(losses_of, implementation=implementation, **options)
    gradient = jax.grad(loss)
    product = jax.grad(lambda x: jnp.vdot(gradient(x), direction))
    return loss(logits), gradient(logits), product(logits)

  got, want = derivatives(logits, kernel), derivatives(logits, "reference")
  for a, b in zip(got, want, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6)
  assert np.abs(got[2]).max() > 1e-3 and not np.asarray(got[2])[2].any()


def test_forward_mode_needs_the_reference(rng):
  logits = jnp.asarray(shapes.make_logits("random", 8, 10))
  tangent = jnp.asarray(rng.normal(size=(8, 10)), jnp.float32)

  def loss(implementation):
    return functools.partial(losses_of, implementation=implementation, score="sigmoid")

  _, got = jax.jit(lambda x, t: jax.jvp(loss("reference"), (x,), (t,)))(logits, tangent)
  want = jnp.vdot(jax.jit(jax.grad(loss(None)))(logits), tangent)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    jax.jvp(loss(None), (logits,), (tangent,))


# ---- what platforms without a kernel run ----


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[:3] + oracle.VARIANTS[5:7])
def test_backward_in_plain_jax(rng, score, renormalize):
  """The reference in the place of both kernels."""
  options = _options.route_options(24, 5, score, renormalize, 1.5, None)
  logits = make_logits("dead", 36, 24, score).reshape(2, 18, 24)
  logits[:, ::2] = make_logits("random", 18, 24, score).reshape(2, 9, 24)
  where = np.stack([np.arange(18) % 4 > 0, np.zeros(18, bool)])
  cotangents = random_cotangents(rng, logits.shape, 5)
  cotangents["score_sums"][1], cotangents["z_sum"][1] = np.nan, np.nan

  @jax.jit
  def derivative(logits, weights, scores, z):
    results = _reference_stats.stats(
      logits, None, where, None, options=options, index_dtype=np.dtype(np.int32)
    )
    choice = None if weights is None else (weights, *results[:3])
    return _reference_stats.stats_backward(logits, results[3], choice, scores, z, options=options)

  static = {"score": score, "renormalize": renormalize}
  choice = oracle.route(logits, 5, where=where, **static)
  for names in (ALL, ("score_sums",)):
    used = {name: cotangents[name] for name in names}
    gradient = np.asarray(derivative(logits, *(used.get(name) for name in ALL)))
    assert not gradient[1].any()
    one = oracle.Choice(*(x[0] for x in choice))
    first = {name: value[0] for name, value in used.items()}
    oracle_stats.check_gradient(
      gradient[0], logits[0], one, first, where=where[0], scale=1.5, **static
    )


# ---- what is not computed ----


def loss_of(names):
  """A loss of some of the results, with a gradient that needs their values."""

  def loss(logits, **options):
    routing, stats = jax_router.route_with_stats(logits, 2, **options)
    values = {
      "weights": jnp.sum(jnp.sin(routing.weights)),
      "score_sums": jnp.sum(jnp.sin(stats.score_sums)),
      "z_sum": jnp.sum(jnp.sin(stats.z_sum)),
    }
    return sum((values[name] for name in names), jnp.sum(logits))

  return loss


def backward_operands(function, *args) -> list[int]:
  """How many operands each joint backward kernel has."""
  text = jax.jit(function).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
  found = re.findall(r"custom_call @jax_router_stats_backward\(([^)]*)\)", text)
  return [len(operands.split(",")) for operands in found]


@pytest.mark.parametrize("shape", ((7, 12), (16, 12), (3, 16, 12)))
@pytest.mark.parametrize("names", ((), *SUBSETS), ids="+".join)
def test_unused_cotangents_cost_nothing(names, shape):
  """One forward, one backward with no more operands than it needs."""
  logits = jnp.ones(shape)
  gradient = jax.grad(loss_of(names))
  # The joint backward reads logits and softmax; weights come with the choice of three arrays.
  expected = 2 + 4 * ("weights" in names) + ("score_sums" in names) + ("z_sum" in names)
  joint = bool(set(names) - {"weights"})
  assert backward_operands(gradient, logits) == [expected] * joint
  assert programs.calls("stats", gradient, logits) == (int(bool(names)), int(joint))
  assert programs.calls("route", gradient, logits) == (0, int(names == ("weights",)))


@pytest.mark.parametrize("options", ({}, {"renormalize": False}, {"score": "sigmoid"}))
def test_named_residuals_save_the_choice_under_checkpoint(options):
  """One forward kernel with the policy, two without; the same gradient always."""
  x = jnp.asarray(shapes.make_logits("random", 8, 6))
  matrix = jnp.asarray(shapes.make_logits("random", 6, 16, seed=1))

  def layer(x, matrix):
    logits = jnp.tanh(x @ matrix)
    routing, stats = jax_router.route_with_stats(logits, 2, **options)
    losses = jax_router.load_balance_loss(stats, 2) + jax_router.z_loss(stats)
    return losses + jnp.sum(jnp.sin(routing.weights)) + jnp.sum(jnp.sin(stats.score_sums))

  def gradient(layer):
    return jax.value_and_grad(layer, argnums=(0, 1))

  save = jax.checkpoint_policies.save_only_these_names("jax_router")
  plain = gradient(layer)
  saving = gradient(jax.checkpoint(layer, policy=save))
  recomputing = gradient(jax.checkpoint(layer))
  want = jax.jit(plain)(x, matrix)
  for function, forwards in ((plain, 1), (saving, 1), (recomputing, 2)):
    assert programs.calls("stats", function, x, matrix) == (forwards, 1)
    programs.assert_same(jax.jit(function)(x, matrix), want)
