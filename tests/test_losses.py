"""`load_balance_loss` and `z_loss`: values in float64, batches, other systems' formulas, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
import oracle
import oracle_stats
import shapes
from jax_router import RouterStats, load_balance_loss, route_with_stats, z_loss
from programs import put

EXPERTS, K = 12, 3


def make_logits(*lead: int) -> np.ndarray:
  tokens = int(np.prod(lead))
  return shapes.make_logits("random", tokens, EXPERTS).reshape(*lead, EXPERTS)


def wanted(logits, coeff=1.0, num_tokens=None, **options) -> tuple[np.ndarray, np.ndarray]:
  """Both losses in float64, from the logits alone."""
  experts = oracle.route(logits, K, **options).experts
  stats = oracle_stats.statistics(
    logits, experts, **{n: v for n, v in options.items() if n in ("score", "where")}
  )
  tokens = stats.num_tokens if num_tokens is None else np.asarray(num_tokens)
  safe = np.maximum(tokens, 1).astype(np.float64)
  products = (stats.expert_counts * stats.score_sums).sum(-1)
  balance = EXPERTS * coeff / (K * safe**2) * products
  return np.where(tokens > 0, balance, 0), np.where(tokens > 0, coeff * stats.z_sum / safe, 0)


def losses(logits, coeff=1.0, num_tokens=None, **options):
  _, stats = route_with_stats(logits, K, **options)
  return (
    load_balance_loss(stats, K, coeff, num_tokens=num_tokens),
    z_loss(stats, coeff, num_tokens=num_tokens),
  )


def check(got, want, rtol=3e-6):
  for a, b in zip(got, want, strict=True):
    assert a.dtype == np.float32 and a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-30)


# ---- values ----


@pytest.mark.parametrize("score", oracle.SCORES[:3])
def test_losses_of_tokens_and_of_sequences(implementation, rng, score):
  for lead in ((50,), (2, 3, 7)):
    logits, where = make_logits(*lead), rng.random(lead) < 0.7
    function = functools.partial(losses, implementation=implementation, score=score, coeff=0.25)
    got = jax.jit(function)(logits, where=where)
    assert got[0].shape == lead[:-1]
    check(got, wanted(logits, 0.25, score=score, where=where))


def test_loss_of_the_whole_batch_is_that_of_summed_statistics(rng):
  logits, where = make_logits(4, 24), rng.random((4, 24)) < 0.7
  stats = route_with_stats(logits, K, where=where)[1]
  total = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), stats)
  got = load_balance_loss(total, K), z_loss(total)
  check(got, wanted(logits.reshape(96, EXPERTS), where=where.reshape(96)))


def test_loss_of_the_global_batch_by_psum(make_mesh, rng):
  """Every shard of a `shard_map` has the loss, and its part of the gradient, of all tokens."""
  logits, where = make_logits(64), rng.random(64) < 0.7
  mesh = make_mesh(AxisType.Auto)

  def total(logits, where):
    _, stats = route_with_stats(logits, K, where=where)
    stats = jax.lax.psum(stats, "d")
    return load_balance_loss(stats, K, 0.5), z_loss(stats, 0.5)

  mapped = jax.shard_map(total, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P())
  args = put(mesh, logits, "d", None), put(mesh, where, "d")
  check(jax.jit(mapped)(*args), wanted(logits, 0.5, where=where))
  got = jax.jit(jax.grad(lambda *args: sum(mapped(*args))))(*args)
  want = jax.grad(lambda x: sum(losses(x, 0.5, where=where)))(logits)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def test_golden_loss():
  """The auxiliary loss of P = [[.5, .3, .2], [.1, .6, .3]] and its gradient."""

  def loss(score_sums):
    stats = RouterStats(
      jnp.array([3, 1, 2], jnp.int32), score_sums, jnp.float32(0), jnp.array(2, jnp.int32)
    )
    return load_balance_loss(stats, 1, 0.01)

  value, gradient = jax.value_and_grad(loss)(jnp.array([0.6, 0.9, 0.5]))
  np.testing.assert_allclose(value, 0.02775, rtol=1e-6)
  np.testing.assert_allclose(gradient, [0.0225, 0.0075, 0.015], rtol=1e-6)


@pytest.mark.parametrize("tokens", (1, 1000, 2**30))
def test_even_load_costs_the_coefficient(tokens):
  """And squares of large numbers of tokens neither overflow nor vanish."""
  counts = np.full(EXPERTS, tokens * K // EXPERTS, np.int32)
  stats = RouterStats(
    jnp.asarray(counts), jnp.full(EXPERTS, tokens / EXPERTS), jnp.float32(4.0 * tokens),
    jnp.array(tokens, jnp.int32),
  )  # fmt: skip
  even = int(counts[0]) * EXPERTS / (K * tokens)
  np.testing.assert_allclose(load_balance_loss(stats, K, 0.7), 0.7 * even, rtol=1e-6)
  np.testing.assert_allclose(z_loss(stats, 0.7), 2.8, rtol=1e-6)


@pytest.mark.parametrize("coeff", (0, -2.5, np.float32(0.125), 3))
def test_coefficients_multiply(coeff):
  logits = make_logits(30)
  check(losses(logits, coeff), wanted(logits, float(coeff)))


# ---- numbers of tokens ----


def test_given_numbers_of_tokens(rng):
  logits, where = make_logits(3, 20), rng.random((3, 20)) < 0.7
  given = (
    40, np.int64(40), np.array(40), jnp.array(40), np.array([5, 7, 0]), jnp.array([[1], [2]])[0],
    np.array([-1, 20, 30], np.int16), 0,
  )  # fmt: skip
  for number in given:
    want = wanted(logits, num_tokens=np.broadcast_to(number, 3), where=where)
    check(losses(logits, num_tokens=number, where=where), want)


def test_traced_number_of_tokens():
  logits, traces = make_logits(20), []

  @jax.jit
  def function(logits, number):
    traces.append(number)
    return losses(logits, num_tokens=number)

  for number in (20, 7, 0):
    check(function(logits, jnp.array(number)), wanted(logits, num_tokens=number))
  assert len(traces) == 1


def test_losses_map():
  """vmap over sequences with one number of tokens for all, and with one for each."""
  logits, numbers = make_logits(3, 20), np.array([20, 10, 0])
  stats = route_with_stats(logits, K)[1]

  def both(stats, number):
    return load_balance_loss(stats, K, num_tokens=number), z_loss(stats, num_tokens=number)

  check(jax.vmap(both, (0, None))(stats, jnp.array(10)), wanted(logits, num_tokens=[10] * 3))
  check(jax.vmap(both)(stats, jnp.asarray(numbers)), wanted(logits, num_tokens=numbers))


@pytest.mark.parametrize("number", (None, 0))
def test_no_tokens_cost_nothing_and_have_no_gradient(implementation, number):
  """All padding, a sequence of nothing else, or a number of tokens of 0."""
  logits = jnp.asarray(make_logits(2, 6))
  where = jnp.zeros((2, 6), bool) if number is None else None

  @jax.jit
  def value_and_gradient(logits):
    def total(x):
      both = losses(x, num_tokens=number, where=where, implementation=implementation)
      return sum(jnp.sum(loss) for loss in both)

    return jax.value_and_grad(total)(logits)

  value, gradient = value_and_gradient(logits)
  assert value == 0 and not np.asarray(gradient).any()
  for value in losses(jnp.zeros((0, EXPERTS))):
    assert value == 0


# ---- gradients ----


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_gradient_of_both_losses(implementation, rng, score):
  """Counts are constants: the cotangent of score_sums is made of them."""
  logits, where = make_logits(3, 20), rng.random((3, 20)) < 0.8

  @jax.jit
  def gradient(x):
    def total(x):
      both = losses(x, 0.5, score=score, where=where, implementation=implementation)
      return jnp.sum(both[0]) + jnp.sum(both[1])

    return jax.grad(total)(x)

  choice = oracle.route(logits, K, score=score, where=where)
  stats = oracle_stats.statistics(logits, choice.experts, score=score, where=where)
  tokens = stats.num_tokens.astype(np.float64)
  cotangents = {
    "score_sums": EXPERTS * 0.5 / (K * tokens**2)[:, None] * stats.expert_counts,
    "z_sum": 0.5 / tokens,
  }
  oracle_stats.check_gradient(
    gradient(logits), logits, choice, cotangents, score=score, where=where
  )


# ---- the formulas of other systems ----


def probabilities(logits) -> np.ndarray:
  return oracle.softmax(oracle.widen(logits))


def chosen(logits) -> np.ndarray:
  """One-hot rows of the experts, `[..., k, E]`."""
  return np.eye(EXPERTS)[oracle.route(logits, K).experts]


def test_coefficient_of_megatron():
  """E c / (k N**2) * sum(tokens_per_expert * sum of probabilities): coeff = c."""
  logits, c = make_logits(40), 0.01
  tokens_per_expert = chosen(logits).sum((0, 1))
  aggregated = probabilities(logits).sum(0)
  want = (aggregated * tokens_per_expert).sum() * (EXPERTS * c / (K * 40 * 40))
  np.testing.assert_allclose(losses(logits, c)[0], want, rtol=3e-6)


def test_coefficient_of_maxtext():
  """mean(density * density of probabilities) * E**2 * c of a batch: coeff = c k, then the mean."""
  logits, c = make_logits(4, 25), 0.02
  density = chosen(logits).sum(-2).mean(1)
  density_of_probabilities = probabilities(logits).mean(1)
  want = (density * density_of_probabilities).mean() * EXPERTS**2 * c
  np.testing.assert_allclose(jnp.mean(losses(logits, c * K)[0]), want, rtol=3e-6)


def test_coefficients_of_levanter():
  """c sum(f * mean probability) with f = load E / k: coeff = c / k; and c mean(logsumexp**2)."""
  logits, c = make_logits(40), 0.03
  load = chosen(logits).sum((0, 1)) / (40 * K)
  want = c * (load * EXPERTS / K * probabilities(logits).mean(0)).sum()
  np.testing.assert_allclose(losses(logits, c / K)[0], want, rtol=3e-6)
  want = c * (np.log(np.exp(logits.astype(np.float64)).sum(-1)) ** 2).mean()
  np.testing.assert_allclose(losses(logits, c)[1], want, rtol=3e-6)


# ---- errors ----


STATS = RouterStats(
  np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float32), np.zeros(2, np.float32),
  np.zeros(2, np.int32),
)  # fmt: skip

WRONG = (
  ({"num_tokens": 2.5}, TypeError, "num_tokens must be a static integer, got float"),
  ({"num_tokens": True}, TypeError, "num_tokens must be an integer, got True"),
  ({"num_tokens": -1}, ValueError, "num_tokens must be between 0 and 2147483647, got -1"),
  ({"num_tokens": 2**31}, ValueError, "num_tokens must be between 0 and 2147483647"),
  ({"num_tokens": np.float32(3)}, TypeError, "num_tokens must be a static integer, got float32"),
  ({"num_tokens": np.ones(2)}, TypeError, "num_tokens must have an integer dtype, got float"),
  ({"num_tokens": np.ones(2, bool)}, TypeError, "num_tokens must have an integer dtype, got bool"),
  ({"num_tokens": np.ones(3, int)}, ValueError, r"num_tokens must broadcast to \(2,\), got"),
  ({"num_tokens": np.ones((1, 2), int)}, ValueError, r"broadcast to \(2,\), got shape \(1, 2\)"),
  ({"coeff": "1"}, TypeError, "coeff must be a static Python number, got str"),
  ({"coeff": True}, TypeError, "coeff must be a static Python number, got bool"),
  ({"coeff": jnp.ones(())}, TypeError, "coeff must be a static Python number, got ArrayImpl"),
  ({"coeff": float("nan")}, ValueError, "coeff must be finite, got nan"),
  ({"stats": tuple(STATS)}, TypeError, "stats must be a jax_router.RouterStats, got tuple"),
  (
    {"stats": STATS._replace(score_sums=np.zeros((2, 5), np.float32))},
    ValueError,
    r"stats.score_sums must have shape .* = \(2, 4\), got \(2, 5\)",
  ),
  (
    {"stats": STATS._replace(z_sum=np.zeros((), np.float32))},
    ValueError,
    r"stats.z_sum must have shape .* = \(2,\), got \(\)",
  ),
)


@pytest.mark.parametrize("options, error, message", WRONG)
def test_wrong_arguments_are_named(options, error, message):
  options = {"stats": STATS} | options
  for function in (load_balance_loss, z_loss):
    with pytest.raises(error, match=message):
      function(**options | ({"k": 2} if function is load_balance_loss else {}))


@pytest.mark.parametrize(
  "k, error, message",
  (
    (0, ValueError, "k must be between 1 and num_experts = 4, got 0"),
    (5, ValueError, "k must be between 1 and num_experts = 4, got 5"),
    (1.0, TypeError, "k must be a static integer, got float"),
  ),
)
def test_wrong_k_is_named(k, error, message):
  with pytest.raises(error, match=message):
    load_balance_loss(STATS, k)


def test_numpy_statistics_are_accepted():
  stats = route_with_stats(make_logits(30), K)[1]
  arrays = RouterStats(*(np.asarray(x) for x in stats))
  for got, want in ((load_balance_loss(arrays, K), load_balance_loss(stats, K)),
                    (z_loss(arrays), z_loss(stats))):  # fmt: skip
    assert isinstance(got, jax.Array) and got == want


def test_documented_examples():
  _, stats = jax_router.route_with_stats(jnp.zeros((6, 4)), 4)
  assert load_balance_loss(stats, 4, 0.5).item() == 0.5
