"""`assign_replicas` against Python integers, and its errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
import oracle_replicas as oracle
from jax_router import assign_replicas

POLICIES, LOADS = ("hash", "xorshift"), ("logical", "physical")


@functools.cache
def compiled(**static):
  return jax.jit(
    lambda experts, table, counts, where, offset: assign_replicas(
      experts, table, counts, where=where, token_offset=offset, **static
    )
  )


@pytest.fixture
def assign(implementation):
  """`assign_replicas` under jit, as numpy."""

  def call(experts, table, counts, where=None, offset=0, **static):
    function = compiled(**static, implementation=implementation)
    return jax.device_get(function(experts, table, counts, where, np.uint32(offset)))

  return call


def check(got, want):
  for value, right in zip(got, want, strict=True):
    assert value.dtype == np.int32
    np.testing.assert_array_equal(value, right)


TABLE = np.array([[0, 4], [1, -1], [2, 5], [3, -1]], np.int32)
COUNTS = np.array([2, 1, 2, 1], np.int32)
PAIRS = np.tile(np.int32([0, 2]), (4, 1))


# ---- the draw ----


def test_golden_vector(assign):
  physical, load = assign(PAIRS, TABLE, COUNTS, policy="xorshift")
  assert physical.tolist() == [[0, 2], [4, 5], [0, 2], [4, 5]]
  assert load.tolist() == [4, 0, 4, 0]
  load = assign(PAIRS, TABLE, COUNTS, policy="xorshift", load="physical", num_physical=6)[1]
  assert load.tolist() == [2, 0, 2, 0, 2, 2]


def replicas_of_one_expert(assign, tokens: int, count: int, **options) -> np.ndarray:
  """The replica, as a number below `count`, that each of some tokens takes."""
  table = np.arange(count, dtype=np.int32)[None]
  experts = np.zeros((tokens, 1), np.int32)
  return assign(experts, table, np.int32([count]), **options)[0][:, 0]


def test_xorshift_is_that_of_fastdeploy(assign):
  assert [oracle.xorshift(t) for t in range(6)] == [0, 513, 1026, 1539, 2052, 2565]
  took = functools.partial(replicas_of_one_expert, assign, policy="xorshift")
  assert took(6, 1000).tolist() == [0, 513, 26, 539, 52, 565]
  assert (took(16, 3) == 0).all()
  assert np.bincount(took(512, 2)).tolist() == [256, 256]
  assert np.bincount(took(512, 3)).tolist() == [171, 172, 169]
  assert np.bincount(took(512, 4)).tolist() == [128] * 4


def test_draws_beyond_the_sign_bit_are_unsigned(assign):
  offset = np.uint32(2**32 - 7)
  for policy in POLICIES:
    got = replicas_of_one_expert(assign, 50, 7, policy=policy, offset=offset)
    draw = oracle.xorshift if policy == "xorshift" else lambda t: oracle.mixed(t, 0)
    assert got.tolist() == [draw(2**32 - 7 + t) % 7 for t in range(50)]
  assert max(oracle.xorshift(2**32 - 7 + t) for t in range(7)) >= 2**31


@pytest.mark.parametrize("count", (2, 3, 5, 7, 16))
def test_hash_is_well_mixed(assign, count):
  """Shares, pairs of neighbouring tokens and pairs of experts lie where chance puts them."""
  tokens = 8192
  table = np.arange(2 * count, dtype=np.int32).reshape(2, count)
  experts = np.tile(np.int32([0, 1]), (tokens, 1))
  physical, _ = assign(experts, table, np.int32([count] * 2))
  first, second = physical[:, 0], physical[:, 1] - count
  pairs = (first, first[1:] * count + first[:-1], first * count + second)
  for values, cells in zip(pairs, (count, count**2, count**2), strict=True):
    seen = np.bincount(values, minlength=cells)
    expected = len(values) / cells
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi2 - (cells - 1)) < 5 * np.sqrt(2 * cells), (count, cells, chi2)
  assert len(np.unique(first[:16])) > 1


# ---- tables, ids, loads ----

# Loads of many slots are counted in memory, long rows in parts.
SIZES = (
  (1, 1, 1, 1), (1, 8, 256, 2), (7, 3, 5, 1), (33, 2, 7, 4), (130, 6, 72, 3), (257, 8, 896, 5),
  (2000, 9, 257, 33), (900, 22, 2304, 2),
)  # fmt: skip


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens, k, num_experts, width", SIZES)
def test_sizes(assign, rng, tokens, k, num_experts, width, policy, load):
  table, counts, num_physical = oracle.make_table(rng, num_experts, width)
  experts = oracle.make_experts(rng, tokens, k, num_experts=num_experts)
  static = {"policy": policy, "load": load, "num_physical": num_physical}
  for where in (None, rng.random(tokens) < 0.7):
    want = oracle.assign(experts, table, counts, where=where, offset=11, **static)
    check(assign(experts, table, counts, where, np.uint32(11), **static), want)


@pytest.mark.parametrize("tokens, k, num_physical", ((5000, 8, 20), (300, 8, 60_000)))
def test_uneven_loads(assign, rng, tokens, k, num_physical):
  """All choose one expert, or two; more slots than a block of threads has memory for."""
  table = np.stack([np.arange(3), np.arange(num_physical - 3, num_physical)]).astype(np.int32)
  counts = np.int32([3, 2])
  for experts in (np.ones((tokens, k), np.int32), rng.integers(0, 2, (tokens, k))):
    for load in LOADS:
      static = {"load": load, "num_physical": num_physical}
      want = oracle.assign(experts, table, counts, **static)
      check(assign(experts, table, counts, **static), want)
      assert want[1].sum() == tokens * k


def test_empty(assign):
  for shape in ((0, 2), (3, 0, 2), (0, 4, 2)):
    physical, load = assign(np.zeros(shape, np.int32), TABLE, COUNTS)
    assert physical.shape == shape
    assert load.shape == (*shape[:-2], 4) and (load == 0).all()


def test_default_number_of_slots_is_the_size_of_the_table(assign):
  experts = np.int32([[0, 4], [-1, 3]])
  physical, load = assign(experts, TABLE, COUNTS, load="physical")
  assert physical[:, 1].tolist() == [8, 3] and physical[1, 0] == 8
  assert load.shape == (8,) and load.sum() == 2


def test_padding_is_not_counted(assign):
  where = np.array([True, False, False, True])
  physical, load = assign(PAIRS, TABLE, COUNTS, where, policy="xorshift", num_physical=6)
  assert physical.tolist() == [[0, 2], [6, 6], [6, 6], [4, 5]]
  assert load.tolist() == [2, 0, 2, 0]
  physical, load = assign(PAIRS, TABLE, COUNTS, np.zeros(4, bool), num_physical=6)
  assert (physical == 6).all() and (load == 0).all()


def test_padding_of_route_is_passed_on(implementation):
  where = np.array([True, False])
  experts = jax_router.route(
    np.zeros((2, 4), np.float32), 2, where=where, implementation=implementation
  ).experts
  physical, load = assign_replicas(experts, TABLE, COUNTS, implementation=implementation)
  assert physical[1].tolist() == [8, 8] and load.tolist() == [1, 1, 0, 0]


def test_unused_entries_are_never_returned(assign, rng):
  table, counts, num_physical = oracle.make_table(rng, 40, 6)
  experts = rng.integers(0, 40, (999, 4)).astype(np.int32)
  want = assign(experts, table, counts, num_physical=num_physical)
  assert (want[0] < num_physical).all() and want[1].sum() == 999 * 4
  for poison in (0, 3, -(2**31), 2**31 - 1):
    poisoned = np.where(table < 0, np.int32(poison), table)
    check(assign(experts, poisoned, counts, num_physical=num_physical), want)


def test_traced_values_that_cannot_be_used_give_no_replica(assign):
  """Counts of 0, below 0 and above R; entries below 0 and beyond the slots."""
  table = np.int32([[0, 9], [1, 1], [2, 2], [-1, -5], [3, 2**31 - 1], [4, -1]])
  counts = np.int32([2, 0, 3, 2, 2, -(2**31)])
  experts = np.tile(np.arange(6, dtype=np.int32), (64, 1))
  for policy in POLICIES:
    for load in LOADS:
      static = {"policy": policy, "load": load, "num_physical": 9}
      want = oracle.assign(experts, table, counts, **static)
      check(assign(experts, table, counts, **static), want)
      assert set(np.unique(want[0])) == {0, 3, 9} and 0 < want[1].sum() < 128


@pytest.mark.parametrize("dtype", (np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.int64))
def test_dtypes(implementation, dtype):
  want = oracle.assign(PAIRS, TABLE, COUNTS, num_physical=8)
  table = np.where(TABLE < 0, 7, TABLE)
  arrays = [x.astype(dtype) for x in (PAIRS, table, COUNTS)]
  if dtype != np.int64:
    arrays = [jnp.asarray(x) for x in arrays]
  check(jax.device_get(assign_replicas(*arrays, implementation=implementation)), want)


def test_64_bit_ids_are_not_cut_off():
  big = np.array([[2**32, 1], [-(2**32), 1], [2**63 - 1, 1]])
  for experts in (big, big.astype(np.uint64)):
    physical, load = assign_replicas(experts, TABLE, COUNTS)
    assert physical.tolist() == [[8, 1]] * 3 and load.tolist() == [0, 3, 0, 0]
  with pytest.raises(ValueError, match=r"replica_table must hold slots .* got 4294967296"):
    assign_replicas(PAIRS, TABLE.astype(np.int64) + 2**32, COUNTS)
  with pytest.raises(ValueError, match=r"replica_counts must lie in 1 \.\. R = 2, got 4294967297"):
    assign_replicas(PAIRS, TABLE, np.full(4, 2**32 + 1))


def test_repeats_are_identical_and_fully_written(kernel, rng):
  table, counts, num_physical = oracle.make_table(rng, 128, 4)
  experts = oracle.make_experts(rng, 3001, 8, num_experts=128)
  static = {"load": "physical", "num_physical": num_physical}
  function = compiled(**static, implementation=kernel)
  arguments = jax.device_put((experts, table, counts, None, np.uint32(0)))
  want = oracle.assign(experts, table, counts, **static)
  for i in range(5):
    # Freed arrays of the same size full of rubbish are what an unwritten result would show.
    rubbish = [jnp.full(x.shape, 7 + i, jnp.int32) for x in want]
    jax.block_until_ready(rubbish)
    del rubbish
    check(jax.device_get(function(*arguments)), want)


# ---- bad arguments ----


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"experts": PAIRS[0]}, ValueError, r"experts must have shape \[\.\.\., T, k\], got \(2,\)"),
    ({"experts": PAIRS.astype(float)}, TypeError, "experts must have an integer dtype, got float"),
    ({"experts": [[0]]}, TypeError, "experts must be an array, got list"),
    ({"replica_table": TABLE[0]}, ValueError, r"replica_table must have shape \[E, R\]"),
    ({"replica_table": TABLE[:, :0]}, ValueError, r"replica_table must .* got \(4, 0\)"),
    ({"replica_table": TABLE > 0}, TypeError, "replica_table must have an integer dtype, got bool"),
    ({"replica_counts": COUNTS[:3]}, ValueError, r"replica_counts must have shape .* \(4,\), got"),
    ({"replica_counts": COUNTS * 1.0}, TypeError, "replica_counts must have an integer dtype"),
    ({"replica_counts": COUNTS * 0}, ValueError, "in 1 .. R = 2, got 0 for expert 0"),
    ({"replica_counts": np.int32([2, 1, 3, 1])}, ValueError, "got 3 for expert 2"),
    ({"replica_counts": np.int32([2, 2, 2, 1])}, ValueError, "got -1 for expert 1, replica 1"),
    ({"num_physical": 5}, ValueError, r"0 .. num_physical - 1 = 4 .* got 5 for expert 2"),
    ({"num_physical": 0}, ValueError, "num_physical must be between 1 and 2147483647, got 0"),
    ({"num_physical": 2.0}, TypeError, "num_physical must be a static integer, got float"),
    ({"num_physical": 2**30, "load": "physical"}, ValueError, "num_physical must be at most"),
    ({"policy": "random"}, ValueError, "policy must be one of 'hash', 'xorshift', got 'random'"),
    ({"load": "both"}, ValueError, "load must be one of 'logical', 'physical', got 'both'"),
    ({"where": np.ones(4)}, TypeError, "where must have dtype bool, got float"),
    ({"where": np.ones(3, bool)}, ValueError, r"where must have shape .* got \(3,\)"),
    ({"token_offset": 0.5}, TypeError, "token_offset must be an array, got float"),
    ({"token_offset": np.zeros(())}, TypeError, "token_offset must have an integer dtype"),
    ({"token_offset": np.zeros(4, int)}, ValueError, r"token_offset must have shape \(\) or"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_arguments(arguments, exception, text):
  given = {"experts": PAIRS, "replica_table": TABLE, "replica_counts": COUNTS} | arguments
  with pytest.raises(exception, match=text):
    assign_replicas(**given)


def test_values_of_jax_arrays_are_checked_unless_traced():
  bad = jnp.asarray(COUNTS * 0)
  for call in (assign_replicas, lambda *x: jax.jit(lambda: assign_replicas(*x))()):
    with pytest.raises(ValueError, match="got 0 for expert 0"):
      call(PAIRS, TABLE, bad)
  assert (jax.jit(assign_replicas)(PAIRS, TABLE, bad)[0] == 8).all()
