"""Transformations, gradients and sharding of `route_and_assign_replicas`."""

from __future__ import annotations

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
import oracle_replicas
import programs
import shapes
from jax_router import Groups, _route_replicas, assign_replicas, route, route_and_assign_replicas
from jax_router.compat import fastdeploy
from programs import assert_equal, assert_same, collectives, loop, put

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
E, K = 24, 3
WORD = "route_and_assign_replicas"
TABLE, COUNTS, _ = oracle_replicas.make_table(np.random.default_rng(3), E, 4)
NUM_PHYSICAL = 4 * E
REPLICAS = {"num_physical": NUM_PHYSICAL, "load": "physical"}
VARIANTS = ({}, {"renormalize": False, "scale": 2.0}, {"score": "sigmoid"})


def make_logits(*shape):
  logits = shapes.make_logits("quantized", int(np.prod(shape)), E)
  return jnp.asarray(logits.reshape(*shape, E))


def fused(logits, table=TABLE, counts=COUNTS, offset=0, **options):
  return route_and_assign_replicas(
    logits, K, table, counts, token_offset=offset, **REPLICAS, **options
  )


def chain(logits, table=TABLE, counts=COUNTS, offset=0, **options):
  routing = route(logits, K, **options)
  shared = {name: x for name, x in options.items() if name in ("where", "implementation")}
  assigned = assign_replicas(
    routing.experts, table, counts, token_offset=offset, **REPLICAS, **shared
  )
  return routing, *assigned


def calls(function, *args) -> tuple[int, int]:
  """How many forward kernels, and how many backward kernels of `route`."""
  return programs.calls(WORD, function, *args)[0], programs.calls("route", function, *args)[1]


def weights_loss(weights, *by) -> jax.Array:
  scale = sum((1 + x).astype(jnp.float32) for x in by)
  return jnp.sum(jnp.sin(3 * weights) * scale)


def loss_of(function):
  """A loss of weights, experts and physical ids."""

  def loss(logits, *args, **options):
    routing, physical, _ = function(logits, *args, **options)
    return weights_loss(routing.weights, routing.experts, physical)

  return loss


# ---- programs ----


def test_it_is_one_kernel():
  for name in (None, "cpu"):
    run = functools.partial(fused, implementation=name)
    text = jax.jit(run).trace(make_logits(64)).lower(lowering_platforms=("cpu",)).as_text()
    for word in (WORD, "route", "assign_replicas"):
      assert text.count(f"custom_call @jax_router_{word}(") == (word == WORD)
  assert calls(jax.grad(loss_of(fused)), make_logits(64)) == (1, 1)


def test_operators_of_fastdeploy_are_one_kernel():
  logits, bias, stats = make_logits(8), np.zeros(E, np.float32), np.zeros(E, np.int32)
  for name, keys in (("noaux_tc_redundant", logits), ("grouped_topk_redundant", bias)):

    def run(x, keys, name=name):
      operator = getattr(fastdeploy, name)
      return operator(x, keys, TABLE, COUNTS, stats, 4, 2, K, True, 2.5, TABLE.shape[1])

    text = jax.jit(run).trace(logits, keys).lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("custom_call @jax_router_") == 1 == text.count(f"@jax_router_{WORD}(")


def test_on_other_platforms_it_is_plain_jax():
  text = jax.jit(fused).trace(make_logits(64)).lower(lowering_platforms=("tpu",)).as_text()
  assert "jax_router" not in text and "sort" in text
  named = functools.partial(fused, implementation="cpu")
  with pytest.raises(ValueError, match="implementation='cpu' of route cannot run here"):
    jax.jit(named).trace(make_logits(64)).lower(lowering_platforms=("tpu",))


def test_export():
  checks = jax_router.DISABLE_JAX_EXPORT_CHECKS
  (batch,) = jax.export.symbolic_shape("batch")
  shape = jax.ShapeDtypeStruct((batch, E), jnp.float32)
  exported = jax.export.export(jax.jit(fused), disabled_checks=checks)(shape)
  for tokens in (1, 16, 300):
    assert_equal(exported.call(make_logits(tokens)), chain(make_logits(tokens)))


def test_scan_over_decoding_steps_with_moving_offsets():
  logits = make_logits(5, 2)

  def step(offset, x):
    return offset + 2, fused(x, offset=offset)

  routing, physical, load = jax.jit(lambda x: jax.lax.scan(step, jnp.uint32(0), x)[1])(logits)
  want = chain(logits.reshape(10, E))
  assert_equal(
    (routing.weights.reshape(10, K), physical.reshape(10, K)), (want[0].weights, want[1])
  )
  assert_equal(load.sum(0), want[2])

  def loss(run):
    def total(x):
      def step(carry, x):
        return carry + 2, loss_of(run)(x, offset=carry)

      return jax.lax.scan(step, jnp.uint32(0), x)[1].sum()

    return jax.jit(jax.grad(total))

  assert_equal(loss(fused)(logits), loss(chain)(logits))


# ---- vmap ----

LOGITS, TABLES, OFFSETS, BIASES, WHERES, GIVEN = range(6)


@pytest.mark.parametrize(
  "axes, out_axes",
  (
    ({LOGITS: 0}, 0), ({LOGITS: 2}, 1), ({TABLES: 0}, 0), ({TABLES: 1}, -1), ({OFFSETS: 0}, 0),
    ({BIASES: 1}, 0), ({WHERES: 1}, 1), ({GIVEN: 0}, 0), ({LOGITS: 1, TABLES: 1, WHERES: 0}, 0),
    ({LOGITS: 0, TABLES: 0, OFFSETS: 0, BIASES: 0, WHERES: 0, GIVEN: 2}, 0),
  ),
)  # fmt: skip
def test_vmap_over_any_operand_is_one_call(implementation, rng, axes, out_axes):
  size, tokens = 5, 13
  tables = [oracle_replicas.make_table(rng, E, 4)[:2] for _ in range(size)]
  whole = (
    np.asarray(make_logits(size, tokens)),
    (np.stack([t for t, _ in tables]), np.stack([c for _, c in tables])),
    rng.integers(0, 2**32, size, dtype=np.uint32),
    rng.integers(-8, 9, size=(size, E)).astype(np.float32) / 16,
    rng.random((size, tokens)) < 0.8,
    rng.integers(-1, E + 1, (size, tokens, K)).astype(np.int32),
  )
  names = {BIASES: "bias", WHERES: "where", GIVEN: "experts"}
  used = [LOGITS, TABLES, OFFSETS, *(i for i in names if i in axes)]

  def put_axis(i):
    return jax.tree.map(
      lambda x: np.moveaxis(x, 0, axes[i] if x.ndim > axes[i] else 0) if i in axes else x[0],
      whole[i],
    )

  args = [put_axis(i) for i in used]

  def function(logits, tables, offset, *rest, run=fused):
    more = {names[i]: x for i, x in zip(used[3:], rest, strict=True)}
    return run(logits, *tables, offset, score="sigmoid", implementation=implementation, **more)

  flat = jax.tree.leaves(args)
  in_axes = [axes.get(i) for i in used for _ in jax.tree.leaves(args[used.index(i)])]

  def from_flat(*leaves, run=fused):
    logits, table, counts, offset, *rest = leaves
    return function(logits, (table, counts), offset, *rest, run=run)

  got = jax.jit(jax.vmap(from_flat, in_axes, out_axes))(*flat)
  want = loop(functools.partial(from_flat, run=chain), in_axes, out_axes, *flat)
  assert_equal(got, want)
  assert int(got[2].sum()) > 0
  if implementation == "cpu":
    assert calls(jax.vmap(from_flat, in_axes, out_axes), *flat)[0] == 1


def test_vmap_twice(rng):
  logits = make_logits(2, 3, 7)
  offsets = rng.integers(0, 99, (2, 3), dtype=np.uint32)
  run = jax.vmap(jax.vmap(lambda x, o: fused(x, offset=o)))
  assert_equal(jax.jit(run)(logits, offsets), fused(logits, offset=offsets))
  assert calls(run, logits, offsets)[0] == 1


# ---- gradients ----


@pytest.mark.parametrize("options", VARIANTS)
def test_gradient_is_that_of_route(implementation, rng, options):
  logits = make_logits(40)
  more = {"where": jnp.asarray(rng.random(40) < 0.8), "implementation": implementation, **options}
  bias = jnp.asarray(rng.normal(size=E), jnp.float32)
  for extra in ({}, {"bias": bias, "groups": Groups(6, 2)}):
    losses = [functools.partial(loss_of(f), **more, **extra) for f in (fused, chain)]
    gradients = [jax.jit(jax.grad(loss))(logits) for loss in losses]
    assert_equal(*gradients)
    assert np.abs(gradients[0]).max() > 0


@pytest.mark.parametrize("options", VARIANTS)
def test_second_order_and_batches(options):
  logits = make_logits(3, 6)
  results = []
  for function in (fused, chain):
    loss = functools.partial(loss_of(function), **options)

    def of_gradient(x, loss=loss):
      return jnp.sum(jnp.sin(jax.grad(loss)(x)))

    results.append(
      (
        jax.jit(jax.grad(of_gradient))(logits),
        jax.jit(jax.vmap(jax.grad(loss)))(logits),
        jax.jit(jax.grad(lambda x, loss=loss: jnp.sum(jax.vmap(loss)(x))))(logits),
        jax.jit(jax.jacrev(lambda x, f=function: f(x, **options)[0].weights))(logits[0]),
      )
    )
  assert_same(*results)
  assert all(np.abs(x).max() > 0 for x in results[0])


def test_forward_mode_of_the_reference():
  logits = make_logits(9)
  tangent = make_logits(2, 9)[1]
  got, want = (
    jax.jvp(lambda x, f=f: f(x, implementation="reference")[0].weights, (logits,), (tangent,))
    for f in (fused, chain)
  )
  assert_same(got, want)


def test_bias_tables_and_given_experts_have_no_gradient(rng):
  bias = jnp.asarray(rng.normal(size=E), jnp.float32)

  def loss(logits, bias):
    return loss_of(fused)(logits, bias=bias)

  assert not jax.grad(loss, argnums=1)(make_logits(9), bias).any()


@pytest.mark.parametrize("options", VARIANTS)
def test_named_residuals_save_everything_under_checkpoint(options):
  """One forward kernel with the policy, two without; the same gradient always."""
  x = make_logits(8)
  matrix = jnp.asarray(shapes.make_logits("random", E, E, seed=1))

  def layer(x, matrix):
    routing, physical, load = fused(jnp.tanh(x @ matrix), **options)
    loss = weights_loss(routing.weights, routing.experts, physical)
    return loss * jnp.sum(jnp.sin(load.astype(jnp.float32)))

  def gradient(layer):
    return jax.value_and_grad(layer, argnums=(0, 1))

  save = jax.checkpoint_policies.save_only_these_names("jax_router")
  plain = gradient(layer)
  saving, recomputing = (gradient(jax.checkpoint(layer, policy=policy)) for policy in (save, None))
  for function, count in ((plain, 1), (saving, 1), (recomputing, 2)):
    assert calls(function, x, matrix) == (count, 1)
    assert_same(jax.jit(function)(x, matrix), jax.jit(plain)(x, matrix))


# ---- sharding ----

LAYOUTS = (
  ((8,), (64,), ("d",), {"all-reduce"}),
  ((8,), (8,), ("d",), {"all-reduce"}),
  ((4, 2), (64,), (("d", "m"),), {"all-reduce"}),
  ((4, 2), (64,), ("m",), {"all-reduce"}),
  ((8,), (2, 16), (None, "d"), {"all-reduce"}),
  ((8,), (8, 6), ("d", None), set()),
  ((4, 2), (4, 16), ("d", "m"), {"all-reduce"}),
)


@KINDS
@pytest.mark.parametrize("sizes, shape, spec, needed", LAYOUTS)
def test_sharded_logits_are_not_gathered(make_mesh, rng, sizes, shape, spec, needed, kind):
  """And the tokens' indices are those of the whole row."""
  logits, bias = make_logits(*shape), rng.normal(size=E).astype(np.float32)
  where = rng.random(shape) < 0.8
  mesh = make_mesh(kind, sizes)

  def run(logits, where, bias, table, counts, function=fused):
    return function(logits, table, counts, 5, bias=bias, where=where, score="sigmoid")

  def gradient(logits, *rest):
    return jax.grad(lambda x: weights_loss(run(x, *rest)[0].weights))(logits)

  rest = (where, bias, TABLE, COUNTS)
  want = jax.jit(functools.partial(run, function=chain))(logits, *rest)
  want_gradient = jax.jit(gradient)(logits, *rest)
  with jax.set_mesh(mesh):
    args = (put(mesh, logits, *spec, None), put(mesh, where, *spec))
    args = (*args, *(put(mesh, x) for x in rest[1:]))
    assert collectives(run, *args) == needed
    assert collectives(gradient, *args) == set()
    got, got_gradient = jax.jit(run)(*args), jax.jit(gradient)(*args)
  assert got[1].sharding.is_equivalent_to(args[0].sharding, got[1].ndim)
  assert got[0].weights.sharding.is_equivalent_to(args[0].sharding, got[1].ndim)
  assert_equal(got, want)
  assert_equal(got_gradient, want_gradient)


def test_sharded_arrays_without_a_known_mesh(make_mesh):
  logits = make_logits(64)
  sharded = put(make_mesh(AUTO), logits, "d", None)
  assert collectives(fused, sharded) == {"all-reduce"}
  assert_equal(jax.jit(fused)(sharded), jax.jit(chain)(logits))


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("name", (None, "reference"))
@KINDS
def test_shard_map(make_mesh, kind, name, check_vma):
  """A shard's indices are its own unless it has an offset."""
  logits = make_logits(64)

  def whole(logits, table, counts):
    offset = jax.lax.axis_index("d") * logits.shape[0]
    routing, physical, load = fused(logits, table, counts, offset, implementation=name)
    return routing, physical, jax.lax.psum(load, "d")

  def local(logits, table, counts):
    routing, physical, load = fused(logits, table, counts, implementation=name)
    return routing, physical, load[None]

  def gradient(logits, table, counts):
    return jax.grad(lambda x: loss_of(fused)(x, table, counts, implementation=name))(logits)

  mesh = make_mesh(kind)
  specs = {"mesh": mesh, "in_specs": (P("d"), P(), P()), "check_vma": check_vma}
  with jax.set_mesh(mesh):
    args = (put(mesh, logits, "d", None), put(mesh, TABLE), put(mesh, COUNTS))
    mapped = jax.shard_map(whole, **specs, out_specs=(P("d"), P("d"), P()))
    assert collectives(mapped, *args) == {"all-reduce"}
    assert_same(jax.jit(mapped)(*args), chain(logits, implementation=name))
    mapped = jax.shard_map(local, **specs, out_specs=(P("d"), P("d"), P("d")))
    assert collectives(mapped, *args) == set()
    routing, physical, load = jax.device_get(jax.jit(mapped)(*args))
    mapped = jax.shard_map(gradient, **specs, out_specs=P("d"))
    assert collectives(mapped, *args) == set()
    slopes = jax.device_get(jax.jit(mapped)(*args))
  for i in range(8):
    part = slice(8 * i, 8 * i + 8)
    want = chain(logits[part], implementation=name)
    got = routing.weights[part], physical[part], load[i]
    assert_same(got, (np.asarray(want[0].weights), *want[1:]))
    loss = functools.partial(loss_of(chain), implementation=name)
    np.testing.assert_allclose(slopes[part], jax.grad(loss)(logits[part]), rtol=1e-5, atol=1e-5)


def test_replicated_logits_with_a_table_of_each_device_get_the_summed_gradient(make_mesh, rng):
  logits = make_logits(6)
  tables = np.stack([oracle_replicas.make_table(rng, E, 4)[0] % NUM_PHYSICAL for _ in range(8)])
  counts = np.ones(E, np.int32)

  def loss(logits, table):
    return loss_of(fused)(logits, table[0], counts)

  mapped = jax.shard_map(
    lambda x, t: jax.lax.psum(loss(x, t), "d"), mesh=make_mesh(AUTO), in_specs=(P(), P("d")),
    out_specs=P(),
  )  # fmt: skip
  got = jax.jit(jax.grad(mapped))(logits, tables)
  want = sum(jax.grad(loss)(logits, tables[i : i + 1]) for i in range(8))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_logits_sharded_along_their_experts_are_refused(make_mesh):
  mesh = make_mesh(EXPLICIT)
  with jax.set_mesh(mesh):
    logits = put(mesh, make_logits(64), None, "d")
    with pytest.raises(ValueError, match="logits must not be sharded along their experts"):
      fused(logits)


def test_docstring():
  result = doctest.testmod(_route_replicas)
  assert result.attempted > 0 and result.failed == 0
