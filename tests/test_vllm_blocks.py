"""`moe_align_block_size` by vLLM's names against numpy, over the whole of every array."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle_layouts
from jax_router.compat import vllm
from oracle_layouts import check_equal, make_ids

NAMES = ("sorted_ids", "expert_ids", "num_tokens_post_pad")


@functools.cache
def compiled(block_size, num_experts, **static):
  return jax.jit(
    lambda ids, expert_map: vllm.moe_align_block_size(
      ids, block_size, num_experts, expert_map, **static
    )
  )


def check(implementation, ids, block_size, num_experts, expert_map=None, pad=False, ignore=False):
  function = compiled(
    block_size, num_experts, pad_sorted_ids=pad, ignore_invalid_experts=ignore,
    implementation=implementation,
  )  # fmt: skip
  want = oracle_layouts.align(
    ids, block_size, num_experts, expert_map=expert_map, pad=pad, ignore_invalid=ignore
  )
  check_equal(function(ids, expert_map), want, NAMES)
  return want


def make_map(rng, num_experts: int, kind: str) -> np.ndarray:
  """Local ids of the experts of one of two ranks: a window, every other one, or in any order."""
  local = np.full(num_experts, -1, np.int32)
  count = max(num_experts // 2, 1)
  here = {
    "window": np.arange(num_experts - count, num_experts),
    "every other": np.arange(0, 2 * count, 2)[:count],
    "any": rng.permutation(num_experts)[:count],
  }[kind]
  local[here] = np.arange(count)
  return local


# ---- golden vectors ----


def test_golden(implementation):
  ids = np.array([[0, 3, 5], [2, 3, 5], [1, 3, 5], [1, 2, 3], [1, 3, 5]], np.int32)
  got = vllm.moe_align_block_size(ids, 4, 6, implementation=implementation)
  want = [0, 15, 15, 15, 6, 9, 12, 15, 3, 10, 15, 15, 1, 4, 7, 11, 13, 15, 15, 15, 2, 5, 8, 14]
  assert got[0].tolist() == want + [15] * 9
  assert got[1].tolist() == [0, 1, 2, 3, 3, 5, -1, -1, -1]
  assert got[2].tolist() == [24]


def test_golden_of_vllm(implementation):
  ids = np.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], np.int32)
  got = vllm.moe_align_block_size(ids, 4, 5, implementation=implementation)
  want = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
  assert got[0].shape == (27,) and got[0].tolist() == want + [12] * 11
  assert got[1].tolist() == [1, 2, 3, 4, -1, -1, -1]
  assert got[2].tolist() == [16]


def test_both_forms_of_an_expert_map(implementation):
  """Local order is the reverse of the global one; expert 1 lives elsewhere."""
  ids = np.array([[0, 1], [2, 1], [0, 2]], np.int32)
  local = np.array([1, -1, 0], np.int32)
  mapped = vllm.moe_align_block_size(ids, 2, 3, local, implementation=implementation)
  assert mapped[0].tolist() == [0, 4, 1, 3, 2, 5, 6, 6, 6]
  assert mapped[1].tolist() == [1, -1, 0, -1, -1] and mapped[2].tolist() == [6]
  dropped = vllm.moe_align_block_size(ids, 2, 3, local, False, True, implementation=implementation)
  assert dropped[0].tolist() == [2, 5, 0, 4, 6, 6, 6, 6, 6]
  assert dropped[1].tolist() == [0, 1, -1, -1, -1] and dropped[2].tolist() == [4]


# ---- grids ----


def check_grid_case(kernel, rng, tokens, k, num_experts, block_size):
  ids = make_ids(rng, tokens, k, num_experts)
  check(kernel, ids, block_size, num_experts)
  check(kernel, ids, block_size, num_experts, pad=True)
  local = make_map(rng, num_experts, "window")
  for ignore in (False, True):
    check(kernel, ids, block_size, num_experts, local, pad=ignore, ignore=ignore)


@pytest.mark.parametrize("num_experts", (32, 160, 256, 257))
@pytest.mark.parametrize("block_size", (32, 128))
def test_grid_of_vllm(kernel, rng, num_experts, block_size):
  for tokens, k in ((1, 1), (3, 2), (3, 32), (256, 2)):
    check_grid_case(kernel, rng, tokens, k, num_experts, block_size)


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", (32, 160, 256, 257))
@pytest.mark.parametrize("block_size", (32, 128))
@pytest.mark.parametrize("tokens", (1, 3, 256, 2256, 4096))
def test_whole_grid_of_vllm(kernel, rng, tokens, num_experts, block_size):
  for k in (1, 2, 16, 32):
    check_grid_case(kernel, rng, tokens, k, num_experts, block_size)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", (32, 64, 128, 256))
@pytest.mark.parametrize("k", (1, 3, 8, 64))
def test_grid_of_sglang(kernel, rng, block_size, k):
  for tokens in (1, 2, 33, 511, 4096):
    check(kernel, make_ids(rng, tokens, k, 256, "random"), block_size, 256)


@pytest.mark.parametrize("kind", ("distinct", "random", "one", "outside", "mixed"))
@pytest.mark.parametrize("maps", ("none", "window", "every other", "any"))
def test_kinds_and_maps(implementation, rng, kind, maps):
  for tokens, k, num_experts in ((3, 2, 9), (37, 4, 7)):
    ids = make_ids(rng, tokens, k, num_experts, kind)
    if maps == "none":
      check(implementation, ids, 4, num_experts)
      check(implementation, ids, 4, num_experts, pad=True)
      continue
    local = make_map(rng, num_experts, maps)
    for ignore in (False, True):
      check(implementation, ids, 4, num_experts, local, ignore=ignore)


@pytest.mark.parametrize("num_experts", (1, 7, 1024, 4096))
def test_numbers_of_experts(kernel, rng, num_experts):
  """Fewer entries than experts, as many, and more."""
  for tokens in {1, max(num_experts // 4, 1), num_experts}:
    for pad in (False, True):
      check(kernel, make_ids(rng, tokens, 2, num_experts, "random"), 16, num_experts, pad=pad)


@pytest.mark.parametrize("block_size", (1, 4, 64, 1000))
def test_block_sizes(implementation, rng, block_size):
  check(implementation, make_ids(rng, 19, 3, 7, "mixed"), block_size, 7, pad=True)


def test_no_tokens(implementation):
  for num_experts in (1, 5):
    check(implementation, np.zeros((0, 3), np.int32), 4, num_experts)
  got = vllm.moe_align_block_size(np.zeros((0, 3), np.int32), 4, 5)
  assert got[0].shape == got[1].shape == (0,) and got[2].tolist() == [0]


@pytest.mark.parametrize("dtype", (np.uint8, np.int16, np.uint32, np.int64, np.uint64))
@pytest.mark.parametrize("x64", (False, True))
def test_types(rng, dtype, x64):
  """Also ids and local ids that int32 cannot hold, of numpy and of JAX."""
  largest = np.iinfo(dtype).max
  ids = make_ids(rng, 20, 3, 9, "random").astype(dtype)
  ids[2, 1] = largest
  want_map = make_map(rng, 9, "any")
  given_map = np.where(want_map < 0, largest, want_map.astype(dtype))
  want_ids = np.minimum(ids, dtype(9)).astype(np.int64)
  for ignore in (False, True):
    want = oracle_layouts.align(want_ids, 4, 9, expert_map=want_map, ignore_invalid=ignore)
    with jax.enable_x64(x64):
      args = (jnp.asarray(ids), jnp.asarray(given_map)) if x64 else (ids, given_map)
      got = vllm.moe_align_block_size(args[0], 4, 9, args[1], False, ignore)
    check_equal(got, want, NAMES)


# ---- batches ----


def test_batched_example_of_vllm():
  got = vllm.batched_moe_align_block_size(8, 4, np.array([2, 3, 0, 6, 8], np.int32))
  want = [0, 1, 40, 40, 8, 9, 10, 40, *range(24, 30), 40, 40, *range(32, 40)]
  assert got[0].tolist() == want + [40] * 16
  assert got[1].tolist() == [0, 1, 3, 3, 4, 4, -1, -1, -1, -1]
  assert got[2].tolist() == [24]


@pytest.mark.parametrize("most", (0, 1, 5, 64, 150))
@pytest.mark.parametrize("block_size", (1, 4, 64, 1000))
def test_batched(rng, most, block_size):
  align = jax.jit(
    functools.partial(vllm.batched_moe_align_block_size, most, block_size)
  )  # fmt: skip
  for batches in (1, 2, 33):
    for counts in (
      rng.integers(0, most + 1, batches), np.zeros(batches), np.full(batches, most),
      rng.integers(-5, most + 9, batches),
    ):  # fmt: skip
      counts = counts.astype(np.int32)
      check_equal(align(counts), oracle_layouts.batched_align(most, block_size, counts), NAMES)


def test_batched_leading_dimensions_vmap_and_types(rng):
  counts = rng.integers(0, 12, (3, 2, 5)).astype(np.int32)
  align = functools.partial(vllm.batched_moe_align_block_size, 11, 4)
  whole, mapped = align(counts), jax.vmap(align, 1, 1)(counts)
  for i in range(3):
    for j in range(2):
      want = oracle_layouts.batched_align(11, 4, counts[i, j])
      check_equal([x[i, j] for x in whole], want, NAMES)
      check_equal([x[i, j] for x in mapped], want, NAMES)
  for values in (
    np.array([2**40, -(2**40), 3]), np.array([2**64 - 1, 0, 3], np.uint64),
    np.array([127, -128, 3], np.int8), np.array([255, 0, 3], np.uint8),
  ):  # fmt: skip
    want = oracle_layouts.batched_align(300, 64, [min(max(int(v), 0), 300) for v in values])
    check_equal(vllm.batched_moe_align_block_size(300, 64, values), want, NAMES)


def test_repeats_have_the_same_bits(kernel, rng):
  """Where vLLM adds up positions with atomics, the order varies."""
  ids = jnp.asarray(make_ids(rng, 4097, 16, 128, "random"))
  want = oracle_layouts.align(np.asarray(ids), 64, 128)
  for _ in range(5):
    check_equal(compiled(64, 128, implementation=kernel)(ids, None), want, NAMES)
