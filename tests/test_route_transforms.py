"""`route` under JAX transformations: vmap, jit, scan, remat, export, eager calls."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
import programs
import shapes
from jax_router import Groups
from programs import assert_same, loop

calls = functools.partial(programs.calls, "route")


# ---- vmap ----


def operands(rng, size: int, tokens: int, num_experts: int, k: int):
  """Batched logits, bias, where and given experts, the batch axis first."""
  logits = shapes.make_logits("quantized", size * tokens, num_experts)
  return (
    jnp.asarray(logits.reshape(size, tokens, num_experts)),
    jnp.asarray(rng.integers(-8, 9, size=(size, num_experts)) / 16, jnp.float32),
    jnp.asarray(rng.random((size, tokens)) < 0.8),
    jnp.asarray(rng.integers(-1, num_experts + 1, size=(size, tokens, k)), jnp.int32),
  )


def call_with(used: tuple[bool, bool, bool], **options):
  """`route` as a function of logits and of those of bias, where and experts that are used."""
  names = [n for n, u in zip(("bias", "where", "experts"), used, strict=True) if u]

  def function(logits, *rest):
    return jax_router.route(logits, 3, **dict(zip(names, rest, strict=True)), **options)

  return function


BATCHED = (
  # Used operands and their batch axes, logits first.
  ((False, False, False), (0,), 0),
  ((False, False, False), (1,), 1),
  ((False, False, False), (-1,), -1),
  ((True, False, False), (0, None), 0),
  ((True, False, False), (0, 0), 1),
  ((True, False, False), (-1, 1), 0),
  ((True, False, False), (None, 0), 0),
  ((True, False, False), (None, -1), -1),
  ((False, True, False), (0, 0), 0),
  ((False, True, False), (1, None), 0),
  ((False, True, False), (None, 1), 1),
  ((False, False, True), (0, 0), 0),
  ((False, False, True), (None, 2), 0),
  ((False, False, True), (-1, None), 0),
  ((True, True, False), (2, None, 0), 0),
  ((True, True, False), (None, 0, None), 0),
  ((True, True, True), (1, 0, 1, 2), 1),
)


@pytest.mark.parametrize("used, in_axes, out_axes", BATCHED)
def test_vmap_over_any_axis_and_operand_is_one_call(rng, used, in_axes, out_axes):
  everything = operands(rng, 4, 5, 12, 3)
  chosen = [everything[0], *(x for x, u in zip(everything[1:], used, strict=True) if u)]
  args = [
    x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip(chosen, in_axes, strict=True)
  ]
  for options in ({"score": "sigmoid"}, {"renormalize": False}):
    function = call_with(used, **options)
    batched = jax.vmap(function, in_axes, out_axes)
    want = loop(function, in_axes, out_axes, *args)
    assert_same(jax.jit(batched)(*args), want)
    assert calls(batched, *args) == (1, 0)

    def gradient(*args, function=function):
      return jax.grad(lambda x: jnp.sum(jnp.sin(3 * function(x, *args[1:]).weights)))(args[0])

    batched = jax.vmap(gradient, in_axes, out_axes)
    want = loop(gradient, in_axes, out_axes, *args)
    assert_same(jax.jit(batched)(*args), want)
    assert calls(batched, *args) == (1, 1)


def test_vmap_with_groups(rng):
  logits, bias, _, _ = operands(rng, 4, 5, 12, 3)
  function = call_with((True, False, False), score="sigmoid", groups=Groups(4, 2))
  for in_axes in ((0, 0), (0, None), (None, 0)):
    args = [x if a == 0 else x[0] for x, a in zip((logits, bias), in_axes, strict=True)]
    batched = jax.vmap(function, in_axes)
    assert_same(jax.jit(batched)(*args), loop(function, in_axes, 0, *args))
    assert calls(batched, *args) == (1, 0)


def test_nested_vmap_is_one_call(rng):
  logits = jnp.asarray(shapes.make_logits("random", 24, 10)).reshape(2, 3, 4, 10)
  bias = jnp.asarray(rng.integers(-8, 9, size=(3, 10)) / 16, jnp.float32)
  function = call_with((True, False, False), score="sigmoid")
  inner = jax.vmap(function, in_axes=(1, 0))  # [2, 4, 10] over 4 and [4, 10]
  four = jnp.concatenate([bias, bias[:1]])
  nested = jax.vmap(inner, in_axes=(1, None), out_axes=2)
  got = jax.jit(nested)(logits, four)
  assert got.weights.shape == (4, 2, 3, 3)
  for i, j, t in itertools.product(range(2), range(3), range(4)):
    want = function(logits[i, j, t], four[t])
    np.testing.assert_array_equal(got.experts[t, i, j], want.experts)
    np.testing.assert_allclose(got.weights[t, i, j], want.weights, rtol=1e-6)
  assert calls(nested, logits, four) == (1, 0)


def test_vmap_of_one_row_and_of_no_rows():
  logits = jnp.asarray(shapes.make_logits("random", 6, 10))
  for rows in (logits, logits[:0]):
    batched = jax.vmap(lambda x: jax_router.route(x, 3))
    got, want = batched(rows), jax_router.route(rows, 3)
    assert_same(got, want)
    assert calls(batched, rows) == (1, 0)


def test_grad_of_vmap_and_jacobian(rng):
  logits = jnp.asarray(shapes.make_logits("random", 12, 8)).reshape(3, 4, 8)

  def weights(x):
    return jax_router.route(x, 3, renormalize=False, scale=2.0).weights

  def loss(x):
    return jnp.sum(jnp.sin(jax.vmap(weights, 1, 1)(x)))

  got = jax.jit(jax.grad(loss))(logits)
  assert_same(got, jax.grad(lambda x: jnp.sum(jnp.sin(weights(x))))(logits))
  assert calls(jax.grad(loss), logits) == (1, 1)

  got = jax.jit(jax.jacrev(weights))(logits[0])
  reference = functools.partial(
    jax_router.route, k=3, renormalize=False, scale=2.0, implementation="reference"
  )
  assert_same(got, jax.jacfwd(lambda x: reference(x).weights)(logits[0]))
  assert calls(jax.jacrev(weights), logits[0]) == (1, 1)


# ---- control flow ----


def test_scan_map_and_cond():
  logits = jnp.asarray(shapes.make_logits("random", 20, 16)).reshape(4, 5, 16)

  def step(carry, x):
    weights, experts = jax_router.route(x + carry, 2)
    return carry + weights.sum() / 100, (weights, experts)

  def by_hand(logits):
    carry, results = jnp.float32(0), []
    for x in logits:
      carry, result = step(carry, x)
      results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

  def scanned(logits):
    return jax.lax.scan(step, jnp.float32(0), logits)

  assert_same(jax.jit(scanned)(logits), by_hand(logits))

  def loss(run):
    return lambda logits: jnp.sum(jnp.sin(3 * run(logits)[1][0]))

  assert_same(jax.jit(jax.grad(loss(scanned)))(logits), jax.grad(loss(by_hand))(logits))

  mapped = jax.jit(lambda x: jax.lax.map(lambda row: jax_router.route(row, 2), x))(logits)
  assert_same(mapped, jax_router.route(logits, 2))

  @jax.jit
  def either(flag, x):
    best = functools.partial(jax_router.route, k=2)
    even = functools.partial(jax_router.route, k=2, score="sigmoid")
    return jax.lax.cond(flag, best, even, x)

  assert_same(either(True, logits), jax_router.route(logits, 2))
  assert_same(either(False, logits), jax_router.route(logits, 2, score="sigmoid"))


@pytest.mark.parametrize("options", ({}, {"renormalize": False}, {"score": "sigmoid"}))
def test_named_residuals_save_the_choice_under_checkpoint(options):
  """One forward kernel with the policy, two without; the same gradient always."""
  x = jnp.asarray(shapes.make_logits("random", 8, 6))
  matrix = jnp.asarray(shapes.make_logits("random", 6, 16, seed=1))

  def layer(x, matrix):
    weights, experts = jax_router.route(jnp.tanh(x @ matrix), 2, **options)
    return jnp.sum(jnp.sin(weights) * (1 + experts.astype(jnp.float32)))

  def gradient(layer):
    return jax.value_and_grad(layer, argnums=(0, 1))

  save = jax.checkpoint_policies.save_only_these_names("jax_router")
  plain = gradient(layer)
  saving = gradient(jax.checkpoint(layer, policy=save))
  recomputing = gradient(jax.checkpoint(layer))
  assert calls(plain, x, matrix) == (1, 1)
  assert calls(saving, x, matrix) == (1, 1)
  assert calls(recomputing, x, matrix) == (2, 1)
  want = jax.jit(plain)(x, matrix)
  assert_same(jax.jit(saving)(x, matrix), want)
  assert_same(jax.jit(recomputing)(x, matrix), want)


# ---- jit and eager calls ----


def test_jit_traces_once_for_each_shape_and_option():
  traces = []

  @functools.partial(jax.jit, static_argnames=("k", "groups"))
  def routed(logits, k, groups=None):
    traces.append(logits.shape)
    return jax_router.route(logits, k, groups=groups)

  for _ in range(3):
    routed(jnp.zeros((4, 8)), 2)
    routed(jnp.zeros((4, 8)), 2, groups=Groups(4, 2))
  routed(jnp.ones((4, 8)), 2)
  assert len(traces) == 2
  routed(jnp.zeros((5, 8)), 2)
  routed(jnp.zeros((4, 8)), 3)
  assert len(traces) == 4


def test_eager_calls_equal_compiled_ones_and_compile_once(rng, caplog):
  logits, bias, where, experts = operands(rng, 2, 9, 13, 3)

  def compiles(function) -> bool:
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
      jax.block_until_ready(function(logits))
    return any("Finished XLA compilation" in record.message for record in caplog.records)

  for options in ({}, {"bias": bias[0]}, {"where": where}, {"experts": experts}):
    function = functools.partial(jax_router.route, k=3, score="sigmoid", **options)
    assert compiles(function) and not compiles(function)
    assert_same(function(logits), jax.jit(function)(logits))


def test_numpy_arrays_are_accepted(rng):
  logits, bias, where, experts = (np.asarray(x) for x in operands(rng, 2, 9, 12, 3))
  for options in ({"bias": bias[0], "where": where}, {"experts": experts}):
    got = jax_router.route(logits, 3, **options)
    assert all(isinstance(x, jax.Array) for x in got)
    assert_same(got, jax_router.route(jnp.asarray(logits), 3, **options))


def test_named_scope_shows_in_the_compiled_program():
  def function(logits):
    with jax.named_scope("my_router"):
      return jax_router.route(logits, 2)

  text = jax.jit(function).lower(jnp.zeros((4, 8))).compile().as_text()
  line = next(line for line in text.splitlines() if 'custom_call_target="jax_router_route"' in line)
  assert "my_router" in line


def test_result_is_a_pytree():
  routing = jax_router.route(jnp.zeros((4, 8)), 2)
  leaves, structure = jax.tree.flatten(routing)
  assert [x.dtype for x in leaves] == [jnp.float32, jnp.int32]
  assert isinstance(jax.tree.unflatten(structure, leaves), jax_router.Routing)
  doubled = jax.jit(lambda r: r._replace(weights=2 * r.weights))(routing)
  assert isinstance(doubled, jax_router.Routing)


def test_implementation_of_the_reference_has_no_custom_call():
  logits = jnp.zeros((4, 8))
  reference = functools.partial(jax_router.route, k=2, implementation="reference")
  assert calls(reference, logits) == (0, 0)
  assert calls(functools.partial(jax_router.route, k=2, implementation="cpu"), logits) == (1, 0)


# ---- export ----


def exported(function, *args, platforms=None) -> jax.export.Exported:
  checks = jax_router.DISABLE_JAX_EXPORT_CHECKS
  return jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*args)


def serialized(function, *args, platforms=None) -> jax.export.Exported:
  """Exported, written out and read back."""
  pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
  data = exported(function, *args, platforms=platforms).serialize(vjp_order=1)
  return jax.export.deserialize(data)


@pytest.mark.parametrize("export", (exported, serialized))
def test_export_gives_the_same_values_and_gradients(rng, export):
  logits, bias, where, _ = operands(rng, 2, 9, 12, 3)
  for options in ({}, {"bias": bias[0], "score": "sigmoid", "where": where}):

    def function(x, options=options):
      return tuple(jax_router.route(x, 3, **options))

    again = export(function, logits)
    assert_same(tuple(again.call(logits)), function(logits))

    def loss(call, x):
      return jnp.sum(jnp.sin(call(x)[0]))

    got = jax.grad(functools.partial(loss, again.call))(logits)
    assert_same(got, jax.grad(functools.partial(loss, function))(logits))


@pytest.mark.parametrize("export", (exported, serialized))
@pytest.mark.parametrize("with_bias", (False, True))
def test_export_with_a_symbolic_batch_and_two_platforms(rng, export, with_bias):
  (batch,) = jax.export.symbolic_shape("batch")
  bias = jnp.asarray(rng.normal(size=12), jnp.float32) if with_bias else None

  def function(x):
    return tuple(jax_router.route(x, 3, score="sigmoid", bias=bias))

  shape = jax.ShapeDtypeStruct((batch, 12), jnp.float32)
  again = export(function, shape, platforms=["cpu", "cuda"])
  assert set(again.platforms) == {"cpu", "cuda"}
  for tokens in (1, 7, 64):
    logits = jnp.asarray(shapes.make_logits("random", tokens, 12))
    assert_same(tuple(again.call(logits)), function(logits))


def test_export_needs_the_checks_disabled():
  function = jax.jit(functools.partial(jax_router.route, k=3))
  with pytest.raises(ValueError, match="jax_router_route"):
    jax.export.export(function, platforms=["cpu"])(jax.ShapeDtypeStruct((4, 12), jnp.float32))
