"""`route_with_stats` under JAX transformations: vmap, scan, jit, export."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
import oracle_stats
import programs
import shapes
from jax_router import Groups
from programs import assert_same, loop

calls = functools.partial(programs.calls, "stats")


def operands(rng, size: int, tokens: int, num_experts: int, k: int):
  """Batched logits, bias, where and given experts, the batch axis first."""
  logits = shapes.make_logits("quantized", size * tokens, num_experts)
  return (
    jnp.asarray(logits.reshape(size, tokens, num_experts)),
    jnp.asarray(rng.integers(-8, 9, size=(size, num_experts)) / 16, jnp.float32),
    jnp.asarray(rng.random((size, tokens)) < 0.8),
    jnp.asarray(rng.integers(-1, num_experts + 1, size=(size, tokens, k)), jnp.int32),
  )


NAMES = ("bias", "where", "experts")


def call_with(used: tuple[str, ...], **options):
  """`route_with_stats` as a function of logits and of the operands that are used."""

  def function(logits, *rest):
    return jax_router.route_with_stats(logits, 3, **dict(zip(used, rest, strict=True)), **options)

  return function


def loss(result) -> jax.Array:
  """A loss of everything that has a gradient, made of everything that has none, too."""
  routing, stats = result
  balance = jnp.sum(stats.expert_counts.astype(jnp.float32) * jnp.sin(stats.score_sums))
  return jnp.sum(jnp.sin(3 * routing.weights)) + balance / 10 + jnp.sum(jnp.sin(stats.z_sum / 100))


def gradient_of(function):
  return lambda logits, *rest: jax.grad(lambda x: loss(function(x, *rest)))(logits)


# ---- vmap ----

BATCHED = (
  # Used operands, all batch axes (logits first), the axis of the results.
  ((), (0,), 0),
  ((), (1,), 0),
  ((), (-1,), 0),
  (("bias",), (0, None), 0),
  (("bias",), (-1, 1), 0),
  (("bias",), (None, 0), 0),
  (("where",), (1, None), 0),
  (("where",), (None, 1), 0),
  (("experts",), (0, 0), 0),
  (("experts",), (None, 2), 0),
  (NAMES[:2], (2, None, 0), -1),
  (NAMES, (1, 0, 1, 2), 0),
)


@pytest.mark.parametrize(
  "used, in_axes, out_axes, tokens", [(*case, (5, 8)[i % 2]) for i, case in enumerate(BATCHED)]
)
def test_vmap_over_any_axis_and_operand_is_one_call(rng, used, in_axes, out_axes, tokens):
  """5 tokens are one group of tokens, 8 are several."""
  everything = dict(zip(("logits", *NAMES), operands(rng, 4, tokens, 12, 3), strict=True))
  chosen = [everything[name] for name in ("logits", *used)]
  args = [
    x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip(chosen, in_axes, strict=True)
  ]
  function = call_with(used, score="sigmoid") if tokens == 5 else call_with(used)
  batched = jax.vmap(function, in_axes, out_axes)
  assert_same(jax.jit(batched)(*args), loop(jax.jit(function), in_axes, out_axes, *args))
  assert calls(batched, *args) == (1, 0)
  gradient = gradient_of(function)
  batched = jax.vmap(gradient, in_axes, 1)
  assert_same(jax.jit(batched)(*args), loop(jax.jit(gradient), in_axes, 1, *args))
  assert calls(batched, *args) == (1, 1)


def test_vmap_with_groups(rng):
  logits, bias, _, _ = operands(rng, 4, 5, 12, 3)
  function = call_with(("bias",), score="sigmoid", groups=Groups(4, 2))
  for in_axes in ((0, 0), (0, None), (None, 0)):
    args = [x if a == 0 else x[0] for x, a in zip((logits, bias), in_axes, strict=True)]
    batched = jax.vmap(function, in_axes)
    assert_same(jax.jit(batched)(*args), loop(jax.jit(function), in_axes, 0, *args))
    assert calls(batched, *args) == (1, 0)


def test_nested_vmap_is_one_call(rng):
  """Over experts' biases outside, over the batch inside, the tokens in the middle."""
  logits = jnp.asarray(shapes.make_logits("random", 48, 10)).reshape(8, 6, 10)
  bias = jnp.asarray(rng.integers(-8, 9, size=(3, 10)) / 16, jnp.float32)
  function = call_with(("bias",), score="sigmoid")
  nested = jax.vmap(jax.vmap(function, (1, None)), (None, 0))
  _, stats = jax.jit(nested)(logits, bias)
  assert stats.expert_counts.shape == (3, 6, 10) and stats.z_sum.shape == (3, 6)
  assert calls(nested, logits, bias) == (1, 0)
  gradient = jax.vmap(jax.vmap(gradient_of(function), (1, None)), (None, 0))
  assert calls(gradient, logits, bias) == (1, 1)
  for i in range(3):
    for b in range(6):
      want = jax.jit(function)(logits[:, b], bias[i])
      assert_same(jax.tree.map(lambda x, i=i, b=b: x[i, b], stats), want[1])


def test_vmap_over_single_tokens_gives_each_its_statistics():
  """[E] logits are one token: mapped over, the statistics of every token on its own."""
  logits = shapes.make_logits("random", 6, 10)
  routing, stats = jax.vmap(lambda x: jax_router.route_with_stats(x, 3))(jnp.asarray(logits))
  oracle_stats.check_call(
    (routing._replace(weights=routing.weights[:, None], experts=routing.experts[:, None]), stats),
    logits[:, None],
    3,
  )
  assert stats.num_tokens.tolist() == [1] * 6


def test_grad_of_vmap_and_jacobian():
  logits = jnp.asarray(shapes.make_logits("random", 24, 8)).reshape(3, 8, 8)
  function = call_with((), renormalize=False, scale=2.0)

  def mapped_loss(x):
    return jnp.sum(jax.vmap(lambda row: loss(function(row)), 1)(jnp.swapaxes(x, 0, 1)))

  def looped(x):
    return sum(loss(function(row)) for row in x)

  got = jax.jit(jax.grad(mapped_loss))(logits)
  assert_same(got, jax.jit(jax.grad(looped))(logits))
  assert calls(jax.grad(mapped_loss), logits) == (1, 1)

  def sums(implementation):
    def function(x):
      _, stats = jax_router.route_with_stats(x, 3, renormalize=False, implementation=implementation)
      return stats.score_sums, stats.z_sum

    return function

  got = jax.jit(jax.jacrev(sums(None)))(logits[0])
  for a, b in zip(got, jax.jit(jax.jacfwd(sums("reference")))(logits[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  # One call for the rows of the Jacobian of either result.
  assert calls(jax.jacrev(sums(None)), logits[0]) == (1, 1)


# ---- control flow ----


def test_scan_with_its_gradient():
  logits = jnp.asarray(shapes.make_logits("random", 16, 16)).reshape(2, 8, 16)

  def step(carry, x):
    routing, stats = jax_router.route_with_stats(x + carry, 2, score="sigmoid")
    return carry + jax_router.load_balance_loss(stats, 2) / 100, (routing, stats)

  def by_hand(logits):
    carry, results = jnp.float32(0), []
    for x in logits:
      carry, result = step(carry, x)
      results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

  def scanned(logits):
    return jax.lax.scan(step, jnp.float32(0), logits)

  assert_same(jax.jit(scanned)(logits), jax.jit(by_hand)(logits))

  def total(run):
    return lambda logits: loss(run(logits)[1]) + 100 * run(logits)[0]

  assert_same(jax.jit(jax.grad(total(scanned)))(logits), jax.jit(jax.grad(total(by_hand)))(logits))


def test_cond_and_map():
  logits = jnp.asarray(shapes.make_logits("random", 16, 12)).reshape(2, 8, 12)
  best, even = call_with(()), call_with((), score="sigmoid")

  @jax.jit
  def either(flag, x):
    def chosen(x):
      return jax.lax.cond(flag, lambda y: loss(best(y)), lambda y: loss(even(y)), x)

    return jax.value_and_grad(chosen)(x)

  for flag, function in ((True, best), (False, even)):
    want = jax.jit(jax.value_and_grad(lambda x, f=function: loss(f(x))))(logits)
    assert_same(either(flag, logits), want)
  mapped = jax.jit(lambda x: jax.lax.map(best, x))(logits)
  assert_same(mapped, jax.jit(best)(logits))


# ---- jit and eager calls ----


def test_jit_traces_once_for_each_shape_and_option():
  traces = []

  @functools.partial(jax.jit, static_argnames=("k", "groups"))
  def routed(logits, k, groups=None):
    traces.append(logits.shape)
    return jax_router.route_with_stats(logits, k, groups=groups)

  for _ in range(3):
    routed(jnp.zeros((4, 8)), 2)
    routed(jnp.zeros((4, 8)), 2, groups=Groups(4, 2))
  assert len(traces) == 2
  routed(jnp.zeros((5, 8)), 2)
  assert len(traces) == 3


def test_eager_calls_equal_compiled_ones(rng):
  logits, bias, where, experts = operands(rng, 2, 8, 13, 3)
  for options in ({}, {"bias": bias[0]}, {"where": where}, {"experts": experts}):
    function = functools.partial(jax_router.route_with_stats, k=3, score="sigmoid", **options)
    assert_same(function(logits), jax.jit(function)(logits))
    arrays = {name: np.asarray(value) for name, value in options.items()}
    got = jax_router.route_with_stats(np.asarray(logits), 3, score="sigmoid", **arrays)
    assert_same(got, function(logits))


def test_implementations_have_their_custom_calls():
  logits = jnp.zeros((4, 8))
  for implementation, expected in (("reference", (0, 0)), ("cpu", (1, 0)), (None, (1, 0))):
    function = functools.partial(jax_router.route_with_stats, k=2, implementation=implementation)
    assert calls(function, logits) == expected


def test_implementations_agree(rng):
  """The default is the platform's kernel; its integers are the reference's."""
  logits, bias, where, _ = operands(rng, 2, 8, 13, 3)
  for options in ({"bias": bias[0], "where": where}, {"renormalize": False}):
    function = functools.partial(jax_router.route_with_stats, k=3, **options)
    reference = functools.partial(function, implementation="reference")
    (routing, stats), (expected, want) = jax.jit(function)(logits), jax.jit(reference)(logits)
    np.testing.assert_array_equal(routing.experts, expected.experts)
    np.testing.assert_allclose(routing.weights, expected.weights, rtol=3e-6)
    np.testing.assert_array_equal(stats.expert_counts, want.expert_counts)
    np.testing.assert_array_equal(stats.num_tokens, want.num_tokens)
    np.testing.assert_allclose(stats.score_sums, want.score_sums, rtol=1e-5)
    np.testing.assert_allclose(stats.z_sum, want.z_sum, rtol=1e-5)


# ---- export ----


def exported(function, *args, platforms=None) -> jax.export.Exported:
  checks = jax_router.DISABLE_JAX_EXPORT_CHECKS
  return jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*args)


@pytest.mark.parametrize("used", ((), ("bias", "where")), ids=("plain", "bias, where"))
def test_export_with_symbolic_tokens(rng, used):
  """One program for every number of tokens, with its gradient."""
  batch, tokens = jax.export.symbolic_shape("b, t")
  _, bias, _, _ = operands(rng, 1, 1, 12, 3)
  function = call_with(used, score="sigmoid")

  def everything(logits, *rest):
    return jax.tree.leaves((function(logits, *rest), gradient_of(function)(logits, *rest)))

  shape = [jax.ShapeDtypeStruct((batch, tokens, 12), jnp.float32)]
  if used:
    shape += [
      jax.ShapeDtypeStruct((12,), jnp.float32),
      jax.ShapeDtypeStruct((batch, tokens), jnp.bool_),
    ]
  again = exported(everything, *shape)
  for size in ((1, 1), (3, 7), (2, 40)):
    args = [jnp.asarray(shapes.make_logits("random", size[0] * size[1], 12)).reshape(*size, 12)]
    if used:
      args += [bias[0], jnp.asarray(rng.random(size) < 0.7)]
    assert_same(again.call(*args), jax.jit(everything)(*args))


def test_export_for_two_platforms_and_its_pulled_back_gradient(rng):
  pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
  logits, *_ = operands(rng, 2, 8, 12, 3)

  def function(x):
    routing, stats = call_with(())(x)
    return routing.weights, stats.score_sums, stats.z_sum

  data = exported(function, logits, platforms=["cpu", "cuda"]).serialize(vjp_order=1)
  again = jax.export.deserialize(data)
  assert set(again.platforms) == {"cpu", "cuda"}
  assert_same(tuple(again.call(logits)), jax.jit(function)(logits))

  def total(call):
    return lambda x: sum(jnp.sum(jnp.sin(y)) for y in call(x))

  got = jax.grad(total(again.call))(logits)
  assert_same(got, jax.jit(jax.grad(total(function)))(logits))


def test_export_needs_the_checks_disabled():
  function = jax.jit(functools.partial(jax_router.route_with_stats, k=3))
  with pytest.raises(ValueError, match="jax_router_stats"):
    jax.export.export(function, platforms=["cpu"])(jax.ShapeDtypeStruct((4, 12), jnp.float32))
