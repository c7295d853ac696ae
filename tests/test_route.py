"""Values of `route` against the float64 oracle and `jax.lax.top_k`."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import oracle
import shapes

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
CASES = tuple((*variant, dtype) for variant in oracle.VARIANTS for dtype in DTYPES)

SIZES = (1, 7, 33, 64, 128, 130, 256, 257, 512, 896, 2304, 4096, 8192)
TOKENS = (257, 3, 1)


def sizes_and_choices() -> list[tuple[int, int, int]]:
  """(tokens, experts, k) for every size and every k, larger rows with fewer tokens."""
  found = []
  for experts in SIZES:
    for i, k in enumerate(sorted({1, 2, 3, 8, 22, 36, experts - 1, experts})):
      if 1 <= k <= experts:
        tokens = TOKENS[(experts + i) % 3] if experts * k < 40000 else 3
        found.append((tokens, experts, k))
  return found


def top_k(logits, k: int):
  """Experts by `jax.lax.top_k` on float32 logits, NaN as -inf."""
  x = jnp.asarray(logits).astype(jnp.float32)
  return jax.lax.top_k(jnp.where(jnp.isnan(x), -jnp.inf, x), k)[1]


def check_sizes(route, tokens, experts, k):
  score, renormalize, dtype = CASES[(experts + 5 * k) % len(CASES)]
  logits = shapes.make_logits("random", tokens, experts, dtype)
  got = route(logits, k, score=score, renormalize=renormalize)
  assert got.weights.dtype == np.float32 and got.experts.dtype == np.int32
  oracle.check_route(got, logits, k, score=score, renormalize=renormalize)
  np.testing.assert_array_equal(got.experts, top_k(logits, k))


@pytest.mark.parametrize("tokens, experts, k", sizes_and_choices())
def test_sizes(kernel_route, tokens, experts, k):
  check_sizes(kernel_route, tokens, experts, k)


@pytest.mark.parametrize("tokens, experts, k", sizes_and_choices()[::4])
def test_sizes_of_every_implementation(route, tokens, experts, k):
  check_sizes(route, tokens, experts, k)


@pytest.mark.slow
@pytest.mark.parametrize("score, renormalize, dtype", CASES)
@pytest.mark.parametrize("kind", shapes.FINITE_KINDS + shapes.SPECIAL_KINDS)
def test_sizes_for_every_variant_and_kind(route, kind, score, renormalize, dtype):
  for tokens, experts, k in sizes_and_choices():
    logits = shapes.make_logits(kind, min(tokens, 20), experts, dtype, seed=k)
    got = route(logits, k, score=score, renormalize=renormalize)
    oracle.check_route(got, logits, k, score=score, renormalize=renormalize)
    np.testing.assert_array_equal(got.experts, top_k(logits, k))


def check_kinds(route, score, renormalize, experts, k):
  kinds = shapes.FINITE_KINDS + shapes.SPECIAL_KINDS
  for kind, dtype in itertools.product(kinds, DTYPES):
    logits = shapes.make_logits(kind, 24, experts, dtype)
    got = route(logits, k, score=score, renormalize=renormalize)
    oracle.check_route(got, logits, k, score=score, renormalize=renormalize)
    np.testing.assert_array_equal(got.experts, top_k(logits, k), err_msg=f"{kind} {dtype}")


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_kinds_of_logits(route, score, renormalize):
  check_kinds(route, score, renormalize, 33, 8)


@pytest.mark.parametrize("experts, k", ((256, 8), (512, 36), (2304, 22)))
@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_kinds_of_logits_in_long_rows(kernel_route, score, renormalize, experts, k):
  check_kinds(kernel_route, score, renormalize, experts, k)


@pytest.mark.parametrize("model", shapes.MODELS, ids=lambda model: model.name)
def test_models(route, rng, model):
  logits = shapes.make_logits("random", 64, model.experts, ml_dtypes.bfloat16)
  bias = rng.normal(size=model.experts).astype(np.float32) / 4 if model.bias else None
  options = model.options | {"bias": bias}
  oracle.check_route(route(logits, model.k, **options), logits, model.k, **options)


@pytest.mark.parametrize("score", oracle.SCORES)
def test_no_tokens(route, score):
  for shape in ((0, 64), (0, 5, 64), (5, 0, 64)):
    got = route(np.zeros(shape, np.float32), 8, score=score)
    assert got.weights.shape == got.experts.shape == (*shape[:-1], 8)
  bias, where = np.ones(64, np.float32), np.ones((0,), bool)
  got = route(np.zeros((0, 64), np.float32), 8, score=score, bias=bias, where=where)
  assert got.experts.shape == (0, 8)


def test_leading_dimensions_are_tokens(route, rng):
  bias = rng.normal(size=40).astype(np.float32)
  flat = shapes.make_logits("random", 30, 40)
  where = rng.random(30) < 0.7
  for options in ({}, {"bias": bias}, {"where": where}, {"bias": bias, "where": where}):
    want = route(flat, 5, score="sigmoid", **options)
    for lead in ((30,), (5, 6), (2, 3, 5), (1, 30, 1)):
      shaped = {k: v.reshape(lead) if k == "where" else v for k, v in options.items()}
      got = route(flat.reshape(*lead, 40), 5, score="sigmoid", **shaped)
      for a, b in zip(got, want, strict=True):
        assert a.shape == (*lead, 5)
        np.testing.assert_array_equal(np.reshape(a, (30, 5)), b)
  one = route(flat[4], 5, score="sigmoid", bias=bias)
  assert one.weights.shape == one.experts.shape == (5,)
  oracle.check_route(one, flat[4], 5, score="sigmoid", bias=bias)
  padding = route(flat[4], 5, where=np.bool_(False))
  assert padding.experts.tolist() == [40] * 5 and padding.weights.tolist() == [0] * 5


@pytest.mark.parametrize("scale", (2.5, -1.5, 0.0, 1e-20, 1e20))
@pytest.mark.parametrize(
  "score, renormalize", (("softmax", True), ("softmax", False), ("sigmoid", True))
)
def test_scale_multiplies_last(route, score, renormalize, scale):
  logits = shapes.make_logits("random", 9, 64)
  options = {"score": score, "renormalize": renormalize}
  got = route(logits, 6, scale=scale, **options)
  plain = route(logits, 6, **options)
  np.testing.assert_array_equal(got.experts, plain.experts)
  oracle.check_route(got, logits, 6, scale=scale, **options)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_weight_dtype_rounds_float32_weights(route, dtype):
  logits = shapes.make_logits("random", 20, 64, ml_dtypes.bfloat16)
  got, full = route(logits, 6, weight_dtype=dtype), route(logits, 6)
  assert got.weights.dtype == np.dtype(dtype)
  np.testing.assert_array_equal(got.weights, np.asarray(full.weights).astype(got.weights.dtype))
  np.testing.assert_array_equal(got.experts, full.experts)


@pytest.mark.parametrize("dtype", ("int16", "int32", "uint8", "uint16", "uint32", "int8"))
def test_index_dtypes(route, dtype):
  experts = 127 if dtype == "int8" else 255 if dtype == "uint8" else 300
  logits = shapes.make_logits("random", 40, experts)
  where = np.arange(40) % 3 > 0
  got, usual = route(logits, 7, where=where, index_dtype=dtype), route(logits, 7, where=where)
  assert got.experts.dtype == np.dtype(dtype)
  np.testing.assert_array_equal(np.asarray(got.experts).astype(np.int32), usual.experts)
  np.testing.assert_array_equal(got.weights, usual.weights)
  oracle.check_route(got, logits, 7, where=where)
  assert (np.asarray(got.experts)[~where] == experts).all()


def test_64_bit_indices_and_weights(route):
  logits = shapes.make_logits("random", 40, 300)
  where = np.arange(40) % 3 > 0
  usual = route(logits, 7, where=where)
  with jax.enable_x64(True):
    for dtype in ("int64", "uint64"):
      got = route(logits, 7, where=where, index_dtype=dtype, weight_dtype="float64")
      assert got.experts.dtype == np.dtype(dtype) and got.weights.dtype == np.float64
      np.testing.assert_array_equal(np.asarray(got.experts).astype(np.int32), usual.experts)
      np.testing.assert_array_equal(got.weights, np.asarray(usual.weights).astype(np.float64))


def test_row_alone_equals_row_among_others(route, implementation):
  """A token's result depends on nothing but the token: in the kernels to the bit."""
  tolerance = 3e-7 if implementation == "reference" else 0
  for score, renormalize in oracle.VARIANTS:
    logits = shapes.make_logits("random", 65, 130)
    together = route(logits, 9, score=score, renormalize=renormalize)
    for t in (0, 31, 64):
      alone = route(logits[t], 9, score=score, renormalize=renormalize)
      np.testing.assert_allclose(alone.weights, together.weights[t], rtol=tolerance, atol=0)
      np.testing.assert_array_equal(alone.experts, together.experts[t])


@pytest.mark.parametrize(
  "repeats, tokens, experts, k, score",
  (
    (200, 257, 130, 9, "softmax"),
    (5, 1, 2304, 36, "sigmoid"),
    (5, 300, 64, 64, "sqrtsoftplus"),
    (5, 3, 8192, 100, "none"),
  ),
)
def test_repeats_are_identical_and_fully_written(route, repeats, tokens, experts, k, score):
  logits = jnp.asarray(shapes.make_logits("random", tokens, experts))
  want = oracle.check_route(route(logits, k, score=score), logits, k, score=score)
  first = None
  for i in range(repeats):
    # Freed arrays of the same size full of rubbish are what an unwritten result would show.
    rubbish = [jnp.full((tokens, k), -7.0 - i), jnp.full((tokens, k), -7 - i, jnp.int32)]
    jax.block_until_ready(rubbish)
    del rubbish
    got = jax.device_get(route(logits, k, score=score))
    first = got if first is None else first
    assert got.weights.tobytes() == first.weights.tobytes()
    assert got.experts.tobytes() == first.experts.tobytes()
  np.testing.assert_array_equal(first.experts, want.experts)
  assert ((first.experts >= 0) & (first.experts < experts)).all()
  assert (np.diff(np.sort(first.experts, axis=-1), axis=-1) > 0).all()


def test_result_unpacks_and_is_a_named_tuple(route):
  weights, experts = result = route(np.zeros((3, 4), np.float32), 2)
  assert result.weights is weights and result.experts is experts
  assert result._fields == ("weights", "experts")


def test_implementations_agree(rng):
  """The default is the platform's kernel; its experts and weights are the reference's."""
  import jax_router

  logits = jnp.asarray(shapes.make_logits("quantized", 100, 96))
  bias = jnp.asarray(rng.integers(-4, 5, size=96) / 8, jnp.float32)
  for options in ({}, {"bias": bias, "score": "sigmoid"}, {"renormalize": False}):
    default = jax_router.route(logits, 6, **options)
    reference = jax_router.route(logits, 6, implementation="reference", **options)
    np.testing.assert_array_equal(default.experts, reference.experts)
    np.testing.assert_allclose(default.weights, reference.weights, rtol=1e-6, atol=1e-37)


def test_sqrtsoftplus_near_its_smallest_value(route):
  """The last logits before exp would be a denormal: the score is a square root, far from one."""
  logits = np.array([[-86.7, -86.9, -86.5, -86.99]], np.float32)
  got = route(logits, 4, score="sqrtsoftplus", renormalize=False)
  assert np.asarray(got.experts).tolist() == [[2, 0, 1, 3]]
  want = np.exp(np.array([-86.5, -86.7, -86.9, -86.99]) / 2)
  np.testing.assert_allclose(np.asarray(got.weights)[0], want, rtol=1e-5)
