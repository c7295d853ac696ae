"""`route_and_assign_replicas` is `route` followed by `assign_replicas`, to the bit."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import oracle
import oracle_replicas
import shapes
from jax_router import Groups, assign_replicas, route, route_and_assign_replicas
from programs import assert_equal

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
POLICIES, LOADS = ("hash", "xorshift"), ("logical", "physical")
REPLICAS = ("num_physical", "policy", "load")
ARRAYS = ("bias", "where", "experts")


@functools.cache
def _compiled(name: str, k: int, static: tuple):
  options = dict(static) | {"implementation": name}
  replicas = {n: options.pop(n) for n in REPLICAS if n in options}

  def both(logits, table, counts, offset, arrays):
    given = {"token_offset": offset} | replicas
    fused = route_and_assign_replicas(logits, k, table, counts, **given, **arrays, **options)
    routing = route(logits, k, **arrays, **options)
    where = arrays.get("where")
    chain = assign_replicas(
      routing.experts, table, counts, where=where, implementation=name, **given
    )
    return fused, (routing, *chain)

  return jax.jit(both)


def compare(name, logits, k, table, counts, offset=0, **options):
  """The fused call as numpy, compared with the chain to the bit and with Python integers."""
  static = tuple(sorted((n, x) for n, x in options.items() if n not in ARRAYS))
  arrays = {n: x for n, x in options.items() if n in ARRAYS}
  offset = np.asarray(offset, np.uint32)
  got, want = jax.device_get(_compiled(name, k, static)(logits, table, counts, offset, arrays))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()
  routing, physical, load = got
  assert physical.dtype == load.dtype == np.int32
  num_physical = options.get("num_physical", table.size)
  for i in np.ndindex(logits.shape[:-2]):
    where = arrays["where"][i] if "where" in arrays else None
    want = oracle_replicas.assign(
      routing.experts[i], table, counts, num_physical=num_physical, where=where,
      policy=options.get("policy", "hash"), load=options.get("load", "logical"),
      offset=int(offset[i] if offset.ndim else offset),
    )  # fmt: skip
    assert_equal((physical[i], load[i]), want)
  return got


def make_table(num_experts: int, width: int):
  return oracle_replicas.make_table(np.random.default_rng(num_experts), num_experts, width)


def logits_of(tokens, num_experts, dtype=np.float32, kind="random"):
  return shapes.make_logits(kind, tokens, num_experts, dtype)


# ---- sizes ----

SIZES = (
  (1, 1, 2), (7, 3, 1), (130, 6, 3), (130, 60, 2), (256, 8, 4), (600, 10, 2), (600, 100, 2),
  (1024, 8, 2), (2304, 36, 3), (4096, 4, 2), (4096, 300, 2),
)  # fmt: skip


@pytest.mark.parametrize("tokens", (0, 1, 5, 300))
@pytest.mark.parametrize("num_experts, k, width", SIZES)
def test_sizes(kernel, rng, num_experts, k, width, tokens):
  table, counts, num_physical = make_table(num_experts, width)
  logits = logits_of(tokens, num_experts, DTYPES[tokens % 3])
  extras = (
    {},
    {"bias": rng.normal(size=num_experts).astype(np.float32), "score": "sigmoid"},
    {"where": rng.random(tokens) < 0.7, "renormalize": False},
    {"experts": rng.integers(-1, num_experts + 2, (tokens, k)).astype(np.int32)},
  )
  static = itertools.product(POLICIES, LOADS)
  for (policy, load), extra in zip(static, extras, strict=True):
    _, _, counted = compare(
      kernel, logits, k, table, counts, 2**32 - 3, num_physical=num_physical, policy=policy,
      load=load, **extra,
    )  # fmt: skip
    if not extra:
      assert counted.sum() == tokens * k


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("tokens, k, num_physical", ((4000, 8, 20), (300, 2, 60_000)))
def test_uneven_loads(kernel, tokens, k, num_physical, load):
  """All choose the same experts; few bins, and more than there are slots of tokens."""
  table = np.stack([np.arange(16), np.arange(num_physical - 16, num_physical)], 1).astype(np.int32)
  counts = np.full(16, 2, np.int32)
  logits = np.broadcast_to(np.arange(16, dtype=np.float32), (tokens, 16))
  static = {"load": load, "num_physical": num_physical}
  assert compare(kernel, logits, k, table, counts, **static)[2].sum() == tokens * k


# ---- options ----

OPTIONS = (
  {},
  {"renormalize": False, "scale": 2.5, "policy": "xorshift"},
  {"score": "sigmoid", "load": "physical"},
  {"score": "sqrtsoftplus", "renormalize": False},
  {"score": "none", "policy": "xorshift", "load": "physical"},
  {"groups": Groups(6, 3, "max")},
  {"groups": Groups(6, 3, "top2"), "score": "sigmoid", "load": "physical"},
  {"index_dtype": np.int16, "weight_dtype": ml_dtypes.bfloat16},
  {"index_dtype": np.uint8, "weight_dtype": np.float16, "load": "physical"},
)
USED = ((), ("bias",), ("where",), ("bias", "where"), ("experts",), ("where", "experts"))


@pytest.mark.parametrize("used", USED, ids="-".join)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("k", (3, 12))
def test_options(implementation, rng, options, used, k):
  """With numpy for the routing, too."""
  tokens, num_experts = 37, 24
  values = {
    "bias": rng.integers(-4, 5, num_experts).astype(np.float32) / 8,
    "where": rng.random(tokens) < 0.7,
    "experts": rng.integers(-2, num_experts + 3, (tokens, k)).astype(np.int32),
  }
  arrays = {name: values[name] for name in used}
  table, counts, num_physical = make_table(num_experts, 3)
  logits = logits_of(tokens, num_experts)
  routing, physical, load = compare(
    implementation, logits, k, table, counts, 7, num_physical=num_physical, **options, **arrays
  )
  dropped = routing.experts.astype(int) == num_experts
  np.testing.assert_array_equal(physical == num_physical, dropped)
  assert load.sum() == (~dropped).sum() > 0
  assert dropped.any() == bool({"where", "experts"} & set(used))
  if "index_dtype" not in options:
    names = ("score", "renormalize", "scale", "groups")
    plain = {name: x for name, x in options.items() if name in names}
    oracle.check_route(routing, logits, k, **plain, **arrays)


def test_int64_indices(kernel):
  table, counts, _ = make_table(24, 2)
  with jax.enable_x64(True):
    _compiled.cache_clear()
    compare(kernel, logits_of(300, 24), 3, table, counts, index_dtype=np.int64)
  _compiled.cache_clear()


@pytest.mark.parametrize("kind", shapes.FINITE_KINDS + shapes.SPECIAL_KINDS)
def test_kinds_of_logits(implementation, kind):
  """Rows without a choice are assigned and counted, too."""
  table, counts, num_physical = make_table(40, 3)
  for renormalize in (True, False):
    static = {"num_physical": num_physical, "load": "physical", "renormalize": renormalize}
    got = compare(implementation, logits_of(48, 40, kind=kind), 6, table, counts, **static)
    assert got[2].sum() == 48 * 6


@pytest.mark.parametrize("model", shapes.MODELS, ids=lambda m: m.name)
def test_models(kernel, rng, model):
  bias = {"bias": rng.normal(size=model.experts).astype(np.float32)} if model.bias else {}
  options = {name: x for name, x in model.options.items() if x is not None}
  table, counts, num_physical = make_table(model.experts, 2)
  logits = logits_of(33, model.experts)
  static = {"num_physical": num_physical, "load": "physical"}
  compare(kernel, logits, model.k, table, counts, **static, **options, **bias)


def test_leading_dimensions_and_their_offsets(implementation, rng):
  table, counts, num_physical = make_table(24, 3)
  bias = rng.normal(size=24).astype(np.float32)
  for lead in ((1,), (3,), (2, 5), (0,)):
    logits = logits_of(int(np.prod(lead)) * 9, 24).reshape(*lead, 9, 24)
    where = rng.random((*lead, 9)) < 0.7
    for offset in (5, rng.integers(0, 2**32, lead, dtype=np.uint32)):
      compare(
        implementation, logits, 4, table, counts, offset, num_physical=num_physical,
        load="physical", bias=bias, where=where,
      )  # fmt: skip


def test_empty(implementation):
  table, counts, _ = make_table(8, 2)
  for shape in ((0, 8), (2, 0, 8), (0, 3, 8)):
    logits = np.zeros(shape, np.float32)
    _, physical, load = compare(implementation, logits, 3, table, counts)
    assert physical.shape == (*shape[:-1], 3)
    assert load.shape == (*shape[:-2], 8) and not load.any()


def test_traced_values_that_cannot_be_used_give_no_replica(implementation):
  """Counts of 0, below 0 and above R; entries below 0 and beyond the slots."""
  table = np.int32([[0, 9], [1, 1], [2, 2], [-1, -5], [3, 2**31 - 1], [4, -1]])
  counts = np.int32([2, 0, 3, 2, 2, -(2**31)])
  logits = logits_of(64, 6)
  for policy, load in itertools.product(POLICIES, LOADS):
    static = {"policy": policy, "load": load, "num_physical": 9}
    _, physical, counted = compare(implementation, logits, 6, table, counts, **static)
    assert set(np.unique(physical)) == {0, 3, 9} and 0 < counted.sum() < 128


def test_repeats_are_identical_and_fully_written(kernel):
  table, counts, num_physical = make_table(128, 4)
  logits = jnp.asarray(logits_of(3001, 128))
  function = jax.jit(
    functools.partial(
      route_and_assign_replicas, k=8, replica_table=table, replica_counts=counts,
      num_physical=num_physical, load="physical", implementation=kernel,
    )
  )  # fmt: skip
  first = jax.device_get(function(logits))
  want = oracle_replicas.assign(
    first[0].experts, table, counts, num_physical=num_physical, load="physical"
  )
  assert_equal(first[1:], want)
  for i in range(5):
    # Freed arrays of the same size full of rubbish are what an unwritten result would show.
    rubbish = [jnp.full(x.shape, 7 + i, x.dtype) for x in jax.tree.leaves(first)]
    jax.block_until_ready(rubbish)
    del rubbish
    assert_equal(function(logits), first)


# ---- bad arguments ----

TABLE = np.array([[0, 4], [1, -1], [2, 5], [3, -1]], np.int32)
COUNTS = np.array([2, 1, 2, 1], np.int32)
X = np.zeros((3, 6, 4), np.float32)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"logits": X[0, 0]}, ValueError, r"logits must have shape \[\.\.\., T, E\], got \(4,\)"),
    ({"logits": X.astype(int)}, TypeError, "logits must be one of float32"),
    ({"k": 5}, ValueError, "k must be between 1 and num_experts = 4, got 5"),
    ({"score": "tanh"}, ValueError, "score must be one of .*, got 'tanh'"),
    ({"bias": np.zeros(7, np.float32)}, ValueError, r"bias must have shape .* got \(7,\)"),
    ({"where": np.ones((3, 5), bool)}, ValueError, r"where must have shape .* got \(3, 5\)"),
    ({"experts": np.zeros((3, 6, 3), int)}, ValueError, "experts must have shape"),
    ({"index_dtype": np.float32}, TypeError, "index_dtype must be an integer dtype"),
    ({"weight_dtype": np.int32}, TypeError, "weight_dtype must be a floating dtype"),
    ({"replica_table": TABLE[0]}, ValueError, r"replica_table must have shape \[E, R\]"),
    (
      {"replica_table": TABLE[:3]},
      ValueError,
      r"replica_table must have shape \[E, R\] with E = 4, the experts of logits, got \(3, 2\)",
    ),
    ({"replica_table": TABLE > 0}, TypeError, "replica_table must have an integer dtype, got bool"),
    ({"replica_counts": COUNTS[:3]}, ValueError, r"replica_counts must have shape .* \(4,\), got"),
    ({"replica_counts": COUNTS * 0}, ValueError, "in 1 .. R = 2, got 0 for expert 0"),
    ({"replica_counts": np.int32([2, 2, 2, 1])}, ValueError, "got -1 for expert 1, replica 1"),
    ({"num_physical": 5}, ValueError, r"0 .. num_physical - 1 = 4 .* got 5 for expert 2"),
    ({"num_physical": 0}, ValueError, "num_physical must be between 1 and 2147483647, got 0"),
    ({"num_physical": 2**30, "load": "physical"}, ValueError, "num_physical must be at most"),
    ({"policy": "random"}, ValueError, "policy must be one of 'hash', 'xorshift', got 'random'"),
    ({"load": "both"}, ValueError, "load must be one of 'logical', 'physical', got 'both'"),
    ({"token_offset": np.zeros(())}, TypeError, "token_offset must have an integer dtype"),
    (
      {"token_offset": np.zeros(4, int)},
      ValueError,
      r"token_offset must have shape \(\) or logits.shape\[:-2\] = \(3,\), got \(4,\)",
    ),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_arguments(arguments, exception, text):
  given = {"logits": X, "k": 2, "replica_table": TABLE, "replica_counts": COUNTS} | arguments
  with pytest.raises(exception, match=text):
    route_and_assign_replicas(**given)
