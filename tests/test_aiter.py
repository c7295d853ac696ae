"""aiter's names against numpy, to the bit over the whole of every array but for routing weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import oracle
import oracle_layouts
from jax_router import Routing
from jax_router.compat import aiter
from oracle_layouts import check_equal, make_ids

SORTED = ("sorted_ids", "sorted_weights", "sorted_expert_ids", "num_valid_ids")
AUX = ("m_indices", "reverse_sorted")
MODEL_DIM = 6


@functools.cache
def compiled(static: tuple):
  return jax.jit(
    lambda ids, weights, mask, local_tokens: aiter.moe_sorting(
      ids, weights, expert_mask=mask, num_local_tokens=local_tokens, **dict(static)
    )
  )


def sort(implementation, ids, weights, num_experts, block_size, mask=None, local_tokens=None, **o):
  """`aiter.moe_sorting` under jit with every optional result, compiled once for each shape."""
  static = {
    "num_experts": num_experts, "block_size": block_size, "model_dim": MODEL_DIM,
    "moebuf_dtype": jnp.bfloat16, "output_aux": True, "return_local_topk_ids": True,
    "implementation": implementation,
  }  # fmt: skip
  return compiled(tuple(sorted((static | o).items(), key=lambda item: item[0])))(
    ids, weights, mask, local_tokens
  )


def check(implementation, ids, weights, num_experts, block_size, mask=None, local_tokens=None, **o):
  got = sort(implementation, ids, weights, num_experts, block_size, mask, local_tokens, **o)
  want = oracle_layouts.moe_sorting(
    ids, weights, num_experts, block_size, mask=mask, local_tokens=local_tokens
  )
  names = (*SORTED, *AUX, "local_topk_ids")
  buffer = got[4]
  check_equal((*got[:4], *got[5:]), [want[name] for name in names], names)
  assert buffer.shape == (len(ids), MODEL_DIM) and buffer.dtype == jnp.bfloat16
  assert not np.any(buffer)
  return want


def make(rng, tokens, k, num_experts, kind="distinct"):
  ids = make_ids(rng, tokens, k, num_experts, kind)
  return ids, rng.normal(size=ids.shape).astype(np.float32)


# ---- golden vectors: packed layout, E = 6, K = 3, U = 4, T = 5 ----

IDS = np.array([[0, 3, 5], [2, 3, 5], [1, 3, 5], [1, 2, 3], [1, 3, 5]], np.int32)
WEIGHTS = np.arange(15, dtype=np.float32).reshape(5, 3)


def packed(text: str, pad: tuple[int, int]) -> list[int]:
  """Ids of `token.slot` and P, then pads up to the 36 positions."""
  words = [w.split(".") for w in text.replace("|", " ").split()]
  pairs = [pad if w == ["P"] else (int(w[0]), int(w[1])) for w in words]
  return [slot << 24 | token for token, slot in pairs + [pad] * (36 - len(pairs))]


def test_golden(implementation):
  got = sort(implementation, IDS, WEIGHTS, 6, 4)
  text = "0.0 P P P | 2.0 3.0 4.0 P | 1.0 3.1 P P | 0.1 1.1 2.1 3.2 | 4.1 P P P | 0.2 1.2 2.2 4.2"
  assert got[0].tolist() == packed(text, (5, 3))
  assert int(got[0][1]) == 0x03000005 == 50331653
  assert got[0][12:16].tolist() == [0x01000000, 0x01000001, 0x01000002, 0x02000003]
  weights = [0, 0, 0, 0, 6, 9, 12, 0, 3, 10, 0, 0, 1, 4, 7, 11, 13, 0, 0, 0, 2, 5, 8, 14]
  assert got[1].tolist() == weights + [0] * 12
  assert got[2].tolist() == [0, 1, 2, 3, 3, 5, -1, -1, -1]
  assert got[3].tolist() == [24, 5]
  assert got[6].tolist() == [0, 12, 20, 8, 13, 21, 4, 14, 22, 5, 9, 15, 6, 16, 23]


def test_golden_with_mask(implementation):
  mask = np.array([1, 0, 1, 1, 0, 1], np.int32)
  got = sort(implementation, IDS, WEIGHTS, 6, 4, mask)
  text = "0.0 P P P | 1.0 3.1 P P | 0.1 1.1 2.1 3.2 | 4.1 P P P | 0.2 1.2 2.2 4.2"
  assert got[0].tolist() == packed(text, (5, 3))
  assert got[2].tolist() == [0, 1, 2, 2, 3, -1, -1, -1, -1]
  assert got[3].tolist() == [20, 5]


def test_golden_with_local_tokens(implementation):
  got = sort(implementation, IDS, WEIGHTS, 6, 4, None, np.array([3], np.int32))
  text = "0.0 P P P | 2.0 P P P | 1.0 P P P | 0.1 1.1 2.1 P | 0.2 1.2 2.2 P"
  assert got[0].tolist() == packed(text, (3, 3))
  assert got[2].tolist() == [0, 1, 2, 3, 5, -1, -1, -1, -1]
  assert got[3].tolist() == [20, 3]


@pytest.mark.parametrize("dispatch_policy", (0, 1, 2))
def test_local_ids_of_aiters_test(implementation, dispatch_policy):
  ids = np.array([[0, 1, 5], [2, 4, 3], [5, 0, 2]], np.int32)
  *_, local = aiter.moe_sorting(
    ids, np.ones((3, 3), np.float32), 6, model_dim=16, moebuf_dtype=jnp.bfloat16, block_size=8,
    expert_mask=np.array([0, 1, 1, 0, 1, 0], np.int32), dispatch_policy=dispatch_policy,
    return_local_topk_ids=True, implementation=implementation,
  )  # fmt: skip
  assert local.tolist() == [[-1, 0, -1], [1, 2, -1], [-1, -1, 1]]


# ---- grids ----

SIZES = ((32, 5), (256, 8), (40, 6), (385, 7))


def check_grid_case(kernel, rng, tokens, num_experts, k):
  """Mask, extra rows and policies of aiter's test."""
  mask = rng.integers(0, 2, num_experts).astype(np.int32)
  for extra in (None, 0, 1000):
    ids, weights = make(rng, tokens + (extra or 0), k, num_experts)
    local = None if extra is None else np.array([tokens], np.int32)
    for policy, given in ((0, None), (1, mask)):
      check(kernel, ids, weights, num_experts, 32, given, local, dispatch_policy=policy)


@pytest.mark.parametrize("num_experts, k", SIZES)
@pytest.mark.parametrize("tokens", (1, 7, 31, 64, 128))
def test_grid_of_aiter(kernel, rng, tokens, num_experts, k):
  check_grid_case(kernel, rng, tokens, num_experts, k)


@pytest.mark.slow
@pytest.mark.parametrize("num_experts, k", SIZES)
@pytest.mark.parametrize("tokens", (256, 512, 1024, 2048, 4096, 8192, 16384))
def test_large_grid_of_aiter(kernel, rng, tokens, num_experts, k):
  check_grid_case(kernel, rng, tokens, num_experts, k)


@pytest.mark.parametrize("kind", ("random", "one", "outside", "mixed"))
@pytest.mark.parametrize("block_size", (1, 16, 128))
def test_kinds_and_block_sizes(implementation, rng, kind, block_size):
  """Ids out of range, all tokens to one expert, and rows that name one twice: each slot is kept."""
  ids, weights = make(rng, 19, 3, 7, kind)
  mask = np.array([True, False, True, True, True, False, True])
  check(implementation, ids, weights, 7, block_size)
  check(implementation, ids, weights, 7, block_size, mask, np.int32(11))


@pytest.mark.parametrize("num_experts", (1, 7, 257, 1024, 4096))
def test_numbers_of_experts(kernel, rng, num_experts):
  for tokens, k in ((1, 1), (50, min(8, num_experts))):
    ids, weights = make(rng, tokens, k, num_experts)
    check(kernel, ids, weights, num_experts, 4)
    check(kernel, ids, weights, num_experts, 32, np.zeros(num_experts, np.int32))


@pytest.mark.parametrize("k", (1, 2, 127, 128, 129, 255))
def test_slots(implementation, rng, k):
  """From slot 128 on a packed id is negative; the pad of 255 slots is the last there is."""
  ids, weights = make(rng, 3, k, 260)
  want = check(implementation, ids, weights, 260, 4)
  assert (want["sorted_ids"] < 0).any() == (k >= 128)


def test_as_long_as_aiter_has_them(rng):
  """Shorter and longer than the plan: 33 of 64 positions, and 8192 - 8 of 256."""
  for tokens, k, num_experts, length in ((2, 1, 1, 33), (1, 8, 256, 8192), (1, 1, 1, 32)):
    ids, weights = make(rng, tokens, k, num_experts)
    check(None, ids, weights, num_experts, 32)
    assert sort(None, ids, weights, num_experts, 32)[0].shape == (length,)


@pytest.mark.parametrize("tokens", (0, 5))
def test_no_tokens(implementation, rng, tokens):
  ids, weights = make(rng, tokens, 3, 6)
  check(implementation, ids, weights, 6, 4, None, np.int32(0))
  if not tokens:
    check(implementation, ids, weights, 6, 4)


# ---- options ----


def test_policies_never_change_results(kernel, rng):
  for tokens in (5, 3000):
    ids, weights = make(rng, tokens, 4, 33, "mixed")
    first = sort(kernel, ids, weights, 33, 16, dispatch_policy=0)
    for policy in (1, 2):
      check_equal(sort(kernel, ids, weights, 33, 16, dispatch_policy=policy), jax.device_get(first))


def test_local_tokens_of_every_form(rng):
  ids, weights = make(rng, 9, 2, 5)
  for value in (4, np.int32(4), np.array([4], np.int64), jnp.array([4]), jnp.int32(4), np.uint8(4)):
    got = aiter.moe_sorting(ids, weights, 5, 1, jnp.float32, 4, num_local_tokens=value)
    want = oracle_layouts.moe_sorting(ids, weights, 5, 4, local_tokens=4)
    check_equal(got[:4], [want[name] for name in SORTED])
  for value in (-3, 0, 9, 10, 2**40, np.int64(-(2**40))):
    got = aiter.moe_sorting(ids, weights, 5, 1, jnp.float32, 4, num_local_tokens=value)
    want = oracle_layouts.moe_sorting(ids, weights, 5, 4, local_tokens=value)
    check_equal(got[:4], [want[name] for name in SORTED])


def test_a_new_number_of_local_tokens_does_not_retrace(rng):
  """One program for half the tokens and for all, as a replayed graph needs it."""
  ids, weights = make(rng, 20, 3, 8)
  traces = []

  @jax.jit
  def function(local_tokens):
    traces.append(None)
    return aiter.moe_sorting(
      ids, weights, 8, 1, jnp.float32, 4, num_local_tokens=local_tokens
    )[:4]  # fmt: skip

  for value in (20, 10, 0, 3):
    want = oracle_layouts.moe_sorting(ids, weights, 8, 4, local_tokens=value)
    check_equal(function(jnp.array([value])), [want[name] for name in SORTED])
  assert len(traces) == 1


def test_which_results_there_are(rng):
  ids, weights = make(rng, 5, 2, 4)
  names = (*SORTED, *AUX, "local_topk_ids")
  want = oracle_layouts.moe_sorting(ids, weights, 4, 4)
  for aux in (False, True):
    for local in (False, True):
      got = aiter.moe_sorting(
        ids, weights, 4, 3, jnp.float16, 4, return_local_topk_ids=local, output_aux=aux
      )
      present = [n for n in names if (n not in AUX or aux) and (n != "local_topk_ids" or local)]
      check_equal((*got[:4], *got[5:]), [want[name] for name in present], present)
  for accumulate, mask, shape in (
    (True, None, (5, 3)), (False, None, (0, 0)), (False, np.ones(4, bool), (5, 3))
  ):  # fmt: skip
    got = aiter.moe_sorting(
      ids, weights, 4, 3, jnp.float16, 4, expert_mask=mask, accumulate=accumulate
    )
    assert got[4].shape == shape and got[4].dtype == jnp.float16 and not np.any(got[4])


@pytest.mark.parametrize("dtype", (jnp.bfloat16, np.float16, np.float32))
def test_weights_of_every_type_become_float32(implementation, rng, dtype):
  ids, weights = make(rng, 9, 2, 5)
  weights = weights.astype(dtype)
  weights[0] = np.nan, np.inf
  got = aiter.moe_sorting(ids, weights, 5, 1, jnp.int8, 4, implementation=implementation)
  want = oracle_layouts.moe_sorting(ids, weights.astype(np.float32), 5, 4)
  check_equal(got[:4], [want[name] for name in SORTED])


def test_flashinfers_metadata_of_the_same_arrays():
  """Derived from a packed plan: positions, experts of tiles and how far each tile is filled."""
  got = sort("reference", IDS, WEIGHTS, 6, 4)
  assert got[6].reshape(5, 3).tolist() == [
    [0, 12, 20], [8, 13, 21], [4, 14, 22], [5, 9, 15], [6, 16, 23]
  ]  # fmt: skip
  used = int(got[3][0]) // 4
  filled = (np.asarray(got[5])[: 4 * used].reshape(used, 4) < 5).sum(1)
  assert (np.arange(used) * 4 + filled).tolist() == [1, 7, 10, 16, 17, 24] and used == 6


# ---- topk_softmax ----


@pytest.mark.parametrize("dtype", (np.float32, jnp.bfloat16, np.float16))
@pytest.mark.parametrize("need_renorm", (True, False))
@pytest.mark.parametrize("tokens, num_experts, k", ((1, 1, 1), (7, 128, 4), (33, 385, 9)))
def test_topk_softmax(implementation, rng, dtype, need_renorm, tokens, num_experts, k):
  logits = rng.normal(size=(tokens, num_experts)).astype(dtype)
  weights, ids, indices = aiter.topk_softmax(logits, k, need_renorm, implementation=implementation)
  assert weights.dtype == jnp.float32 and ids.dtype == indices.dtype == jnp.int32
  oracle.check_route(Routing(weights, ids), logits, k, renormalize=need_renorm)
  want = [[j * tokens + t for j in range(k)] for t in range(tokens)]
  assert indices.tolist() == want


def test_topk_softmax_of_ties_nan_and_infinities(implementation):
  nan, inf = np.nan, np.inf
  logits = np.array(
    [[1, 2, 2, 1], [nan, 0, -inf, 0], [nan] * 4, [-inf] * 4, [inf, 0, 1, nan], [nan, 5, nan, nan]],
    np.float32,
  )
  for need_renorm in (True, False):
    got = aiter.topk_softmax(logits, 2, need_renorm, implementation=implementation)
    oracle.check_route(Routing(*got[:2]), logits, 2, renormalize=need_renorm)
    assert got[1].tolist() == [[1, 2], [1, 3], [0, 1], [0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize("shared", (1, 2, 4, 8))
def test_shared_experts(implementation, rng, shared):
  logits = rng.normal(size=(11, 32 + shared)).astype(np.float32) * 9
  logits[0, -1], logits[1, -1] = np.nan, -np.inf
  weights, ids, _ = aiter.topk_softmax(
    logits, 5, True, shared, "sigmoid", implementation=implementation
  )
  assert weights.shape == (11, 5 + shared) and ids.shape == (11, 5)
  oracle.check_route(Routing(weights[:, :5], ids), logits[:, :32], 5)
  with np.errstate(over="ignore"):
    want = 1 / (1 + np.exp(-logits[:, 32:].astype(np.float64)))
  np.testing.assert_allclose(weights[:, 5:], np.nan_to_num(want), rtol=1e-6, atol=1e-38)


# ---- topk_softmax_sorting ----

DECODE = [(t, 128, 4) for t in (1, 8, 32, 64, 7)] + [(t, 256, 8) for t in (1, 16, 32, 60, 13)]


@pytest.mark.parametrize("dtype", (np.float32, ml_dtypes.bfloat16, np.float16))
@pytest.mark.parametrize("need_renorm", (True, False))
def test_grid_of_the_fused_operation(kernel, rng, need_renorm, dtype):
  for tokens, num_experts, k in DECODE:
    logits = rng.normal(size=(tokens, num_experts)).astype(dtype)
    got = aiter.topk_softmax_sorting(
      logits, k, num_experts, 256, jnp.bfloat16, need_renorm=need_renorm, block_size=32,
      implementation=kernel,
    )  # fmt: skip
    choice = oracle.route(logits, k, renormalize=need_renorm)
    assert choice.clear.all()
    want = oracle_layouts.moe_sorting(choice.experts, choice.weights, num_experts, 32)
    check_equal((got[0], got[2], got[3]), [want[n] for n in (SORTED[0], *SORTED[2:])])
    np.testing.assert_allclose(got[1], want["sorted_weights"], rtol=1e-5, atol=1e-38)
    assert got[4].shape == (tokens, 256) and got[4].dtype == jnp.bfloat16 and not np.any(got[4])


@pytest.mark.parametrize("need_renorm", (True, False))
def test_fused_is_the_chain(implementation, rng, need_renorm):
  """To the bit, on both sides of the largest fused size, with a mask, local tokens and policies."""
  num_experts, k = 33, 4
  most = aiter.fused_topk_moe_sorting_max_tokens(num_experts, k)
  mask = rng.random(num_experts) < 0.6
  for tokens in sorted({1, 50, max(most, 1), most + 1}):
    logits = rng.normal(size=(tokens, num_experts + 2)).astype(np.float32)
    logits[0, 3] = np.nan
    weights, ids, _ = aiter.topk_softmax(
      logits[:, :num_experts], k, need_renorm, implementation=implementation
    )
    for options in (
      {}, {"dispatch_policy": 2}, {"num_local_tokens": np.array([tokens // 2], np.int32)},
      {"expert_mask": mask}, {"expert_mask": mask, "num_local_tokens": 1, "dispatch_policy": 1},
    ):  # fmt: skip
      options = options | {"block_size": 16, "implementation": implementation}
      want = aiter.moe_sorting(ids, weights, num_experts, 5, jnp.float32, **options)
      got = aiter.topk_softmax_sorting(
        logits, k, num_experts, 5, jnp.float32, need_renorm, **options
      )
      check_equal(got, jax.device_get(want))
    operation = aiter.fused_topk_moe_sorting_fwd(
      logits, num_experts, k, 16, need_renorm, model_dim=5, moebuf_dtype=jnp.float32,
      implementation=implementation,
    )  # fmt: skip
    want = aiter.moe_sorting(
      ids, weights, num_experts, 5, jnp.float32, 16, implementation=implementation
    )
    check_equal(operation, jax.device_get(want))


def test_largest_fused_size(kernel):
  del kernel
  for num_experts, k in ((128, 4), (256, 8), (512, 10)):
    got = aiter.fused_topk_moe_sorting_max_tokens(num_experts, k)
    assert got == jax_router.max_fused_tokens(num_experts, k)
  assert aiter.fused_topk_moe_sorting_max_tokens(128, 4, device=jax.devices("cpu")[0]) > 0
