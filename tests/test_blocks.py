"""`plan_blocks` against numpy, to the bit over the whole of every array."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
import oracle_blocks
from jax_router import Routing, plan_blocks
from oracle_blocks import block_plan, check_plan

LAYOUTS = pytest.mark.parametrize("layout", ("flat", "packed"))


@functools.cache
def compiled(num_experts: int, block_size: int, **static):
  return jax.jit(
    lambda routing, expert_mask, num_valid: plan_blocks(
      routing, num_experts, block_size, expert_mask=expert_mask, num_valid=num_valid, **static
    )
  )


def planner(name: str):
  """`plan_blocks` under jit, compiled once for each set of static arguments."""

  def call(weights, experts, *sizes, expert_mask=None, num_valid=None, **static):
    function = compiled(*sizes, **static, implementation=name)
    return function(Routing(weights, experts), expert_mask, num_valid)

  return call


@pytest.fixture
def blocks(implementation):
  """`planner` of every implementation."""
  return planner(implementation)


@pytest.fixture
def kernel_blocks(kernel):
  """`planner` of the kernels only."""
  return planner(kernel)


def make_routing(rng, tokens, k, num_experts, kind="random"):
  """Weights and experts `[tokens, k]`.

  random: any experts, duplicates in a row too. distinct: none. one: all tokens to one expert.
  sorted: ascending over all entries. none: no expert in range. mixed: some out of range.
  """
  weights = rng.normal(size=(tokens, k)).astype(np.float32)
  experts = rng.integers(0, num_experts, (tokens, k))
  if kind == "distinct":
    experts = np.argsort(rng.random((tokens, num_experts)), axis=-1)[:, :k]
  elif kind == "one":
    experts = np.full((tokens, k), num_experts // 2)
  elif kind == "sorted":
    experts = np.sort(experts, axis=None).reshape(tokens, k)
  elif kind in ("none", "mixed"):
    outside = rng.choice([-1, num_experts, num_experts + 5, -(2**31), 2**31 - 1], (tokens, k))
    experts = np.where(rng.random((tokens, k)) < (0.3 if kind == "mixed" else 1), outside, experts)
  return weights, experts.astype(np.int32)


def check(call, weights, experts, *sizes, **options):
  check_plan(
    call(weights, experts, *sizes, **options), block_plan(weights, experts, *sizes, **options)
  )


# ---- golden vectors: section "Golden vectors" of the sorting rules ----

IDS = np.array([[0, 3, 5], [2, 3, 5], [1, 3, 5], [1, 2, 3], [1, 3, 5]], np.int32)
WEIGHTS = np.arange(15, dtype=np.float32).reshape(5, 3)


def packed(text: str, pad: int, length: int) -> list[int]:
  """Ids from their text `token.slot`, P for pads, followed by pads."""
  ids = []
  for word in text.replace("|", " ").split():
    token, slot = word.split(".") if word != "P" else (0, 0)
    ids.append(pad if word == "P" else int(slot) << 24 | int(token))
  return ids + [pad] * (length - len(ids))


def test_golden_packed(blocks):
  got = blocks(WEIGHTS, IDS, 6, 4, layout="packed")
  text = "0.0 P P P | 2.0 3.0 4.0 P | 1.0 3.1 P P | 0.1 1.1 2.1 3.2 | 4.1 P P P | 0.2 1.2 2.2 4.2"
  assert got.ids.tolist() == packed(text, 50331653, 36)
  assert got.ids[12:16].tolist() == [0x01000000, 0x01000001, 0x01000002, 0x02000003]
  weights = [0, 0, 0, 0, 6, 9, 12, 0, 3, 10, 0, 0, 1, 4, 7, 11, 13, 0, 0, 0, 2, 5, 8, 14]
  assert got.weights.tolist() == weights + [0] * 12
  assert got.block_experts.tolist() == [0, 1, 2, 3, 3, 5, -1, -1, -1]
  assert (int(got.num_padded), int(got.num_tokens)) == (24, 5)
  assert got.inverse.ravel().tolist() == [0, 12, 20, 8, 13, 21, 4, 14, 22, 5, 9, 15, 6, 16, 23]


def test_golden_packed_with_a_mask(blocks):
  mask = np.array([1, 0, 1, 1, 0, 1], np.int32)
  got = blocks(WEIGHTS, IDS, 6, 4, layout="packed", expert_mask=mask)
  text = "0.0 P P P | 1.0 3.1 P P | 0.1 1.1 2.1 3.2 | 4.1 P P P | 0.2 1.2 2.2 4.2"
  assert got.ids.tolist() == packed(text, 3 << 24 | 5, 36)
  assert got.block_experts.tolist() == [0, 1, 2, 2, 3, -1, -1, -1, -1]
  assert (int(got.num_padded), int(got.num_tokens)) == (20, 5)


def test_golden_packed_with_three_valid_tokens(blocks):
  got = blocks(WEIGHTS, IDS, 6, 4, layout="packed", num_valid=3)
  text = "0.0 P P P | 2.0 P P P | 1.0 P P P | 0.1 1.1 2.1 P | 0.2 1.2 2.2 P"
  assert got.ids.tolist() == packed(text, 3 << 24 | 3, 36)
  assert got.block_experts.tolist() == [0, 1, 2, 3, 5, -1, -1, -1, -1]
  assert (int(got.num_padded), int(got.num_tokens)) == (20, 3)


def test_golden_flat(blocks):
  got = blocks(WEIGHTS, IDS, 6, 4)
  ids = [0, 15, 15, 15, 6, 9, 12, 15, 3, 10, 15, 15, 1, 4, 7, 11, 13, 15, 15, 15, 2, 5, 8, 14]
  assert got.ids.tolist() == ids + [15] * 12
  assert int(got.num_padded) == 24


def test_golden_flat_of_vllm(blocks):
  experts = np.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]], np.int32)
  got = blocks(np.ones((4, 3), np.float32), experts, 5, 4)
  ids = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
  assert got.ids.tolist() == ids + [12] * 12
  assert got.block_experts.tolist() == [1, 2, 3, 4, -1, -1, -1]
  assert int(got.num_padded) == 16


def test_the_static_length_is_the_tighter_bound():
  """One token of 8 experts of 256 in blocks of 32 needs 256 positions, not 8192."""
  routing = Routing(jnp.ones((1, 8)), jnp.arange(8, dtype=jnp.int32)[None])
  got = plan_blocks(routing, 256, 32)
  assert got.ids.shape == (256,) and int(got.num_padded) == 256


# ---- grids ----


@LAYOUTS
@pytest.mark.parametrize("kind", ("random", "distinct", "one", "sorted", "none", "mixed"))
def test_kinds(blocks, rng, layout, kind):
  for tokens, k, num_experts, block_size in ((37, 4, 7, 4), (64, 8, 257, 16)):
    weights, experts = make_routing(rng, tokens, k, num_experts, kind)
    check(blocks, weights, experts, num_experts, block_size, layout=layout)


@LAYOUTS
@pytest.mark.parametrize("block_size", (1, 4, 16, 32, 64, 128, 1000))
def test_block_sizes(blocks, rng, layout, block_size):
  for tokens, k, num_experts in ((1, 1, 1), (19, 3, 7), (130, 8, 64)):
    weights, experts = make_routing(rng, tokens, k, num_experts, "mixed")
    check(blocks, weights, experts, num_experts, block_size, layout=layout)


@LAYOUTS
@pytest.mark.parametrize("num_experts", (1, 7, 257, 1024, 4096, 8192))
def test_numbers_of_experts(kernel_blocks, rng, layout, num_experts):
  for tokens, k in ((1, 1), (50, min(8, num_experts)), (700, 9)):
    weights, experts = make_routing(rng, tokens, k, num_experts)
    mask = rng.random(num_experts) < 0.6
    check(kernel_blocks, weights, experts, num_experts, 4, layout=layout)
    check(
      kernel_blocks, weights, experts, num_experts, 16, layout=layout, expert_mask=mask,
      num_valid=np.int32(tokens * 2 // 3),
    )  # fmt: skip


@LAYOUTS
@pytest.mark.parametrize("k", (1, 2, 5, 32, 128, 129, 255))
def test_slots(blocks, rng, layout, k):
  """From slot 128 on a packed id is negative; 255 slots are the most that fit."""
  weights, experts = make_routing(rng, 7, k, 260, "distinct")
  check(blocks, weights, experts, 260, 4, layout=layout)
  if layout == "packed" and k > 128:
    assert int(blocks(weights, experts, 260, 4, layout=layout).ids.min()) < 0


# The kernels cut more than 2048 entries into chunks of at least 512.
@LAYOUTS
@pytest.mark.parametrize("kind", ("random", "one", "mixed"))
@pytest.mark.parametrize(
  "tokens, k, num_experts",
  (
    (2047, 1, 64), (2048, 1, 64), (2049, 1, 64), (1024, 2, 7), (1025, 2, 7), (1171, 7, 896),
    (12288, 1, 9), (12289, 1, 9), (2500, 10, 512), (1200, 36, 2304), (5, 4000, 4099),
  ),
)  # fmt: skip
def test_around_the_switch_of_the_kernels(kernel_blocks, rng, layout, kind, tokens, k, num_experts):
  if layout == "packed" and k > 255:
    layout = "flat"
  weights, experts = make_routing(rng, tokens, k, num_experts, kind)
  check(kernel_blocks, weights, experts, num_experts, 16, layout=layout)
  mask = rng.random(num_experts) < 0.5
  check(
    kernel_blocks, weights, experts, num_experts, 3, layout=layout, expert_mask=mask,
    num_valid=np.int32(tokens - tokens // 5),
  )  # fmt: skip


@pytest.mark.slow
@LAYOUTS
@pytest.mark.parametrize("num_experts, k", ((32, 5), (256, 8), (40, 6), (385, 7)))
def test_grid_of_aiter(kernel_blocks, rng, layout, num_experts, k):
  for tokens in (1, 7, 31, 64, 128, 256, 1024, 4096, 16384):
    weights, experts = make_routing(rng, tokens, k, num_experts, "distinct")
    for mask in (None, rng.random(num_experts) < 0.5):
      for valid in (None, np.int32(tokens // 2)):
        check(
          kernel_blocks, weights, experts, num_experts, 32, layout=layout, expert_mask=mask,
          num_valid=valid,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", (32, 160, 256, 257))
@pytest.mark.parametrize("block_size", (32, 128))
def test_grid_of_vllm(kernel_blocks, rng, num_experts, block_size):
  for tokens in (1, 3, 256, 2256, 4096):
    for k in (1, 2, 16, 32):
      weights, experts = make_routing(rng, tokens, k, num_experts, "distinct")
      check(kernel_blocks, weights, experts, num_experts, block_size)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", (32, 64, 128, 256))
def test_grid_of_sglang(kernel_blocks, rng, block_size):
  for tokens in (1, 2, 33, 511, 4096):
    for k in (1, 3, 8, 64):
      weights, experts = make_routing(rng, tokens, k, 256)
      check(kernel_blocks, weights, experts, 256, block_size)


@pytest.mark.slow
def test_many_entries(kernel_blocks, rng):
  """Chunks of the largest size: 128 of them are not enough."""
  weights, experts = make_routing(rng, 600_001, 8, 33, "mixed")
  check(kernel_blocks, weights, experts, 33, 64)


# ---- mask, number of valid tokens ----


@LAYOUTS
@pytest.mark.parametrize("dtype", (np.bool_, np.int32, np.uint8, np.int8))
def test_mask(blocks, rng, layout, dtype):
  weights, experts = make_routing(rng, 33, 4, 12, "mixed")
  mask = (rng.random(12) < 0.5).astype(dtype)
  mask[3] = dtype(-1) if dtype == np.int8 else dtype(1)
  for value in (mask, np.zeros(12, dtype), np.ones(12, dtype)):
    check(blocks, weights, experts, 12, 4, layout=layout, expert_mask=value)


@LAYOUTS
def test_number_of_valid_tokens(blocks, rng, layout):
  weights, experts = make_routing(rng, 20, 3, 8)
  for value in (-(2**31), -1, 0, 1, 7, 19, 20, 21, 2**31 - 1):
    check(blocks, weights, experts, 8, 4, layout=layout, num_valid=np.int32(value))
  for value in (np.uint32(2**32 - 1), np.int8(-3), np.uint8(255), np.int64(2**40), np.uint16(5)):
    routing = Routing(weights, experts)
    got = plan_blocks(routing, 8, 4, layout=layout, num_valid=value)
    check_plan(got, block_plan(weights, experts, 8, 4, layout=layout, num_valid=int(value)))
  for value in (5, -7, 2**40):
    got = plan_blocks(Routing(weights, experts), 8, 4, layout=layout, num_valid=value)
    check_plan(got, block_plan(weights, experts, 8, 4, layout=layout, num_valid=value))


def test_a_new_number_of_valid_tokens_does_not_retrace(rng):
  weights, experts = make_routing(rng, 20, 3, 8)
  traces = []

  @jax.jit
  def function(num_valid):
    traces.append(None)
    return plan_blocks(Routing(weights, experts), 8, 4, num_valid=num_valid)

  for value in (3, 20, 0, 11):
    check_plan(function(jnp.int32(value)), block_plan(weights, experts, 8, 4, num_valid=value))
  assert len(traces) == 1


# ---- empty, types, repetition ----


@LAYOUTS
def test_empty(blocks, rng, layout):
  for shape in ((0, 3), (2, 0, 3), (0, 4, 3)):
    weights = np.zeros(shape, np.float32)
    got = blocks(weights, weights.astype(np.int32), 5, 4, layout=layout, num_valid=3)
    lead = shape[:-2]
    length = oracle_blocks.positions(shape[-2] * 3, 5, 4)
    assert got.ids.shape == got.weights.shape == (*lead, length)
    assert got.block_experts.shape == (*lead, length // 4) and got.inverse.shape == shape
    assert got.num_padded.shape == got.num_tokens.shape == lead
    assert not np.any(got.num_padded) and not np.any(got.num_tokens)


@pytest.mark.parametrize("dtype", (np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.int64))
def test_types_of_experts(implementation, rng, dtype):
  """Also where the number of experts itself does not fit the type."""
  experts = rng.integers(0, 120, (40, 3)).astype(dtype)
  experts[3, 1] = np.iinfo(dtype).max
  weights = rng.normal(size=(40, 3)).astype(np.float32)
  for num_experts in (100, 256, 300):
    got = plan_blocks(Routing(weights, experts), num_experts, 4, implementation=implementation)
    check_plan(got, block_plan(weights, experts.astype(np.int64), num_experts, 4))


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_types_of_weights(implementation, rng, dtype):
  weights, experts = make_routing(rng, 40, 3, 9)
  weights = weights.astype(dtype)
  got = plan_blocks(Routing(weights, experts), 9, 4, implementation=implementation)
  assert got.weights.dtype == dtype
  widened = got._replace(weights=got.weights.astype(jnp.float32))
  check_plan(widened, block_plan(weights, experts, 9, 4))


def test_weights_are_moved_as_they_are(blocks, rng):
  weights, experts = make_routing(rng, 40, 3, 9)
  weights.flat[:5] = (np.nan, np.inf, -np.inf, 0.0, 1e38)
  check(blocks, weights, experts, 9, 4)


@LAYOUTS
def test_repeats_are_identical_and_fully_written(kernel_blocks, rng, layout):
  for tokens, k, num_experts in ((61, 4, 33), (3000, 8, 100)):
    weights, experts = jax.device_put(make_routing(rng, tokens, k, num_experts, "mixed"))
    want = block_plan(np.asarray(weights), np.asarray(experts), num_experts, 16, layout=layout)
    for i in range(5):
      # Freed arrays of the same size full of rubbish are what an unwritten result would show.
      rubbish = [jnp.full(x.shape, 7 + i, x.dtype) for x in want]
      del rubbish
      check_plan(kernel_blocks(weights, experts, num_experts, 16, layout=layout), want)


def test_with_the_padding_tokens_of_route(implementation, rng):
  logits = rng.normal(size=(50, 16)).astype(np.float32)
  where = rng.random(50) < 0.6
  routing = jax_router.route(logits, 3, where=where, implementation=implementation)
  got = plan_blocks(routing, 16, 4, implementation=implementation)
  check_plan(got, block_plan(*map(np.asarray, routing), 16, 4))
  assert (np.asarray(got.inverse)[~where] == -1).all()
  assert (np.asarray(got.inverse)[where] >= 0).all()


def test_a_gather_by_ids_is_undone_by_inverse(blocks, rng):
  weights, experts = make_routing(rng, 50, 4, 11)
  x = rng.normal(size=(50, 3)).astype(np.float32)
  got = jax.device_get(blocks(weights, experts, 11, 8))
  rows = np.concatenate([x, np.zeros((1, 3), np.float32)])[got.ids // 4]
  np.testing.assert_array_equal(rows[got.inverse], np.repeat(x[:, None], 4, 1))
  used = got.ids[got.ids < 200]
  assert sorted(used.tolist()) == list(range(200))
