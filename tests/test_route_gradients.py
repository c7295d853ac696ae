"""Gradients of `route`: the float64 oracle, autodiff of the reference, second order."""

from __future__ import annotations

import functools
import itertools

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


def random_cotangent(rng, tokens: int, k: int) -> np.ndarray:
  return rng.normal(size=(tokens, k)).astype(np.float32)


def check(route_and_gradient, logits, k, cotangent, **options):
  """Compares values and gradient with the oracle; returns the gradient and the oracle's choice."""
  got, gradient = route_and_gradient(logits, k, cotangent, **options)
  want = oracle.check_route(got, logits, k, **options)
  assert want.clear.all()
  static = {n: v for n, v in options.items() if n in ("score", "renormalize", "scale")}
  oracle.check_gradient(gradient, logits, want, cotangent, **static)
  return np.asarray(gradient), want


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_oracle_gradient_agrees_with_central_differences(rng, score, renormalize):
  """The tests below rest on the oracle's formulas; this one rests on its weights alone."""
  logits = np.abs(shapes.make_logits("random", 6, 9)) / 3
  logits[1, :6], logits[2, 3], logits[3] = -np.inf, np.nan, np.nan
  for experts in (None, np.array([[0, 0, 3, 9]] * 6)):
    k = 4
    choice = oracle.route(logits, k, score=score, renormalize=renormalize, experts=experts)
    cotangent = rng.normal(size=(6, k))
    got, tolerance = oracle.gradient(
      logits, choice, cotangent, score=score, renormalize=renormalize, scale=1.7
    )
    assert (tolerance < 1e-4 * np.maximum(1, np.abs(got))).all()

    def value(x, choice=choice, cotangent=cotangent):
      weights = oracle.weigh(x, choice.experts, choice.active, score, renormalize).p
      return (1.7 * weights * cotangent * choice.active).sum(-1)

    x, step = oracle.widen(logits), 1e-5
    for e in range(9):
      up, down = x.copy(), x.copy()
      up[:, e] += step
      down[:, e] -= step
      scale = float(np.float32(1.7)) / 1.7
      want = scale * (value(up) - value(down)) / (2 * step)
      np.testing.assert_allclose(got[:, e], want, rtol=1e-6, atol=1e-8)


def check_random_cotangents(route_and_gradient, rng, score, renormalize, k):
  logits = shapes.make_logits("random", 65, 40)
  if score == "none":
    logits = np.abs(logits)  # A sum that cancels has no accurate gradient.
  cotangent = random_cotangent(rng, 65, k)
  options = {"score": score, "renormalize": renormalize, "scale": 2.5}
  gradient, _ = check(route_and_gradient, logits, k, cotangent, **options)
  assert np.abs(gradient).max() > 1e-3 or (renormalize and k == 1)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_random_cotangents(route_and_gradient, rng, score, renormalize):
  check_random_cotangents(route_and_gradient, rng, score, renormalize, 8)


@pytest.mark.parametrize("k", (1, 2, 40))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_every_k(kernel_route_and_gradient, rng, score, renormalize, k):
  check_random_cotangents(kernel_route_and_gradient, rng, score, renormalize, k)


@pytest.mark.parametrize("experts, k", ((1, 1), (7, 3), (130, 9), (257, 22), (2304, 36), (8192, 4)))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_sizes(kernel_route_and_gradient, rng, score, renormalize, experts, k):
  logits = np.abs(shapes.make_logits("random", 5, experts))
  cotangent = random_cotangent(rng, 5, k)
  check(kernel_route_and_gradient, logits, k, cotangent, score=score, renormalize=renormalize)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_kinds_of_logits(route_and_gradient, rng, score, renormalize):
  options = {"score": score, "renormalize": renormalize, "scale": 0.5}
  kinds = ("tied", "equal", "quantized", "lane", "nan", "minus_inf", "dead")
  for kind, dtype in itertools.product(kinds, DTYPES):
    logits = shapes.make_logits(kind, 24, 48, dtype)
    if score == "none":
      logits = np.abs(logits)  # A sum that cancels has no accurate gradient.
      logits[np.isposinf(logits)] = -np.inf
    cotangent = random_cotangent(rng, 24, 6)
    gradient, want = check(route_and_gradient, logits, 6, cotangent, **options)
    assert np.isfinite(gradient.astype(np.float32)).all()
    assert (gradient[want.degenerate] == 0).all()
    chosen = np.zeros(logits.shape, bool)
    np.put_along_axis(chosen, np.where(want.active, want.experts, want.experts[:, :1]), True, -1)
    if (score, renormalize) != ("softmax", False):
      assert (gradient[~chosen] == 0).all()
    assert (gradient[~np.isfinite(logits.astype(np.float32))] == 0).all()


@pytest.mark.parametrize("offset", (4096.0, -4096.0, 2.0**30))
@pytest.mark.parametrize("renormalize", (True, False))
def test_softmax_gradient_does_not_depend_on_a_common_offset(
  route_and_gradient, rng, renormalize, offset
):
  """Adding a constant to all logits changes neither weights nor gradient, however large it is."""
  logits = rng.integers(-2, 3, size=(20, 16)).astype(np.float32) * np.float32(128)
  if offset < 2**20:
    logits = logits / 128
  cotangent = random_cotangent(rng, 20, 5)
  plain, _ = check(route_and_gradient, logits, 5, cotangent, renormalize=renormalize)
  moved = logits + np.float32(offset)
  np.testing.assert_array_equal(moved - np.float32(offset), logits)
  gradient, _ = check(route_and_gradient, moved, 5, cotangent, renormalize=renormalize)
  np.testing.assert_allclose(gradient, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("magnitude", (1e30, 3e38, -1e30))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_gradients_of_huge_logits_are_finite(
  route_and_gradient, rng, score, renormalize, magnitude
):
  logits = np.full((2, 12), magnitude, np.float32)
  logits[1, ::2] = 1.0
  cotangent = random_cotangent(rng, 2, 4)
  _, gradient = route_and_gradient(logits, 4, cotangent, score=score, renormalize=renormalize)
  assert np.isfinite(gradient).all()
  if score == "softmax":
    choice = oracle.route(logits, 4, score=score, renormalize=renormalize)
    oracle.check_gradient(gradient, logits, choice, cotangent, renormalize=renormalize)


@pytest.mark.parametrize("scale", (0.0, -2.0, 1e-30, 1e30, 2e-38))
@pytest.mark.parametrize(
  "score, renormalize", (("softmax", True), ("softmax", False), ("sigmoid", True))
)
def test_scales(kernel_route_and_gradient, rng, score, renormalize, scale):
  logits = shapes.make_logits("random", 9, 32)
  options = {"score": score, "renormalize": renormalize, "scale": scale}
  check(kernel_route_and_gradient, logits, 4, random_cotangent(rng, 9, 4), **options)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_bias_groups_and_padding(kernel_route_and_gradient, rng, score, renormalize):
  logits = np.abs(shapes.make_logits("random", 60, 48))
  options = {
    "score": score,
    "renormalize": renormalize,
    "bias": rng.normal(size=48).astype(np.float32),
    "groups": Groups(6, 3),
    "where": rng.random(60) < 0.7,
    "scale": 2.5,
  }
  cotangent = random_cotangent(rng, 60, 5)
  gradient, _ = check(kernel_route_and_gradient, logits, 5, cotangent, **options)
  assert (gradient[~options["where"]] == 0).all()


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_given_experts_twice_add_up(route_and_gradient, rng, score, renormalize):
  logits = np.abs(shapes.make_logits("nan", 60, 24))
  experts = rng.integers(-2, 27, size=(60, 6)).astype(np.int32)
  experts[:4] = [[3] * 6, [24] * 6, [1, 1, 2, 2, 1, -1], [23, 0, 23, 0, 23, 0]]
  options = {"score": score, "renormalize": renormalize, "experts": experts}
  check(route_and_gradient, logits, 6, random_cotangent(rng, 60, 6), **options)


@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_cotangents_of_slots_without_an_expert_do_not_leak(
  route_and_gradient, rng, score, renormalize, poison
):
  """Padding, filled slots, degenerate rows, given experts out of range: whatever comes back."""
  logits = shapes.make_logits("dead", 36, 24)
  logits[::2] = np.abs(shapes.make_logits("random", 18, 24))
  where = np.arange(36) % 4 > 0
  experts = np.array(oracle.route(logits, 5).experts, np.int32)
  experts[:, 3] = 24 + np.arange(36) % 2
  for given in (None, experts):
    options = {"score": score, "renormalize": renormalize, "where": where, "experts": given}
    want = oracle.route(logits, 5, **options)
    clean = random_cotangent(rng, 36, 5)
    cotangent = np.where(want.active, clean, np.float32(poison))
    assert not want.active.all() and want.active.any()
    _, gradient = route_and_gradient(logits, 5, cotangent, **options)
    assert np.isfinite(gradient).all()
    static = {"score": score, "renormalize": renormalize}
    oracle.check_gradient(gradient, logits, want, cotangent, **static)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_weight_dtype_gradient(kernel_route_and_gradient, rng, dtype):
  """The cotangent arrives in the weights' dtype and is widened before anything else."""
  logits = shapes.make_logits("random", 20, 48)
  cotangent = random_cotangent(rng, 20, 5).astype(dtype)
  _, gradient = kernel_route_and_gradient(logits, 5, cotangent, weight_dtype=dtype)
  _, want = kernel_route_and_gradient(logits, 5, cotangent.astype(np.float32))
  np.testing.assert_array_equal(gradient, want)


def test_gradients_repeat_to_the_bit(kernel_route_and_gradient, rng):
  logits = shapes.make_logits("random", 130, 96)
  experts = rng.integers(0, 96, size=(130, 8)).astype(np.int32)
  cotangent = random_cotangent(rng, 130, 8)
  for options in ({}, {"renormalize": False}, {"experts": experts, "score": "sigmoid"}):
    first = np.asarray(kernel_route_and_gradient(logits, 8, cotangent, **options)[1])
    for _ in range(20):
      again = np.asarray(kernel_route_and_gradient(logits, 8, cotangent, **options)[1])
      assert again.tobytes() == first.tobytes()


def test_bias_where_and_experts_get_no_gradient():
  logits = jnp.asarray(shapes.make_logits("random", 6, 8))
  bias = jnp.linspace(0, 1, 8)

  def loss(logits, bias):
    return jnp.sum(jax_router.route(logits, 2, score="sigmoid", bias=bias).weights ** 2)

  assert (jax.grad(loss, argnums=1)(logits, bias) == 0).all()
  assert jax.grad(loss)(logits, bias).any()


# ---- second order, and the kernels against autodiff of the reference ----


def weights_of(logits, implementation, score, renormalize, **options):
  return jax_router.route(
    logits, 4, score=score, renormalize=renormalize, implementation=implementation, scale=1.5,
    **options,
  ).weights  # fmt: skip


def loss_of(logits, implementation, score, renormalize, **options):
  weights = weights_of(logits, implementation, score, renormalize, **options)
  return jnp.sum(jnp.sin(3 * weights) * jnp.arange(1, 5, dtype=jnp.float32)[None])


GIVEN = {
  "experts": np.array([[0, 1, 2, 3], [4, 4, 5, 10]] * 3 + [[1, 9, 2, -1]], np.int32),
  "where": np.arange(7) != 2,
}
BIASED = {"bias": np.array([0, 1, 0, 2, 0, 0, 0, 1, 0, 0], np.float32), "where": np.arange(7) != 2}


@pytest.mark.parametrize(
  "score, renormalize, options",
  (
    *((*variant, GIVEN) for variant in oracle.VARIANTS),
    ("softmax", True, BIASED),
    ("softmax", False, BIASED),
    ("sigmoid", True, BIASED),
  ),
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


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_check_grads_to_second_order(rng, score, renormalize):
  logits = jnp.asarray(rng.permuted(np.tile(np.arange(1, 9), (3, 1)), axis=1) / 4, jnp.float32)
  function = functools.partial(
    weights_of, implementation=None, score=score, renormalize=renormalize
  )
  check_grads(function, (logits,), order=2, modes=("rev",), atol=0.02, rtol=0.02, eps=1e-2)


def test_forward_mode_needs_the_reference():
  logits = jnp.asarray(shapes.make_logits("random", 4, 8))
  tangent = jnp.ones_like(logits).at[:, 0].set(2)

  def weights(implementation):
    return lambda x: (
      jax_router.route(x, 3, renormalize=False, implementation=implementation).weights
    )

  primal, tangent_out = jax.jvp(weights("reference"), (logits,), (tangent,))
  choice = oracle.route(logits, 3, renormalize=False)
  np.testing.assert_allclose(primal, choice.weights, rtol=1e-6)
  _, vjp = jax.vjp(weights(None), logits)
  for slot in range(3):
    cotangent = jnp.zeros((4, 3)).at[:, slot].set(1)
    along = jnp.sum(vjp(cotangent)[0] * tangent, axis=-1)
    np.testing.assert_allclose(tangent_out[:, slot], along, rtol=1e-5, atol=1e-6)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    jax.jvp(weights(None), (logits,), (tangent,))


# ---- what platforms without a kernel run ----


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_backward_in_plain_jax(rng, score, renormalize):
  """The reference in the place of both kernels: its marks, and its backward made of them."""
  options = _options.route_options(24, 5, score, renormalize, 1.5, None)
  dead = shapes.make_logits("dead", 18, 24)
  random = np.abs(shapes.make_logits("random", 18, 24))
  logits = np.concatenate([dead, random])
  where = jnp.arange(36) % 4 > 0
  given = jnp.asarray(rng.integers(-1, 26, size=(36, 5)), jnp.int32)

  @jax.jit
  def derivative(logits, cotangent, experts):
    results = _reference.route(
      logits, None, where, experts, options=options, index_dtype=np.dtype(np.int32)
    )
    dense = logits if score == "softmax" and not renormalize else None
    return results[:2], _reference.route_backward(
      cotangent, *results, dense, options=options, num_experts=24, dtype=logits.dtype
    )

  for experts, dtype in ((None, np.float32), (given, ml_dtypes.bfloat16)):
    static = {"score": score, "renormalize": renormalize, "scale": 1.5}
    x = logits.astype(dtype)
    want = oracle.route(x, 5, where=where, experts=experts, **static)
    clean = random_cotangent(rng, 36, 5)
    cotangent = np.where(want.active, clean, np.float32(np.nan))
    results, gradient = derivative(x, cotangent, experts)
    routing = jax_router.Routing(*results)
    oracle.check_route(routing, x, 5, where=where, experts=experts, **static)
    oracle.check_gradient(gradient, x, want, cotangent, **static)
