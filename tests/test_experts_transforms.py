"""`dense_moe_fc2` under vmap, scan, remat, sharding and export; lowering for other platforms."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
import oracle_experts as oracle
from jax_router import _native, dense_moe_fc2
from oracle_experts import make_operands
from programs import assert_equal, calls, collectives, loop, put

GATHERS = {"all-gather", "all-to-all", "collective-permute", "reduce-scatter"}
KINDS = pytest.mark.parametrize(
  "kind", (AxisType.Auto, AxisType.Explicit), ids=("auto", "explicit")
)


@pytest.fixture(autouse=True)
def _only_what_is_built(request):
  for name in ("implementation", "kernel"):
    if name in request.fixturenames:
      oracle.skip_without_kernel(request.getfixturevalue(name))


def loss(h, w2, alpha, implementation=None):
  return jnp.sum(jnp.sin(3 * dense_moe_fc2(h, w2, alpha, implementation=implementation)))


gradient = jax.grad(loss, (0, 1, 2))


def assert_close(got, want, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def batched(size, *shape):
  """Operands with a leading axis of different cases."""
  cases = [make_operands(*shape, seed=i) for i in range(size)]
  return [np.stack(arrays) for arrays in zip(*cases, strict=True)]


# ---- vmap ----

# Axes of h, w2, alpha and the result.
AXES = ((0, 0, 0, 0), (2, 1, 1, 1), (-1, None, 0, 0), (0, None, None, 0), (None, None, 1, 1),
        (None, 3, None, 0))  # fmt: skip


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_vmap_over_any_axis_and_operand_is_one_call(implementation, axes):
  *in_axes, out_axis = axes
  arrays = [
    a[0] if axis is None else np.moveaxis(a, 0, axis)
    for a, axis in zip(batched(4, 7, 5, 6, 9, 2), in_axes, strict=True)
  ]
  for function, out_axes in ((dense_moe_fc2, out_axis), (gradient, 0)):
    if function is gradient and implementation == "reference" and None in in_axes:
      continue  # slow to compile, and nothing of ours but what the others have
    run = jax.jit(functools.partial(function, implementation=implementation))
    mapped = jax.vmap(run, in_axes, out_axes)
    assert_close(jax.jit(mapped)(*arrays), loop(run, in_axes, out_axes, *arrays))
    if implementation == "cpu":
      assert calls("experts", mapped, *arrays) == (1, 0)


def test_shared_weights_are_not_copied():
  """vmap over the activations makes more tokens, in any order of the axes."""
  h, w2, alpha = batched(3, 6, 5, 4, 8, 2)
  mapped = jax.jit(jax.vmap(dense_moe_fc2, (0, None, 0)))
  text = mapped.lower(h, w2[0], alpha).as_text()
  assert "tensor<5x4x8xf32>" in text and "tensor<3x5x4x8xf32>" not in text
  flat = dense_moe_fc2(h.reshape(18, 5, 4), w2[0], alpha.reshape(18, 5))
  np.testing.assert_array_equal(mapped(h, w2[0], alpha).reshape(18, 8), flat)


def test_nested_vmap():
  """Over tokens inside, over weights outside, and the other way around."""
  h, w2, alpha = batched(3, 8, 5, 4, 6, 2)
  want = np.stack([dense_moe_fc2(*operands) for operands in zip(h, w2, alpha, strict=True)])
  one = jax.vmap(dense_moe_fc2, (0, None, 0))
  h, alpha = h.reshape(3, 2, 4, 5, 4), alpha.reshape(3, 2, 4, 5)
  for mapped, axis in ((jax.vmap(one), 0), (jax.vmap(jax.vmap(dense_moe_fc2), (1, None, 1)), 1)):
    got = np.moveaxis(np.asarray(jax.jit(mapped)(h, w2, alpha)), axis, 0)
    np.testing.assert_array_equal(got.reshape(want.shape), want)


# ---- scan, remat ----


def test_scan_and_checkpoint():
  h, w2, alpha = batched(3, 6, 5, 8, 8, 2)

  def layers(h, w2, alpha, wrap):
    def step(carry, xs):
      h, w2, alpha = xs
      result = wrap(dense_moe_fc2)(h + carry[:, None, :], w2, alpha)
      return jnp.tanh(result), None

    return jnp.sum(jax.lax.scan(step, jnp.zeros((6, 8)), (h, w2, alpha))[0])

  def by_hand(h, w2, alpha):
    carry = jnp.zeros((6, 8))
    for i in range(3):
      carry = jnp.tanh(
        dense_moe_fc2(h[i] + carry[:, None, :], w2[i], alpha[i], implementation="reference")
      )
    return jnp.sum(carry)

  want = jax.jit(jax.value_and_grad(by_hand, (0, 1, 2)))(h, w2, alpha)
  for wrap in (lambda f: f, jax.checkpoint):
    run = functools.partial(layers, wrap=wrap)
    assert_close(jax.jit(jax.value_and_grad(run, (0, 1, 2)))(h, w2, alpha), want)


# ---- sharding ----


@KINDS
def test_sharded_tokens_under_plain_jit_are_not_gathered(make_mesh, kind):
  """Plain JAX, whose one collective tells all devices whether the result is finite."""
  operands = make_operands(24, 6, 8, 10, 2)
  want = dense_moe_fc2(*operands, implementation="reference")
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    h, w2, alpha = operands
    args = put(mesh, h, "d", None, None), put(mesh, w2), put(mesh, alpha, "d", None)
    assert not collectives(dense_moe_fc2, *args) & GATHERS
    got = jax.jit(dense_moe_fc2)(*args)
    assert got.sharding.is_equivalent_to(put(mesh, want, "d", None).sharding, 2)
  assert_close(got, want)


@pytest.mark.parametrize("axis", ("E", "I"))
def test_sharded_experts_are_added_up(make_mesh, axis):
  operands = make_operands(9, 8, 16, 10, 3)
  mesh = make_mesh(AxisType.Auto)
  spec = ("d", None) if axis == "E" else (None, "d")
  h, w2, alpha = operands
  args = put(mesh, h, None, *spec), put(mesh, w2, *spec, None), put(mesh, alpha)
  text = jax.jit(dense_moe_fc2).lower(*args).as_text()
  assert "jax_router" not in text
  assert "all-reduce" in collectives(dense_moe_fc2, *args)
  oracle.fc2(*operands).check(jax.jit(dense_moe_fc2)(*args), np.float32)


def test_a_kernel_asked_for_takes_no_shards(make_mesh):
  operands = make_operands(16, 4, 8, 10, 2)
  run = functools.partial(dense_moe_fc2, implementation="cpu")
  explicit = make_mesh(AxisType.Explicit)
  with jax.set_mesh(explicit):
    args = put(explicit, operands[0], "d"), *operands[1:]
    with pytest.raises(ValueError, match="implementation='cpu' takes no sharded operands, got"):
      run(*args)
  auto = make_mesh(AxisType.Auto)
  args = put(auto, operands[0], "d"), *(put(auto, x) for x in operands[1:])
  with pytest.raises(ValueError, match=r"'cpu' of experts cannot run here: .* jax\.shard_map"):
    jax.jit(run)(*args)


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("name", (None, "reference"))
@KINDS
def test_shard_map_over_tokens(make_mesh, kind, name, check_vma):
  """The kernel of each device takes its tokens; replicated weights get the summed gradient."""
  operands = make_operands(24, 6, 8, 10, 2)
  mesh = make_mesh(kind)
  run = functools.partial(dense_moe_fc2, implementation=name)
  specs = P("d"), P(), P("d")
  mapped = jax.shard_map(
    run, mesh=mesh, in_specs=specs, out_specs=P("d"), check_vma=check_vma
  )  # fmt: skip
  with jax.set_mesh(mesh):
    args = [put(mesh, x, *spec) for x, spec in zip(operands, specs, strict=True)]
    assert collectives(mapped, *args) == set()
    assert ("jax_router_experts" in jax.jit(mapped).lower(*args).as_text()) == (name is None)
    got = jax.jit(mapped)(*args)
    pulled = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(3 * mapped(*a))), (0, 1, 2)))(*args)
  assert_close(got, run(*operands))
  assert_close(pulled, gradient(*operands, implementation=name), 1e-4)


def test_shard_map_over_experts(make_mesh):
  operands = make_operands(9, 16, 8, 10, 3)
  mapped = jax.shard_map(
    lambda *args: jax.lax.psum(dense_moe_fc2(*args), "d"),
    mesh=make_mesh(AxisType.Auto),
    in_specs=(P(None, "d"), P("d"), P(None, "d")),
    out_specs=P(),
  )
  oracle.fc2(*operands).check(jax.jit(mapped)(*operands), np.float32)
  got = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(3 * mapped(*a))), (0, 1, 2)))(*operands)
  assert_close(got, gradient(*operands), 1e-4)


def test_one_device_among_many():
  operands = make_operands(9, 4, 8, 10, 3)
  args = jax.device_put(operands, jax.devices()[-1])
  got = jax.jit(dense_moe_fc2)(*args)
  assert got.devices() == {jax.devices()[-1]}
  np.testing.assert_array_equal(got, jax.jit(dense_moe_fc2)(*operands))


# ---- lowering, export ----


def lowered(function, *args, platform="cpu") -> str:
  return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def test_other_platforms_get_plain_jax():
  operands = make_operands(8, 4, 64, 8, 2)
  assert "@jax_router_experts(" in lowered(dense_moe_fc2, *operands)
  assert "@jax_router" not in lowered(dense_moe_fc2, *operands, platform="tpu")
  asked = functools.partial(dense_moe_fc2, implementation="cpu")
  with pytest.raises(ValueError, match="implementation='cpu' of experts cannot run here"):
    lowered(asked, *operands, platform="tpu")
  reference = functools.partial(gradient, implementation="reference")
  assert "@jax_router" not in lowered(reference, *operands)


def test_cuda_lowering_follows_the_build_and_the_sizes():
  built = "experts" in _native.platforms().get("cuda", ())
  for depth, width, dtype in ((64, 8, jnp.bfloat16), (32, 8, jnp.bfloat16), (64, 8, jnp.float32)):
    operands = make_operands(8, 4, depth, width, 2, np.dtype(dtype))
    fits = depth == 64 and dtype == jnp.bfloat16
    text = lowered(dense_moe_fc2, *operands, platform="cuda")
    assert ("@jax_router_experts(" in text) == (built and fits)


def test_export_with_symbolic_tokens_and_two_platforms():
  pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
  tokens = jax.export.symbolic_shape("tokens")[0]
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 4, 6), (4, 6, 10), (tokens, 4))]
  data = jax.export.export(
    jax.jit(dense_moe_fc2),
    platforms=["cpu", "cuda"],
    disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS,
  )(*shapes).serialize(vjp_order=1)
  again = jax.export.deserialize(data)
  for size in (1, 7, 300):
    operands = make_operands(size, 4, 6, 10, 2)
    assert_equal(again.call(*operands), dense_moe_fc2(*operands))
    got = jax.grad(lambda *a: jnp.sum(jnp.sin(3 * again.call(*a))), (0, 1, 2))(*operands)
    assert_close(got, gradient(*operands), 1e-4)
