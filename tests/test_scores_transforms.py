"""`aux_scores` under JAX transformations and on sharded logits; second order; memory."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jax_router
import programs
import shapes
from jax_router import _native
from programs import assert_equal, assert_same, collectives, loop, put

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
EXPERTS = 12
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
each_score = pytest.mark.parametrize("score", SCORES)
calls = functools.partial(programs.calls, "scores")


def make_logits(*shape: int) -> jax.Array:
  """Positive: under "none" a sum that cancels is not accurate."""
  tokens = int(np.prod(shape[:-1]))
  return jnp.abs(jnp.asarray(shapes.make_logits("random", tokens, shape[-1]))).reshape(shape)


def loss(scores) -> jax.Array:
  """A polynomial of the scores with another factor for each expert."""
  factor = jnp.linspace(0.5, 1, scores.shape[-1], dtype=jnp.float32)
  factor = jnp.expand_dims(factor, range(scores.ndim - 1))
  return jnp.sum(scores * (1 + scores) * factor)


def gradient_of(function):
  return lambda logits, *rest: jax.grad(lambda x: loss(function(x, *rest)))(logits)


def masked(logits, where, **options):
  """`aux_scores` with its mask as a positional argument."""
  return jax_router.aux_scores(logits, where=where, **options)


# ---- vmap ----

# Batch axes of the logits and, if there is a second one, of where.
BATCHED = (
  ((0,), 0),
  ((1,), 1),
  ((-1,), -1),
  ((0, 0), 0),
  ((2, 1), 1),
  ((1, None), 2),
  ((None, 0), -1),
)


@each_score
@pytest.mark.parametrize("in_axes, out_axes", BATCHED)
def test_vmap_over_any_axis_and_operand_is_one_call(rng, score, in_axes, out_axes):
  everything = make_logits(4, 5, EXPERTS), jnp.asarray(rng.random((4, 5)) < 0.8)
  args = [
    x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip(everything, in_axes, strict=False)
  ]
  plain = jax_router.aux_scores if len(args) == 1 else masked
  function = functools.partial(plain, score=score)
  for f, count in ((function, (1, 0)), (gradient_of(function), (1, 1))):
    batched = jax.vmap(f, in_axes, out_axes)
    assert_same(jax.jit(batched)(*args), loop(f, in_axes, out_axes, *args))
    assert calls(batched, *args) == count


@each_score
def test_nested_vmap_and_gradient_of_vmap(score):
  logits = make_logits(2, 3, 4, EXPERTS)
  function = functools.partial(jax_router.aux_scores, score=score)
  nested = jax.vmap(jax.vmap(function, 1, 1), 0, 0)
  assert_same(jax.jit(nested)(logits), function(logits))
  assert calls(nested, logits) == (1, 0)
  assert_same(jax.jit(gradient_of(nested))(logits), gradient_of(function)(logits))
  assert calls(gradient_of(nested), logits) == (1, 1)
  want = jax.jacfwd(functools.partial(function, implementation="reference"))(logits[0, 0])
  assert_same(jax.jit(jax.jacrev(function))(logits[0, 0]), want)
  assert calls(jax.jacrev(function), logits[0, 0]) == (0, 1)  # the backward needs no scores


# ---- control flow, remat, eager calls ----


def test_scan():
  logits = make_logits(4, 5, EXPERTS)

  def step(carry, x):
    scores = jax_router.aux_scores(x + carry, "sigmoid")
    return carry + scores[:, 0].sum() / 100, scores

  def by_hand(logits):
    carry, results = jnp.float32(0), []
    for x in logits:
      carry, result = step(carry, x)
      results.append(result)
    return carry, jnp.stack(results)

  def scanned(logits):
    return jax.lax.scan(step, jnp.float32(0), logits)

  assert_same(jax.jit(scanned)(logits), by_hand(logits))
  got, want = (jax.grad(lambda x, run=run: loss(run(x)[1])) for run in (scanned, by_hand))
  assert_same(jax.jit(got)(logits), want(logits))


@pytest.mark.parametrize("score", SCORES[:2])
def test_checkpoint(score):
  x, matrix, values = make_logits(8, 6), make_logits(6, 16), make_logits(8, 16)

  def layer(x, matrix):
    return jnp.sum(jax_router.aux_scores(jnp.tanh(x @ matrix), score) * values)

  save = jax.checkpoint_policies.save_only_these_names("jax_router")
  gradient = jax.value_and_grad(layer, argnums=(0, 1))
  want = jax.jit(gradient)(x, matrix)
  for options in ({}, {"policy": save}):
    again = jax.value_and_grad(jax.checkpoint(layer, **options), argnums=(0, 1))
    assert_same(jax.jit(again)(x, matrix), want)
    assert calls(again, x, matrix) == (1, 1)


def test_eager_calls_and_numpy_arrays(rng):
  logits, where = shapes.make_logits("random", 9, 13), rng.random(9) < 0.7
  got = jax_router.aux_scores(logits, where=where)
  assert isinstance(got, jax.Array)
  assert_same(got, jax.jit(masked)(logits, where))
  assert (got[~where] == 0).all() and (got[where] > 0).all()


def test_implementation_of_the_reference_has_no_custom_call():
  for implementation, want in (("reference", (0, 0)), ("cpu", (1, 1)), (None, (1, 1))):
    function = functools.partial(jax_router.aux_scores, implementation=implementation)
    assert calls(gradient_of(function), jnp.zeros((4, 8))) == want


# ---- second order, forward mode ----


def derivative(score, implementation, where=None):
  """Gradient of a loss of logits `[T, 10]`."""

  def loss_of(logits):
    scores = jax_router.aux_scores(logits, score, where=where, implementation=implementation)
    return jnp.sum(jnp.sin(3 * scores) * jnp.arange(1, 11, dtype=jnp.float32)[None])

  return jax.grad(loss_of)


def make_special_logits(rng):
  logits = np.abs(rng.normal(size=(8, 10))).astype(np.float32) + np.float32(0.1)
  logits[4], logits[5, 1:], logits[6, 3] = np.nan, -np.inf, np.nan
  return logits, np.arange(8) != 2


@each_score
def test_second_order_is_the_references(kernel, rng, score):
  logits, where = make_special_logits(rng)
  if score in ("sigmoid", "sqrtsoftplus"):
    logits[7] -= 48 if score == "sigmoid" else 80  # A sum not much larger than 1e-20.
  direction = rng.normal(size=(8, 10)).astype(np.float32)

  @functools.partial(jax.jit, static_argnums=1)
  def derivatives(logits, implementation):
    gradient = derivative(score, implementation, where)
    product = jax.grad(lambda x: jnp.vdot(gradient(x), direction))
    return gradient(logits), product(logits)

  got, want = derivatives(logits, kernel), derivatives(logits, "reference")
  for a, b in zip(got, want, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6)
  assert np.abs(got[1]).max() > 1e-3
  assert (got[1][np.array([2, 4])] == 0).all()


@each_score
def test_check_grads_to_second_order(rng, score):
  logits = jnp.asarray(rng.permuted(np.tile(np.arange(1, 9), (3, 1)), axis=1) / 4, jnp.float32)
  function = functools.partial(jax_router.aux_scores, score=score)
  check_grads(function, (logits,), order=2, modes=("rev",), atol=0.02, rtol=0.02, eps=1e-2)


def test_second_order_in_bfloat16(kernel):
  """Tangents keep the dtype of the logits."""
  logits = jnp.asarray(shapes.make_logits("quantized", 7, 10), jnp.bfloat16)

  @functools.partial(jax.jit, static_argnums=1)
  def product(logits, implementation):
    gradient = derivative("sigmoid", implementation)
    return jax.grad(lambda x: jnp.sum(gradient(x).astype(jnp.float32) ** 2))(logits)

  got, want = product(logits, kernel), product(logits, "reference")
  assert got.dtype == jnp.bfloat16
  got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
  np.testing.assert_allclose(got, want, rtol=0.05, atol=0.02 * np.abs(want).max())
  assert np.abs(got).max() > 0.01


@each_score
def test_forward_mode_needs_the_reference(rng, score):
  logits, tangent = make_logits(4, 8), jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)

  def scores(implementation):
    return lambda x: jax_router.aux_scores(x, score, implementation=implementation)

  _, along = jax.jvp(scores("reference"), (logits,), (tangent,))
  _, vjp = jax.vjp(scores(None), logits)
  for expert in range(8):
    (gradient,) = vjp(jnp.zeros((4, 8)).at[:, expert].set(1))
    want = jnp.sum(gradient * tangent, axis=-1)
    np.testing.assert_allclose(along[:, expert], want, rtol=1e-5, atol=1e-6)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    jax.jvp(scores(None), (logits,), (tangent,))


@each_score
def test_forward_over_reverse(rng, score):
  """A Hessian-vector product in one forward pass over the gradient."""
  logits, where = make_special_logits(rng)
  direction = rng.normal(size=logits.shape).astype(np.float32)

  def product(implementation):
    gradient = derivative(score, implementation, where)
    return jax.jit(lambda x: jax.jvp(gradient, (x,), (direction,))[1])(logits)

  np.testing.assert_allclose(product(None), product("reference"), rtol=3e-5, atol=3e-6)


# ---- lowering for other platforms, export, memory ----


def lowered(platform: str, function) -> str:
  logits = jax.ShapeDtypeStruct((16, EXPERTS), jnp.float32)
  return jax.jit(function).trace(logits).lower(lowering_platforms=(platform,)).as_text()


def test_other_platforms_get_plain_jax():
  assert "@jax_router" not in lowered("tpu", gradient_of(jax_router.aux_scores))
  asked = functools.partial(jax_router.aux_scores, implementation="cpu")
  with pytest.raises(ValueError, match="implementation='cpu' of scores cannot run here"):
    lowered("tpu", asked)


def test_cuda_lowering_follows_the_build():
  words = _native.platforms().get("cuda", ())
  text = lowered("cuda", gradient_of(jax_router.aux_scores))
  for word in ("scores", "scores_backward"):
    assert (f"@jax_router_{word}(" in text) == (word in words)


@pytest.mark.parametrize("score", SCORES[::2])
def test_export_with_a_symbolic_batch_and_two_platforms(score):
  pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
  (batch,) = jax.export.symbolic_shape("batch")
  function = functools.partial(jax_router.aux_scores, score=score)
  data = jax.export.export(
    jax.jit(function),
    platforms=["cpu", "cuda"],
    disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS,
  )(jax.ShapeDtypeStruct((batch, EXPERTS), jnp.float32)).serialize(vjp_order=1)
  again = jax.export.deserialize(data)
  for tokens in (1, 7, 64):
    logits = make_logits(tokens, EXPERTS)
    assert_same(again.call(logits), function(logits))
    assert_same(jax.grad(lambda x: loss(again.call(x)))(logits), gradient_of(function)(logits))


@each_score
def test_gradient_keeps_the_logits_alone(score):
  """Beside operands and results, XLA allocates nothing of the size of the logits."""
  logits = jnp.zeros((4096, 256), jnp.bfloat16)

  def scores_and_gradient(logits, cotangent):
    scores, pull_back = jax.vjp(lambda x: jax_router.aux_scores(x, score), logits)
    return scores, pull_back(cotangent)

  program = jax.jit(scores_and_gradient).lower(logits, jnp.zeros((4096, 256))).compile()
  analysis = program.memory_analysis()
  assert analysis is not None
  assert analysis.temp_size_in_bytes <= 4096


# ---- sharding ----

LAYOUTS = {
  "tokens": ((8,), (64, EXPERTS), ("d", None)),
  "tokens over two axes": ((4, 2), (64, EXPERTS), (("d", "m"), None)),
  "sequence": ((8,), (2, 16, EXPERTS), (None, "d", None)),
  "batch and sequence": ((4, 2), (4, 16, EXPERTS), ("d", "m", None)),
}


def make_case(rng, shape, with_where: bool):
  """A function and its arguments: logits and, where asked for, a mask."""
  args = [make_logits(*shape)]
  if with_where:
    args.append(jnp.asarray(rng.random(shape[:-1]) < 0.8))
  return functools.partial(masked if with_where else jax_router.aux_scores, score="sigmoid"), args


@KINDS
@pytest.mark.parametrize("with_where", (False, True))
@pytest.mark.parametrize("sizes, shape, spec", LAYOUTS.values(), ids=LAYOUTS)
def test_token_sharded_logits_need_no_collective(
  make_mesh, rng, sizes, shape, spec, with_where, kind
):
  function, args = make_case(rng, shape, with_where)
  functions = function, gradient_of(function)
  want = [jax.jit(f)(*args) for f in functions]
  mesh = make_mesh(kind, sizes)
  sharding = NamedSharding(mesh, P(*spec))
  with jax.set_mesh(mesh):
    args = [put(mesh, x, *spec[: x.ndim]) for x in args]
    for f, expected in zip(functions, want, strict=True):
      assert collectives(f, *args) == set()
      got = jax.jit(f)(*args)
      assert_equal(got, expected)
      assert got.sharding.is_equivalent_to(sharding, got.ndim)


@pytest.mark.parametrize("with_where", (False, True))
@pytest.mark.parametrize("check_vma", (True, False))
@KINDS
def test_shard_map(make_mesh, rng, kind, check_vma, with_where):
  function, args = make_case(rng, (64, EXPERTS), with_where)
  mesh = make_mesh(kind)
  specs = (P("d", None), P("d"))[: len(args)]
  shard = functools.partial(
    jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P("d", None), check_vma=check_vma
  )
  want, want_gradient = jax.jit(function)(*args), jax.jit(gradient_of(function))(*args)
  args = [put(mesh, x, *spec) for x, spec in zip(args, specs, strict=True)]
  with jax.set_mesh(mesh):
    assert collectives(shard(function), *args) == set()
    assert_equal(jax.jit(shard(function))(*args), want)
    assert_equal(jax.jit(gradient_of(shard(function)))(*args), want_gradient)
    assert_equal(jax.jit(shard(gradient_of(function)))(*args), want_gradient)


@pytest.mark.parametrize("implementation", (None, "reference"))
def test_replicated_logits_in_shard_map_get_the_summed_gradient(make_mesh, rng, implementation):
  """Each device scores the same logits under its own mask; the gradient is the sum over devices."""
  logits, where = make_logits(6, EXPERTS), jnp.asarray(rng.random((8, 6)) < 0.5)

  def local(logits, where):
    return loss(masked(logits, where[0], implementation=implementation))

  mapped = jax.shard_map(
    lambda *args: jax.lax.psum(local(*args), "d"),
    mesh=make_mesh(AUTO),
    in_specs=(P(), P("d")),
    out_specs=P(),
  )
  got = jax.jit(jax.grad(mapped))(logits, where)
  want = sum(jax.grad(local)(logits, where[i : i + 1]) for i in range(8))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", ((None, "d"), ("d", "m")))
def test_expert_sharded_logits_and_cotangents_are_right(make_mesh, rng, spec):
  logits = make_logits(64, 32)
  cotangent = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)

  def pull_back(logits, cotangent):
    scores, vjp = jax.vjp(jax_router.aux_scores, logits)
    return scores, vjp(cotangent)

  mesh = make_mesh(AUTO, (8,) if spec[0] is None else (4, 2))
  got = jax.jit(pull_back)(put(mesh, logits, *spec), put(mesh, cotangent, *spec))
  assert_equal(got, jax.jit(pull_back)(logits, cotangent))
  explicit = make_mesh(EXPLICIT, (4, 2))
  with jax.set_mesh(explicit), pytest.raises(ValueError, match="logits must not be sharded along"):
    jax_router.aux_scores(put(explicit, logits, "d", "m"))
