"""`route_with_cutoff` against `route` and against sorted keys."""

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
from jax_router import route, route_with_cutoff
from programs import assert_equal, assert_same, calls, collectives, put
from test_route_sharding import KINDS

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
KINDS_OF_LOGITS = shapes.FINITE_KINDS + shapes.SPECIAL_KINDS


def own_keys(logits, score, bias, implementation) -> np.ndarray:
  """Keys `[T, E]` in float32, in descending order, from the scores that `route` gives."""
  experts = logits.shape[-1]
  given = np.broadcast_to(np.arange(experts, dtype=np.int32), logits.shape)
  static = (("implementation", implementation), ("renormalize", False), ("score", score))
  y = np.array(compiled("route", experts, static)(logits, {"experts": given}).weights)
  x = np.asarray(logits).astype(np.float32)
  y[~(oracle.widen(logits) > -np.inf).any(-1)] = 0  # a row without a number replays as uniform
  if score == "none" and bias is not None:
    y = np.where(x == -np.inf, x, y)
  with np.errstate(invalid="ignore"):
    keys = y if bias is None else y + bias
  dead = np.isnan(x) if bias is not None else ~(x > -np.inf)
  return -np.sort(-np.where(dead | np.isnan(keys), -np.inf, keys), axis=-1)


@functools.cache
def compiled(word, k, static):
  function = getattr(jax_router, word)
  return jax.jit(lambda logits, operands: function(logits, k, **operands, **dict(static)))


def check(implementation, logits, k, *, exact=True, bias=None, where=None, **static):
  static = {"score": "sigmoid"} | static
  operands = {"bias": bias, "where": where}
  words = ("route", "route_with_cutoff")
  items = tuple(sorted((static | {"implementation": implementation}).items()))
  want, (got, cutoff) = (compiled(word, k, items)(logits, operands) for word in words)
  assert isinstance(got, jax_router.Routing) and cutoff.dtype == np.float32
  assert got.weights.dtype == want.weights.dtype and got.experts.dtype == want.experts.dtype
  np.testing.assert_array_equal(got.experts, want.experts)
  if got.weights.dtype == np.float32:
    static = {name: static[name] for name in ("score", "renormalize", "scale") if name in static}
    oracle.check_route(got, logits, k, **operands, **static)
  else:
    np.testing.assert_array_equal(got.weights, want.weights)
  keys = own_keys(logits, static["score"], bias, implementation)[..., k]
  keys = keys if where is None else np.where(where, keys, -np.inf)
  if exact:
    np.testing.assert_array_equal(cutoff, keys)
  else:
    np.testing.assert_allclose(cutoff, keys, rtol=2e-6, atol=1e-7)
  return np.asarray(cutoff)


def random_bias(experts) -> np.ndarray:
  return np.random.default_rng(experts).normal(size=experts).astype(np.float32) / 4


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_every_score(kernel, score, renormalize, biased):
  logits = shapes.make_logits("random", 50, 33, DTYPES[biased])
  bias = random_bias(33) if biased else None
  for k in (1, 7, 32):
    check(kernel, logits, k, score=score, renormalize=renormalize, bias=bias, scale=2.5)


@pytest.mark.parametrize("kind", KINDS_OF_LOGITS)
def test_kinds_of_logits(kernel, kind):
  """Also rows without enough keys above -inf, or without any."""
  for i, score in enumerate(oracle.SCORES):
    if score == "none" and kind == "extreme":
      continue  # Sums of weights overflow.
    logits = shapes.make_logits(kind, 24, 12, DTYPES[i % 3])
    for bias in (None, random_bias(12)):
      cutoff = check(kernel, logits, 4, score=score, bias=bias)
      if kind == "dead" and bias is None:
        assert (cutoff == -np.inf).all()


@pytest.mark.parametrize("score", oracle.SCORES)
@pytest.mark.parametrize("kind", ("nan", "dead", "tied"))
def test_the_reference(kind, score):
  logits = shapes.make_logits(kind, 24, 12)
  for bias in (None, random_bias(12)):
    check("reference", logits, 4, score=score, bias=bias, exact=False)


def test_the_cutoff_in_float64(kernel):
  for score in oracle.SCORES:
    for bias in (None, random_bias(40)):
      logits = shapes.make_logits("random", 64, 40)
      y = oracle.scores(oracle.widen(logits), score)
      want = -np.sort(-(y if bias is None else y + bias), -1)[:, 6]
      got = route_with_cutoff(logits, 6, score=score, bias=bias, implementation=kernel)[1]
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_bias_that_forbids_experts(implementation):
  """A key of -inf is no key; where none is left, the weights are uniform."""
  logits = shapes.make_logits("random", 9, 5)
  for allowed in (5, 3, 2, 1, 0):
    bias = np.where(np.arange(5) < allowed, 0, -np.inf).astype(np.float32)
    cutoff = check(implementation, logits, 2, bias=bias, renormalize=True, scale=3.0)
    assert (np.isfinite(cutoff) == (allowed > 2)).all()


def test_softmax_of_improbable_experts(implementation):
  """A bias chooses experts of probability 0; their weights are still a softmax."""
  logits = np.array([[200, 1, 2, 3, -5]], np.float32)
  bias = np.array([0, 2, 3, 4, 5], np.float32)
  check(implementation, logits, 3, score="softmax", bias=bias)


def test_dtypes_padding_and_leading_dimensions(kernel, rng):
  logits = shapes.make_logits("random", 24, 20)
  where = rng.random(24) < 0.7
  cutoff = check(
    kernel, logits, 3,
    where=where, bias=random_bias(20), index_dtype=np.uint8, weight_dtype=jnp.bfloat16,
  )  # fmt: skip
  assert (np.isfinite(cutoff) == where).all()
  flat = route_with_cutoff(logits, 3, implementation=kernel)
  for lead in ((2, 3, 4), (24, 1)):
    got = route_with_cutoff(logits.reshape(*lead, 20), 3, implementation=kernel)
    assert got[0].weights.shape == (*lead, 3) and got[1].shape == lead
    assert_same(jax.tree.map(lambda a, b: jnp.reshape(a, b.shape), got, flat), flat)
  one, cutoff = route_with_cutoff(logits[4], 3, implementation=kernel)
  assert one.weights.shape == (3,) and cutoff.shape == ()
  assert cutoff == flat[1][4]
  empty = route_with_cutoff(logits[:0], 3, implementation=kernel)
  assert empty[0].experts.shape == (0, 3) and empty[1].shape == (0,)


# ---- gradients ----


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_gradient_is_that_of_route(kernel, rng, score, renormalize, biased):
  where = rng.random(24) < 0.8
  cotangent = rng.normal(size=(24, 4)).astype(np.float32)
  options = {"score": score, "renormalize": renormalize, "scale": 1.5, "where": where}
  options |= {"bias": random_bias(12) if biased else None, "implementation": kernel}

  @jax.jit
  @jax.grad
  def gradient(x):
    routing, cutoff = route_with_cutoff(x, 4, **options)
    return jnp.sum(routing.weights * cotangent) + jnp.sum(jnp.where(where, cutoff, 0.0))

  @jax.jit
  @jax.grad
  def gradient_of_route(x):
    return jnp.sum(route(x, 4, **options).weights * cotangent)

  for kind in ("random", "nan", "dead"):
    logits = shapes.make_logits(kind, 24, 12)
    want, got = gradient_of_route(logits), gradient(logits)
    assert np.abs(want).max() > 0 or kind == "dead"
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_forward_mode_of_the_reference():
  logits = jnp.asarray(shapes.make_logits("random", 5, 8))

  def function(x):
    return route_with_cutoff(x, 3, implementation="reference")[0].weights

  tangent = jnp.ones_like(logits).at[:, ::2].set(-1)
  got = jax.jvp(function, (logits,), (tangent,))[1]
  want = (function(logits + 1e-3 * tangent) - function(logits - 1e-3 * tangent)) / 2e-3
  np.testing.assert_allclose(got, want, atol=1e-3)


def test_one_kernel_each_way():
  """Also under a checkpoint that keeps the choice."""

  def loss(x):
    return jnp.sum(jnp.sin(route_with_cutoff(x, 3)[0].weights))

  logits = jnp.zeros((4, 9))
  assert calls("route", jax.grad(loss), logits) == (1, 1)
  kept = jax.checkpoint_policies.save_only_these_names("jax_router")
  assert calls("route", jax.grad(jax.checkpoint(loss, policy=kept)), logits) == (1, 1)


# ---- transformations ----


@pytest.mark.parametrize("axes", ((0, None), (1, None), (None, 0), (2, 1)))
def test_vmap(kernel, rng, axes):
  experts = 7
  logits = rng.normal(size=(3, 3, 3, experts)).astype(np.float32)
  bias = rng.normal(size=(3, experts) if axes[1] == 0 else (experts, 3)).astype(np.float32)
  if axes[1] is None:
    bias = bias[:, 0]

  def function(x, b):
    return route_with_cutoff(x, 2, bias=b, implementation=kernel)

  got = jax.vmap(function, axes)(logits, bias)
  for i in range(3):
    x, b = (
      a if axis is None else np.take(a, i, axis)
      for a, axis in zip((logits, bias), axes, strict=True)
    )
    assert_equal(jax.tree.map(lambda leaf, i=i: leaf[i], got), function(x, b))


@KINDS
@pytest.mark.parametrize("score", ("sigmoid", "softmax"))
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("shape, spec", (((64, 32), ("d", None)), ((8, 6, 32), ("d", None, None))))
def test_token_sharded_logits_need_no_collective(make_mesh, kind, score, biased, shape, spec):
  logits = shapes.make_logits("random", int(np.prod(shape[:-1])), 32).reshape(shape)
  bias = [random_bias(32)] if biased else []

  def function(logits, *rest):
    return route_with_cutoff(logits, 4, score=score, bias=rest[0] if rest else None)

  def gradient(logits, *rest):
    return jax.grad(lambda x: jnp.sum(jnp.sin(function(x, *rest)[0].weights)))(logits)

  want, want_gradient = jax.jit(function)(logits, *bias), jax.jit(gradient)(logits, *bias)
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    args = [put(mesh, logits, *spec), *(put(mesh, b, None) for b in bias)]
    assert collectives(function, *args) == set()
    assert collectives(gradient, *args) == set()
    assert_equal(jax.jit(function)(*args), want)
    assert_equal(jax.jit(gradient)(*args), want_gradient)


# ---- bad arguments ----


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"k": 12}, ValueError, "k must be between 1 and num_experts - 1 = 11, got 12"),
    ({"k": 0}, ValueError, "k must be between 1 and num_experts - 1 = 11, got 0"),
    ({"score": "relu"}, ValueError, "score must be one of .* got 'relu'"),
    ({"bias": np.zeros(11, np.float32)}, ValueError, r"bias must have shape .* got \(11,\)"),
    ({"index_dtype": np.float32}, TypeError, "index_dtype must be an integer dtype"),
    ({"weight_dtype": np.int32}, TypeError, "weight_dtype must be a floating dtype"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_arguments_are_refused_while_tracing(arguments, exception, text):
  with pytest.raises(exception, match=text):
    route_with_cutoff(**{"logits": np.zeros((5, 12), np.float32), "k": 3} | arguments)


def test_one_expert_has_no_cutoff():
  with pytest.raises(ValueError, match="k must be between 1 and num_experts - 1 = 0, got 1"):
    route_with_cutoff(np.zeros((5, 1), np.float32), 1)
