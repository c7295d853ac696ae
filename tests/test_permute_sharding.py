"""`permute` and `combine` of sharded arrays: no collective along batches, an error along tokens."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_router import Plan, _primitive, combine, permute
from oracle_permute import make_experts, make_plan, make_rows
from programs import assert_equal, collectives, put

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
UNKNOWN = r"{} has an order over all tokens, .* cannot tell .* jax\.shard_map, .* leading dimension"


def make_case(rng, *lead, tokens=6, k=3, width=8):
  """Tokens, weights and the arrays of a plan."""
  experts = np.zeros((*lead, tokens, k), np.int32)
  for i, row in enumerate(np.ndindex(lead)):
    experts[row] = make_experts("outside", tokens, k, 5, seed=i)
  plan = make_plan(experts, 5)
  return make_rows(rng, *lead, tokens, width), make_rows(rng, *lead, tokens, k), *plan


def layer(x, weights, *plan, implementation=None):
  rows = jnp.tanh(permute(x, Plan(*plan), implementation=implementation))
  return combine(rows, weights, Plan(*plan), implementation=implementation)


def loss(x, weights, *plan, implementation=None):
  return jnp.sum(jnp.sin(3 * layer(x, weights, *plan, implementation=implementation)))


gradient = jax.grad(loss, (0, 1))


def put_all(mesh, args, *spec):
  """Arrays on the mesh, their leading dimensions split as `spec` says."""
  return [put(mesh, x, *spec, *(None,) * (x.ndim - len(spec))) for x in args]


# ---- leading dimensions ----


@KINDS
@pytest.mark.parametrize(
  "sizes, lead, spec",
  (((8,), (8,), ("d",)), ((4, 2), (4, 2), ("d", "m")), ((4, 2), (2, 8), (None, ("d", "m")))),
)
def test_sharded_leading_dimensions_need_no_collective(make_mesh, rng, sizes, lead, spec, kind):
  args = make_case(rng, *lead)
  functions = layer, gradient
  want = [jax.jit(f)(*args) for f in functions]
  mesh = make_mesh(kind, sizes)
  with jax.set_mesh(mesh):
    args = put_all(mesh, args, *spec)
    for f, expected in zip(functions, want, strict=True):
      assert collectives(f, *args) == set()
      got = jax.jit(f)(*args)
      assert_equal(got, expected)
      for leaf in jax.tree.leaves(got):
        assert leaf.sharding.is_equivalent_to(put_all(mesh, [leaf], *spec)[0].sharding, leaf.ndim)


def test_auto_mesh_that_is_known_by_the_arrays_alone(make_mesh, rng):
  args = make_case(rng, 8)
  mesh = make_mesh(AUTO)
  sharded = put_all(mesh, args, "d")
  for function in (layer, gradient, jax.vmap(layer)):
    assert collectives(function, *sharded) == set()
    assert_equal(jax.jit(function)(*sharded), jax.jit(function)(*args))


def test_call_without_its_partitioning_attributes_is_gathered(make_mesh, rng, monkeypatch):
  """What the tests above would see if the calls lost their sharding rule."""
  mesh = make_mesh(AUTO)
  monkeypatch.setattr(_primitive, "_partitioning", lambda *_: {})
  with jax.set_mesh(mesh):
    args = put_all(mesh, make_case(rng, 8), "d")
    assert "all-gather" in collectives(lambda *a: layer(*a), *args)  # not yet compiled


# ---- tokens ----


def test_explicitly_sharded_tokens_are_refused(make_mesh, rng):
  x, weights, *plan = make_case(rng, tokens=8, k=2)
  y = make_rows(rng, 16, 8)
  mesh = make_mesh(EXPLICIT)
  remedy = r" must not be sharded .* jax\.shard_map, .* leading dimension"
  with jax.set_mesh(mesh):
    x, y, weights, *plan = put_all(mesh, (x, y, weights, *plan))
    split = functools.partial(put, mesh)
    order, inverse, sizes = plan
    cases = (
      ("x", permute, (split(x, "d", None), Plan(*plan))),
      ("x", permute, (split(x, None, "d"), Plan(*plan))),
      ("plan.inverse", permute, (x, Plan(order, split(inverse, "d"), sizes))),
      ("y", combine, (split(y, "d", None), weights, Plan(*plan))),
      ("weights", combine, (y, split(weights, "d", None), Plan(*plan))),
      ("plan.order", combine, (y, weights, Plan(split(order, "d"), inverse, sizes))),
    )
    for name, function, args in cases:
      for f in (function, jax.jit(function)):
        with pytest.raises(ValueError, match=f"^{name}{remedy}"):
          f(*args)
    assert_equal(jax.jit(permute)(x, Plan(*plan)), permute(x, Plan(*plan)))


@pytest.mark.parametrize("known", (True, False), ids=("set_mesh", "arrays alone"))
def test_hidden_shards_of_tokens_are_refused(make_mesh, rng, known):
  x, weights, *plan = make_case(rng, tokens=8, k=2)
  y = make_rows(rng, 16, 8)
  mesh = make_mesh(AUTO)
  sharded = put(mesh, x, "d", None)
  rows = put(mesh, y, "d", None)

  def run(function, *args):
    if not known:
      return jax.jit(function)(*args)
    with jax.set_mesh(mesh):
      return jax.jit(function)(*args)

  with pytest.raises(ValueError, match=UNKNOWN.format("permute")):
    run(permute, sharded, Plan(*plan))
  with pytest.raises(ValueError, match=UNKNOWN.format("combine")):
    run(combine, rows, weights, Plan(*plan))
  # A leading dimension says that the tokens are whole.
  whole = run(lambda x: permute(x[None], Plan(*(a[None] for a in plan)))[0], sharded)
  assert_equal(whole, permute(x, Plan(*plan)))


def test_one_device_among_many(rng):
  x, weights, *plan = make_case(rng)
  args = jax.device_put((x, weights, *plan), jax.devices()[-1])
  got = jax.jit(gradient)(*args)
  assert jax.tree.leaves(got)[0].devices() == {jax.devices()[-1]}
  assert_equal(got, jax.jit(gradient)(x, weights, *plan))


# ---- shard_map ----


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("name", (None, "reference"))
@KINDS
def test_shard_map_has_a_plan_for_each_shard(make_mesh, rng, kind, name, check_vma):
  args = make_case(rng, 8)
  function = functools.partial(layer, implementation=name)
  own_gradient = functools.partial(gradient, implementation=name)
  mesh = make_mesh(kind)
  want = jax.jit(function)(*args)
  want_gradient = jax.jit(own_gradient)(*args)
  flat = [x.reshape(-1, *x.shape[2:]) for x in args]
  specs = tuple(P("d", *(None,) * (x.ndim - 1)) for x in flat)
  shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, check_vma=check_vma)
  mapped = shard(function, out_specs=P("d", None))
  inside = shard(own_gradient, out_specs=specs[:2])
  with jax.set_mesh(mesh):
    flat = [put(mesh, x, *spec) for x, spec in zip(flat, specs, strict=True)]
    assert collectives(mapped, *flat) == set()
    got = jax.jit(mapped)(*flat)
    got_gradients = [jax.jit(inside)(*flat)]
    outside = jax.grad(lambda *a: jnp.sum(jnp.sin(3 * mapped(*a))), (0, 1))
    got_gradients.append(jax.jit(outside)(*flat))
  np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-6, atol=1e-6)
  for pair in got_gradients:
    for a, b in zip(pair, want_gradient, strict=True):
      np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", (None, "reference"))
def test_replicated_operands_in_shard_map_get_the_summed_gradient(make_mesh, rng, name):
  """Each device has a plan of its own for the same tokens and weights."""
  x, weights, *plans = make_case(rng, 8)
  x, weights = x[0], weights[0]

  def local(x, weights, *plan):
    return loss(x, weights, *(a[0] for a in plan), implementation=name)

  mapped = jax.shard_map(
    lambda *args: jax.lax.psum(local(*args), "d"),
    mesh=make_mesh(AUTO),
    in_specs=(P(), P(), *(P("d"),) * 3),
    out_specs=P(),
  )
  got = jax.jit(jax.grad(mapped, (0, 1)))(x, weights, *plans)
  each = [jax.grad(local, (0, 1))(x, weights, *(a[i : i + 1] for a in plans)) for i in range(8)]
  for a, b in zip(got, jax.tree.map(lambda *g: sum(g), *each), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
