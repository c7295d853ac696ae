"""Transformations and sharding of `plan`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
from oracle_plan import make_experts
from programs import assert_equal, calls, collectives, loop, put
from test_plan import check_against_oracle

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
EXPERTS = 9


def plan(experts, **options):
  return jax_router.plan(experts, EXPERTS, **options)


def make_batch(*shape) -> np.ndarray:
  tokens = int(np.prod(shape[:-1]))
  return make_experts("some in no group", tokens, shape[-1], EXPERTS).reshape(shape)


def check_batch(got, experts):
  """Each batch row has the plan of its own tokens."""
  got = jax.device_get(got)
  for i in np.ndindex(experts.shape[:-2]):
    check_against_oracle(jax.tree.map(lambda x, i=i: x[i], got), experts[i], EXPERTS)


# ---- vmap, leading dimensions ----


@pytest.mark.parametrize("shape", ((2, 3, 8, 3), (3, 1200, 7), (40, 5, 2)))
def test_leading_dimensions_are_kept(implementation, shape):
  experts = make_batch(*shape)
  got = jax.jit(functools.partial(plan, implementation=implementation))(experts)
  assert got.order.shape == (*shape[:-2], shape[-2] * shape[-1])
  assert got.group_sizes.shape == (*shape[:-2], EXPERTS)
  check_batch(got, experts)


@pytest.mark.parametrize("in_axis, out_axis", ((0, 0), (1, 1), (2, 0), (-1, -1)))
def test_vmap(implementation, in_axis, out_axis):
  inner = functools.partial(plan, implementation=implementation)
  experts = make_batch(4, 6, 5)
  mapped = jax.jit(jax.vmap(inner, in_axis, out_axis))
  assert_equal(mapped(experts), loop(inner, (in_axis,), out_axis, experts))


def test_nested_vmap(implementation):
  inner = functools.partial(plan, implementation=implementation)
  experts = make_batch(3, 4, 6, 5)
  check_batch(jax.jit(jax.vmap(jax.vmap(inner)))(experts), experts)
  # The tokens of the inner and the slots of the outer function are mapped over.
  got = jax.jit(jax.vmap(jax.vmap(inner, 2, 0), 1, 0))(experts)
  check_batch(got, experts.transpose(1, 3, 0, 2))


def test_vmap_is_one_call():
  assert calls("plan", jax.vmap(plan), make_batch(5, 4, 7))[0] == 1


# ---- no gradient, loops, export ----


def test_nothing_has_a_gradient(implementation, rng):
  logits = rng.normal(size=(16, EXPERTS)).astype(np.float32)

  def loss(x):
    weights, experts = jax_router.route(x, 2, implementation=implementation)
    order, inverse, sizes = plan(experts, implementation=implementation)
    kept = jax.lax.stop_gradient(weights).reshape(-1)[order][inverse]
    return jnp.sum(weights.reshape(-1) * kept) + jnp.sum(sizes).astype(jnp.float32)

  def without_plan(x):
    weights = jax_router.route(x, 2, implementation=implementation).weights
    return jnp.sum(weights * jax.lax.stop_gradient(weights))

  got, want = (jax.jit(jax.grad(f))(logits) for f in (loss, without_plan))
  assert np.abs(got).max() > 1e-3
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_forward_mode(implementation):
  experts = make_batch(6, 3)
  zero = np.zeros(experts.shape, jax.dtypes.float0)
  primal, tangent = jax.jvp(
    functools.partial(plan, implementation=implementation), (experts,), (zero,)
  )
  check_against_oracle(primal, experts, EXPERTS)
  assert all(x.dtype == jax.dtypes.float0 for x in tangent)


def test_scan(implementation):
  experts = make_batch(4, 10, 3)

  def body(total, ids):
    found = plan(ids, implementation=implementation)
    return total + found.group_sizes, found

  total, got = jax.lax.scan(body, jnp.zeros(EXPERTS, jnp.int32), experts)
  check_batch(got, experts)
  np.testing.assert_array_equal(total, got.group_sizes.sum(0))


@pytest.mark.parametrize("shape", ("t, 3", "2, t, 3", "b, 16, 3"))
def test_export(shape):
  experts = make_batch(*{"t, 3": (16, 3), "2, t, 3": (2, 16, 3), "b, 16, 3": (4, 16, 3)}[shape])
  symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), np.int32)
  exported = jax.export.export(
    jax.jit(lambda ids: tuple(plan(ids))), disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS
  )(symbolic)
  got = jax.export.deserialize(exported.serialize()).call(experts)
  check_batch(jax_router.Plan(*got), experts)


# ---- sharding ----


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("name", (None, "reference"))
@KINDS
def test_shard_map(make_mesh, kind, name, check_vma):
  """Each device sorts its own tokens, without a collective."""
  experts = make_batch(64, 3)

  def local(ids):
    return jax.tree.map(lambda x: x[None], plan(ids, implementation=name))

  mesh = make_mesh(kind)
  mapped = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma)
  with jax.set_mesh(mesh):
    sharded = put(mesh, experts, "d", None)
    assert collectives(mapped, sharded) == set()
    got = jax.jit(mapped)(sharded)
  check_batch(got, experts.reshape(8, 8, 3))


@pytest.mark.parametrize("known", (True, False), ids=("set_mesh", "arrays alone"))
@KINDS
def test_sharded_leading_dimensions_need_no_collective(make_mesh, kind, known):
  experts = make_batch(8, 5, 3)
  mesh = make_mesh(kind)
  sharded = put(mesh, experts, "d", None, None)

  def run():
    assert collectives(plan, sharded) == set()
    return jax.jit(plan)(sharded)

  if known:
    with jax.set_mesh(mesh):
      got = run()
  else:
    got = run()
  assert got.order.sharding.is_equivalent_to(put(mesh, got.order, "d").sharding, 2)
  check_batch(got, experts)


def test_vmap_over_a_sharded_axis(make_mesh):
  experts = make_batch(5, 8, 3)
  sharded = put(make_mesh(AUTO), experts, None, "d", None)
  mapped = jax.vmap(plan, 1)
  assert collectives(mapped, sharded) == set()
  check_batch(jax.jit(mapped)(sharded), experts.swapaxes(0, 1))


def test_explicitly_sharded_tokens_and_slots_are_refused(make_mesh):
  mesh = make_mesh(EXPLICIT)
  pattern = r"experts must not be sharded .* plan has an order .* jax\.shard_map"
  with jax.set_mesh(mesh):
    for shape, spec in (
      ((64, 8), ("d", None)),
      ((64, 8), (None, "d")),
      ((2, 64, 8), (None, "d", None)),
    ):
      sharded = put(mesh, make_batch(*shape), *spec)
      for function in (plan, jax.jit(plan), functools.partial(plan, implementation="reference")):
        with pytest.raises(ValueError, match=pattern):
          function(sharded)
    whole = make_batch(64, 8)
    check_against_oracle(jax.jit(plan)(put(mesh, whole, None, None)), whole, EXPERTS)


def test_tokens_that_may_be_sharded_are_refused(make_mesh):
  experts = make_batch(64, 3)
  sharded = put(make_mesh(AUTO), experts, "d", None)
  for function in (plan, jax.jit(plan)):
    with pytest.raises(ValueError, match=r"plan has an order .* over 8 devices .* leading dim"):
      function(sharded)
  check_batch(jax.jit(plan)(sharded[None]), experts[None])
