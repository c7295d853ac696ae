"""Transformations and sharding of `quantile_histogram`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
from jax_router import quantile_bias, quantile_histogram, route_with_cutoff
from programs import assert_equal, calls, collectives, loop, put
from test_balance import exact_counts, make_case

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
BOUNDS = np.array([-1.013, 1.007], np.float32)


def count(logits, cutoff, bounds=BOUNDS, where=None, **options):
  options = {"num_bins": 40, "score": "none"} | options
  return quantile_histogram(logits, cutoff, bounds=bounds, where=where, **options)


def make_batch(*shape):
  tokens = int(np.prod(shape[:-1]))
  logits, _, cutoff, _ = make_case(tokens, shape[-1], 2, score="none")
  return logits.reshape(shape), cutoff.reshape(shape[:-1])


def expected(logits, cutoff, where=None):
  """Counts over every token of every batch."""
  where = None if where is None else where.reshape(-1)
  flat = logits.reshape(-1, logits.shape[-1])
  return exact_counts(flat, cutoff.reshape(-1), BOUNDS, 40, where)


# ---- vmap, batch dimensions ----


def test_leading_dimensions_are_kept(implementation, rng):
  logits, cutoff = make_batch(2, 3, 8, 9)
  where = rng.random((2, 3, 8)) < 0.7
  got = jax.jit(functools.partial(count, implementation=implementation))(
    logits, cutoff, BOUNDS, where
  )
  assert got.shape == (2, 3, 9, 40)
  for i in np.ndindex(2, 3):
    np.testing.assert_array_equal(got[i], expected(logits[i], cutoff[i], where[i]))


@pytest.mark.parametrize(
  "in_axes, out_axes",
  (((0, 0, None), 0), ((1, 1, None), 2), ((None, None, 0), 0), ((3, None, 1), 1)),
)
def test_vmap(implementation, rng, in_axes, out_axes):
  inner = functools.partial(count, implementation=implementation)
  logits, cutoff = make_batch(3, 3, 16, 7)
  if in_axes[0] is None:
    logits, cutoff = logits[0], cutoff[0]
  elif in_axes[0] == 3:
    logits, cutoff = np.moveaxis(logits, 0, -1), cutoff[0]
  bounds = BOUNDS
  if in_axes[2] is not None:
    bounds = np.stack([BOUNDS, BOUNDS * 2, BOUNDS[::-1]], in_axes[2])
  mapped = jax.jit(jax.vmap(inner, in_axes, out_axes))
  assert_equal(
    mapped(logits, cutoff, bounds), loop(inner, in_axes, out_axes, logits, cutoff, bounds)
  )


def test_vmap_is_one_call():
  logits, cutoff = make_batch(5, 4, 7)
  assert calls("quantile_histogram", jax.vmap(count), logits, cutoff)[0] == 1


# ---- no gradient, no second observation ----


def test_nothing_has_a_gradient(implementation):
  logits, cutoff = make_batch(16, 7)

  def loss(logits, cutoff, bounds):
    counts = count(logits, cutoff, bounds, implementation=implementation)
    return jnp.sum(logits) + jnp.sum(counts).astype(jnp.float32)

  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(logits, cutoff, BOUNDS)
  assert [np.unique(x).tolist() for x in gradients] == [[1], [0], [0]]
  primal, tangent = jax.jvp(lambda x: count(x, cutoff), (logits,), (logits,))
  np.testing.assert_array_equal(primal, expected(logits, cutoff))
  assert tangent.dtype == jax.dtypes.float0


def test_recomputation_does_not_count_again():
  """The histogram of a recomputed forward is used by nothing, so it is not made."""
  logits = jnp.asarray(make_batch(16, 7)[0])

  @jax.checkpoint
  def layer(x):
    routing, cutoff = route_with_cutoff(x, 2)
    return jnp.sum(jnp.sin(routing.weights)), count(x, cutoff, score="sigmoid")

  def step(x):
    return jax.grad(layer, has_aux=True)(x)

  assert calls("route", step, logits) == (2, 1)
  assert calls("quantile_histogram", step, logits)[0] == 1


def test_new_bounds_and_cutoffs_do_not_retrace():
  traces = []

  @jax.jit
  def step(bias, bounds):
    traces.append(None)
    logits = make_case(64, 8, 2)[0]
    cutoff = route_with_cutoff(logits, 2, bias=bias)[1]
    counts = quantile_histogram(logits, cutoff, bounds=bounds)
    return quantile_bias(counts, bias, 2, bounds=bounds)

  state = jnp.zeros(8), jnp.array([-1.0, 1.0])
  seen = {tuple(np.asarray(state[1]).tolist())}
  for _ in range(4):
    state = step(*state)
    seen.add(tuple(np.asarray(state[1]).tolist()))
  assert len(traces) == 1 and len(seen) > 2


def test_scan_over_microbatches():
  logits, cutoff = make_batch(4, 10, 7)

  def body(total, xs):
    return total + count(*xs), None

  total = jax.lax.scan(body, jnp.zeros((7, 40), jnp.int32), (logits, cutoff))[0]
  np.testing.assert_array_equal(total, expected(logits, cutoff))


# ---- sharding ----


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("name", (None, "reference"))
@KINDS
def test_shard_map_adds_up_to_one_device(make_mesh, rng, kind, name, check_vma):
  logits, cutoff = make_batch(64, 7)
  where = rng.random(64) < 0.7

  def local(logits, cutoff, bounds, where):
    return jax.lax.psum(count(logits, cutoff, bounds, where, implementation=name), "d")

  specs = (P("d", None), P("d"), P(), P("d"))
  mesh = make_mesh(kind)
  mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
  values = zip((logits, cutoff, BOUNDS, where), specs, strict=True)
  args = [put(mesh, x, *spec) for x, spec in values]
  with jax.set_mesh(mesh):
    assert collectives(mapped, *args) == {"all-reduce"}
    got = jax.jit(mapped)(*args)
  np.testing.assert_array_equal(got, expected(logits, cutoff, where))


TOKEN_LAYOUTS = (
  ((8,), (64, 7), ("d", None)),
  ((4, 2), (64, 7), (("d", "m"), None)),
  ((4, 2), (64, 7), ("m", None)),
  ((8,), (2, 16, 7), (None, "d", None)),
  ((4, 2), (4, 16, 7), ("d", "m", None)),
)


@pytest.mark.parametrize("known", (True, False), ids=("set_mesh", "arrays alone"))
@pytest.mark.parametrize("sizes, shape, spec", TOKEN_LAYOUTS)
def test_sharded_tokens_are_not_gathered(make_mesh, sizes, shape, spec, known):
  logits, cutoff = make_batch(*shape)
  want = jax.jit(count)(logits, cutoff)
  mesh = make_mesh(AUTO, sizes)
  args = put(mesh, logits, *spec), put(mesh, cutoff, *spec[:-1])
  if known:
    with jax.set_mesh(mesh):
      found, got = collectives(count, *args), jax.jit(count)(*args)
  else:
    found, got = collectives(count, *args), jax.jit(count)(*args)
  assert found == {"all-reduce"}
  assert_equal(got, want)
  if len(shape) == 2:
    np.testing.assert_array_equal(got, expected(logits, cutoff))


@KINDS
def test_sharded_batch_dimensions_need_no_collective(make_mesh, kind):
  logits, cutoff = make_batch(8, 5, 7)
  want = jax.jit(count)(logits, cutoff)
  mesh = make_mesh(kind)
  with jax.set_mesh(mesh):
    args = put(mesh, logits, "d", None, None), put(mesh, cutoff, "d", None)
    assert collectives(count, *args) == set()
    got = jax.jit(count)(*args)
    summed = jax.jit(lambda *x: jnp.sum(count(*x), axis=0, dtype=jnp.int32))(*args)
  assert_equal(got, want)
  assert got.sharding.is_equivalent_to(put(mesh, got, "d").sharding, 3)
  np.testing.assert_array_equal(summed, expected(logits, cutoff))


def test_shard_map_over_one_of_two_axes(make_mesh):
  logits, cutoff = make_batch(64, 7)
  mesh = make_mesh(AUTO, (4, 2))
  mapped = jax.shard_map(
    lambda *x: jax.lax.psum(count(*x), "d"), mesh=mesh, in_specs=(P("d", None), P("d")),
    out_specs=P(), axis_names={"d"},
  )  # fmt: skip
  with jax.set_mesh(mesh):
    args = put(mesh, logits, ("d", "m"), None), put(mesh, cutoff, ("d", "m"))
    assert collectives(mapped, *args) == {"all-reduce"}
    np.testing.assert_array_equal(jax.jit(mapped)(*args), expected(logits, cutoff))


def test_explicitly_sharded_tokens_and_experts_are_refused(make_mesh):
  logits, cutoff = make_batch(64, 8)
  mesh = make_mesh(EXPLICIT)
  with jax.set_mesh(mesh):
    for spec in (("d", None), (None, "d")):
      args = put(mesh, logits, *spec), put(mesh, cutoff, None)
      for function in (count, jax.jit(count)):
        with pytest.raises(ValueError, match=r"logits must not be sharded .* jax\.shard_map"):
          function(*args)
    args = put(mesh, logits, None, None), put(mesh, cutoff, None)
    np.testing.assert_array_equal(jax.jit(count)(*args), expected(logits, cutoff))


def test_export():
  logits, cutoff = make_batch(48, 7)
  exported = jax.export.export(
    jax.jit(count), disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS
  )(logits, cutoff)
  got = jax.export.deserialize(exported.serialize()).call(logits, cutoff)
  np.testing.assert_array_equal(got, expected(logits, cutoff))
