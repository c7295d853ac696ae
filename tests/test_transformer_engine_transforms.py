"""TransformerEngine's names under vmap, on meshes, in shard_map, and from run to run."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import transformer_engine_oracle as oracle
from jax_router.compat import transformer_engine
from jax_router.compat.transformer_engine import (
  fused_moe_aux_loss,
  fused_score_for_moe_aux_loss,
  fused_topk_with_score_function,
)
from programs import assert_equal, collectives, loop, put

EXPERTS, K = 32, 4

# Each takes logits [..., EXPERTS] and a bias [EXPERTS].
FORMS = {
  "map": {},
  "pre-softmax": {"score_function": "softmax", "use_pre_softmax": True},
  "bitmap and groups": {"routing_map_format": "bitmap_u8", "num_groups": 8, "group_topk": 4},
  "indices": {"topk_indices_dtype": np.int16},
  "scores": {"compute_aux_scores": True},
}
BY_FORM = pytest.mark.parametrize("form", FORMS)


def make_function(form: str, **fixed):
  options = {"score_function": "sigmoid"} | FORMS[form] | fixed

  def function(logits, bias):
    biased = options["score_function"] != "softmax"
    return fused_topk_with_score_function(
      logits, K, expert_bias=bias if biased else None, **options
    )

  return function


def gradient_of(function):
  """Gradient of a loss of the first result with respect to the logits."""
  return lambda logits, *rest: jax.grad(lambda x: jnp.sum(jnp.sin(9 * function(x, *rest)[0])))(
    logits
  )


# ---- vmap ----


@BY_FORM
@pytest.mark.parametrize(
  "shape, in_axes, out_axis",
  (
    ((3, 7, EXPERTS), (0, None), 0),
    ((7, 3, EXPERTS), (1, None), 1),
    ((7, EXPERTS, 3), (-1, None), 0),
    ((3, 7, EXPERTS), (0, 1), 1),
    ((7, EXPERTS), (None, 0), 0),
  ),
)
def test_vmap_over_any_axis_and_operand(kernel, rng, form, shape, in_axes, out_axis):
  """A batched bias and a batch axis that comes last are where TransformerEngine goes wrong."""
  logits = rng.normal(size=shape).astype(np.float32)
  bias = rng.normal(size={None: (EXPERTS,), 0: (3, EXPERTS), 1: (EXPERTS, 3)}[in_axes[1]])
  args = jnp.asarray(logits), jnp.asarray(bias, jnp.float32)
  function = make_function(form, implementation=kernel)
  in_axes = tuple(None if a is None else a % x.ndim for a, x in zip(in_axes, args, strict=True))
  for f in (lambda *a: tuple(function(*a)), gradient_of(function)):
    got = jax.jit(jax.vmap(f, in_axes, out_axis))(*args)
    assert_equal(got, loop(f, in_axes, out_axis, *args))


@BY_FORM
def test_nested_vmap_and_one_batched_equal_to_the_experts(kernel, rng, form):
  """As many biases as experts: a batch axis taken for the experts would pass unseen."""
  logits = jnp.asarray(rng.normal(size=(2, 5, EXPERTS)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=(EXPERTS, EXPERTS)), jnp.float32)
  function = make_function(form, implementation=kernel)
  got = jax.vmap(lambda x: jax.vmap(lambda b: function(x, b))(bias))(logits)
  for i, j in ((0, 0), (1, 5), (1, 31)):
    assert_equal(jax.tree.map(lambda x, i=i, j=j: x[i, j], got), function(logits[i], bias[j]))


@pytest.mark.parametrize("in_axes", ((0, None, None), (2, 1, None), (None, 0, 0), (1, 0, 0)))
def test_vmap_of_the_loss(rng, in_axes):
  """Every row of a batched cotangent counts, and so do batched counts and totals."""
  shapes = {0: (5, 7, 8), 1: (7, 5, 8), 2: (7, 8, 5), None: (7, 8)}
  probs = jnp.asarray(rng.random(size=shapes[in_axes[0]]), jnp.float32)
  counts = rng.integers(1, 9, size={0: (5, 8), 1: (8, 5), None: (8,)}[in_axes[1]])
  totals = jnp.int32(7) if in_axes[2] is None else jnp.arange(5, 10, dtype=jnp.int32)

  def loss(probs, counts, total):
    return fused_moe_aux_loss(probs, counts, 2, 0.1, total_num_tokens=total)

  def both(*args):
    return jax.value_and_grad(loss)(*args)

  args = probs, jnp.asarray(counts, jnp.int32), totals
  got, want = jax.vmap(both, in_axes)(*args), loop(both, in_axes, 0, *args)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  weights = jnp.arange(1, 6, dtype=jnp.float32)
  gradient = jax.grad(lambda p: jnp.vdot(weights, jax.vmap(loss, in_axes)(p, *args[1:])))(probs)
  each = loop(jax.grad(loss), in_axes, 0, *args)
  want = jnp.tensordot(weights, each, 1)
  if in_axes[0] is not None:
    want = jnp.moveaxis(each * weights[:, None, None], 0, in_axes[0])
  np.testing.assert_allclose(gradient, want, rtol=1e-6)


# ---- TransformerEngine's meshes ----

MESHES = {
  "dp2 fsdp2 tpsp2": {"dp": 2, "fsdp": 2, "tpsp": 2},
  "dp2 tpsp2": {"dp": 2, "tpsp": 2},
  "dp2": {"dp": 2},
  "tpsp2": {"tpsp": 2},
}
TOLERANCE = 2.42e-5  # float32 epsilon to the power 2 / 3, TransformerEngine's
ON_MESHES = pytest.mark.parametrize("mesh", MESHES, indirect=True)
KINDS = pytest.mark.parametrize(
  "kind", (AxisType.Auto, AxisType.Explicit), ids=("auto", "explicit")
)


@pytest.fixture
def mesh(request, kind):
  sizes = MESHES[request.param]
  count = int(np.prod(list(sizes.values())))
  if len(jax.devices()) < count:
    pytest.skip(f"needs {count} devices of the default backend")
  devices = jax.devices()[:count]
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (kind,) * len(sizes), devices=devices)


def token_axis(mesh) -> str | None:
  return "dp" if "dp" in mesh.axis_names else None


@ON_MESHES
@KINDS
@pytest.mark.parametrize("tokens, experts, k", ((128, 32, 4), (2048, 128, 8)))
@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
@pytest.mark.parametrize("name", ("topk", "indices", "scores"))
def test_tokens_over_a_mesh(mesh, kind, rng, tokens, experts, k, score, name):
  logits = oracle.make_logits(tokens, experts, score)
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  if name == "scores":
    function = functools.partial(fused_score_for_moe_aux_loss, topk=k, score_function=score)
    values = oracle.aux_scores(logits, score)
    routing = oracle.mark(oracle.best(values, k), experts)
    want = values, routing, oracle.aux_scores_gradient(logits, cotangent, score)
  else:
    dtype = np.int32 if name == "indices" else None
    function = functools.partial(
      fused_topk_with_score_function, topk=k, score_function=score, topk_indices_dtype=dtype
    )
    choice = oracle.choose(logits, k, score_function=score)
    routing = choice.indices if dtype else choice.routing_map
    gradient = oracle.choice_gradient(logits, choice, cotangent, score_function=score)
    want = choice.probs, routing, gradient

  def step(logits, cotangent):
    (values, routing), vjp = jax.vjp(function, logits)
    zeros = np.zeros(routing.shape, jax.dtypes.float0)
    return values, routing, vjp((cotangent, zeros))[0]

  with jax.set_mesh(mesh):
    args = [put(mesh, x, token_axis(mesh), None) for x in (logits, cotangent)]
    assert collectives(step, *args) == set()
    got = jax.jit(step)(*args)
  np.testing.assert_array_equal(got[1], want[1])
  for i in (0, 2):
    np.testing.assert_allclose(got[i], want[i], rtol=TOLERANCE, atol=TOLERANCE)
  for x in got:
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, P(token_axis(mesh), None)), 2)


@ON_MESHES
@KINDS
@pytest.mark.parametrize("tokens, experts, k", ((128, 32, 4), (2048, 128, 4)))
@pytest.mark.parametrize("sharded", (True, False))
def test_loss_over_a_mesh(mesh, kind, rng, tokens, experts, k, sharded):
  """The rows of all devices count, whether they are sharded or replicated."""
  probs = oracle.make_logits(tokens, experts, "sigmoid")
  counts = rng.integers(1, 1000, size=experts).astype(np.int32)
  want = oracle.aux_loss(probs, counts, k, 0.01, tokens, experts)

  def step(probs, counts):
    return jax.value_and_grad(fused_moe_aux_loss)(probs, counts, k, 0.01)

  axis = token_axis(mesh) if sharded else None
  with jax.set_mesh(mesh):
    args = put(mesh, probs, axis, None), put(mesh, counts, None)
    assert collectives(step, *args) == ({"all-reduce"} if axis else set())
    loss, gradient = jax.jit(step)(*args)
  assert loss.sharding.is_fully_replicated
  for shard in loss.addressable_shards:
    np.testing.assert_allclose(shard.data, want[0], rtol=TOLERANCE, atol=TOLERANCE)
  np.testing.assert_allclose(gradient, want[1], rtol=TOLERANCE, atol=0)


@ON_MESHES
@KINDS
def test_scores_and_loss_over_a_mesh(mesh, kind, rng):
  """Logits sharded over tokens: two sums are reduced, nothing is gathered."""
  logits = rng.normal(size=(128, EXPERTS)).astype(np.float32)

  def loss(logits):
    scores, routing_map = fused_score_for_moe_aux_loss(logits, K, "softmax")
    counts = jnp.sum(routing_map, axis=0, dtype=jnp.int32)
    return fused_moe_aux_loss(scores, counts, K, 0.01)

  with jax.set_mesh(mesh):
    sharded = put(mesh, logits, token_axis(mesh), None)
    step = jax.value_and_grad(loss)
    assert collectives(step, sharded) == ({"all-reduce"} if token_axis(mesh) else set())
    got, gradient = jax.jit(step)(sharded)
  scores = oracle.aux_scores(logits, "softmax")
  counts = oracle.mark(oracle.best(scores, K), EXPERTS).sum(0)
  want, slope = oracle.aux_loss(scores, counts, K, 0.01, 128, EXPERTS)
  np.testing.assert_allclose(got, want, rtol=TOLERANCE)
  want_gradient = oracle.aux_scores_gradient(logits, slope, "softmax")
  np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-9)
  assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, P(token_axis(mesh), None)), 2)


def test_loss_of_the_tokens_of_all_devices_in_shard_map(make_mesh, rng):
  """Counts and total of the global batch, local scores: the losses add up."""
  mesh = make_mesh(AxisType.Auto)
  logits = rng.normal(size=(64, EXPERTS)).astype(np.float32)

  def loss(logits):
    scores, routing_map = fused_score_for_moe_aux_loss(logits, K, "softmax")
    counts = jax.lax.psum(jnp.sum(routing_map, axis=0, dtype=jnp.int32), "d")
    total = jax.lax.psum(jnp.int32(logits.shape[0]), "d")
    local = fused_moe_aux_loss(scores, counts, K, 0.01, total_num_tokens=total)
    return jax.lax.psum(local, "d")

  mapped = jax.shard_map(loss, mesh=mesh, in_specs=P("d", None), out_specs=P())
  got, gradient = jax.jit(jax.value_and_grad(mapped))(logits)
  scores = oracle.aux_scores(logits, "softmax")
  counts = oracle.mark(oracle.best(scores, K), EXPERTS).sum(0)
  want, slope = oracle.aux_loss(scores, counts, K, 0.01, 64, EXPERTS)
  oracle.check_close(got, want)
  want = oracle.aux_scores_gradient(logits, slope, "softmax")
  np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("check_vma", (True, False))
@BY_FORM
def test_shard_map(make_mesh, rng, form, check_vma):
  mesh = make_mesh(AxisType.Auto)
  logits = rng.normal(size=(64, EXPERTS)).astype(np.float32)
  bias = rng.normal(size=EXPERTS).astype(np.float32)
  function = make_function(form)
  for f in (lambda *a: tuple(function(*a)), gradient_of(function)):
    mapped = jax.shard_map(
      f, mesh=mesh, in_specs=(P("d", None), P()), out_specs=P("d", None), check_vma=check_vma
    )
    assert_equal(jax.jit(mapped)(logits, bias), jax.jit(f)(logits, bias))


# ---- other transformations, and repeats ----


def test_checkpoint_and_second_derivatives_of_scattered_probs(rng):
  """Probs that come with indices are scattered outside the kernel."""
  logits = jnp.asarray(rng.normal(size=(6, EXPERTS)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=EXPERTS), jnp.float32)
  direction = jnp.asarray(rng.normal(size=logits.shape), jnp.float32)
  function, plain = make_function("indices"), make_function("map")

  def curvature(f):
    slope = gradient_of(f)
    return jax.grad(lambda x: jnp.vdot(slope(x, bias), direction))(logits)

  want = jax.jit(lambda: (gradient_of(plain)(logits, bias), curvature(plain)))()
  saved = jax.checkpoint(function)
  got = jax.jit(lambda: (gradient_of(saved)(logits, bias), curvature(function)))()
  assert np.count_nonzero(want[1]) > 0
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@BY_FORM
def test_repeats_have_the_same_bits(kernel, rng, form):
  logits = jnp.asarray(rng.normal(size=(257, EXPERTS)), jnp.bfloat16)
  bias = jnp.asarray(rng.normal(size=EXPERTS), jnp.float32)
  function = make_function(form, implementation=kernel)
  step = jax.jit(lambda *a: (function(*a), gradient_of(function)(*a)))
  first = step(logits, bias)
  assert np.count_nonzero(first[1]) > 0
  for _ in range(20):
    assert_equal(step(logits, bias), first)


def test_repeats_of_the_loss_have_the_same_bits(kernel, rng):
  probs = jnp.asarray(rng.random(size=(5000, 130)), jnp.float32)
  counts = jnp.asarray(rng.integers(1, 1000, size=130), jnp.int32)
  step = jax.jit(lambda p, n: jax.value_and_grad(fused_moe_aux_loss)(p, n, 8, 0.01))
  first = step(probs, counts)
  assert first[0] > 0
  for _ in range(20):
    assert_equal(step(probs, counts), first)


def test_public_names():
  names = ("ScoreFunction", "RoutingMapFormat", "fused_moe_aux_loss")
  assert all(hasattr(transformer_engine, name) for name in names)
  assert [(m.name, m.value) for m in transformer_engine.ScoreFunction] == [
    ("SIGMOID", 0), ("SOFTMAX", 1), ("SQRTSOFTPLUS", 2)
  ]  # fmt: skip
  assert [(m.name, m.value) for m in transformer_engine.RoutingMapFormat] == [
    ("BYTEMAP", 0), ("BITMAP_U8", 1)
  ]  # fmt: skip
