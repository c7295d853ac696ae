"""`route_and_plan_blocks` is `route` followed by `plan_blocks`, to the bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import shapes
from jax_router import Groups, max_fused_tokens, plan_blocks, route, route_and_plan_blocks
from oracle_blocks import block_plan, check_plan
from programs import assert_equal

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
ARRAYS = ("bias", "where", "experts")


@functools.cache
def _compiled(name: str, k: int, block_size: int, static: tuple):
  options = dict(static) | {"implementation": name}
  blocks = {"layout": options.pop("layout", "flat")}
  zeros = options.pop("zeros", None)

  def fused(logits, arrays):
    more = options | blocks | {"zeros": zeros}
    return route_and_plan_blocks(logits, k, block_size, **arrays, **more)

  def chain(logits, arrays):
    routing = route(logits, k, **arrays, **options)
    plan = plan_blocks(routing, logits.shape[-1], block_size, implementation=name, **blocks)
    return (
      (routing, plan) if zeros is None else (routing, plan, jnp.zeros(zeros.shape, zeros.dtype))
    )

  return jax.jit(fused), jax.jit(chain)


def compare(name, logits, k, block_size, **options):
  """The fused call, after a comparison with the chain and of the plan with numpy."""
  static = tuple(sorted((n, x) for n, x in options.items() if n not in ARRAYS))
  arrays = {n: x for n, x in options.items() if n in ARRAYS}
  fused, chain = _compiled(name, k, block_size, static)
  got, want = jax.device_get((fused(logits, arrays), chain(logits, arrays)))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()
  routing, plan, *_ = got
  if logits.ndim == 2 and plan.weights.dtype == np.float32:
    layout = options.get("layout", "flat")
    check_plan(plan, block_plan(*routing, logits.shape[-1], block_size, layout=layout))
  return got


def logits_of(tokens, num_experts, dtype=np.float32, kind="random"):
  return shapes.make_logits(kind, tokens, num_experts, dtype)


# ---- sizes ----

# As in aiter's tests of its fused kernel.
GRID = [(t, 128, 4) for t in (1, 8, 32, 64, 7)] + [(t, 256, 8) for t in (1, 16, 32, 60, 13)]


@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, num_experts, k", GRID)
def test_grid_of_aiter(kernel, tokens, num_experts, k, dtype, renormalize):
  zeros = jax.ShapeDtypeStruct((tokens, 256), dtype)
  logits = logits_of(tokens, num_experts, dtype)
  compare(kernel, logits, k, 32, renormalize=renormalize, layout="packed", zeros=zeros)


@pytest.mark.parametrize("tokens", (*range(1, 10), 31, 32, 33, 127, 128, 129, 500))
def test_few_tokens(kernel, tokens):
  compare(kernel, logits_of(tokens, 64), 6, 16)


@pytest.mark.parametrize("num_experts, k", ((256, 8), (64, 6), (33, 33), (1, 1), (2304, 36)))
def test_around_the_most_fused_tokens(kernel, num_experts, k):
  device = jax.devices("cuda" if kernel == "cuda" else "cpu")[0]
  most = max_fused_tokens(num_experts, k, device=device)
  for tokens in (most - 1, most, most + 1):
    if tokens > 0:
      compare(kernel, logits_of(tokens, num_experts), k, 16)


def test_shapes_decide_what_is_fused():
  most = max_fused_tokens(64, 8, device=jax.devices("cpu")[0])
  for tokens, words in (
    (most, {"route_and_plan_blocks"}),
    (most + 1, {"route", "blocks"}),
  ):
    for name in (None, "cpu"):
      function = functools.partial(route_and_plan_blocks, k=8, block_size=16, implementation=name)
      logits = jax.ShapeDtypeStruct((tokens, 64), np.float32)
      text = jax.jit(function).trace(logits).lower(lowering_platforms=("cpu",)).as_text()
      for word in ("route_and_plan_blocks", "route", "blocks"):
        assert text.count(f"custom_call @jax_router_{word}(") == (word in words)


def test_on_other_platforms_it_is_plain_jax():
  logits = jax.ShapeDtypeStruct((64, 64), np.float32)
  function = jax.jit(functools.partial(route_and_plan_blocks, k=8, block_size=16))
  text = function.trace(logits).lower(lowering_platforms=("tpu",)).as_text()
  assert "jax_router" not in text and "sort" in text
  named = functools.partial(route_and_plan_blocks, k=8, block_size=16, implementation="cpu")
  with pytest.raises(ValueError, match="implementation='cpu' of route cannot run here"):
    jax.jit(named).trace(logits).lower(lowering_platforms=("tpu",))


def test_most_fused_tokens_are_checked():
  assert isinstance(max_fused_tokens(256, 8), int)
  with pytest.raises(ValueError, match="k must be between 1 and num_experts = 4, got 5"):
    max_fused_tokens(4, 5)
  with pytest.raises(ValueError, match="num_experts must be between 1"):
    max_fused_tokens(0, 1)


# ---- options ----

OPTIONS = (
  {},
  {"renormalize": False, "scale": 2.5},
  {"score": "sigmoid"},
  {"score": "sqrtsoftplus", "renormalize": False},
  {"score": "none"},
  {"groups": Groups(4, 2, "max")},
  {"index_dtype": np.int16, "weight_dtype": ml_dtypes.bfloat16},
  {"index_dtype": np.uint8, "weight_dtype": np.float16},
)


@pytest.mark.parametrize("arrays", ((), ("bias",), ("where",), ("bias", "where"), ("experts",)))
@pytest.mark.parametrize("options", OPTIONS)
def test_options(implementation, rng, options, arrays):
  tokens, num_experts, k = 45, 24, 5
  values = {
    "bias": rng.normal(size=num_experts).astype(np.float32),
    "where": rng.random(tokens) < 0.7,
    "experts": rng.integers(-2, num_experts + 3, (tokens, k)).astype(np.int32),
  }
  used = {name: values[name] for name in arrays}
  routing, plan = compare(
    implementation, logits_of(tokens, num_experts), k, 4, layout="packed", **options, **used
  )
  dropped = np.asarray(routing.experts).astype(int) == num_experts
  np.testing.assert_array_equal(plan.inverse < 0, dropped)
  assert dropped.any() == bool({"where", "experts"} & set(arrays))
  assert int(plan.num_tokens) == tokens


@pytest.mark.parametrize("kind", shapes.FINITE_KINDS + shapes.SPECIAL_KINDS)
def test_kinds_of_logits(implementation, kind):
  compare(implementation, logits_of(48, 40, kind=kind), 6, 8)
  compare(implementation, logits_of(48, 40, kind=kind), 6, 8, renormalize=False)


@pytest.mark.parametrize("model", shapes.MODELS, ids=lambda m: m.name)
def test_models(kernel, rng, model):
  bias = {"bias": rng.normal(size=model.experts).astype(np.float32)} if model.bias else {}
  options = {name: x for name, x in model.options.items() if x is not None}
  compare(kernel, logits_of(33, model.experts), model.k, 16, **options, **bias)


def test_leading_dimensions(implementation, rng):
  """Each row is a plan of its own, with few rows and with many."""
  bias = rng.normal(size=24).astype(np.float32)
  for lead in ((1,), (3,), (2, 5), (0,)):
    logits = logits_of(int(np.prod(lead)) * 9, 24).reshape(*lead, 9, 24)
    where = rng.random((*lead, 9)) < 0.7
    routing, plan = compare(implementation, logits, 4, 4, bias=bias, where=where)
    for i in np.ndindex(lead):
      row = jax.tree.map(lambda x, i=i: x[i], plan)
      check_plan(row, block_plan(routing.weights[i], routing.experts[i], 24, 4))


def test_empty(implementation):
  for shape in ((0, 8), (2, 0, 8), (0, 3, 8)):
    routing, plan = compare(implementation, np.zeros(shape, np.float32), 3, 4)
    assert routing.experts.shape == plan.inverse.shape == (*shape[:-1], 3)
    assert plan.num_padded.shape == shape[:-2] and not np.any(plan.num_padded)


def test_repeats_are_identical_and_fully_written(kernel):
  logits = jnp.asarray(logits_of(60, 33))
  zeros = jax.ShapeDtypeStruct((60, 7), np.float32)
  function = jax.jit(
    functools.partial(route_and_plan_blocks, k=4, block_size=16, zeros=zeros, implementation=kernel)
  )
  first = jax.device_get(function(logits))
  check_plan(first[1], block_plan(*first[0], 33, 16))
  assert not first[2].any()
  for i in range(5):
    # Freed arrays of the same size full of rubbish are what an unwritten result would show.
    rubbish = [jnp.full(x.shape, 7 + i, x.dtype) for x in jax.tree.leaves(first)]
    del rubbish
    assert_equal(function(logits), first)


# ---- zeros ----


def test_zeros_have_the_leading_dimensions(implementation):
  logits = logits_of(18, 8).reshape(3, 6, 8)
  zeros = jax.ShapeDtypeStruct((3, 6, 2), jnp.bfloat16)
  function = functools.partial(
    route_and_plan_blocks, k=2, block_size=4, implementation=implementation
  )
  *got, cleared = jax.jit(functools.partial(function, zeros=zeros))(logits)
  assert cleared.shape == (3, 6, 2) and cleared.dtype == jnp.bfloat16 and not jnp.any(cleared)
  assert_equal(got, function(logits))
  inner = functools.partial(function, zeros=jax.ShapeDtypeStruct((6, 2), jnp.bfloat16))
  assert_equal(jax.vmap(inner)(logits), (*got, cleared))


X = np.zeros((3, 6, 8), np.float32)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"logits": X[0, 0]}, ValueError, r"logits must have shape \[\.\.\., T, E\], got \(8,\)"),
    ({"logits": X.astype(int)}, TypeError, "logits must be one of float32"),
    ({"k": 9}, ValueError, "k must be between 1 and num_experts = 8, got 9"),
    ({"block_size": 0}, ValueError, "block_size must be between 1 and .*, got 0"),
    ({"block_size": 2.0}, TypeError, "block_size must be a static integer, got float"),
    ({"layout": "dense"}, ValueError, "layout must be one of 'flat', 'packed', got 'dense'"),
    ({"score": "tanh"}, ValueError, "score must be one of .*, got 'tanh'"),
    ({"bias": np.zeros(7, np.float32)}, ValueError, r"bias must have shape .* got \(7,\)"),
    ({"where": np.ones((3, 5), bool)}, ValueError, r"where must have shape .* got \(3, 5\)"),
    ({"experts": np.zeros((3, 6, 3), int)}, ValueError, "experts must have shape"),
    ({"index_dtype": np.float32}, TypeError, "index_dtype must be an integer dtype"),
    ({"weight_dtype": np.int32}, TypeError, "weight_dtype must be a floating dtype"),
    ({"zeros": (3, 6)}, TypeError, "zeros must be a jax.ShapeDtypeStruct or None, got tuple"),
    (
      {"zeros": jax.ShapeDtypeStruct((6, 3), np.float32)},
      ValueError,
      r"zeros must have a shape that starts with .* \(3,\), got \(6, 3\)",
    ),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_arguments(arguments, exception, text):
  with pytest.raises(exception, match=text):
    route_and_plan_blocks(**{"logits": X, "k": 2, "block_size": 4} | arguments)


def test_packed_slots_have_a_limit():
  logits = np.zeros((2, 300), np.float32)
  assert route_and_plan_blocks(logits, 255, 4, layout="packed")[1].inverse.shape == (2, 255)
  with pytest.raises(ValueError, match="layout='packed' holds at most k = 255 slots"):
    route_and_plan_blocks(logits, 256, 4, layout="packed")
  assert jax_router.route_and_plan_blocks(logits, 256, 4)[1].inverse.shape == (2, 256)
