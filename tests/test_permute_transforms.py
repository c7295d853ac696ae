"""`permute` and `combine` under JAX transformations; second order; what is kept and computed."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_router
from jax_router import Plan, _native, combine, permute
from oracle_permute import make_experts, make_plan, make_rows
from programs import assert_equal, assert_same, calls, loop

EXPERTS = 5


def make_case(rng, *lead, tokens=8, k=3, width=6, kind="outside"):
  """x, y, weights and a plan, with leading dimensions."""
  experts = np.zeros((*lead, tokens, k), np.int32)
  for i, row in enumerate(np.ndindex(lead)):
    experts[row] = make_experts(kind, tokens, k, EXPERTS, seed=i)
  arrays = (
    make_rows(rng, *lead, tokens, width),
    make_rows(rng, *lead, tokens * k, width),
    make_rows(rng, *lead, tokens, k),
  )
  return *map(jnp.asarray, arrays), jax.tree.map(jnp.asarray, make_plan(experts, EXPERTS))


def layer(x, weights, plan, implementation=None):
  """Both words around a function of the rows."""
  rows = jnp.tanh(permute(x, plan, implementation=implementation))
  return combine(rows, weights, plan, implementation=implementation)


def loss(x, weights, plan, implementation=None):
  result = layer(x, weights, plan, implementation)
  return jnp.sum(jnp.sin(3 * result))


gradient = jax.grad(loss, (0, 1))


def on_arrays(function):
  """`function(*arrays, plan)` of arrays, and the arrays of the plan one by one."""
  return lambda *args: function(*args[:-3], Plan(*args[-3:]))


# ---- vmap ----

# Axes of x or y, of the weights, of the plan, and of the result.
BATCHED = (
  (0, 0, 0, 0),
  (1, 2, 1, 2),
  (-1, 0, 0, 1),
  (None, 0, 0, 0),
  (1, None, None, 1),
  (0, 0, None, 0),
)


@pytest.mark.parametrize("rows, slots, entries, out", BATCHED)
def test_vmap_over_any_axis_and_operand_is_one_call(implementation, rng, rows, slots, entries, out):
  case = make_case(rng, 4)
  axes = (rows, rows, slots, entries, entries, entries)
  arrays = (*case[:3], *case[3])
  x, y, weights, *plan = (
    a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(arrays, axes, strict=True)
  )
  options = {"implementation": implementation}
  forward = on_arrays(functools.partial(permute, **options))
  back = on_arrays(functools.partial(combine, **options))
  whole = on_arrays(functools.partial(gradient, **options))
  for function, args, in_axes in (
    (forward, (x, *plan), (rows, *axes[3:])),
    (back, (y, weights, *plan), (rows, slots, *axes[3:])),
    (whole, (x, weights, *plan), (rows, slots, *axes[3:])),
  ):
    if all(axis is None for axis in in_axes):
      continue
    out_axes = 0 if function is whole else out
    mapped = jax.vmap(function, in_axes, out_axes)
    assert_same(jax.jit(mapped)(*args), loop(function, in_axes, out_axes, *args))
    if implementation == "cpu":
      counts = [calls(word, mapped, *args) for word in ("permute", "combine")]
      assert counts == [
        (int(function is not back), int(function is whole)),
        (int(function is not forward), int(function is whole)),
      ]


def test_nested_vmap_and_gradient_of_vmap(rng):
  x, _, weights, plan = make_case(rng, 2, 3)
  nested = jax.vmap(jax.vmap(layer, 1, 1), 0, 0)
  turned = jax.tree.map(lambda a: jnp.swapaxes(a, 1, 2), (x, weights, plan))
  assert_same(jnp.swapaxes(jax.jit(nested)(*turned), 1, 2), layer(x, weights, plan))

  def nested_loss(x, weights):
    return jnp.sum(jnp.sin(3 * nested(x, weights, turned[2])))

  got = jax.jit(jax.grad(nested_loss, (0, 1)))(*turned[:2])
  want = gradient(x, weights, plan)
  assert_same(tuple(jnp.swapaxes(g, 1, 2) for g in got), want)
  function = jax.grad(nested_loss, (0, 1))
  assert [calls(word, function, *turned[:2]) for word in ("permute", "combine")] == [(1, 1)] * 2


# ---- what is computed and kept ----


def lowered(function, *args, platform="cpu") -> str:
  return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "argnums, of_rows, of_weights", ((0, True, False), (1, False, True), ((0, 1), True, True))
)
def test_only_the_gradients_asked_for_are_computed(rng, argnums, of_rows, of_weights):
  """A gradient alone needs only the other operand, and one call."""
  _, y, weights, plan = make_case(rng)
  cotangent = make_rows(rng, 8, 6)

  def pulled(y, weights):
    return jax.grad(lambda *args: jnp.vdot(combine(*args, plan), cotangent), argnums)(y, weights)

  text = lowered(pulled, y, weights)
  assert text.count("@jax_router_combine_backward(") == 1
  assert f"of_rows = {str(of_rows).lower()}" in text
  assert f"of_weights = {str(of_weights).lower()}" in text
  got = jax.jit(pulled)(y, weights)
  want = jax.grad(
    lambda *args: jnp.vdot(combine(*args, plan, implementation="reference"), cotangent), (0, 1)
  )(y, weights)
  assert_same(got, want if argnums == (0, 1) else want[argnums])


def test_constant_weights_keep_no_rows(rng):
  """The pulled-back function holds the plan and the weights, nothing of the size of the rows."""
  _, y, weights, plan = make_case(rng, tokens=16, width=64)
  _, pull_back = jax.vjp(lambda y: combine(y, weights, plan), y)
  kept = [leaf.size for leaf in jax.tree.leaves(pull_back)]
  assert kept and max(kept) < y.size
  _, pull_back = jax.vjp(lambda y, w: combine(y, w, plan), y, weights)
  assert max(leaf.size for leaf in jax.tree.leaves(pull_back)) == y.size


def test_what_is_not_used_has_no_backward(rng):
  x, y, weights, plan = make_case(rng)

  def unused(x, weights):
    rows, tokens = permute(x, plan), combine(y, weights, plan)
    return jnp.sum(x), (rows, tokens)

  function = jax.grad(unused, (0, 1), has_aux=True)
  got, _ = jax.jit(function)(x, weights)
  assert_equal(got, (jnp.ones_like(x), jnp.zeros_like(weights)))
  assert [calls(word, function, x, weights) for word in ("permute", "combine")] == [(1, 0)] * 2


def test_the_gradient_of_permute_keeps_the_plan_alone(rng):
  x, *_, plan = make_case(rng, tokens=16, width=64)
  _, pull_back = jax.vjp(lambda x: permute(x, plan), x)
  assert max(leaf.size for leaf in jax.tree.leaves(pull_back)) == plan.inverse.size


def test_checkpoint_with_the_names_does_not_sort_again(rng):
  """With the policy, the plan is made once; without it, twice."""
  x, _, weights, _ = make_case(rng)
  experts = jnp.asarray(make_experts("outside", 8, 3, EXPERTS))

  def block(x, weights, experts):
    return loss(x, weights, jax_router.plan(experts, EXPERTS))

  def differentiated(function):
    return jax.value_and_grad(function, (0, 1))

  save = jax.checkpoint_policies.save_only_these_names("jax_router")
  want = jax.jit(differentiated(block))(x, weights, experts)
  for options, plans in (({"policy": save}, 1), ({}, 2)):
    again = differentiated(jax.checkpoint(block, **options))
    assert_same(jax.jit(again)(x, weights, experts), want)
    assert calls("plan", again, x, weights, experts)[0] == plans
    assert calls("combine", again, x, weights, experts)[1] == 1


def test_scan(rng):
  x, _, weights, plan = make_case(rng, 4)

  def step(carry, xs):
    x, weights, plan = xs
    result = layer(x + carry, weights, plan)
    return carry + jnp.mean(result), result

  def by_hand(x, weights):
    carry, results = jnp.float32(0), []
    for i in range(4):
      carry, result = step(carry, jax.tree.map(lambda a, i=i: a[i], (x, weights, plan)))
      results.append(result)
    return jnp.stack(results)

  def scanned(x, weights):
    return jax.lax.scan(step, jnp.float32(0), (x, weights, plan))[1]

  assert_same(jax.jit(scanned)(x, weights), by_hand(x, weights))
  got, want = (
    jax.jit(jax.grad(lambda *args, run=run: jnp.sum(jnp.sin(run(*args))), (0, 1)))(x, weights)
    for run in (scanned, by_hand)
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_eager_calls_and_numpy_arrays(rng):
  x, _, weights, plan = make_case(rng)
  got = layer(*jax.tree.map(np.asarray, (x, weights, plan)))
  assert isinstance(got, jax.Array)
  assert_equal(got, jax.jit(layer)(x, weights, plan))


# ---- second order, forward mode ----


@pytest.mark.parametrize("kind", ("outside", "padding", "repeated"))
def test_second_order_is_the_references(kernel, rng, kind):
  x, _, weights, plan = make_case(rng, kind=kind)
  directions = make_rows(rng, *x.shape), make_rows(rng, *weights.shape)

  @functools.partial(jax.jit, static_argnums=2)
  def products(x, weights, implementation):
    def along(x, weights):
      pulled = gradient(x, weights, plan, implementation)
      return sum(jnp.vdot(g, d) for g, d in zip(pulled, directions, strict=True))

    return along(x, weights), jax.grad(along, (0, 1))(x, weights)

  got, want = products(x, weights, kernel), products(x, weights, "reference")
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-5)
    assert np.abs(b).max() > 0.1


def test_check_grads_to_second_order(rng):
  x, _, weights, plan = make_case(rng, tokens=3, width=4)
  function = functools.partial(layer, plan=plan)
  check_grads(function, (x, weights), order=2, modes=("rev",), atol=0.02, rtol=0.02, eps=1e-2)


def test_forward_over_reverse(rng):
  x, _, weights, plan = make_case(rng)
  direction = make_rows(rng, *x.shape)

  def product(implementation):
    pulled = lambda x: gradient(x, weights, plan, implementation)  # noqa: E731
    return jax.jit(lambda x: jax.jvp(pulled, (x,), (direction,))[1])(x)

  for a, b in zip(product(None), product("reference"), strict=True):
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-5)


def test_forward_mode_needs_the_reference(rng):
  x, _, weights, plan = make_case(rng)
  tangent = make_rows(rng, *x.shape)

  def along(implementation):
    return jax.jvp(lambda x: layer(x, weights, plan, implementation), (x,), (tangent,))[1]

  _, pull_back = jax.vjp(lambda x: layer(x, weights, plan), x)
  cotangent = make_rows(rng, *x.shape)
  got, want = jnp.vdot(along("reference"), cotangent), jnp.vdot(tangent, pull_back(cotangent)[0])
  np.testing.assert_allclose(got, want, rtol=1e-4)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    along(None)


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16), ids=("bfloat16", "float16"))
def test_gradients_keep_the_dtypes(kernel, rng, dtype):
  x, _, weights, plan = make_case(rng)
  x, weights = x.astype(dtype), weights.astype(jnp.bfloat16)
  got = jax.jit(gradient, static_argnums=3)(x, weights, plan, kernel)
  want = jax.jit(gradient, static_argnums=3)(x, weights, plan, "reference")
  assert [g.dtype for g in got] == [dtype, jnp.bfloat16]
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.05, atol=0.05
    )


# ---- lowering for other platforms, export ----


def test_other_platforms_get_plain_jax(rng):
  x, _, weights, plan = make_case(rng)
  assert "@jax_router" not in lowered(gradient, x, weights, plan, platform="tpu")
  asked = functools.partial(permute, implementation="cpu")
  with pytest.raises(ValueError, match="implementation='cpu' of permute cannot run here"):
    lowered(asked, x, plan, platform="tpu")


def test_cuda_lowering_follows_the_build(rng):
  words = _native.platforms().get("cuda", ())
  x, _, weights, plan = make_case(rng)
  text = lowered(gradient, x, weights, plan, platform="cuda")
  for word in ("permute", "permute_backward", "combine", "combine_backward"):
    assert (f"@jax_router_{word}(" in text) == (word in words)
    assert word in _native.platforms()["cpu"]


def test_implementation_of_the_reference_has_no_custom_call(rng):
  x, _, weights, plan = make_case(rng)
  function = functools.partial(gradient, implementation="reference")
  assert "@jax_router" not in lowered(function, x, weights, plan)


def test_export_with_symbolic_tokens_and_two_platforms(rng):
  pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
  tokens = jax.export.symbolic_shape("tokens")[0]
  shapes = (
    jax.ShapeDtypeStruct((tokens, 6), jnp.float32),
    jax.ShapeDtypeStruct((tokens, 3), jnp.float32),
    Plan(*(jax.ShapeDtypeStruct((size,), jnp.int32) for size in (3 * tokens, 3 * tokens, EXPERTS))),
  )
  data = jax.export.export(
    jax.jit(on_arrays(layer)),
    platforms=["cpu", "cuda"],
    disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS,
  )(*shapes[:2], *shapes[2]).serialize(vjp_order=1)
  again = jax.export.deserialize(data)
  for size in (1, 7, 64):
    x, _, weights, plan = make_case(rng, tokens=size)
    assert_same(again.call(x, weights, *plan), layer(x, weights, plan))
    got = jax.grad(lambda x, w, p: jnp.sum(jnp.sin(3 * again.call(x, w, *p))), (0, 1))(
      x, weights, plan
    )
    assert_same(got, gradient(x, weights, plan))
