"""The layer around `dense_moe_fc2`: float8, chosen experts, which form; bad arguments."""

from __future__ import annotations

import doctest
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle_experts as oracle
from jax_router import (
  PackedW2,
  Routing,
  _experts,
  _experts_layer,
  alpha_from_topk,
  choose_moe_form,
  dense_moe,
  dense_moe_fc2,
  pack_w2,
  route,
)
from oracle_experts import DTYPES, FLOAT8, dequantize, make_alpha, make_operands, quantize_h
from oracle_permute import make_rows


@pytest.fixture(autouse=True)
def _only_what_is_built(request):
  if "implementation" in request.fixturenames:
    oracle.skip_without_kernel(request.getfixturevalue("implementation"))


# ---- float8 ----


@pytest.mark.parametrize("width", (8, 128, 200))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_pack_w2(rng, dtype, width):
  w2 = make_rows(rng, 3, 256, width, dtype=dtype)
  w2[1, 128:] = 0
  w2[2] *= np.asarray(100, dtype)
  packed = jax.jit(pack_w2)(w2)
  assert packed.q.shape == (width, 768) and packed.q.dtype == FLOAT8
  assert packed.scale.shape == (-(-width // 128), 6) and packed.scale.dtype == np.float32
  wide = np.moveaxis(w2.astype(np.float64), 2, 0).reshape(width, 768)
  for row in range(packed.scale.shape[0]):
    for column in range(6):
      block = wide[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
      most = np.abs(block).max()
      np.testing.assert_allclose(packed.scale[row, column], most / 448 or 1, rtol=1e-6)
  _, again = dequantize(np.ones((1, 3, 256), FLOAT8), np.ones((1, 6), np.float32), packed)
  np.testing.assert_allclose(
    again, w2.astype(np.float64), rtol=2**-4, atol=np.abs(wide).max() / 2e5
  )
  assert (np.asarray(packed.q)[:, 384:512].astype(np.float32) == 0).all()


FLOAT8_IMPLEMENTATION = pytest.mark.parametrize(
  "name", ("reference", None, pytest.param("cuda", marks=pytest.mark.gpu))
)


def skip_float8(name) -> float:
  """Skips what is not there; what the sums of this implementation round more than float32."""
  if name == "cuda":
    oracle.skip_without_kernel(name)
  on_cuda = name == "cuda" or (name is None and jax.default_backend() == "gpu")
  return oracle.FLOAT8_SUMS if on_cuda else 0.0


@FLOAT8_IMPLEMENTATION
@pytest.mark.parametrize("out_dtype", (None, np.float32))
@pytest.mark.parametrize("shape", ((1, 1, 128, 8), (17, 5, 256, 200), (0, 2, 128, 16)), ids=str)
def test_float8(rng, name, shape, out_dtype):
  fold = skip_float8(name)
  tokens, experts, depth, width = shape
  h, h_scale = quantize_h(rng.normal(size=(tokens, experts, depth)))
  packed = pack_w2(make_rows(rng, experts, depth, width))
  alpha = make_alpha("top-k", tokens, experts, min(2, experts))
  run = functools.partial(dense_moe_fc2, out_dtype=out_dtype, implementation=name)
  got = jax.jit(run)(h, packed, alpha, h_scale=h_scale)
  want = oracle.fc2(*dequantize(h, h_scale, packed), alpha, fold)
  want.check(got, out_dtype or jnp.bfloat16)


def float8_case(rng):
  """h, its scales, packed weights and alpha, of which expert 1 is chosen by no token."""
  h, h_scale = quantize_h(rng.normal(size=(9, 3, 256)))
  packed = pack_w2(make_rows(rng, 3, 256, 200))
  alpha = make_alpha("top-k", 9, 3, 1)
  alpha[:, 1] = 0
  return h, h_scale, packed, alpha


@FLOAT8_IMPLEMENTATION
def test_float8_masks(rng, name):
  """Scales and values of experts of weight 0 may be anything."""
  fold = skip_float8(name)
  h, h_scale, packed, alpha = float8_case(rng)
  run = jax.jit(functools.partial(dense_moe_fc2, out_dtype=np.float32, implementation=name))
  want = oracle.fc2(*dequantize(h, h_scale, packed), alpha, fold)
  unused = np.repeat(alpha == 0, 2, axis=1)
  scale, q = np.array(packed.scale), np.array(packed.q)
  scale[:, 2:4], q[:, 256:512] = np.inf, np.nan
  for special in (np.nan, np.inf):
    poisoned = np.where(unused, np.float32(special), h_scale)
    not_finite = np.where(alpha[:, :, None] == 0, FLOAT8(np.nan), h)
    want.check(run(not_finite, PackedW2(q, scale), alpha, h_scale=poisoned), np.float32)


@FLOAT8_IMPLEMENTATION
def test_float8_gradients(rng, name):
  """Of alpha and both scales; that of an expert of weight 0 that is not finite is 0."""
  skip_float8(name)
  h, h_scale, packed, alpha = float8_case(rng)
  cotangent = make_rows(rng, 9, 200)

  @jax.jit
  def pull(h, q, alpha, h_scale, scale):
    def run(alpha, h_scale, scale):
      options = {"out_dtype": np.float32, "implementation": name}
      return dense_moe_fc2(h, PackedW2(q, scale), alpha, h_scale=h_scale, **options)

    return jax.vjp(run, alpha, h_scale, scale)[1](cotangent)

  wide = dequantize(h, h_scale, packed)
  of_h, of_w2, of_alpha = oracle.gradients(cotangent, *wide, alpha)
  q = np.asarray(packed.q).astype(np.float64)
  blocks = (of_h.values * h.astype(np.float64)).reshape(9, 6, 128).sum(axis=2)
  rows = (np.moveaxis(of_w2.values, 2, 0).reshape(200, 768) * q).reshape(200, 6, 128).sum(axis=2)
  of_scale = np.stack([rows[:128].sum(axis=0), rows[128:].sum(axis=0)])
  got = pull(h, packed.q, alpha, h_scale, packed.scale)
  of_alpha.check(got[0], np.float32)
  np.testing.assert_allclose(got[1], blocks, rtol=1e-4, atol=1e-4 * np.abs(blocks).max())
  np.testing.assert_allclose(got[2], of_scale, rtol=1e-4, atol=1e-4 * np.abs(of_scale).max())
  assert np.abs(blocks).max() > 1 and np.abs(of_scale).max() > 1
  poisoned = np.where(alpha[:, :, None] == 0, FLOAT8(np.nan), h)
  again = pull(poisoned, packed.q, alpha, h_scale, packed.scale)
  np.testing.assert_array_equal(again[0], np.where(alpha == 0, 0, got[0]))
  for a, b in zip(again[1:], got[1:], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---- the layer ----


def layer_in_numpy(x, w13, w2, experts, weights):
  """float64, a token and an expert at a time."""
  x, w13, w2 = (a.astype(np.float64) for a in (x, w13, w2))
  result = np.zeros((len(x), w2.shape[2]))
  for t, j in np.ndindex(experts.shape):
    e = experts[t, j]
    if 0 <= e < len(w2):
      gate, up = np.split(w13[e] @ x[t], 2)
      result[t] += float(weights[t, j]) * ((up * gate / (1 + np.exp(-gate))) @ w2[e])
  return result


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_layer(implementation, rng, dtype):
  if implementation == "cuda" and dtype == np.float32:
    pytest.skip("the CUDA kernel takes 16 bits")
  x = make_rows(rng, 30, 24, dtype=dtype)
  w13 = (make_rows(rng, 6, 128, 24) / 5).astype(dtype)
  w2 = (make_rows(rng, 6, 64, 24) / 8).astype(dtype)
  routing = route(make_rows(rng, 30, 6), 2, where=rng.random(30) < 0.8)
  got = jax.jit(functools.partial(dense_moe, implementation=implementation))(x, w13, w2, routing)
  assert got.dtype == dtype
  want = layer_in_numpy(x, w13, w2, np.asarray(routing.experts), np.asarray(routing.weights))
  assert (np.asarray(got)[np.asarray(routing.experts[:, 0]) == 6] == 0).all()
  bar = {"float32": 1e-6, "bfloat16": 6e-3, "float16": 1e-3}[np.dtype(dtype).name]
  assert oracle.relative_error(got, want) < bar


def test_layer_has_the_gradients_of_a_sum_over_the_chosen_experts(implementation, rng):
  if implementation == "cuda":
    pytest.skip("the CUDA kernel takes 16 bits, and the gradient is in plain JAX")
  x, w13, w2 = make_rows(rng, 12, 8), make_rows(rng, 5, 12, 8) / 3, make_rows(rng, 5, 6, 10)
  routing = route(make_rows(rng, 12, 5), 2)

  def plain(x, w13, w2, weights):
    gate, up = jnp.split(jnp.einsum("tkfd,td->tkf", w13[routing.experts], x), 2, axis=-1)
    h = up * jax.nn.silu(gate)
    return jnp.einsum("tk,tki,tkin->tn", weights, h, w2[routing.experts])

  def ours(x, w13, w2, weights):
    chosen = Routing(weights, routing.experts)
    return dense_moe(x, w13, w2, chosen, implementation=implementation)

  def gradients(function):
    loss = lambda *args: jnp.sum(jnp.sin(function(*args)))  # noqa: E731
    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, w13, w2, routing.weights)

  for a, b in zip(gradients(ours), gradients(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert np.abs(b).max() > 0.1


@pytest.mark.parametrize("dtype", (np.int8, np.int16, np.int32, np.uint8, np.uint32))
def test_alpha_from_topk(rng, dtype):
  experts = rng.integers(0, 120, (2, 40, 5)).astype(dtype)
  experts[0, :3, 0] = experts[0, :3, 1]
  weights = rng.normal(size=experts.shape).astype(np.float32)
  if np.iinfo(dtype).min < 0:
    experts[1, 5] = -1
  for num_experts in (1, 100, 300):
    got = jax.jit(alpha_from_topk, static_argnums=2)(experts, weights, num_experts)
    want = np.zeros((2, 40, num_experts))
    for *row, slot in np.ndindex(experts.shape):
      e = int(experts[(*row, slot)])
      if 0 <= e < num_experts:
        want[(*row, e)] += weights[(*row, slot)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


# ---- which form ----


@pytest.mark.parametrize("device, ridge", (("H100", 263), ("H200", 184)))
def test_form_of_the_shapes_of_deepseek(device, ridge):
  """One of 8 devices: from where most experts are read to somewhat past the ridge."""
  forms = [
    choose_moe_form(n, 7168, 256, 256, 8, device=f"NVIDIA {device} 80GB") for n in range(0, 600)
  ]
  dense = [n for n, f in enumerate(forms) if f.form == "dense"]
  assert dense == list(range(dense[0], dense[-1] + 1))
  assert 60 <= dense[0] <= 70 and ridge <= dense[-1] <= 1.25 * ridge
  assert all((f.form == "dense") == (f.dense_us <= f.grouped_us) for f in forms)
  assert f"{128} tokens choose 98%" in forms[128].reason
  assert "need not be read" in forms[16].reason and "take longer" in forms[500].reason


def test_times_of_the_forms():
  """Bytes over the bandwidth of an H100, or operations over its rate."""
  few = choose_moe_form(128, 7168, 256, 256, 8, device="H100")
  np.testing.assert_allclose(few.dense_us, 319, rtol=0.01)
  many = choose_moe_form(384, 7168, 256, 256, 8, device="H100")
  np.testing.assert_allclose(many.dense_us, 457, rtol=0.01)
  half = choose_moe_form(128, 7168, 256, 256, 8, dtype=FLOAT8, device="H100")
  np.testing.assert_allclose(half.dense_us, 160, rtol=0.01)
  every = choose_moe_form(4, 7168, 8, 256, 8, device="H100")
  assert every.form == "dense"


def test_form_of_unknown_devices():
  for device in (None, jax.devices("cpu")[0], "NVIDIA GH200 480GB"):
    if device is not None or jax.default_backend() == "cpu":
      form = choose_moe_form(128, 7168, 256, 256, 8, device=device)
      assert form.form == "grouped" and np.isnan([form.dense_us, form.grouped_us]).all()
      assert "not known" in form.reason


def test_documentation_runs():
  """The checks in the page, and the examples in the docstrings."""
  for module in (_experts, _experts_layer):
    results = doctest.testmod(module)
    assert results.attempted >= 4 and results.failed == 0
  path = pathlib.Path(__file__).parents[1] / "docs" / "dense_experts.md"
  blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
  assert len(blocks) == 3
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    for block in blocks:
      assert "assert " in block
      exec(compile(block, str(path), "exec"), {})


# ---- bad arguments ----

H, W2, ALPHA = make_operands(6, 4, 128, 16, 2)
SCALE = np.ones((6, 4), np.float32)
PACKED = PackedW2(np.zeros((16, 512), FLOAT8), np.ones((1, 4), np.float32))
FP8 = {"h": H.astype(FLOAT8), "w2": PACKED, "h_scale": SCALE}
HALF = {"h": H.astype(jnp.bfloat16), "w2": W2.astype(jnp.bfloat16)}

BAD = (
  ({"h": 3}, TypeError, "h must be an array, got int"),
  ({"h": H.astype(int)}, TypeError, "h must be one of float32, bfloat16, float16, .* got int32"),
  ({"h": H[0, 0]}, ValueError, r"h must have shape \[\.\.\., E, I\] .* got \(128,\)"),
  ({"h": H[:, :, :0]}, ValueError, r"h must have shape .* at least 1, got \(6, 4, 0\)"),
  ({"alpha": ALPHA[:5]}, ValueError, r"alpha must have shape .* = \(6, 4\), got \(5, 4\)"),
  ({"alpha": ALPHA[:, :3]}, ValueError, r"alpha must have shape .* = \(6, 4\), got \(6, 3\)"),
  ({"alpha": ALPHA.astype(int)}, TypeError, "alpha must have a floating dtype, got int32"),
  ({"w2": W2[:3]}, ValueError, r"w2 must have shape .* = \(4, 128\), got \(3, 128\)"),
  ({"w2": W2[:, :64]}, ValueError, r"w2 must have shape .* = \(4, 128\), got \(4, 64\)"),
  ({"w2": W2[0]}, ValueError, r"w2 must have shape \[E, I, H\], .* got \(128, 16\)"),
  ({"w2": W2[:, :, :0]}, ValueError, r"w2 must have shape \[E, I, H\], each at least 1"),
  ({"w2": W2.astype(np.float16)}, TypeError, "w2 must have the dtype of h, float32, got float16"),
  ({"w2": PACKED}, TypeError, "w2 must be an array, got PackedW2"),
  ({"h_scale": SCALE}, ValueError, "h_scale must be None unless h is float8_e4m3fn"),
  ({"out_dtype": FLOAT8}, TypeError, "out_dtype must be one of .* got float8_e4m3fn"),
  ({"skip_unselected": 1}, TypeError, "skip_unselected must be a static bool, got int"),
  ({"implementation": "gpu"}, ValueError, "implementation must be one of .* got 'gpu'"),
  ({"implementation": "cuda"}, ValueError, r"'cuda' takes bfloat16, float16, .* got h float32\["),
  (
    {"h": HALF["h"][:, :, :96], "w2": HALF["w2"][:, :96], "implementation": "cuda"},
    ValueError, r"I in multiples of 64, .* got h bfloat16\[6, 4, 96\]",
  ),
  (
    HALF | {"w2": HALF["w2"][:, :, :12], "implementation": "cuda"},
    ValueError, r"H in multiples of 8, .* got h bfloat16\[6, 4, 128\] and H = 12",
  ),
  (FP8 | {"w2": W2}, TypeError, "w2 must be a jax_router.PackedW2 for an h in float8, got ndarray"),
  (FP8 | {"h": FP8["h"][:, :, :64]}, ValueError, "I that is a multiple of 128 in float8, got"),
  (FP8 | {"h_scale": None}, ValueError, "h_scale must be given for an h in float8, got None"),
  (FP8 | {"h_scale": SCALE[:, :3]}, ValueError, r"h_scale must have shape .* got \(6, 3\)"),
  (FP8 | {"h_scale": SCALE.astype(np.float16)}, TypeError, "h_scale must have dtype float32, got"),
  (FP8 | {"w2": PackedW2(W2[0].T, SCALE)}, TypeError, "w2.q must have dtype float8_e4m3fn, got"),
  (
    FP8 | {"w2": PACKED._replace(q=PACKED.q[:, :256])},
    ValueError, r"w2.q must have shape .* E \* I = 512, got \(16, 256\)",
  ),
  (
    FP8 | {"w2": PACKED._replace(scale=np.ones((2, 4), np.float32))},
    ValueError, r"w2.scale must have shape .* = \(1, 4\), got \(2, 4\)",
  ),
  (FP8 | {"implementation": "cpu"}, ValueError, "'cpu' cannot run in float8"),
)  # fmt: skip


@pytest.mark.parametrize("changed, exception, text", BAD)
def test_bad_arguments(changed, exception, text):
  arguments = {"h": H, "w2": W2, "alpha": ALPHA} | changed
  with pytest.raises(exception, match=text):
    dense_moe_fc2(**arguments)


def raises(exception, text, function, *args, **options):
  with pytest.raises(exception, match=text):
    function(*args, **options)


def test_bad_arguments_of_the_others():
  raises(ValueError, "w2 must have an I that is a multiple of 128", pack_w2, W2[:, :64])
  raises(TypeError, "w2 must be one of .* got int32", pack_w2, W2.astype(int))
  ids, weights = np.zeros((3, 2), np.int32), np.zeros((3, 2), np.float32)
  raises(TypeError, "experts must have an integer dtype", alpha_from_topk, weights, weights, 4)
  raises(TypeError, "weights must have a floating dtype", alpha_from_topk, ids, ids, 4)
  raises(
    ValueError, r"weights must have shape .*\(3, 2\), got", alpha_from_topk, ids, weights[0], 4
  )
  raises(ValueError, "num_experts must be between 1", alpha_from_topk, ids, weights, 0)
  raises(ValueError, "experts must have shape", alpha_from_topk, ids[0, 0], weights[0, 0], 4)
  x, w13 = np.zeros((3, 8), np.float32), np.zeros((4, 256, 8), np.float32)
  routing = Routing(weights, ids)
  raises(TypeError, "x must be one of .* got int32", dense_moe, x.astype(int), w13, W2, routing)
  raises(ValueError, r"w13 must have shape \[E, 2", dense_moe, x, w13[:, :3], W2, routing)
  raises(ValueError, "w13 must have shape .* last axis", dense_moe, x[:, :4], w13, W2, routing)
  raises(TypeError, "w13 must have the dtype", dense_moe, x.astype(np.float16), w13, W2, routing)
  raises(TypeError, "must be a jax_router.Routing, got tuple", dense_moe, x, w13, W2, (ids, ids))
  raises(ValueError, "routing.experts must have shape", dense_moe, x[:2], w13, W2, routing)
  raises(ValueError, r"w2 must have shape .* \(4, 128\), got", dense_moe, x, w13, W2[:3], routing)
  raises(ValueError, "k must be between 1 and num_experts", choose_moe_form, 1, 8, 4, 8, 5)
  raises(TypeError, "dtype must be one of", choose_moe_form, 1, 8, 4, 8, 2, dtype=np.float32)
  raises(TypeError, "device must be a jax.Device", choose_moe_form, 1, 8, 4, 8, 2, device=3)
