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
from jax_router import _experts_primitive, _native, dense_moe_fc2
from oracle_experts import make_operands, make_operands_for
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
  result = dense_moe_fc2(h, w2, alpha, out_dtype=np.float32, implementation=implementation)
  return jnp.sum(jnp.sin(3 * result))


gradient = jax.grad(loss, (0, 1, 2))


def assert_close(got, want, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def batched(size, *shape, implementation=None):
  """Operands with a leading axis of different cases."""
  cases = [make_operands_for(implementation, *shape, seed=i) for i in range(size)]
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
    for a, axis in zip(
      batched(4, 7, 5, 6, 9, 2, implementation=implementation), in_axes, strict=True
    )
  ]
  # A sum that is cut elsewhere may be rounded to the next bfloat16.
  tolerance = 2e-2 if implementation == "cuda" else 1e-5
  for function, out_axes in ((dense_moe_fc2, out_axis), (gradient, 0)):
    if function is gradient and implementation == "reference" and None in in_axes:
      continue  # slow to compile, and nothing of ours but what the others have
    run = jax.jit(functools.partial(function, implementation=implementation))
    mapped = jax.vmap(run, in_axes, out_axes)
    assert_close(jax.jit(mapped)(*arrays), loop(run, in_axes, out_axes, *arrays), tolerance)
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


@pytest.fixture
def cuda_kernel(monkeypatch):
  """A build with the CUDA module, taken to be on GPUs that run the kernel."""
  if "experts" not in _native.platforms().get("cuda", ()):
    pytest.skip("this build has no cuda kernel of experts")
  monkeypatch.setattr(_experts_primitive, "why_not_cuda", lambda: None)


def test_cuda_lowering_follows_the_sizes(cuda_kernel):
  sizes = (
    (64, 8, jnp.bfloat16),
    (32, 8, jnp.bfloat16),
    (64, 12, jnp.float16),
    (64, 8, jnp.float32),
  )
  for depth, width, dtype in sizes:
    operands = make_operands(8, 4, depth, width, 2, np.dtype(dtype))
    text = lowered(dense_moe_fc2, *operands, platform="cuda")
    assert ("@jax_router_experts(" in text) == (depth == 64 and dtype == jnp.bfloat16)
  many = np.zeros((1, 65537, 64), jnp.bfloat16)
  operands = many, np.zeros((65537, 64, 8), jnp.bfloat16), np.zeros((1, 65537), np.float32)
  assert "@jax_router" not in lowered(dense_moe_fc2, *operands, platform="cuda")


def test_many_tokens_take_cublas(cuda_kernel, monkeypatch):
  """In 16 bits, unless the kernel is asked for; in float8 it is always faster than plain JAX."""
  monkeypatch.setattr(_native, "check_implementation", lambda name: None)
  asked = functools.partial(dense_moe_fc2, implementation="cuda")
  for tokens in (512, 513):
    operands = make_operands(tokens, 2, 64, 8, 1, np.dtype(jnp.bfloat16))
    text = lowered(dense_moe_fc2, *operands, platform="cuda")
    assert ("@jax_router_experts(" in text) == (tokens == 512)
    assert "@jax_router_experts(" in lowered(asked, *operands, platform="cuda")


def test_limits_of_the_kernel():
  """The largest sizes that it takes, and one more of each."""
  fits = functools.partial(_experts_primitive.fits_cuda, "bfloat16")
  assert fits((2**20, 2**4), 2**16, 64, 2**31 - 8)
  assert not fits((2**24 + 1,), 2**16, 64, 2**31 - 8)
  assert not fits((1,), 2**16 + 1, 64, 8)
  assert not fits((1,), 2**15, 2**16, 8)
  assert not fits((1,), 8, 64, 2**31)


def test_cuda_lowering_follows_the_devices(monkeypatch):
  """Without GPUs that run the kernel, what is compiled for CUDA is plain JAX."""
  monkeypatch.setattr(_experts_primitive, "why_not_cuda", lambda: "it is not there")
  # Sizes of its own: JAX keeps what it has lowered before.
  operands = make_operands(10, 4, 64, 8, 2, np.dtype(jnp.bfloat16))
  assert "@jax_router" not in lowered(dense_moe_fc2, *operands, platform="cuda")
  monkeypatch.setattr(_native, "check_implementation", lambda name: None)
  with pytest.raises(ValueError, match="'cuda' of dense_moe_fc2 cannot run here: it is not there"):
    dense_moe_fc2(*operands, implementation="cuda")


def test_cuda_call_has_scratch_of_each_batch_row(cuda_kernel):
  """Beside the result; vmap over activations is one call of more tokens."""
  h, w2, alpha = (
    x.astype(jnp.bfloat16) if i < 2 else x for i, x in enumerate(batched(3, 6, 5, 64, 8, 2))
  )
  words = _native.experts_scratch(False, 18, 5, 64, 8)
  assert words > 0
  text = lowered(jax.vmap(dense_moe_fc2, (0, None, 0)), h, w2[0], alpha, platform="cuda")
  assert f"-> (tensor<3x6x8xbf16>, tensor<{words}xi32>)" in text
  words = _native.experts_scratch(False, 6, 5, 64, 8)
  text = lowered(jax.vmap(dense_moe_fc2), h, w2, alpha, platform="cuda")
  assert f"-> (tensor<3x6x8xbf16>, tensor<3x{words}xi32>)" in text
  assert text.count("custom_call @jax_router_experts(") == 1


def test_cuda_call_of_float8(cuda_kernel):
  """One call, and under vmap with shared weights one of more tokens."""
  h, h_scale = oracle.quantize_h(np.ones((6, 3, 128), np.float32))
  packed = jax_router.pack_w2(np.ones((3, 128, 24), np.float32))
  alpha = np.ones((6, 3), np.float32)

  def run(h, packed, alpha, h_scale):
    return dense_moe_fc2(h, packed, alpha, h_scale=h_scale)

  words = _native.experts_scratch(True, 6, 3, 128, 24)
  text = lowered(run, h, packed, alpha, h_scale, platform="cuda")
  assert text.count("custom_call @jax_router_experts_float8(") == 1
  assert f"-> (tensor<6x24xbf16>, tensor<{words}xi32>)" in text
  assert "@jax_router" not in lowered(run, h, packed, alpha, h_scale)
  h, alpha, h_scale = (np.stack([x, x]) for x in (h, alpha, h_scale))
  text = lowered(jax.vmap(run, (0, None, 0, 0)), h, packed, alpha, h_scale, platform="cuda")
  assert "tensor<24x384xf8E4M3FN>" in text and "-> (tensor<2x6x24xbf16>, " in text


def test_vmap_of_float8(rng):
  """Over activations alone, and over the weights too."""
  cases = []
  for _ in range(3):
    h, h_scale = oracle.quantize_h(rng.normal(size=(5, 2, 128)))
    packed = jax_router.pack_w2(rng.normal(size=(2, 128, 24)).astype(np.float32))
    cases.append((h, packed, oracle.make_alpha("top-k", 5, 2, 1), h_scale))

  def run(h, packed, alpha, h_scale):
    return dense_moe_fc2(h, packed, alpha, h_scale=h_scale, out_dtype=np.float32)

  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *cases)
  assert_close(jax.vmap(run)(*stacked), np.stack([run(*case) for case in cases]))
  shared = stacked[0], cases[0][1], *stacked[2:]
  want = np.stack([run(h, cases[0][1], *others) for h, _, *others in cases])
  assert_close(jax.vmap(run, (0, None, 0, 0))(*shared), want)


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
