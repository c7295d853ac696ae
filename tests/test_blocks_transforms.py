"""Transformations, gradients and sharding of `plan_blocks` and `route_and_plan_blocks`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
import shapes
from jax_router import Routing, plan_blocks, route, route_and_plan_blocks
from oracle_blocks import block_plan, check_plan
from programs import assert_equal, assert_same, calls, collectives, loop, put

E, U = 9, 4
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
HIDDEN = r"it cannot tell whether its tokens are sharded; call it in jax\.shard_map"


def make_routing(*shape):
  """Weights and experts `[..., T, k]`, some of them out of range."""
  rng = np.random.default_rng(5)
  return Routing(
    jnp.asarray(rng.normal(size=shape), jnp.float32),
    jnp.asarray(rng.integers(-1, E + 1, shape), jnp.int32),
  )


def make_logits(*shape):
  return jnp.asarray(
    shapes.make_logits("random", int(np.prod(shape[:-1])), shape[-1]).reshape(shape)
  )


def plan(weights, experts, mask=None, num_valid=None, **options):
  routing = Routing(weights, experts)
  return plan_blocks(routing, E, U, expert_mask=mask, num_valid=num_valid, **options)


def fused(logits, where=None, bias=None, **options):
  return route_and_plan_blocks(logits, 3, U, where=where, bias=bias, layout="packed", **options)


def chain(logits, where=None, bias=None, **options):
  routing = route(logits, 3, where=where, bias=bias, **options)
  plan = plan_blocks(routing, logits.shape[-1], U, layout="packed")
  return routing, plan


# ---- vmap, leading dimensions ----


def test_leading_dimensions_are_kept(implementation, rng):
  weights, experts = make_routing(2, 3, 8, 2)
  valid = rng.integers(0, 9, (2, 3)).astype(np.int32)
  mask = rng.random(E) < 0.7
  got = jax.jit(functools.partial(plan, implementation=implementation))(
    weights, experts, mask, valid
  )
  for i in np.ndindex(2, 3):
    want = block_plan(
      np.asarray(weights[i]), np.asarray(experts[i]), E, U, expert_mask=mask, num_valid=valid[i]
    )
    check_plan(jax.tree.map(lambda x, i=i: x[i], got), want)
  scalar = plan(weights, experts, mask, 5, implementation=implementation)
  full = plan(weights, experts, mask, np.full((2, 3), 5), implementation=implementation)
  assert_equal(scalar, full)


@pytest.mark.parametrize(
  "in_axes, out_axes",
  (((0, 0, None, None), 0), ((1, 1, 0, None), 1), ((None, 2, None, 0), 0), ((None,) * 3 + (0,), 0)),
)
def test_vmap(implementation, rng, in_axes, out_axes):
  inner = functools.partial(plan, implementation=implementation)
  weights, experts = (
    jnp.moveaxis(x, 0, a) if a is not None else x[0]
    for x, a in zip(make_routing(3, 8, 2), in_axes, strict=False)
  )
  mask = jnp.asarray(rng.random((3, E) if in_axes[2] == 0 else E) < 0.7)
  valid = jnp.asarray([8, 0, 5] if in_axes[3] == 0 else 6, jnp.int32)
  args = weights, experts, mask, valid
  # A scalar result has one axis, the new one.
  got = jax.jit(jax.vmap(inner, in_axes, 0))(*args)
  assert_equal(got, loop(inner, in_axes, 0, *args))
  inverse = jax.vmap(lambda *x: inner(*x).inverse, in_axes, out_axes)(*args)
  np.testing.assert_array_equal(np.moveaxis(np.asarray(inverse), out_axes, 0), got.inverse)


def test_vmap_is_one_call():
  weights, experts = make_routing(5, 2, 8, 3)
  assert calls("blocks", jax.vmap(jax.vmap(plan)), weights, experts)[0] == 1
  assert calls("route_and_plan_blocks", jax.vmap(fused), make_logits(5, 8, 9))[0] == 1


def test_vmap_of_the_fused_call(implementation, rng):
  inner = functools.partial(fused, implementation=implementation)
  logits, where = make_logits(3, 10, 9), jnp.asarray(rng.random((3, 10)) < 0.7)
  bias = jnp.asarray(rng.normal(size=(3, 9)), jnp.float32)
  for axes in ((0, 0, 0), (0, None, None), (None, None, 0)):
    args = [x if a == 0 else x[0] for x, a in zip((logits, where, bias), axes, strict=True)]
    got = jax.jit(jax.vmap(inner, axes))(*args)
    # XLA rounds the reference's softmax by the shape of its loops.
    equal = assert_same if implementation == "reference" else assert_equal
    equal(got, loop(inner, axes, 0, *args))


# ---- gradients ----


def test_the_gradient_is_that_of_a_gather(implementation, rng):
  weights, experts = make_routing(2, 13, 3)
  cotangent = jnp.asarray(rng.normal(size=plan(weights, experts).weights.shape), jnp.float32)
  mask = jnp.asarray(rng.random(E) < 0.7)

  def function(weights):
    return plan(weights, experts, mask, 11, implementation=implementation)

  result, vjp = jax.vjp(lambda w: function(w).weights, weights)
  gradient = np.asarray(jax.jit(lambda c: vjp(c)[0])(cotangent))
  inverse = np.asarray(function(weights).inverse)
  for i in np.ndindex(inverse.shape):
    want = 0 if inverse[i] < 0 else cotangent[i[0], inverse[i]]
    assert gradient[i] == want
  assert (inverse < 0).any() and (inverse >= 0).any()

  # The other results have none.
  def ids_of(weights):
    return jnp.sum(function(weights).ids).astype(jnp.float32)

  whole = jax.grad(lambda w: jnp.sum(function(w).weights) + ids_of(w))(weights)
  np.testing.assert_array_equal(whole, inverse >= 0)
  assert result.shape == cotangent.shape


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_the_gradient_has_the_dtype_of_the_weights(implementation, dtype):
  weights, experts = make_routing(13, 3)
  run = functools.partial(plan, experts=experts, implementation=implementation)
  gradient = jax.grad(lambda w: jnp.sum(run(w).weights * dtype(2)))(weights.astype(dtype))
  assert gradient.dtype == dtype
  kept = (np.asarray(experts) >= 0) & (np.asarray(experts) < E)
  np.testing.assert_array_equal(gradient.astype(jnp.float32), np.where(kept, 2, 0))


def test_second_order(implementation):
  weights, experts = make_routing(13, 3)

  def loss(w):
    return jnp.sum(jnp.sin(plan(w, experts, implementation=implementation).weights))

  kept = (np.asarray(experts) >= 0) & (np.asarray(experts) < E)
  hessian = jax.jit(jax.jacrev(jax.grad(loss)))(weights).reshape(39, 39)
  want = np.diag(np.where(kept, -np.sin(np.asarray(weights)), 0).ravel())
  np.testing.assert_allclose(hessian, want, rtol=1e-6, atol=1e-7)


def test_forward_mode_of_the_reference():
  weights, experts = make_routing(2, 13, 3)
  function = functools.partial(plan, experts=experts, implementation="reference")
  tangent = jnp.cos(weights)
  _, dot = jax.jvp(lambda w: function(w).weights, (weights,), (tangent,))
  np.testing.assert_array_equal(dot, function(tangent).weights)


def test_no_weights_no_gradient(implementation):
  """No token at all, all tokens dropped."""
  weights, experts = make_routing(6, 2)
  run = functools.partial(plan, implementation=implementation)
  zero = jax.grad(lambda w: jnp.sum(run(w, experts, num_valid=0).weights))(weights)
  assert zero.shape == (6, 2) and not zero.any()
  empty = jax.grad(lambda w: jnp.sum(run(w, experts[:0]).weights))(weights[:0])
  assert empty.shape == (0, 2)


def losses(function):
  """Of the weights of the routing, of the plan, and of both."""

  def loss(logits, of_routing, of_plan, *rest):
    routing, blocks = function(logits, *rest)
    slots = jnp.arange(routing.weights.shape[-1], dtype=jnp.float32)
    positions = jnp.arange(blocks.weights.shape[-1], dtype=jnp.float32)
    slots = jnp.broadcast_to(slots, routing.weights.shape)
    positions = jnp.broadcast_to(positions, blocks.weights.shape)
    return of_routing * jnp.sum(jnp.sin(routing.weights + slots)) + of_plan * jnp.sum(
      jnp.sin(blocks.weights * positions)
    )

  return loss


@pytest.mark.parametrize(
  "options",
  ({}, {"renormalize": False}, {"score": "sigmoid", "scale": 2.5}, {"score": "sqrtsoftplus"}),
)
def test_the_gradient_of_the_fused_call_is_that_of_the_chain(implementation, rng, options):
  logits, where = make_logits(2, 17, 9), rng.random((2, 17)) < 0.8
  options = options | {"implementation": implementation}
  gradients = [jax.jit(jax.grad(losses(functools.partial(f, **options)))) for f in (fused, chain)]
  for factors in ((1.0, 0.0), (0.0, 1.0), (0.7, -1.3)):
    got, want = (gradient(logits, *factors, where) for gradient in gradients)
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_second_order_of_the_fused_call(implementation):
  logits = make_logits(3, 9)
  hessians = [
    jax.jit(jax.jacrev(jax.grad(losses(functools.partial(f, implementation=implementation)))))
    for f in (fused, chain)
  ]
  got, want = (hessian(logits, 0.7, -1.3) for hessian in hessians)
  assert np.abs(want).max() > 1e-3
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_vmap_of_the_gradient(kernel):
  weights, experts = make_routing(3, 8, 2)

  def gradient(w, e):
    return jax.grad(lambda w: jnp.sum(jnp.sin(plan(w, e, implementation=kernel).weights)))(w)

  assert_same(jax.vmap(gradient)(weights, experts), loop(gradient, (0, 0), 0, weights, experts))


# ---- recomputation, loops ----


def test_saved_names_keep_the_plan():
  """Under the policy of the library's name nothing is sorted or routed again."""
  policy = jax.checkpoint_policies.save_only_these_names("jax_router")
  weights, experts = make_routing(16, 2)
  logits = make_logits(16, 9)

  def of_plan(w):
    blocks = plan(w, experts)
    return jnp.sum(jnp.sin(blocks.weights) * jnp.cos(blocks.ids.astype(jnp.float32)))

  def of_both(x):
    routing, blocks = fused(x)
    values = jnp.sin(blocks.weights) * jnp.cos(blocks.ids.astype(jnp.float32))
    return jnp.sum(jnp.sin(routing.weights)) + jnp.sum(values)

  for word, loss, x in (("blocks", of_plan, weights), ("route_and_plan_blocks", of_both, logits)):
    again, saved = jax.checkpoint(loss), jax.checkpoint(loss, policy=policy)
    assert calls(word, jax.value_and_grad(again), x)[0] == 2
    assert calls(word, jax.value_and_grad(saved), x)[0] == 1
    assert_equal(jax.jit(jax.grad(saved))(x), jax.jit(jax.grad(loss))(x))


def test_scan(kernel):
  weights, experts = make_routing(4, 8, 2)
  run = functools.partial(plan, implementation=kernel)
  _, got = jax.jit(lambda *x: jax.lax.scan(lambda c, x: (c, run(*x)), 0, x))(weights, experts)
  assert_equal(got, run(weights, experts))


def test_export():
  weights, experts = make_routing(8, 2)
  exported = jax.export.export(
    jax.jit(lambda *x: tuple(plan(*x))), disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS
  )(weights, experts)
  got = jax.export.deserialize(exported.serialize()).call(weights, experts)
  assert_equal(got, tuple(plan(weights, experts)))


# ---- sharding ----


def gradient_of(function):
  def loss(x, *rest):
    return jnp.sum(jnp.sin(jax.tree.leaves(function(x, *rest))[-5]))

  return jax.grad(loss)


@pytest.mark.parametrize("name", (None, "reference"))
@KINDS
def test_sharded_leading_dimensions_need_no_collective(make_mesh, kind, name):
  run = functools.partial(plan, num_valid=5, mask=np.arange(E) % 3 > 0, implementation=name)
  run_fused = functools.partial(fused, implementation=name)
  weights, experts = make_routing(8, 6, 2)
  logits = make_logits(8, 6, 9)
  want = jax.jit(run)(weights, experts), jax.jit(run_fused)(logits)
  want_gradients = (
    jax.jit(gradient_of(run))(weights, experts), jax.jit(gradient_of(run_fused))(logits)
  )  # fmt: skip
  assert all(np.abs(x).max() > 1e-3 for x in want_gradients)
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    weights, experts, logits = (put(mesh, x, "d", None, None) for x in (weights, experts, logits))
    if name is None:
      for f, *args in ((run, weights, experts), (run_fused, logits)):
        assert collectives(f, *args) == set()
        assert collectives(gradient_of(f), *args) == set()
    got = jax.jit(run)(weights, experts), jax.jit(run_fused)(logits)
    gradients = (
      jax.jit(gradient_of(run))(weights, experts), jax.jit(gradient_of(run_fused))(logits)
    )  # fmt: skip
  assert_equal(got, want)
  assert_same(gradients, want_gradients)
  if name is None:
    for x in jax.tree.leaves((got, gradients)):
      assert x.sharding.is_equivalent_to(put(mesh, x, "d").sharding, x.ndim)


@pytest.mark.parametrize("known", (True, False), ids=("set_mesh", "arrays alone"))
def test_hidden_shards_of_tokens_are_refused(make_mesh, known):
  mesh = make_mesh(AUTO)
  weights, experts = (put(mesh, x, "d", None) for x in make_routing(16, 2))
  logits = put(mesh, make_logits(16, 9), "d", None)
  for word, f, *args in (
    ("blocks", plan, weights, experts), ("route_and_plan_blocks", fused, logits)
  ):  # fmt: skip
    for call in (f, jax.jit(f)):
      with pytest.raises(ValueError, match=f"{word} has an order over all tokens.*{HIDDEN}"):
        if known:
          with jax.set_mesh(mesh):
            call(*args)
        else:
          call(*args)


def test_explicitly_sharded_tokens_are_refused(make_mesh):
  mesh = make_mesh(EXPLICIT)
  weights, experts = make_routing(16, 2)
  logits, where = make_logits(16, 9), jnp.ones(16, bool)
  with jax.set_mesh(mesh):
    whole = [put(mesh, x, None) for x in (weights, experts, logits, where)]
    split = [put(mesh, x, "d") for x in (weights, experts, logits, where)]
    for name, call in (
      ("routing.experts", lambda: plan(whole[0], split[1])),
      ("routing.weights", lambda: plan(split[0], whole[1])),
      ("logits", lambda: fused(split[2])),
      ("where", lambda: fused(whole[2], split[3])),
    ):
      with pytest.raises(
        ValueError, match=rf"{name} must not be sharded along its tokens .*shard_map"
      ):
        call()
    got = jax.jit(plan)(*whole[:2]), jax.jit(fused)(*whole[2:])
  assert_equal(got, (plan(weights, experts), fused(logits, where)))


@pytest.mark.parametrize("check_vma", (True, False))
@KINDS
def test_shard_map(make_mesh, kind, check_vma):
  """Tokens in jax.shard_map: each device plans its own."""
  mesh = make_mesh(kind)
  logits = make_logits(48, 9)

  def local(x):
    _, blocks = fused(x)
    return jax.tree.map(lambda leaf: leaf[None], blocks)

  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=P("d", None), out_specs=P("d"), check_vma=check_vma
  )

  def gradient(x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(mapped(x).weights)))(x)

  want = fused(logits.reshape(8, 6, 9))[1]
  with jax.set_mesh(mesh):
    x = put(mesh, logits, "d", None)
    assert collectives(mapped, x) == set()
    assert_equal(jax.jit(mapped)(x), want)
    got = jax.jit(gradient)(x)
  expected = jax.grad(lambda x: jnp.sum(jnp.sin(fused(x)[1].weights)))(logits.reshape(8, 6, 9))
  assert_same(np.asarray(got), np.asarray(expected).reshape(48, 9))


def test_one_device_among_many():
  assert len(jax.devices("cpu")) == 8
  weights, experts = make_routing(16, 2)
  last = jax.devices("cpu")[-1]
  with jax.default_device(jax.devices("cpu")[0]):
    want = plan(weights, experts, implementation="cpu")
  got = jax.jit(functools.partial(plan, implementation="cpu"))(
    *jax.device_put((weights, experts), last)
  )
  assert_equal(got, want)
  assert got.ids.devices() == {last}
