"""`route_with_stats` of sharded logits: one all-reduce of `[E]`-sized data, no gather."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
import shapes
from jax_router import Groups, _primitive
from programs import assert_equal, assert_same, collectives, put

EXPERTS, K = 32, 4
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))

_REDUCED = re.compile(r"= (\(.*?\)|\S+) all-reduce(?:-start)?\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")


def reduced_elements(function, *args) -> list[int]:
  """How many elements each all-reduce of the compiled program has."""
  text = jax.jit(function).lower(*args).compile().as_text()
  return [
    sum(int(np.prod([int(d) for d in dims.split(",") if d])) for dims in _SHAPE.findall(result))
    for result in _REDUCED.findall(text)
  ]


def make_case(rng, shape, used):
  """Logits, the function of them and of further operands, and these by name."""
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
    return jax_router.route_with_stats(logits, K, **dict(zip(names, rest, strict=True)), **static)

  return logits, function, {name: values[name] for name in names}


def operand_spec(name: str, spec: tuple) -> tuple:
  return {"bias": (None,), "where": spec[:-1], "experts": (*spec[:-1], None)}[name]


def losses(result) -> jax.Array:
  routing, stats = result
  balance = jax_router.load_balance_loss(stats, K, 0.5) + jax_router.z_loss(stats, 0.1)
  return jnp.sum(jnp.sin(3 * routing.weights)) + jnp.sum(balance)


def gradient_of(function):
  return lambda logits, *rest: jax.grad(lambda x: losses(function(x, *rest)))(logits)


def assert_close_result(got, want):
  """The routing to the bit, integers exactly, sums to rounding."""
  assert_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1].expert_counts, want[1].expert_counts)
  np.testing.assert_array_equal(got[1].num_tokens, want[1].num_tokens)
  np.testing.assert_allclose(got[1].score_sums, want[1].score_sums, rtol=3e-6)
  np.testing.assert_allclose(got[1].z_sum, want[1].z_sum, rtol=3e-6)


# ---- the text search finds what it looks for ----


def test_call_without_its_partitioning_attributes_is_gathered(make_mesh, rng, monkeypatch):
  """What the tests below would see if the calls lost their sharding rule."""
  logits, function, _ = make_case(rng, (64, EXPERTS), ())
  mesh = make_mesh(AUTO)
  monkeypatch.setattr(_primitive, "_partitioning", lambda *_: {})
  with jax.set_mesh(mesh):
    args = [put(mesh, logits, "d", None)]
    assert "all-gather" in collectives(function, *args)
    assert "all-gather" in collectives(gradient_of(function), *args)


def test_the_size_of_an_all_reduce_is_read(make_mesh):
  mesh = make_mesh(AUTO)
  x = put(mesh, np.ones((8, 5, 3), np.float32), "d", None, None)
  assert reduced_elements(lambda x: jnp.sum(x, axis=0), x) == [15]
  assert reduced_elements(jnp.sum, x) == [1]


# ---- plain jit over token-sharded logits ----

# Mesh, logits, their spec, and how many sequences are left on each device.
LAYOUTS = {
  "tokens": ((8,), (64, EXPERTS), ("d", None), 1),
  "one token each": ((8,), (8, EXPERTS), ("d", None), 1),
  "tokens over two axes": ((4, 2), (64, EXPERTS), (("d", "m"), None), 1),
  "tokens over one of two axes": ((4, 2), (64, EXPERTS), ("m", None), 1),
  "fewer groups than devices": ((4, 2), (12, EXPERTS), ("d", None), 1),
  "batch": ((8,), (8, 6, EXPERTS), ("d", None, None), 0),
  "sequence": ((8,), (2, 16, EXPERTS), (None, "d", None), 2),
  "batch and sequence": ((4, 2), (4, 16, EXPERTS), ("d", "m", None), 1),
}

OPERANDS = {
  "plain": (),
  "bias": ("bias",),
  "where": ("where",),
  "experts": ("experts",),
  "bias, where, groups": ("bias", "where", "groups"),
}

# Every set of operands in one layout, one in all others.
PLAIN_JIT = [
  pytest.param(*layout, used, id=f"{name}, {used_name}")
  for name, layout in LAYOUTS.items()
  for used_name, used in OPERANDS.items()
  if name == "tokens" or used_name == "bias, where, groups"
]


@KINDS
@pytest.mark.parametrize("sizes, shape, spec, sequences, used", PLAIN_JIT)
def test_sharded_logits_need_one_all_reduce(
  make_mesh, rng, sizes, shape, spec, sequences, used, kind
):
  """Sharded tokens: one, of counts, sums, z sum and tokens together; a sharded batch: none."""
  logits, function, rest = make_case(rng, shape, used)
  mesh = make_mesh(kind, sizes)
  want = jax.jit(function)(logits, *rest.values())
  want_gradient = jax.jit(gradient_of(function))(logits, *rest.values())
  with jax.set_mesh(mesh):
    args = [put(mesh, logits, *spec)]
    args += [put(mesh, value, *operand_spec(name, spec)) for name, value in rest.items()]
    reduced = [sequences * (2 * EXPERTS + 2)] if sequences else []
    assert collectives(function, *args) == ({"all-reduce"} if sequences else set())
    assert reduced_elements(function, *args) == reduced
    gradient = gradient_of(function)
    assert collectives(gradient, *args) <= {"all-reduce"}
    # What the loss does not need may be left out.
    sizes_of_all = reduced_elements(gradient, *args)
    assert len(sizes_of_all) == len(reduced) and sum(sizes_of_all) <= sum(reduced)
    got, got_gradient = jax.jit(function)(*args), jax.jit(gradient)(*args)
  assert_close_result(got, want)
  np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-5, atol=1e-7)
  assert got_gradient.sharding.is_equivalent_to(args[0].sharding, got_gradient.ndim)
  assert got[0].weights.sharding.is_equivalent_to(args[0].sharding, got_gradient.ndim)


def test_auto_mesh_that_is_known_by_the_arrays_alone(make_mesh, rng):
  """Without `jax.set_mesh` only the arguments carry the mesh, after tracing."""
  logits, function, rest = make_case(rng, (64, EXPERTS), ("bias", "where"))
  mesh = make_mesh(AUTO)
  args = [put(mesh, logits, "d", None)]
  args += [put(mesh, v, *operand_spec(n, ("d", None))) for n, v in rest.items()]
  assert reduced_elements(function, *args) == [2 * EXPERTS + 2]
  assert collectives(gradient_of(function), *args) == {"all-reduce"}
  assert_close_result(jax.jit(function)(*args), jax.jit(function)(logits, *rest.values()))


@KINDS
def test_eager_calls(make_mesh, rng, kind):
  logits, function, rest = make_case(rng, (64, EXPERTS), ("bias",))
  mesh = make_mesh(kind)
  want = function(logits, *rest.values())
  with jax.set_mesh(mesh):
    got = function(put(mesh, logits, "d", None), put(mesh, rest["bias"], None))
  assert_close_result(got, want)


@pytest.mark.parametrize("kind", (pytest.param(AUTO, marks=pytest.mark.slow), EXPLICIT))
def test_losses_of_one_kind_need_the_all_reduce_of_theirs(make_mesh, rng, kind):
  """The z loss of sharded tokens, and of a sharded batch the loss of the whole batch."""
  logits, function, _ = make_case(rng, (8, 16, EXPERTS), ())
  mesh = make_mesh(kind)

  def z(x):
    return jax_router.z_loss(function(x)[1]).sum()

  def of_batch(x):
    stats = jax.tree.map(lambda s: jnp.sum(s, axis=0, dtype=s.dtype), function(x)[1])
    return jax_router.load_balance_loss(stats, K)

  want = [jax.jit(jax.value_and_grad(f))(logits) for f in (z, of_batch)]
  with jax.set_mesh(mesh):
    for spec in (("d", None, None), (None, "d", None)):
      x = put(mesh, logits, *spec)
      for f, expected in zip((z, of_batch), want, strict=True):
        assert collectives(jax.value_and_grad(f), x) == {"all-reduce"}
        assert_same(jax.jit(jax.value_and_grad(f))(x), expected)


@pytest.mark.parametrize("kind", (pytest.param(AUTO, marks=pytest.mark.slow), EXPLICIT))
def test_second_order_of_sharded_logits(make_mesh, rng, kind):
  logits, function, _ = make_case(rng, (16, EXPERTS), ())
  direction = rng.normal(size=logits.shape).astype(np.float32)

  def product(x, direction):
    return jax.grad(lambda y: jnp.sum(gradient_of(function)(y) * direction))(x)

  want = jax.jit(product)(logits, direction)
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    args = put(mesh, logits, "d", None), put(mesh, direction, "d", None)
    assert collectives(product, *args) <= {"all-reduce"}
    got = jax.jit(product)(*args)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@KINDS
@pytest.mark.parametrize("axis", (0, 1))
def test_vmap_over_and_beside_the_sharded_dimension(make_mesh, rng, kind, axis):
  logits, function, _ = make_case(rng, (8, 16, EXPERTS), ())
  mapped = jax.vmap(function, in_axes=axis)
  mesh = make_mesh(kind)
  want = jax.jit(mapped)(logits)
  with jax.set_mesh(mesh):
    x = put(mesh, logits, "d", None, None)
    assert collectives(mapped, x) == (set() if axis == 0 else {"all-reduce"})
    assert_close_result(jax.jit(mapped)(x), want)


# ---- shard_map ----


@pytest.mark.parametrize(
  "kind, used, check_vma",
  (
    (AUTO, ("bias",), True),
    (AUTO, ("where",), False),
    (AUTO, ("experts",), True),
    (EXPLICIT, ("bias", "where"), True),
    (EXPLICIT, ("experts",), False),
  ),
)
def test_shard_map_statistics_are_the_shards(make_mesh, rng, kind, used, check_vma):
  """Each shard's own without a collective; their psum is that of all tokens, gradients too."""
  logits, function, rest = make_case(rng, (64, EXPERTS), used)
  mesh = make_mesh(kind)
  specs = (P("d", None), *(P(*operand_spec(name, ("d", None))) for name in rest))
  args = [put(mesh, x, *spec) for x, spec in zip((logits, *rest.values()), specs, strict=True)]

  def local(*args):
    routing, stats = function(*args)
    return routing, jax.tree.map(lambda x: x[None], stats)

  def summed(*args):
    routing, stats = function(*args)
    return routing, jax.lax.psum(stats, "d")

  def mapped(function, out):
    return jax.shard_map(
      function, mesh=mesh, in_specs=specs, out_specs=(P("d", None), out), check_vma=check_vma
    )

  want = jax.jit(function)(logits, *rest.values())
  want_gradient = jax.jit(gradient_of(function))(logits, *rest.values())
  with jax.set_mesh(mesh):
    assert collectives(mapped(local, P("d")), *args) == set()
    routing, stats = jax.jit(mapped(local, P("d")))(*args)
    together = mapped(summed, P())
    assert_close_result(jax.jit(together)(*args), want)
    got_gradient = jax.jit(gradient_of(together))(*args)
  assert_close_result((routing, jax.tree.map(lambda x: np.sum(x, axis=0), stats)), want)
  np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-5, atol=1e-7)
  for i in range(8):
    part = [x if name == "bias" else x[8 * i : 8 * i + 8] for name, x in rest.items()]
    one = jax.jit(function)(logits[8 * i : 8 * i + 8], *part)[1]
    assert_close_result(
      (routing, jax.tree.map(lambda x, i=i: np.asarray(x)[i], stats)), (routing, one)
    )


@pytest.mark.parametrize("used", (("bias",), ("where",)), ids=lambda u: u[0])
def test_shard_map_over_one_of_two_axes(make_mesh, rng, used):
  """Tokens sharded over a manual axis and, inside, over one that the compiler splits."""
  logits, function, rest = make_case(rng, (64, EXPERTS), used)
  mesh = make_mesh(AUTO, (4, 2))
  specs = (P("d", None), *(P("d") if name != "bias" else P() for name in rest))

  def summed(*args):
    routing, stats = function(*args)
    return routing, jax.lax.psum(stats, "d")

  mapped = jax.shard_map(
    summed, mesh=mesh, in_specs=specs, out_specs=(P("d", None), P()), axis_names={"d"}
  )
  full = ("d", "m"), None
  args = [put(mesh, logits, *full)]
  args += [put(mesh, v, *operand_spec(n, full)) for n, v in rest.items()]
  with jax.set_mesh(mesh):
    assert collectives(mapped, *args) == {"all-reduce"}
    got, got_gradient = jax.jit(mapped)(*args), jax.jit(gradient_of(mapped))(*args)
  assert_close_result(got, jax.jit(function)(logits, *rest.values()))
  want_gradient = jax.jit(gradient_of(function))(logits, *rest.values())
  np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-5, atol=1e-7)


# ---- experts sharded ----


def test_expert_sharded_logits(make_mesh, rng):
  """Right with Auto axes, where the compiler gathers rows; refused with Explicit ones."""
  logits, function, _ = make_case(rng, (64, EXPERTS), ())
  x = put(make_mesh(AUTO, (4, 2)), logits, "d", "m")
  assert_close_result(jax.jit(function)(x), jax.jit(function)(logits))
  mesh = make_mesh(EXPLICIT, (4, 2))
  x = put(mesh, logits, "d", "m")
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="sharded along their experts"):
    jax.jit(function)(x)
