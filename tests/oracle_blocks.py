"""Block plans in numpy, entry by entry, beside `oracle`."""

from __future__ import annotations

import numpy as np

from jax_router import BlockPlan


def positions(entries: int, num_experts: int, block_size: int) -> int:
  """The static length of a plan: the tighter bound, in whole blocks."""
  most = entries + min(entries, num_experts) * (block_size - 1)
  return most + (-most) % block_size


def block_plan(
  weights, experts, num_experts, block_size, *, layout="flat", expert_mask=None, num_valid=None
) -> BlockPlan:
  """What `plan_blocks` must be, of weights and experts `[T, k]`."""
  tokens, k = np.shape(experts)
  n = tokens if num_valid is None else min(max(int(num_valid), 0), tokens)
  kept = [True] * num_experts if expert_mask is None else [bool(x) for x in expert_mask]
  bins = {e: [] for e in range(num_experts) if kept[e]}
  for t in range(n):
    for j in range(k):
      if int(experts[t][j]) in bins:
        bins[int(experts[t][j])].append((t, j))

  def encode(token, slot, flat):
    if layout == "flat":
      return flat
    return (token + slot * 2**24 + 2**31) % 2**32 - 2**31

  pad = encode(n, k, tokens * k)
  ids, sorted_weights, block_experts = [], [], []
  inverse = np.full((tokens, k), -1, np.int32)
  for local, entries in enumerate(bins.values()):
    while entries:
      block, entries = entries[:block_size], entries[block_size:]
      block_experts.append(local)
      for t, j in block:
        inverse[t, j] = len(ids)
        ids.append(encode(t, j, t * k + j))
        sorted_weights.append(weights[t][j])
      missing = block_size - len(block)
      ids += [pad] * missing
      sorted_weights += [0] * missing
  num_padded = len(ids)
  length = positions(tokens * k, num_experts, block_size)
  assert num_padded <= length
  ids += [pad] * (length - num_padded)
  sorted_weights += [0] * (length - num_padded)
  block_experts += [-1] * (length // block_size - len(block_experts))
  return BlockPlan(
    *(
      np.asarray(x, dtype)
      for x, dtype in (
        (ids, np.int32),
        (sorted_weights, np.float32),
        (block_experts, np.int32),
        (num_padded, np.int32),
        (n, np.int32),
        (inverse, np.int32),
      )
    )
  )


def check_plan(got: BlockPlan, want: BlockPlan) -> None:
  """Equal to the bit, over the whole of every array."""
  assert isinstance(got, BlockPlan)
  for name, a, b in zip(BlockPlan._fields, got, want, strict=True):
    a = np.asarray(a)
    assert a.dtype == b.dtype, name
    np.testing.assert_array_equal(a, b, err_msg=name)
    if a.dtype == np.float32:
      np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32), err_msg=name)
