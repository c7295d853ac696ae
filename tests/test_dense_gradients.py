"""Gradients of `route_dense`: the float64 oracle, `route`, second order, memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_router
import oracle
import shapes
from jax_router import Groups, _options, _reference

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
POISON = (np.nan, np.inf, -np.inf)


def poisoned_cotangent(rng, choice: oracle.Choice, num_experts: int, dtype) -> np.ndarray:
  """Random where a chosen expert has a gradient, NaN and infinite everywhere else."""
  tokens = len(choice.experts)
  read = np.zeros((tokens, num_experts + 1), bool)
  np.put_along_axis(read, np.where(choice.active, choice.experts, num_experts), True, axis=-1)
  poison = rng.choice(np.array(POISON), size=(tokens, num_experts))
  return np.where(read[:, :-1], rng.normal(size=poison.shape), poison).astype(dtype)


def check(route_dense_and_gradient, rng, logits, k, **options):
  """Values and gradient against the oracle; the gradient, the choice and the cotangent."""
  static = {n: v for n, v in options.items() if n in ("score", "renormalize", "scale")}
  choice = oracle.route(logits, k, **options)
  assert choice.clear.all()
  cotangent = poisoned_cotangent(rng, choice, logits.shape[-1], logits.dtype)
  got, gradient = route_dense_and_gradient(logits, k, cotangent, **options)
  oracle.check_dense(got, logits, k, **options)
  slots = oracle.at_chosen(choice, cotangent)
  oracle.check_gradient(gradient, logits, choice, slots, **static)
  return np.asarray(gradient), choice, cotangent


def positive(logits):
  """A sum of scores that cancels has no accurate gradient."""
  logits = np.abs(logits)
  logits[np.isposinf(logits)] = -np.inf
  return logits


# ---- first order ----


def check_poisoned_cotangents(route_dense_and_gradient, rng, score, renormalize):
  """Only the cotangents of chosen experts are read: all others are NaN or infinite here."""
  options = {"score": score, "renormalize": renormalize, "scale": 2.5}
  for kind, dtype in zip(("random", "tied", "dead"), DTYPES, strict=True):
    logits = positive(shapes.make_logits(kind, 40, 40, dtype))
    gradient, _, _ = check(route_dense_and_gradient, rng, logits, 8, **options)
    assert np.isfinite(gradient.astype(np.float32)).all() and gradient.any()


def check_given_experts(route_dense_and_gradient, rng, score, renormalize):
  """An expert given twice gets the sum of its slots."""
  logits = positive(shapes.make_logits("nan", 60, 24))
  experts = rng.integers(-2, 27, size=(60, 6)).astype(np.int32)
  experts[:4] = [[3] * 6, [24] * 6, [1, 1, 2, 2, 1, -1], [23, 0, 23, 0, 23, 0]]
  options = {"score": score, "renormalize": renormalize, "experts": experts}
  check(route_dense_and_gradient, rng, logits, 6, **options)


CHECKS = pytest.mark.parametrize("check_gradient", (check_poisoned_cotangents, check_given_experts))


@CHECKS
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_gradients(kernel_route_dense_and_gradient, rng, score, renormalize, check_gradient):
  check_gradient(kernel_route_dense_and_gradient, rng, score, renormalize)


@CHECKS
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[1::5])
def test_gradients_of_every_implementation(
  route_dense_and_gradient, rng, score, renormalize, check_gradient
):
  check_gradient(route_dense_and_gradient, rng, score, renormalize)


@pytest.mark.parametrize("experts, k", ((1, 1), (7, 3), (33, 33), (130, 9), (257, 22), (896, 8)))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[::3])
def test_sizes(kernel_route_dense_and_gradient, rng, score, renormalize, experts, k):
  logits = positive(shapes.make_logits("random", 5, experts))
  options = {"score": score, "renormalize": renormalize}
  check(kernel_route_dense_and_gradient, rng, logits, k, **options)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_kernels_give_the_gradient_of_route(
  kernel_route_dense_and_gradient, kernel_route_and_gradient, rng, score, renormalize
):
  """To the bit, with the cotangents of the chosen experts in the slots and either map format."""
  options = {
    "score": score,
    "renormalize": renormalize,
    "bias": rng.normal(size=48).astype(np.float32),
    "groups": Groups(6, 3),
    "where": rng.random(60) < 0.7,
    "scale": 2.5,
  }
  for dtype in DTYPES[:2]:
    logits = positive(shapes.make_logits("random", 60, 48, dtype))
    function = kernel_route_dense_and_gradient
    gradient, choice, cotangent = check(function, rng, logits, 5, **options)
    slots = oracle.at_chosen(choice, cotangent).astype(np.float32)
    _, want = kernel_route_and_gradient(logits, 5, slots, **options)
    _, bitmap = function(logits, 5, cotangent, map_format="bitmap", **options)
    assert gradient.tobytes() == np.asarray(want).tobytes() == np.asarray(bitmap).tobytes()
    assert (gradient[~options["where"]] == 0).all() and gradient.any()


def test_bias_gets_no_gradient():
  logits = jnp.asarray(shapes.make_logits("random", 6, 8))

  def loss(logits, bias):
    return jnp.sum(jax_router.route_dense(logits, 2, score="sigmoid", bias=bias).probs ** 2)

  gradient, bias_gradient = jax.grad(loss, argnums=(0, 1))(logits, jnp.linspace(0, 1, 8))
  assert (bias_gradient == 0).all() and gradient.any()


# ---- second order, forward mode ----

GIVEN = {
  "experts": np.array([[0, 1, 2, 3], [4, 4, 5, 10]] * 3 + [[1, 9, 2, -1]], np.int32),
  "where": np.arange(7) != 2,
}
BIASED = {"bias": np.array([0, 1, 0, 2, 0, 0, 0, 1, 0, 0], np.float32), "where": np.arange(7) != 2}


def probs_of(logits, implementation, score, renormalize, **options):
  return jax_router.route_dense(
    logits, 4, score=score, renormalize=renormalize, implementation=implementation, scale=1.5,
    **options,
  ).probs  # fmt: skip


def loss_of(logits, **options):
  probs = probs_of(logits, **options).astype(jnp.float32)
  return jnp.sum(jnp.sin(3 * probs) * jnp.arange(1, 11, dtype=jnp.float32)[None])


@pytest.mark.parametrize(
  "score, renormalize, options",
  (*((*variant, GIVEN) for variant in oracle.VARIANTS), ("softmax", False, BIASED)),
)
def test_second_order_is_the_references(kernel, rng, score, renormalize, options):
  logits = np.abs(rng.normal(size=(7, 10))).astype(np.float32) + np.float32(0.1)
  logits[4], logits[5, 1:], logits[6, 3] = np.nan, -np.inf, np.nan
  direction = rng.normal(size=(7, 10)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=1)
  def derivatives(logits, implementation):
    loss = functools.partial(
      loss_of, implementation=implementation, score=score, renormalize=renormalize, **options
    )
    gradient = jax.grad(loss)
    product = jax.grad(lambda x: jnp.vdot(gradient(x), direction))
    return loss(logits), gradient(logits), product(logits)

  got, want = derivatives(logits, kernel), derivatives(logits, "reference")
  for a, b in zip(got, want, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6)
  assert np.abs(got[2]).max() > 1e-3


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[1:3])
def test_check_grads_to_second_order(rng, score, renormalize):
  logits = jnp.asarray(rng.permuted(np.tile(np.arange(1, 9), (3, 1)), axis=1) / 4, jnp.float32)
  function = functools.partial(probs_of, implementation=None, score=score, renormalize=renormalize)
  check_grads(function, (logits,), order=2, modes=("rev",), atol=0.02, rtol=0.02, eps=1e-2)


def test_second_order_in_bfloat16(kernel):
  """Tangents keep the dtype of the logits."""
  logits = jnp.asarray(shapes.make_logits("quantized", 7, 10), jnp.bfloat16)

  @functools.partial(jax.jit, static_argnums=1)
  def product(logits, implementation):
    options = {"implementation": implementation, "score": "sigmoid", "renormalize": True}
    gradient = jax.grad(functools.partial(loss_of, **options))
    return jax.grad(lambda x: jnp.sum(gradient(x).astype(jnp.float32) ** 2))(logits)

  got, want = product(logits, kernel), product(logits, "reference")
  assert got.dtype == jnp.bfloat16
  got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
  np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02 * np.abs(want).max())
  assert np.abs(got).max() > 0.01


def test_forward_mode_needs_the_reference():
  logits = jnp.asarray(shapes.make_logits("random", 4, 8))
  tangent = jnp.ones_like(logits).at[:, 0].set(2)

  def probs(implementation):
    return lambda x: jax_router.route_dense(x, 3, renormalize=False, implementation=implementation)

  primal, tangent_out = jax.jvp(lambda x: probs("reference")(x).probs, (logits,), (tangent,))
  oracle.check_dense(
    probs("reference")(logits)._replace(probs=primal), logits, 3, renormalize=False
  )
  _, vjp = jax.vjp(lambda x: probs(None)(x).probs, logits)
  for expert in range(8):
    along = jnp.sum(vjp(jnp.zeros((4, 8)).at[:, expert].set(1))[0] * tangent, axis=-1)
    np.testing.assert_allclose(tangent_out[:, expert], along, rtol=1e-5, atol=1e-6)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    jax.jvp(lambda x: probs(None)(x).probs, (logits,), (tangent,))


# ---- what platforms without a kernel run ----


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[::2])
def test_backward_in_plain_jax(rng, score, renormalize):
  """The reference in the place of both kernels."""
  options = _options.route_options(24, 5, score, renormalize, 1.5, None)
  logits = positive(shapes.make_logits("dead", 36, 24, ml_dtypes.bfloat16))
  where = jnp.arange(36) % 4 > 0
  static = {"score": score, "renormalize": renormalize, "scale": 1.5}
  choice = oracle.route(logits, 5, where=where, **static)
  cotangent = poisoned_cotangent(rng, choice, 24, logits.dtype)

  @jax.jit
  def derivative(logits, cotangent):
    probs, routing_map, *left = _reference.dense(
      logits, None, where, None, options=options, map_format="bitmap"
    )
    dense = logits if options.dense_gradient else None
    gradient = _reference.dense_backward(
      cotangent, *left, dense, options=options, num_experts=24, dtype=logits.dtype
    )
    return jax_router.DenseRouting(probs, routing_map), gradient

  routing, gradient = derivative(logits, cotangent)
  oracle.check_dense(routing, logits, 5, map_format="bitmap", where=where, **static)
  slots = oracle.at_chosen(choice, cotangent)
  oracle.check_gradient(gradient, logits, choice, slots, **static)


# ---- memory ----


@pytest.mark.parametrize("options", ({}, {"renormalize": False}, {"score": "sigmoid"}))
def test_gradient_keeps_the_choice_alone(options):
  """Beside operands and results, XLA allocates for k slots a token, not for E experts."""
  tokens, experts, k = 4096, 256, 8
  logits = jnp.zeros((tokens, experts))

  def gradient(logits, cotangent):
    def probs_and_map(x):
      result = jax_router.route_dense(x, k, map_format="bitmap", **options)
      return result.probs, result.routing_map

    probs, pull_back, routing_map = jax.vjp(probs_and_map, logits, has_aux=True)
    return probs, routing_map, pull_back(cotangent)

  analysis = jax.jit(gradient).lower(logits, logits).compile().memory_analysis()
  assert analysis is not None
  assert analysis.temp_size_in_bytes <= tokens * (8 * k + 4) + 4096
