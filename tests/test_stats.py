"""Values of `route_with_stats` against the float64 oracle and `route`."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import oracle
import oracle_stats
import shapes
from jax_router import Groups, _compat
from programs import assert_equal, assert_same

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
CASES = tuple((*variant, dtype) for variant in oracle.VARIANTS for dtype in DTYPES)
KINDS = shapes.FINITE_KINDS + shapes.SPECIAL_KINDS

SIZES = (1, 7, 33, 130, 257, 896, 2304, 4096, 8192)
TOKENS = (257, 3, 1, 40)


def sizes_and_choices() -> list[tuple[int, int, int]]:
  """(tokens, experts, k) for every size and k in 1, 2, E; larger rows with fewer tokens."""
  found = []
  for i, experts in enumerate(SIZES):
    for j, k in enumerate(sorted({1, min(2, experts), experts})):
      tokens = TOKENS[(i + j) % 4] if experts * k < 100000 else 3
      found.append((tokens, experts, k))
  return [*found, (1500, 33, 2), (1500, 7, 7), (1500, 130, 1)]


def check_sizes(route, tokens, experts, k):
  score, renormalize, dtype = CASES[(experts + 5 * k + tokens) % len(CASES)]
  logits = shapes.make_logits("random", tokens, experts, dtype)
  if score == "none":
    logits = np.abs(logits)  # A sum that cancels has no accurate shares.
  options = {"score": score, "renormalize": renormalize}
  oracle_stats.check_call(route(logits, k, **options), logits, k, **options)


@pytest.mark.parametrize("tokens, experts, k", sizes_and_choices())
def test_sizes(kernel_route_with_stats, tokens, experts, k):
  check_sizes(kernel_route_with_stats, tokens, experts, k)


@pytest.mark.parametrize("tokens, experts, k", sizes_and_choices()[1::9])
def test_sizes_of_every_implementation(route_with_stats, tokens, experts, k):
  check_sizes(route_with_stats, tokens, experts, k)


def check_kinds(route, score, renormalize, experts, k, dtypes=DTYPES):
  options = {"score": score, "renormalize": renormalize}
  for kind, dtype in itertools.product(KINDS, dtypes):
    logits = shapes.make_logits(kind, 24, experts, dtype)
    _, stats = result = route(logits, k, **options)
    oracle_stats.check_call(result, logits, k, **options)
    assert np.isfinite(stats.score_sums).all() and not np.isnan(stats.z_sum)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_kinds_of_logits(kernel_route_with_stats, score, renormalize):
  check_kinds(kernel_route_with_stats, score, renormalize, 33, 8)


@pytest.mark.parametrize("score, renormalize", oracle.VARIANTS)
def test_kinds_of_logits_in_long_rows(kernel_route_with_stats, score, renormalize):
  check_kinds(kernel_route_with_stats, score, renormalize, 896, 16, DTYPES[:2])


@pytest.mark.parametrize("score", oracle.SCORES)
def test_kinds_of_logits_of_every_implementation(route_with_stats, score):
  check_kinds(route_with_stats, score, score != "sigmoid", 33, 8, DTYPES[:1])


@pytest.mark.slow
@pytest.mark.parametrize("score, renormalize, dtype", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_for_every_variant_and_kind(kernel_route_with_stats, kind, score, renormalize, dtype):
  options = {"score": score, "renormalize": renormalize}
  for tokens, experts, k in sizes_and_choices():
    logits = shapes.make_logits(kind, min(tokens, 20), experts, dtype, seed=k)
    if score == "none" and kind != "plus_inf":
      logits = np.abs(logits)  # A sum that cancels has no accurate shares.
      logits[np.isposinf(logits.astype(np.float32))] = -np.inf
    oracle_stats.check_call(kernel_route_with_stats(logits, k, **options), logits, k, **options)


def optional_operands(rng, tokens: int, experts: int, k: int) -> dict:
  """Sets of options by name."""
  bias = rng.normal(size=experts).astype(np.float32)
  given = rng.integers(-2, experts + 3, size=(tokens, k)).astype(np.int32)
  given[0] = 3  # Every slot of a token may hold the same expert.
  where = rng.random(tokens) < 0.7
  return {
    "plain": {},
    "bias": {"bias": bias},
    "groups": {"groups": Groups(8, 3)},
    "bias, groups, where": {"bias": bias, "groups": Groups(8, 3), "where": where},
    "where": {"where": where},
    "all padding": {"where": np.zeros(tokens, bool)},
    "experts": {"experts": given},
    "experts, where": {"experts": given, "where": where, "scale": 2.5},
  }


NAMES = tuple(optional_operands(np.random.default_rng(0), 2, 8, 2))


# Every variant with half of the operands.
OPERANDS = [
  (*variant, name)
  for i, variant in enumerate(oracle.VARIANTS)
  for j, name in enumerate(NAMES)
  if (i + j + i // 2) % 2 == 0
]


@pytest.mark.parametrize("score, renormalize, name", OPERANDS)
def test_operands(kernel_route_with_stats, kernel_route, rng, score, renormalize, name):
  """Against the oracle, and to the bit the routing of `route`."""
  options = optional_operands(rng, 66, 40, 5)[name] | {"score": score, "renormalize": renormalize}
  kinds = (("random", np.float32), ("nan", ml_dtypes.bfloat16), ("dead", np.float16))
  kind, dtype = kinds[(NAMES.index(name) + oracle.VARIANTS.index((score, renormalize))) % 3]
  logits = np.abs(shapes.make_logits(kind, 66, 40, dtype))
  logits[np.isposinf(logits.astype(np.float32))] = -np.inf
  routing, stats = result = kernel_route_with_stats(logits, 5, **options)
  oracle_stats.check_call(result, logits, 5, **options)
  assert_equal(routing, kernel_route(logits, 5, **options))
  if name == "all padding":
    assert not any(np.asarray(x).any() for x in stats)
  if name == "experts":
    assert stats.expert_counts[3] >= 5


@pytest.mark.parametrize("name", NAMES[3::4])
def test_operands_of_every_implementation(route_with_stats, rng, name):
  options = optional_operands(rng, 66, 40, 5)[name] | {"score": "sigmoid"}
  logits = shapes.make_logits("nan", 66, 40)
  oracle_stats.check_call(route_with_stats(logits, 5, **options), logits, 5, **options)


def test_routing_is_that_of_route_whatever_the_dtypes(kernel_route_with_stats, kernel_route):
  logits = shapes.make_logits("quantized", 50, 120, ml_dtypes.bfloat16)
  where = np.arange(50) % 3 > 0
  for dtypes in (("int8", "bfloat16"), ("uint16", "float16"), ("int32", "float32")):
    options = dict(zip(("index_dtype", "weight_dtype"), dtypes, strict=True)) | {"where": where}
    routing, stats = kernel_route_with_stats(logits, 6, **options)
    assert (routing.experts.dtype.name, routing.weights.dtype.name) == dtypes
    assert_equal(routing, kernel_route(logits, 6, **options))
    oracle_stats.check_stats(stats, logits, routing.experts, where=where)


def test_64_bit_indices_and_numbers_of_tokens(kernel_route_with_stats):
  logits = shapes.make_logits("random", 40, 120)
  where = np.arange(40) % 3 > 0
  usual = kernel_route_with_stats(logits, 6, where=where)
  with jax.enable_x64(True):
    routing, stats = kernel_route_with_stats(logits, 6, where=where, index_dtype="int64")
    assert routing.experts.dtype == np.int64
    assert_equal((routing, stats), usual)
    assert [x.dtype.name for x in stats] == ["int32", "float32", "float32", "int32"]
    for loss in (jax_router.load_balance_loss(stats, 6), jax_router.z_loss(stats)):
      assert loss.dtype == np.float32


@pytest.mark.parametrize("score", ("softmax", "sqrtsoftplus"))
def test_leading_dimensions_have_statistics_of_their_own(kernel_route_with_stats, rng, score):
  logits = np.abs(shapes.make_logits("random", 60, 24))
  bias, where = rng.normal(size=24).astype(np.float32), rng.random(60) < 0.8
  for lead in ((60,), (4, 15), (15, 4), (1, 60), (60, 1), (2, 3, 10)):
    options = {"score": score, "bias": bias, "where": where.reshape(lead)}
    shaped = logits.reshape(*lead, 24)
    oracle_stats.check_call(kernel_route_with_stats(shaped, 3, **options), shaped, 3, **options)


def test_one_token_without_a_dimension(route_with_stats):
  logits = shapes.make_logits("random", 1, 24)[0]
  for where in (None, np.bool_(True), np.bool_(False)):
    _, stats = result = route_with_stats(logits, 3, where=where)
    oracle_stats.check_call(result, logits, 3, where=where)
    assert stats.expert_counts.shape == stats.score_sums.shape == (24,)
    assert stats.z_sum.shape == stats.num_tokens.shape == ()


@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_no_tokens(route_with_stats, score):
  for shape in ((0, 64), (3, 0, 64), (0, 3, 64), (0, 0, 64)):
    routing, stats = route_with_stats(np.zeros(shape, np.float32), 8, score=score)
    assert routing.weights.shape == (*shape[:-1], 8)
    assert stats.expert_counts.shape == stats.score_sums.shape == (*shape[:-2], 64)
    assert stats.z_sum.shape == stats.num_tokens.shape == shape[:-2]
    assert not any(np.asarray(x).any() for x in stats)


@pytest.mark.parametrize("score", oracle.SCORES)
def test_rows_without_a_number_are_tokens_that_choose_the_first(route_with_stats, score):
  logits = np.full((5, 9), -np.inf, np.float32)
  logits[1], logits[3, 2] = np.nan, np.nan
  routing, stats = route_with_stats(logits, 4, score=score)
  assert np.asarray(routing.experts).tolist() == [[0, 1, 2, 3]] * 5
  assert stats.expert_counts.tolist() == [5, 5, 5, 5, 0, 0, 0, 0, 0]
  assert not np.asarray(stats.score_sums).any() and stats.z_sum == 0 and stats.num_tokens == 5


@pytest.mark.parametrize("offset", (4096.0, -4096.0, 2.0**30))
def test_probabilities_do_not_depend_on_a_common_offset(kernel_route_with_stats, rng, offset):
  logits = rng.integers(-2, 3, size=(64, 20)).astype(np.float32)
  logits *= np.float32(128 if offset > 2**20 else 1)
  moved = logits + np.float32(offset)
  np.testing.assert_array_equal(moved - np.float32(offset), logits)
  plain, got = kernel_route_with_stats(logits, 4), kernel_route_with_stats(moved, 4)
  assert_equal(got[0], plain[0])
  np.testing.assert_array_equal(got[1].expert_counts, plain[1].expert_counts)
  np.testing.assert_allclose(got[1].score_sums, plain[1].score_sums, rtol=1e-6)
  oracle_stats.check_call(got, moved, 4)


@pytest.mark.parametrize("score", oracle.SCORES)
def test_huge_logits(route_with_stats, score):
  """Only z_sum can overflow, as its formula does."""
  for magnitude, overflows in ((1e18, False), (-1e18, False), (1e30, True), (-3e38, True)):
    logits = np.full((3, 12), magnitude, np.float32)
    logits[1, ::2] = np.sign(magnitude)
    _, stats = route_with_stats(logits, 4, score=score)
    assert np.isposinf(stats.z_sum) == overflows
    assert np.isfinite(stats.score_sums).all()
    if score != "none" or magnitude > 0:  # Scores that are given and negative may add up to 0.
      oracle_stats.check_stats(
        stats, logits, oracle.route(logits, 4, score=score).experts, score=score
      )


GOLDEN = {
  "softmax": (.0845664, .0188693, .3790001, .0512921, .2298752, .0311102, .1394264, .0658603),
  "sigmoid": (.1307537, .0564938, .1850201, .1050299, .1717396, .0793061, .1535661, .1180907),
}  # fmt: skip


@pytest.mark.parametrize("score", GOLDEN)
def test_golden_scores(route_with_stats, score):
  logits = np.array([[0.5, -1, 2, 0, 1.5, -0.5, 1, 0.25]], np.float32)
  for renormalize in (True, False):
    _, stats = route_with_stats(logits, 1, score=score, renormalize=renormalize)
    np.testing.assert_allclose(stats.score_sums, GOLDEN[score], atol=1e-7)
    np.testing.assert_allclose(stats.z_sum, np.log(np.exp(logits.astype(float)).sum()) ** 2)
    assert stats.expert_counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_counts_are_exact_beyond_the_integers_of_float32(kernel_route_with_stats):
  """2**17 tokens that were given the same expert 129 times, but for one slot."""
  experts = np.zeros((2**17, 129), np.int32)
  experts[5, 3] = 128
  logits = np.ones((2**17, 129), ml_dtypes.bfloat16)
  _, stats = kernel_route_with_stats(logits, 129, experts=experts)
  assert stats.expert_counts.tolist() == [129 * 2**17 - 1, *[0] * 127, 1]
  assert stats.num_tokens == 2**17
  np.testing.assert_allclose(stats.score_sums, 2**17 / 129, rtol=1e-5)


def test_many_tokens(kernel_route_with_stats, rng):
  logits, where = shapes.make_logits("random", 65536, 64), rng.random(65536) < 0.9
  routing, stats = kernel_route_with_stats(logits, 6, where=where)
  oracle_stats.check_stats(stats, logits, routing.experts, where=where)


# ---- the same bits ----


@pytest.mark.parametrize(
  "repeats, tokens, experts, k, score",
  ((200, 257, 130, 9, "softmax"), (200, 1504, 33, 2, "sigmoid"), (5, 24, 8192, 100, "none")),
)
def test_repeats_are_identical(kernel_route_with_stats, repeats, tokens, experts, k, score):
  logits = jnp.asarray(np.abs(shapes.make_logits("random", tokens, experts)))
  first = kernel_route_with_stats(logits, k, score=score)
  oracle_stats.check_call(first, logits, k, score=score)
  for i in range(repeats):
    # Freed arrays of the same size full of rubbish are what an unwritten result would show.
    rubbish = [jnp.full(experts, -7.0 - i), jnp.full(experts, -7 - i, jnp.int32)]
    jax.block_until_ready(rubbish)
    del rubbish
    assert_equal(kernel_route_with_stats(logits, k, score=score), first)


@pytest.mark.parametrize("devices", (1, 8))
def test_batches_do_not_matter_to_the_bits(kernel, monkeypatch, devices):
  """Each sequence alone, mapped over, and as a leading dimension.

  With several devices XLA adds up the sums of groups of tokens, in an order of its own.
  """
  monkeypatch.setattr(_compat, "automatic_devices", lambda: devices)
  flat = shapes.make_logits("random", 3 * 400, 130, ml_dtypes.bfloat16)
  logits = jnp.asarray(flat).reshape(3, 400, 130)
  same = assert_equal if devices == 1 else assert_same

  def call(x):
    return jax_router.route_with_stats(x, 4, score="sigmoid", implementation=kernel)

  together = jax.jit(call)(logits)
  oracle_stats.check_call(together, logits, 4, score="sigmoid")
  same(jax.jit(jax.vmap(call))(logits), together)
  same(jax.jit(jax.vmap(call, in_axes=1))(jnp.swapaxes(logits, 0, 1)), together)
  for i in range(3):
    same(jax.jit(call)(logits[i]), jax.tree.map(lambda x, i=i: x[i], together))


_PRINT_BITS = """
import sys, hashlib
import jax, jax.numpy as jnp, numpy as np, jax_router
logits = np.random.default_rng(3).normal(size=(5000, 96)).astype(np.float32)
def loss(x):
  routing, stats = jax_router.route_with_stats(x, 4, score=sys.argv[1])
  z = jax_router.z_loss(stats)
  return jax_router.load_balance_loss(stats, 4) + z + jnp.sum(routing.weights**2), stats
results = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
digest = hashlib.sha256()
for x in jax.tree.leaves(results):
  digest.update(np.asarray(x).tobytes())
import os
names = [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]
print(digest.hexdigest(), sum(n.startswith("tf_XLAEigen") for n in names))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_do_not_matter_to_the_bits():
  """Two processes, whose pools have 1 and 4 threads, print the same hash."""
  base = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
  processes = [
    subprocess.Popen(
      [sys.executable, "-P", "-c", _PRINT_BITS, "sigmoid"],
      env=base | {"JAX_PLATFORMS": "cpu", "NPROC": threads},
      stdout=subprocess.PIPE,
      text=True,
    )
    for threads in ("1", "4")
  ]
  outputs = [p.communicate(timeout=120)[0].split() for p in processes]
  assert all(p.returncode == 0 for p in processes)
  assert outputs[0][0] == outputs[1][0]
  assert [o[1] for o in outputs] == ["1", "4"]


def test_result_unpacks_and_is_a_pytree():
  routing, stats = jax_router.route_with_stats(jnp.zeros((3, 4)), 2)
  assert routing._fields == ("weights", "experts")
  assert stats._fields == ("expert_counts", "score_sums", "z_sum", "num_tokens")
  doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(stats)
  assert isinstance(doubled, jax_router.RouterStats) and doubled.num_tokens == 6
