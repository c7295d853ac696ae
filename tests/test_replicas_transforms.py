"""Transformations and sharding of `assign_replicas`."""

from __future__ import annotations

import doctest
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
import oracle_replicas as oracle
from jax_router import _replicas, assign_replicas
from jax_router.compat import fastdeploy
from programs import assert_equal, calls, collectives, loop, put

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
EXPERTS, K = 24, 3


@pytest.fixture
def case(rng):
  """`(*shape) -> (ids, table, counts)`, and the function of them with a load by physical slot."""
  table, counts, num_physical = oracle.make_table(rng, EXPERTS, 4)

  def make(*shape):
    return oracle.make_experts(rng, *shape, K, num_experts=EXPERTS), table, counts

  def assign(experts, table, counts, where=None, offset=0, **options):
    return assign_replicas(
      experts, table, counts, where=where, token_offset=offset, num_physical=num_physical,
      load="physical", **options,
    )  # fmt: skip

  def expected(experts, where=None, offset=0):
    static = {"num_physical": num_physical, "load": "physical"}
    return oracle.assign(experts, table, counts, where=where, offset=offset, **static)

  return make, assign, expected


# ---- vmap, leading dimensions, offsets ----


def test_every_row_starts_at_its_offset(case, implementation, rng):
  make, assign, expected = case
  experts, table, counts = make(2, 3, 50)
  where = rng.random((2, 3, 50)) < 0.8
  offsets = rng.integers(0, 2**32, (2, 3), dtype=np.uint32)
  run = jax.jit(functools.partial(assign, implementation=implementation))
  for offset in (np.uint32(5), offsets):
    physical, load = run(experts, table, counts, where, offset)
    for i in np.ndindex(2, 3):
      want = expected(experts[i], where[i], int(offset[i] if offset.ndim else offset))
      assert_equal((physical[i], load[i]), want)


def test_offsets_wrap_around(case):
  make, assign, expected = case
  experts, table, counts = make(9)
  want = expected(experts, offset=2**32 - 3)
  assert not np.array_equal(want[0], expected(experts)[0])
  for offset in (-3, 2**32 - 3, 2**40 - 3, np.int64(2**32 - 3), np.array(-3), jnp.int32(-3)):
    assert_equal(assign(experts, table, counts, offset=offset), want)


def test_parts_of_a_row_with_offsets_make_the_row(case):
  make, assign, expected = case
  experts, table, counts = make(101)
  parts = [
    assign(experts[s], table, counts, offset=s.start) for s in (slice(0, 40), slice(40, 101))
  ]
  physical, load = expected(experts)
  np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), physical)
  np.testing.assert_array_equal(sum(p[1] for p in parts), load)


@pytest.mark.parametrize(
  "in_axes, out_axes",
  (((0, None, None), 0), ((2, None, None), 1), ((None, 0, 0), 0), ((1, 2, 1), -1)),
)
def test_vmap(case, implementation, rng, in_axes, out_axes):
  make, assign, _ = case
  experts, table, counts = make(13)
  if in_axes[0] is not None:
    experts = rng.integers(0, EXPERTS, np.insert(experts.shape, in_axes[0], 5)).astype(np.int32)
  if in_axes[1] is not None:
    tables = [oracle.make_table(rng, EXPERTS, 4)[:2] for _ in range(5)]
    table = np.stack([t for t, _ in tables], in_axes[1])
    counts = np.stack([c for _, c in tables], in_axes[2])
  inner = functools.partial(assign, implementation=implementation)
  got = jax.jit(jax.vmap(inner, in_axes, out_axes))(experts, table, counts)
  assert_equal(got, loop(jax.jit(inner), in_axes, out_axes, experts, table, counts))


def test_vmap_over_offsets_is_one_call(case):
  make, assign, expected = case
  experts, table, counts = make(6)
  offsets = np.arange(4, dtype=np.int32) * 6

  def run(offset):
    return assign(experts, table, counts, offset=offset)

  assert calls("assign_replicas", jax.vmap(run), offsets)[0] == 1
  physical, load = jax.vmap(run)(offsets)
  for i, offset in enumerate(offsets):
    assert_equal((physical[i], load[i]), expected(experts, offset=int(offset)))


# ---- gradients, programs ----


def test_weights_keep_their_gradient_and_ids_have_none(case):
  _, assign, _ = case
  make = case[0]
  _, table, counts = make(1)
  logits = np.random.default_rng(0).normal(size=(12, EXPERTS)).astype(np.float32)

  def loss(logits):
    weights, experts = jax_router.route(logits, K)
    physical, load = assign(experts, table, counts)
    scale = physical.astype(jnp.float32)
    return jnp.sum(weights * scale) + jnp.sum(load).astype(jnp.float32), (physical, experts)

  gradient, (physical, experts) = jax.jit(jax.grad(loss, has_aux=True))(logits)
  scale = np.asarray(physical).astype(np.float32)
  want = jax.grad(lambda x: jnp.sum(jax_router.route(x, K, experts=experts).weights * scale))(
    logits
  )
  np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


def test_decoding_steps_do_not_retrace(case):
  make, assign, expected = case
  experts, table, counts = make(5, 2)
  traces = []

  @jax.jit
  def run(experts):
    traces.append(None)

    def step(offset, ids):
      physical, load = assign(ids, table, counts, offset=offset)
      return offset + 2, (physical, load)

    return jax.lax.scan(step, jnp.uint32(0), experts)[1]

  physical, load = run(experts)
  run(experts)
  assert len(traces) == 1
  whole = expected(experts.reshape(10, K))
  np.testing.assert_array_equal(physical.reshape(10, K), whole[0])
  np.testing.assert_array_equal(load.sum(0), whole[1])


def test_export(case):
  make, assign, expected = case
  experts, table, counts = make(16)
  exported = jax.export.export(
    jax.jit(assign), disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS
  )(experts, table, counts)
  got = jax.export.deserialize(exported.serialize()).call(experts, table, counts)
  assert_equal(got, expected(experts))


def test_other_platforms_get_plain_jax(case):
  make, assign, _ = case
  text = jax.jit(assign).trace(*make(16)).lower(lowering_platforms=("tpu",)).as_text()
  assert "@jax_router" not in text


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
def test_sharded_ids_are_not_gathered(case, make_mesh, rng, sizes, shape, spec, needed, kind):
  """And the tokens' indices are those of the whole row."""
  make, assign, expected = case
  experts, table, counts = make(*shape)
  where = rng.random(shape) < 0.8
  mesh = make_mesh(kind, sizes)
  with jax.set_mesh(mesh):
    args = (put(mesh, experts, *spec, None), put(mesh, table), put(mesh, counts))
    args = (*args, put(mesh, where, *spec))
    assert collectives(assign, *args) == needed
    physical, load = jax.jit(assign)(*args)
  assert physical.sharding.is_equivalent_to(args[0].sharding, physical.ndim)
  physical, load = jax.device_get((physical, load))
  if len(shape) == 1:
    assert_equal((physical, load), expected(experts, where))
  else:
    for i in range(shape[0]):
      assert_equal((physical[i], load[i]), expected(experts[i], where[i]))


def test_sharded_arrays_without_a_known_mesh(case, make_mesh):
  make, assign, expected = case
  experts, table, counts = make(64)
  ids = put(make_mesh(AUTO), experts, "d", None)
  run = functools.partial(assign, table=table, counts=counts)
  assert collectives(run, ids) == {"all-reduce"}
  assert_equal(jax.jit(run)(ids), expected(experts))


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("name", (None, "reference"))
@KINDS
def test_shard_map(case, make_mesh, kind, name, check_vma):
  """A shard's indices are its own unless it has an offset."""
  make, assign, expected = case
  experts, table, counts = make(64)

  def whole(experts, table, counts):
    offset = jax.lax.axis_index("d") * experts.shape[0]
    physical, load = assign(experts, table, counts, offset=offset, implementation=name)
    return physical, jax.lax.psum(load, "d")

  def local(experts, table, counts):
    physical, load = assign(experts, table, counts, implementation=name)
    return physical, load[None]

  mesh = make_mesh(kind)
  specs = {"mesh": mesh, "in_specs": (P("d"), P(), P()), "check_vma": check_vma}
  with jax.set_mesh(mesh):
    args = (put(mesh, experts, "d", None), put(mesh, table), put(mesh, counts))
    mapped = jax.shard_map(whole, **specs, out_specs=(P("d"), P()))
    assert collectives(mapped, *args) == {"all-reduce"}
    assert_equal(jax.jit(mapped)(*args), expected(experts))
    mapped = jax.shard_map(local, **specs, out_specs=(P("d"), P("d")))
    assert collectives(mapped, *args) == set()
    physical, load = jax.device_get(jax.jit(mapped)(*args))
  for i in range(8):
    part = slice(8 * i, 8 * i + 8)
    assert_equal((physical[part], load[i]), expected(experts[part]))


def test_shard_map_over_one_of_two_axes(case, make_mesh):
  make, assign, expected = case
  experts, table, counts = make(64)
  mesh = make_mesh(AUTO, (4, 2))

  def local(experts):
    offset = jax.lax.axis_index("d") * experts.shape[0]
    physical, load = assign(experts, table, counts, offset=offset)
    return physical, jax.lax.psum(load, "d")

  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P()), axis_names={"d"}
  )
  with jax.set_mesh(mesh):
    ids = put(mesh, experts, ("d", "m"), None)
    assert "all-gather" not in collectives(mapped, ids)
    assert_equal(jax.jit(mapped)(ids), expected(experts))


# ---- documentation ----


def test_page_and_docstrings():
  """The examples in the page and in the docstrings."""
  path = pathlib.Path(__file__).parents[1] / "docs" / "grouped_routing.md"
  blocks = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
  assert len(blocks) == 6
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    exec(compile("\n".join(blocks), str(path), "exec"), {})
  for module in (_replicas, fastdeploy):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
