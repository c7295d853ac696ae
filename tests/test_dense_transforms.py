"""`route_dense` under JAX transformations, and on sharded logits."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router
import programs
import shapes
from jax_router import Groups
from programs import assert_equal, assert_same, collectives, loop, put

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
EXPERTS = 12
calls = functools.partial(programs.calls, "dense")


def make_logits(*shape: int) -> jax.Array:
  tokens = int(np.prod(shape[:-1]))
  return jnp.asarray(shapes.make_logits("random", tokens, shape[-1])).reshape(shape)


def loss(routing) -> jax.Array:
  """A polynomial of probs with another factor for each expert, and of the map."""
  probs, routing_map = routing
  factor = jnp.linspace(0.5, 1, probs.shape[-1], dtype=jnp.float32)
  factor = jnp.expand_dims(factor, range(probs.ndim - 1))
  chosen = jnp.mean(routing_map.astype(jnp.bool_), axis=-1, keepdims=True)
  return jnp.sum(probs * (1 + probs) * factor * chosen)


def gradient_of(function):
  return lambda logits, *rest: jax.grad(lambda x: loss(function(x, *rest)))(logits)


# ---- vmap ----


def call_with(names: tuple[str, ...], **options):
  """`route_dense` as a function of logits and of the operands named."""

  def function(logits, *rest):
    operands = dict(zip(names, rest, strict=True))
    return jax_router.route_dense(logits, 3, **operands, **options)

  return function


BATCHED = (
  # Operands beside the logits, and all batch axes, logits first.
  ((), (0,), 0),
  ((), (1,), 1),
  ((), (-1,), -1),
  (("bias",), (0, None), 0),
  (("bias",), (None, -1), -1),
  (("where",), (None, 1), 1),
  (("experts",), (-1, None), 0),
  (("bias", "where"), (2, None, 0), 0),
  (("bias", "where", "experts"), (1, 0, 1, 2), 1),
)


@pytest.mark.parametrize("names, in_axes, out_axes", BATCHED)
def test_vmap_over_any_axis_and_operand_is_one_call(rng, names, in_axes, out_axes):
  everything = {
    "bias": jnp.asarray(rng.integers(-8, 9, size=(4, EXPERTS)) / 16, jnp.float32),
    "where": jnp.asarray(rng.random((4, 5)) < 0.8),
    "experts": jnp.asarray(rng.integers(-1, EXPERTS + 1, size=(4, 5, 3)), jnp.int32),
  }
  chosen = [make_logits(4, 5, EXPERTS), *(everything[name] for name in names)]
  args = [
    x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip(chosen, in_axes, strict=True)
  ]
  map_format = "bitmap" if len(names) % 2 else "bytemap"
  function = call_with(names, map_format=map_format, score="sigmoid")
  batched = jax.vmap(function, in_axes, out_axes)
  assert_same(jax.jit(batched)(*args), loop(function, in_axes, out_axes, *args))
  assert calls(batched, *args) == (1, 0)
  gradient = gradient_of(call_with(names, map_format=map_format, renormalize=False))
  batched = jax.vmap(gradient, in_axes, out_axes)
  assert_same(jax.jit(batched)(*args), loop(gradient, in_axes, out_axes, *args))
  assert calls(batched, *args) == (1, 1)


@pytest.mark.parametrize("options", ({"renormalize": False}, {"score": "sigmoid"}))
def test_nested_vmap_and_gradient_of_vmap(options):
  logits = make_logits(2, 3, 4, EXPERTS)
  route = functools.partial(jax_router.route_dense, k=3, map_format="bitmap", **options)
  nested = jax.vmap(jax.vmap(route, 1, 1), 0, 0)
  assert_same(jax.jit(nested)(logits), route(logits))
  assert calls(nested, logits) == (1, 0)
  assert_same(jax.jit(gradient_of(nested))(logits), gradient_of(route)(logits))
  assert calls(gradient_of(nested), logits) == (1, 1)

  def probs(x):
    return route(x).probs

  plain = functools.partial(route, implementation="reference")
  want = jax.jacfwd(lambda x: plain(x).probs)(logits[0, 0])
  assert_same(jax.jit(jax.jacrev(probs))(logits[0, 0]), want)
  assert calls(jax.jacrev(probs), logits[0, 0]) == (1, 1)


# ---- control flow, remat, eager calls ----


def test_scan():
  logits = make_logits(4, 5, EXPERTS)

  def step(carry, x):
    probs, routing_map = jax_router.route_dense(x + carry, 2)
    return carry + probs[:, 0].sum() / 100, (probs, routing_map)

  def by_hand(logits):
    carry, results = jnp.float32(0), []
    for x in logits:
      carry, result = step(carry, x)
      results.append(result)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

  def scanned(logits):
    return jax.lax.scan(step, jnp.float32(0), logits)

  assert_same(jax.jit(scanned)(logits), by_hand(logits))
  got, want = (jax.grad(lambda x, run=run: loss(run(x)[1])) for run in (scanned, by_hand))
  assert_same(jax.jit(got)(logits), want(logits))


@pytest.mark.parametrize("options", ({}, {"renormalize": False}, {"score": "sigmoid"}))
def test_named_residuals_save_the_choice_under_checkpoint(options):
  """One forward kernel with the policy, two without; the same gradient always."""
  x, matrix, values = make_logits(8, 6), make_logits(6, 16), make_logits(8, 16)

  def layer(x, matrix):
    return jnp.sum(jax_router.route_dense(jnp.tanh(x @ matrix), 2, **options).probs * values)

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


def test_named_probs_are_saved_for_a_backward_that_needs_them():
  """A loss that is not linear in probs routes again unless probs have a name as well."""
  logits = make_logits(8, 16)

  def layer(name, x):
    probs = jax_router.route_dense(jnp.tanh(x), 2).probs
    if name:
      probs = jax.ad_checkpoint.checkpoint_name(probs, "probs")
    return jnp.sum(jnp.sin(probs))

  save = jax.checkpoint_policies.save_only_these_names("jax_router", "probs")
  for name, forwards in ((True, 1), (False, 2)):
    gradient = jax.grad(jax.checkpoint(functools.partial(layer, name), policy=save))
    assert calls(gradient, logits) == (forwards, 1)
    assert_same(jax.jit(gradient)(logits), jax.grad(functools.partial(layer, False))(logits))


def test_eager_calls_and_numpy_arrays():
  logits = shapes.make_logits("random", 9, 13)
  for map_format in ("bytemap", "bitmap"):
    function = functools.partial(jax_router.route_dense, k=3, map_format=map_format)
    assert_same(function(logits), jax.jit(function)(jnp.asarray(logits)))


def test_implementation_of_the_reference_has_no_custom_call():
  for implementation, want in (("reference", (0, 0)), ("cpu", (1, 1)), (None, (1, 1))):
    function = functools.partial(jax_router.route_dense, k=2, implementation=implementation)
    assert calls(gradient_of(function), jnp.zeros((4, 8))) == want


# ---- lowering for other platforms, export ----


def lowered(platform: str, function) -> str:
  logits = jax.ShapeDtypeStruct((16, EXPERTS), jnp.float32)
  return jax.jit(function).trace(logits).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("map_format", ("bytemap", "bitmap"))
def test_other_platforms_get_plain_jax(map_format):
  function = functools.partial(jax_router.route_dense, k=3, map_format=map_format)
  assert "@jax_router" not in lowered("tpu", gradient_of(function))
  asked = functools.partial(function, implementation="cpu")
  with pytest.raises(ValueError, match="implementation='cpu' of dense cannot run here"):
    lowered("tpu", asked)


def test_cuda_lowering_follows_the_build():
  words = jax_router._native.platforms().get("cuda", ())
  text = lowered("cuda", gradient_of(functools.partial(jax_router.route_dense, k=3)))
  assert ("@jax_router_dense(" in text) == ("dense" in words)
  assert ("@jax_router_dense_backward(" in text) == ("dense_backward" in words)


@pytest.mark.parametrize("map_format", ("bytemap", "bitmap"))
def test_export_with_a_symbolic_batch_and_two_platforms(rng, map_format):
  pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
  (batch,) = jax.export.symbolic_shape("batch")
  bias = jnp.asarray(rng.normal(size=EXPERTS), jnp.float32)

  def function(x):
    fixed = {"map_format": map_format, "score": "sigmoid", "bias": bias}
    return tuple(jax_router.route_dense(x, 3, **fixed))

  shape = jax.ShapeDtypeStruct((batch, EXPERTS), jnp.float32)
  data = jax.export.export(
    jax.jit(function),
    platforms=["cpu", "cuda"],
    disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS,
  )(shape).serialize(vjp_order=1)
  again = jax.export.deserialize(data)
  for tokens in (1, 7, 64):
    logits = make_logits(tokens, EXPERTS)
    assert_same(tuple(again.call(logits)), function(logits))
    assert_same(jax.grad(lambda x: loss(again.call(x)))(logits), gradient_of(function)(logits))


# ---- sharding ----

WIDE = 36  # 5 bytes of a bitmap
LAYOUTS = {
  "tokens": ((8,), (64, WIDE), ("d", None)),
  "batch and sequence": ((4, 2), (4, 16, WIDE), ("d", "m", None)),
}


def make_case(rng, shape, used):
  """Logits, the function that routes them, and its further operands by name."""
  logits = make_logits(*shape)
  values = {
    "bias": rng.normal(size=WIDE).astype(np.float32),
    "where": rng.random(shape[:-1]) < 0.8,
    "experts": rng.integers(0, WIDE, size=(*shape[:-1], 3)).astype(np.int32),
  }
  options = {"map_format": "bitmap", "groups": Groups(6, 3)} if used else {"renormalize": False}
  return logits, call_with(used, **options), {name: values[name] for name in used}


def operand_spec(name: str, spec: tuple) -> tuple:
  return {"bias": (None,), "where": spec[:-1], "experts": (*spec[:-1], None)}[name]


@KINDS
@pytest.mark.parametrize("used", ((), ("bias", "where"), ("experts",)), ids="-".join)
@pytest.mark.parametrize("sizes, shape, spec", LAYOUTS.values(), ids=LAYOUTS)
def test_token_sharded_logits_need_no_collective(make_mesh, rng, sizes, shape, spec, used, kind):
  logits, function, rest = make_case(rng, shape, used)
  want = jax.jit(function)(logits, *rest.values())
  want_gradient = jax.jit(gradient_of(function))(logits, *rest.values())
  mesh = make_mesh(kind, sizes)
  sharding = NamedSharding(mesh, P(*spec))
  with jax.set_mesh(mesh):
    args = [put(mesh, logits, *spec)]
    args += [put(mesh, value, *operand_spec(name, spec)) for name, value in rest.items()]
    assert collectives(function, *args) == set()
    assert collectives(gradient_of(function), *args) == set()
    got, got_gradient = jax.jit(function)(*args), jax.jit(gradient_of(function))(*args)
  assert_equal(got, want)
  assert_equal(got_gradient, want_gradient)
  for result in (*got, got_gradient):
    assert result.sharding.is_equivalent_to(sharding, result.ndim)


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("used", ((), ("bias", "where")), ids="-".join)
@KINDS
def test_shard_map(make_mesh, rng, kind, used, check_vma):
  logits, function, rest = make_case(rng, (64, WIDE), used)
  mesh = make_mesh(kind)
  specs = (P("d", None), *(P(*operand_spec(name, ("d", None))) for name in rest))
  shard = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P("d", None), check_vma=check_vma
  )
  want = jax.jit(function)(logits, *rest.values())
  want_gradient = jax.jit(gradient_of(function))(logits, *rest.values())
  args = [put(mesh, x, *spec) for x, spec in zip((logits, *rest.values()), specs, strict=True)]
  with jax.set_mesh(mesh):
    assert collectives(shard(function), *args) == set()
    assert_equal(jax.jit(shard(function))(*args), want)
    assert_equal(jax.jit(gradient_of(shard(function)))(*args), want_gradient)
    assert_equal(jax.jit(shard(gradient_of(function)))(*args), want_gradient)


def test_replicated_logits_in_shard_map_get_the_summed_gradient(make_mesh, rng):
  """Each device weighs the same logits with its own bias; the gradient is the sum over devices."""
  logits = make_logits(6, WIDE)
  bias = jnp.asarray(rng.normal(size=(8, WIDE)), jnp.float32)

  def local(logits, bias):
    return loss(jax_router.route_dense(logits, 3, score="sigmoid", bias=bias[0]))

  mapped = jax.shard_map(
    lambda *args: jax.lax.psum(local(*args), "d"),
    mesh=make_mesh(AUTO),
    in_specs=(P(), P("d")),
    out_specs=P(),
  )
  got = jax.jit(jax.grad(mapped))(logits, bias)
  want = sum(jax.grad(local)(logits, bias[i : i + 1]) for i in range(8))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ((None, "d"), ("d", "m")))
def test_expert_sharded_logits_and_cotangents_are_right(make_mesh, rng, spec):
  logits = make_logits(64, 32)
  cotangent = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)

  def pull_back(logits, cotangent):
    probs, vjp = jax.vjp(lambda x: jax_router.route_dense(x, 4).probs, logits)
    return probs, vjp(cotangent)

  mesh = make_mesh(AUTO, (8,) if spec[0] is None else (4, 2))
  got = jax.jit(pull_back)(put(mesh, logits, *spec), put(mesh, cotangent, *spec))
  assert_equal(got, jax.jit(pull_back)(logits, cotangent))
  explicit = make_mesh(EXPLICIT, (4, 2))
  with jax.set_mesh(explicit), pytest.raises(ValueError, match="logits must not be sharded along"):
    jax_router.route_dense(put(explicit, logits, "d", "m"), 4)
