"""`route` of sharded logits: no collective where tokens are sharded, and the same bits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_router
import shapes
from jax_router import Groups, _primitive
from programs import assert_equal, collectives, put

EXPERTS, K = 32, 4
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))


def weights_loss(routing) -> jax.Array:
  return jnp.sum(jnp.sin(3 * routing.weights) * (1 + routing.experts).astype(jnp.float32))


def gradient_of(function):
  """Gradient of a loss of the routing with respect to the logits."""
  return lambda logits, *rest: jax.grad(lambda x: weights_loss(function(x, *rest)))(logits)


# ---- the text search finds what it looks for ----


@KINDS
def test_top_k_is_gathered(make_mesh, kind):
  """`jax.lax.top_k` has the all-gather that the tests below look for, in the same setting."""
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    logits = put(mesh, shapes.make_logits("random", 64, EXPERTS), "d", None)
    assert "all-gather" in collectives(lambda x: jax.lax.top_k(x, K), logits)


@KINDS
def test_call_without_its_partitioning_attributes_is_gathered(make_mesh, kind, monkeypatch):
  """What the tests below would see if the calls lost their sharding rule."""
  mesh = make_mesh(kind)
  monkeypatch.setattr(_primitive, "_partitioning", lambda *_: {})
  function = functools.partial(jax_router.route, k=K)
  with jax.set_mesh(mesh):
    logits = put(mesh, shapes.make_logits("random", 64, EXPERTS), "d", None)
    assert "all-gather" in collectives(function, logits)
    assert "all-gather" in collectives(gradient_of(function), logits)


def test_sharding_rule_text():
  rule = _primitive.sharding_rule(1, [(64, 16)], [(64, 2), (64,)])
  factors = "([i, j])->([i, k], [i]) {i=64, j=16, k=2}"
  assert rule == f"#sdy.op_sharding_rule<{factors} need_replication={{j, k}}, custom>"


# ---- plain jit over token-sharded logits ----

LAYOUTS = {
  "tokens": ((8,), (64, EXPERTS), ("d", None)),
  "one token each": ((8,), (8, EXPERTS), ("d", None)),
  "tokens over two axes": ((4, 2), (64, EXPERTS), (("d", "m"), None)),
  "tokens over one of two axes": ((4, 2), (64, EXPERTS), ("m", None)),
  "batch": ((8,), (8, 6, EXPERTS), ("d", None, None)),
  "sequence": ((8,), (2, 16, EXPERTS), (None, "d", None)),
  "batch and sequence": ((4, 2), (4, 16, EXPERTS), ("d", "m", None)),
}

# The optional operands in use.
OPERANDS = {
  "plain": (),
  "bias": ("bias",),
  "where": ("where",),
  "experts": ("experts",),
  "bias, where, groups": ("bias", "where", "groups"),
}

# Every set of operands in one layout, two in all others.
PLAIN_JIT = [
  pytest.param(*layout, used, id=f"{name}, {used_name}")
  for name, layout in LAYOUTS.items()
  for used_name, used in OPERANDS.items()
  if name == "tokens" or used_name in ("plain", "bias, where, groups")
]


def make_case(rng, shape, used):
  """Logits, the function that routes them, its further operands, and their ranks before tokens."""
  tokens = int(np.prod(shape[:-1]))
  logits = shapes.make_logits("random", tokens, EXPERTS).reshape(shape)
  values = {
    "bias": rng.normal(size=EXPERTS).astype(np.float32),
    "where": (rng.random(tokens) < 0.8).reshape(shape[:-1]),
    "experts": rng.integers(0, EXPERTS, size=(*shape[:-1], K)).astype(np.int32),
  }
  names = [name for name in used if name in values]
  static = {"score": "sigmoid", "groups": Groups(8, 3) if "groups" in used else None}

  def function(logits, *rest):
    return jax_router.route(logits, K, **dict(zip(names, rest, strict=True)), **static)

  return logits, function, {name: values[name] for name in names}


def operand_spec(name: str, spec: tuple) -> tuple:
  return {"bias": (None,), "where": spec[:-1], "experts": (*spec[:-1], None)}[name]


@KINDS
@pytest.mark.parametrize("sizes, shape, spec, used", PLAIN_JIT)
def test_token_sharded_logits_need_no_collective(make_mesh, rng, sizes, shape, spec, used, kind):
  logits, function, rest = make_case(rng, shape, used)
  mesh = make_mesh(kind, sizes)
  want = jax.jit(function)(logits, *rest.values())
  want_gradient = jax.jit(gradient_of(function))(logits, *rest.values())
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


@pytest.mark.parametrize("used", OPERANDS.values(), ids=OPERANDS)
def test_auto_mesh_that_is_known_by_the_arrays_alone(make_mesh, rng, used):
  """Without `jax.set_mesh` only the arguments carry the mesh, after tracing."""
  logits, function, rest = make_case(rng, (64, EXPERTS), used)
  mesh = make_mesh(AUTO)
  args = [put(mesh, logits, "d", None)]
  args += [put(mesh, v, *operand_spec(n, ("d", None))) for n, v in rest.items()]
  assert collectives(function, *args) == set()
  assert collectives(gradient_of(function), *args) == set()
  assert_equal(jax.jit(function)(*args), jax.jit(function)(logits, *rest.values()))


@KINDS
def test_eager_calls_keep_the_sharding(make_mesh, rng, kind):
  logits, function, rest = make_case(rng, (64, EXPERTS), ("bias",))
  mesh = make_mesh(kind)
  want = function(logits, *rest.values())
  with jax.set_mesh(mesh):
    got = function(put(mesh, logits, "d", None), put(mesh, rest["bias"], None))
  assert_equal(got, want)
  assert got.weights.sharding.is_equivalent_to(NamedSharding(mesh, P("d", None)), 2)


@KINDS
@pytest.mark.parametrize("axis", (0, 1))
def test_vmap_over_and_beside_the_sharded_dimension(make_mesh, rng, kind, axis):
  logits, function, rest = make_case(rng, (8, 16, EXPERTS), ("bias",))
  mapped = jax.vmap(function, in_axes=(axis, None), out_axes=axis)
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    args = (put(mesh, logits, "d", None, None), put(mesh, rest["bias"], None))
    assert collectives(mapped, *args) == set()
    assert collectives(gradient_of(mapped), *args) == set()
    got = jax.jit(mapped)(*args)
  assert_equal(got, jax.jit(function)(logits, *rest.values()))


# ---- shard_map ----


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("used", OPERANDS.values(), ids=OPERANDS)
@KINDS
def test_shard_map(make_mesh, rng, kind, used, check_vma):
  logits, function, rest = make_case(rng, (64, EXPERTS), used)
  mesh = make_mesh(kind)
  specs = (P("d", None), *(P(*operand_spec(name, ("d", None))) for name in rest))
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=P("d", None), check_vma=check_vma
  )
  want = jax.jit(function)(logits, *rest.values())
  want_gradient = jax.jit(gradient_of(function))(logits, *rest.values())
  args = [put(mesh, x, *spec) for x, spec in zip((logits, *rest.values()), specs, strict=True)]
  with jax.set_mesh(mesh):
    assert collectives(mapped, *args) == set()
    assert_equal(jax.jit(mapped)(*args), want)
    assert_equal(jax.jit(gradient_of(mapped))(*args), want_gradient)
    # The gradient taken inside.
    inside = jax.shard_map(
      gradient_of(function), mesh=mesh, in_specs=specs, out_specs=P("d", None), check_vma=check_vma
    )
    assert collectives(inside, *args) == set()
    assert_equal(jax.jit(inside)(*args), want_gradient)


@pytest.mark.parametrize("used", OPERANDS.values(), ids=OPERANDS)
def test_shard_map_over_one_of_two_axes(make_mesh, rng, used):
  """Tokens sharded over a manual axis and, inside, over one that the compiler splits."""
  logits, function, rest = make_case(rng, (64, EXPERTS), used)
  mesh = make_mesh(AUTO, (4, 2))
  specs = [P("d", None), *(P("d") if name != "bias" else P() for name in rest)]
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=tuple(specs), out_specs=P("d", None), axis_names={"d"}
  )
  full = ("d", "m"), None
  args = [put(mesh, logits, *full)]
  args += [put(mesh, v, *operand_spec(n, full)) for n, v in rest.items()]
  with jax.set_mesh(mesh):
    assert collectives(mapped, *args) == set()
    assert collectives(gradient_of(mapped), *args) == set()
    got, got_gradient = jax.jit(mapped)(*args), jax.jit(gradient_of(mapped))(*args)
  assert_equal(got, jax.jit(function)(logits, *rest.values()))
  assert_equal(got_gradient, jax.jit(gradient_of(function))(logits, *rest.values()))


def test_replicated_logits_in_shard_map_get_the_summed_gradient(make_mesh, rng):
  """Each device weighs the same logits with its own bias; the gradient is the sum over devices."""
  logits = jnp.asarray(shapes.make_logits("random", 6, EXPERTS))
  bias = jnp.asarray(rng.normal(size=(8, EXPERTS)), jnp.float32)

  def loss(logits, bias):
    return weights_loss(jax_router.route(logits, K, score="sigmoid", bias=bias[0]))

  def total(logits, bias):
    return jax.lax.psum(loss(logits, bias), "d")

  mesh = make_mesh(AUTO)
  mapped = jax.shard_map(total, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
  got = jax.jit(jax.grad(mapped))(logits, bias)
  want = sum(jax.grad(loss)(logits, bias[i : i + 1]) for i in range(8))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# ---- experts sharded ----


@pytest.mark.parametrize("spec", ((None, "d"), ("d", "m")))
def test_expert_sharded_logits_are_right_with_auto_axes(make_mesh, rng, spec):
  """The choice needs the whole row, so the compiler gathers it; tokens stay where they are."""
  logits, function, rest = make_case(rng, (64, EXPERTS), ("bias",))
  mesh = make_mesh(AUTO, (8,) if spec[0] is None else (4, 2))
  args = (put(mesh, logits, *spec), put(mesh, rest["bias"], spec[1]))
  assert_equal(jax.jit(function)(*args), jax.jit(function)(logits, *rest.values()))
  got = jax.jit(gradient_of(function))(*args)
  assert_equal(got, jax.jit(gradient_of(function))(logits, *rest.values()))


def test_expert_sharded_logits_are_refused_with_explicit_axes(make_mesh, rng):
  logits, function, rest = make_case(rng, (64, EXPERTS), ("bias",))
  mesh = make_mesh(EXPLICIT, (4, 2))
  with jax.set_mesh(mesh):
    bias = put(mesh, rest["bias"], None)
    for spec in ((None, "d"), ("d", "m")):
      sharded = put(mesh, logits, *spec)
      for f in (function, jax.jit(function), jax.jit(gradient_of(function))):
        with pytest.raises(ValueError, match="logits must not be sharded along their experts"):
          f(sharded, bias)
    gathered = jax.sharding.reshard(put(mesh, logits, "d", "m"), P("d", None))
    assert_equal(jax.jit(function)(gathered, bias), function(logits, *rest.values()))


# ---- a training step ----


@KINDS
@pytest.mark.parametrize("options", ({}, {"renormalize": False}, {"score": "sigmoid"}))
def test_data_parallel_step_needs_an_all_reduce_only(make_mesh, rng, kind, options):
  x = rng.normal(size=(64, 16)).astype(np.float32)
  matrix = rng.normal(size=(16, EXPERTS)).astype(np.float32)
  bias = rng.normal(size=EXPERTS).astype(np.float32)

  def step(matrix, bias, x):
    def loss(matrix):
      return weights_loss(jax_router.route(x @ matrix, K, bias=bias, **options)) / 64

    return matrix - np.float32(0.1) * jax.grad(loss)(matrix)

  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    args = put(mesh, matrix, None, None), put(mesh, bias, None), put(mesh, x, "d", None)
    assert collectives(step, *args) == {"all-reduce"}
    got = jax.jit(step)(*args)
  np.testing.assert_allclose(got, jax.jit(step)(matrix, bias, x), rtol=1e-5, atol=1e-6)
