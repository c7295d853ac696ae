"""Values of `route_dense` against the float64 oracle and, to the bit, against `route`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import oracle
import shapes
import test_route_golden as golden
from jax_router import Groups

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
CASES = tuple((*variant, dtype) for variant in oracle.VARIANTS for dtype in DTYPES)
FORMATS = ("bytemap", "bitmap")

SIZES = [
  (experts, k)
  for experts in (1, 7, 33, 130, 257, 896)
  for k in sorted({1, 3, 8, experts - 1, experts})
  if 1 <= k <= experts
]


@pytest.fixture
def routers(route, route_dense):
  """The routing in both forms, by every implementation."""
  return route, route_dense


@pytest.fixture
def kernel_routers(kernel_route, kernel_route_dense):
  """The routing in both forms, by the kernels only."""
  return kernel_route, kernel_route_dense


def scattered(routing, num_experts: int, dtype) -> tuple[np.ndarray, np.ndarray]:
  """Probs and bytemap made of a `Routing` slot by slot, in float32, rounded once."""
  weights = np.asarray(routing.weights).reshape(-1, routing.weights.shape[-1])
  experts = np.asarray(routing.experts).reshape(weights.shape)
  sums = np.zeros((len(weights), num_experts + 1), np.float32)
  chosen = np.zeros(sums.shape, bool)
  rows = np.arange(len(weights))
  for slot in range(weights.shape[-1]):
    sums[rows, experts[:, slot]] += weights[:, slot]
    chosen[rows, experts[:, slot]] = True
  shape = (*routing.weights.shape[:-1], num_experts)
  with np.errstate(over="ignore"):
    probs = sums[:, :-1].astype(dtype)
  return probs.reshape(shape), chosen[:, :-1].reshape(shape)


def check(routers, logits, k, **options) -> oracle.Choice:
  """Both map formats against the oracle, and to the bit against each other and `route`."""
  route, route_dense = routers
  routing = route(logits, k, **options)
  probs, chosen = scattered(routing, logits.shape[-1], logits.dtype)
  choice = None
  for map_format in FORMATS:
    got = route_dense(logits, k, map_format=map_format, **options)
    choice = oracle.check_dense(got, logits, k, map_format=map_format, **options)
    assert np.asarray(got.probs).tobytes() == probs.tobytes()
    if map_format == "bitmap":
      chosen = np.packbits(chosen, axis=-1, bitorder="little")
    assert np.asarray(got.routing_map).tobytes() == chosen.tobytes()
  assert choice is not None
  return choice


# ---- the choice ----


def check_size(routers, experts, k):
  score, renormalize, dtype = CASES[(experts + 5 * k) % len(CASES)]
  logits = shapes.make_logits("random", 3 if experts * k > 40000 else 65, experts, dtype)
  check(routers, logits, k, score=score, renormalize=renormalize)


@pytest.mark.parametrize("experts, k", (*SIZES, (2304, 36), (8192, 4), (8192, 300)))
def test_sizes(kernel_routers, experts, k):
  check_size(kernel_routers, experts, k)


@pytest.mark.parametrize("experts, k", SIZES[1::9])
def test_sizes_of_every_implementation(routers, experts, k):
  check_size(routers, experts, k)


def check_kinds(routers, score, renormalize):
  dtype = DTYPES[oracle.VARIANTS.index((score, renormalize)) % 3]
  for kind in shapes.FINITE_KINDS + shapes.SPECIAL_KINDS:
    logits = shapes.make_logits(kind, 24, 33, dtype)
    check(routers, logits, 8, score=score, renormalize=renormalize)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_kinds_of_logits(kernel_routers, score, renormalize):
  check_kinds(kernel_routers, score, renormalize)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[::3])
def test_kinds_of_every_implementation(routers, score, renormalize):
  check_kinds(routers, score, renormalize)


@pytest.mark.slow
@pytest.mark.parametrize("score, renormalize, dtype", CASES)
@pytest.mark.parametrize("kind", shapes.FINITE_KINDS + shapes.SPECIAL_KINDS)
def test_sizes_for_every_variant_and_kind(routers, kind, score, renormalize, dtype):
  for experts, k in SIZES:
    logits = shapes.make_logits(kind, 12, experts, dtype, seed=k)
    check(routers, logits, k, score=score, renormalize=renormalize)


@pytest.mark.parametrize("model", shapes.MODELS[::3], ids=lambda model: model.name)
def test_models(kernel_routers, rng, model):
  logits = shapes.make_logits("random", 300, model.experts, ml_dtypes.bfloat16)
  bias = rng.normal(size=model.experts).astype(np.float32) / 4 if model.bias else None
  check(kernel_routers, logits, model.k, **model.options | ({} if bias is None else {"bias": bias}))


@pytest.mark.parametrize("name", golden.CASES)
def test_golden_vectors(route_dense_and_gradient, name):
  k, options, experts, weights, slots = golden.CASES[name]
  options = options | {"map_format": "bitmap", "scale": golden.SCALE}
  got, gradient = route_dense_and_gradient(golden.LOGITS, k, golden.COTANGENT, **options)
  want = dict(zip(experts, weights, strict=True))
  np.testing.assert_allclose(got.probs, [want.get(e, 0) for e in range(8)], rtol=2e-7, atol=1e-7)
  assert got.routing_map.tolist() == [sum(1 << e for e in experts)]
  if slots is not None:
    want = [slots.get(e, 0) for e in range(8)]
    np.testing.assert_allclose(gradient, want, rtol=1e-6, atol=1.1e-7)


@pytest.mark.parametrize("scale", (-1.5, 0.0))
def test_scale(kernel_routers, scale):
  logits = shapes.make_logits("random", 9, 20, ml_dtypes.bfloat16)
  check(kernel_routers, logits, 6, scale=scale)


# ---- shapes ----


def test_no_tokens(route_dense):
  for shape in ((0, 20), (0, 5, 20), (5, 0, 20)):
    for map_format, width in zip(FORMATS, (20, 3), strict=True):
      got = route_dense(np.zeros(shape, np.float16), 4, map_format=map_format)
      assert got.probs.shape == shape and got.probs.dtype == np.float16
      assert got.routing_map.shape == (*shape[:-1], width)


def test_leading_dimensions_are_tokens(kernel_route_dense, rng):
  bias, where = rng.normal(size=20).astype(np.float32), rng.random(30) < 0.7
  flat = shapes.make_logits("random", 30, 20)
  for map_format, operands in zip(FORMATS, ({}, {"bias": bias}), strict=True):
    fixed = operands | {"map_format": map_format, "score": "sigmoid"}
    want = kernel_route_dense(flat, 5, where=where, **fixed)
    for lead in ((2, 3, 5), (1, 30, 1)):
      got = kernel_route_dense(flat.reshape(*lead, 20), 5, where=where.reshape(lead), **fixed)
      for a, b in zip(got, want, strict=True):
        assert a.shape == (*lead, b.shape[-1])
        np.testing.assert_array_equal(np.reshape(a, b.shape), b)
    one = kernel_route_dense(flat[4], 5, **fixed)
    assert one.probs.shape == (20,) and one.routing_map.ndim == 1
    oracle.check_dense(one, flat[4], 5, **fixed)


def test_result_unpacks_and_is_a_named_tuple(route_dense):
  probs, routing_map = result = route_dense(np.zeros((3, 4), np.float32), 2)
  assert result.probs is probs and result.routing_map is routing_map
  assert result._fields == ("probs", "routing_map")
  assert isinstance(result, jax_router.DenseRouting)


# ---- bias, groups, where, given experts ----


def check_bias_groups_and_padding(routers, rng, score, renormalize):
  options = {
    "score": score,
    "renormalize": renormalize,
    "bias": rng.normal(size=40).astype(np.float32),
    "groups": Groups(8, 3),
    "where": rng.random(60) < 0.7,
    "scale": 2.5,
  }
  for kind in ("random", "nan", "dead"):
    check(routers, shapes.make_logits(kind, 60, 40), 6, **options)


def check_given_experts(routers, rng, score, renormalize):
  """Out of range, and twice in one row."""
  dtype = DTYPES[oracle.VARIANTS.index((score, renormalize)) % 3]
  experts = rng.integers(-3, 28, size=(60, 6)).astype(np.int32)
  experts[:4] = [[5] * 6, [24] * 6, [-1] * 6, [2, 2, -(2**31), 2**31 - 1, 7, 2]]
  for kind in ("random", "nan", "dead"):
    logits = shapes.make_logits(kind, 60, 24, dtype)
    options = {"score": score, "renormalize": renormalize, "experts": experts, "scale": 0.5}
    check(routers, logits, 6, **options)


OPERANDS = (check_bias_groups_and_padding, check_given_experts)


@pytest.mark.parametrize("check_operands", OPERANDS)
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_operands(kernel_routers, rng, score, renormalize, check_operands):
  check_operands(kernel_routers, rng, score, renormalize)


@pytest.mark.parametrize("check_operands", OPERANDS)
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS[1::5])
def test_operands_of_every_implementation(routers, rng, score, renormalize, check_operands):
  check_operands(routers, rng, score, renormalize)


def test_padding_is_zero_in_probs_and_map(route_dense):
  logits = shapes.make_logits("random", 6, 9)
  where = np.array([True, False, True, False, False, True])
  for map_format in FORMATS:
    got = route_dense(logits, 3, where=where, map_format=map_format)
    assert (np.asarray(got.probs)[~where] == 0).all() and (np.asarray(got.probs)[where] > 0).any()
    assert (np.asarray(got.routing_map)[~where] == 0).all()
    assert np.asarray(got.routing_map)[where].any(axis=-1).all()


def test_map_holds_slots_of_weight_zero(route_dense):
  """Filled slots and the experts of a row without a choice are in the map; -0 marks become +0."""
  logits = np.array([[np.nan, 1, -np.inf, np.nan], [np.nan, np.nan, -np.inf, np.nan]], np.float32)
  got = route_dense(logits, 3)
  assert got.routing_map.tolist() == [[True, True, True, False]] * 2
  third = float(np.float32(1) / np.float32(3))
  assert got.probs.tolist() == [[0, 1, 0, 0], [third, third, third, 0]]
  assert not np.signbit(got.probs).any()


# ---- repeats ----


@pytest.mark.parametrize("map_format", FORMATS)
@pytest.mark.parametrize("tokens, experts, k", ((257, 130, 9), (3, 2304, 36)))
def test_repeats_are_identical_and_fully_written(
  kernel_route_dense, map_format, tokens, experts, k
):
  logits = jnp.asarray(shapes.make_logits("random", tokens, experts))
  given = np.random.default_rng(0).integers(0, experts, size=(tokens, k)).astype(np.int32)
  for options in ({}, {"experts": given}):
    options = options | {"map_format": map_format}
    first = jax.device_get(kernel_route_dense(logits, k, **options))
    oracle.check_dense(first, logits, k, **options)
    for i in range(20):
      # Freed arrays of the same size full of rubbish are what an unwritten result would show.
      rubbish = [jnp.full(x.shape, 1 + i % 2, x.dtype) for x in first]
      jax.block_until_ready(rubbish)
      del rubbish
      got = jax.device_get(kernel_route_dense(logits, k, **options))
      assert all(a.tobytes() == b.tobytes() for a, b in zip(got, first, strict=True))


# ---- bad arguments ----


@pytest.mark.parametrize("map_format", ("Bytemap", "u8", "", None, 1, b"bytemap"))
def test_bad_map_formats_are_refused_while_tracing(map_format):
  logits = jax.ShapeDtypeStruct((5, 12), jnp.float32)
  function = functools.partial(jax_router.route_dense, k=3, map_format=map_format)
  with pytest.raises(ValueError) as caught:
    jax.eval_shape(function, logits)
  message = f"map_format must be one of 'bytemap', 'bitmap', got {map_format!r}"
  assert str(caught.value) == message


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"k": 13}, ValueError, "k must be between 1 and num_experts = 12, got 13"),
    ({"score": "softmin"}, ValueError, "score must be one of .* got 'softmin'"),
    ({"renormalize": 1}, TypeError, "renormalize must be a static bool, got int"),
    ({"scale": np.inf}, ValueError, "scale must be .* got inf"),
    ({"bias": np.ones(11, np.float32)}, ValueError, r"bias must have shape .* got \(11,\)"),
    ({"where": np.ones(5, np.float32)}, TypeError, "where must have dtype bool, got float32"),
    ({"experts": np.ones((5, 2), int)}, ValueError, r"experts must have shape .* got \(5, 2\)"),
    ({"groups": Groups(5, 2)}, ValueError, "groups.count must divide num_experts = 12, got 5"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_arguments_are_refused_while_tracing(arguments, exception, text):
  logits = jax.ShapeDtypeStruct((5, 12), jnp.float32)
  function = functools.partial(jax_router.route_dense, **{"k": 3} | arguments)
  with pytest.raises(exception, match=text):
    jax.eval_shape(function, logits)
  with pytest.raises(TypeError, match="positional"):
    jax_router.route_dense(np.zeros((5, 12), np.float32), 3, "bytemap")
