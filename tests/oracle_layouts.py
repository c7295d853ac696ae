"""The block layouts of aiter and vLLM in numpy, independently of the package.

Every position that they leave undefined has the value that the package promises there.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _runs(experts: np.ndarray, num_experts: int) -> list[np.ndarray]:
  """Flat entries of each expert in ascending order."""
  flat = np.asarray(experts, np.int64).reshape(-1)
  order = np.argsort(flat, kind="stable")
  bounds = np.searchsorted(flat[order], np.arange(num_experts + 1))
  return [order[bounds[e] : bounds[e + 1]] for e in range(num_experts)]


def _place(runs, block_size: int, length: int, pad: int):
  """Entries in blocks: ids of `length` positions, the expert of each used block, used positions."""
  ids, owners = np.full(length, pad, np.int64), []
  start = 0
  for expert, run in enumerate(runs):
    ids[start : start + len(run)] = run
    blocks = -(-len(run) // block_size)
    owners += [expert] * blocks
    start += blocks * block_size
  return ids, owners, start


def _padded(values, length: int, fill: int) -> np.ndarray:
  assert len(values) <= length
  return np.array([*values, *[fill] * (length - len(values))], np.int32)


def moe_sorting(
  ids, weights, num_experts: int, block_size: int, *, mask=None, local_tokens=None
) -> dict[str, np.ndarray]:
  """aiter's arrays by name, without moe_buf."""
  tokens, k = ids.shape
  n = tokens if local_tokens is None else min(max(int(np.reshape(local_tokens, ())), 0), tokens)
  kept = np.ones(num_experts, bool) if mask is None else np.asarray(mask).astype(bool)
  known = (ids >= 0) & (ids < num_experts) & (np.arange(tokens)[:, None] < n)
  known &= kept[np.where(known, ids, 0)]
  number = np.cumsum(kept) - 1
  local = np.where(known, number[np.where(known, ids, 0)], -1)
  length = tokens * k + num_experts * block_size - k
  entries, owners, used = _place(
    _runs(np.where(known, local, -1), num_experts), block_size, length, -1
  )
  assert used <= length
  present = entries >= 0
  safe = np.where(present, entries, 0)
  token = np.where(present, safe // k, n) if tokens else np.full(length, n)
  slot = np.where(present, safe % k, k)
  packed = (slot.astype(np.uint32) << np.uint32(24)) | token.astype(np.uint32)
  position = np.full(tokens * k, -1, np.int32)
  position[entries[present]] = np.flatnonzero(present)
  flat = np.asarray(weights, np.float32).reshape(-1)
  sorted_weights = np.zeros(length, np.float32)
  sorted_weights[present] = flat[entries[present]]
  return {
    "sorted_ids": packed.view(np.int32),
    "sorted_weights": sorted_weights,
    "sorted_expert_ids": _padded(owners, -(-length // block_size), -1),
    "num_valid_ids": np.array([used, n], np.int32),
    "m_indices": token.astype(np.int32),
    "reverse_sorted": position,
    "local_topk_ids": local.astype(np.int32),
  }


def align(
  ids, block_size: int, num_experts: int, *, expert_map=None, pad=False, ignore_invalid=False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """vLLM's sorted_ids, expert_ids and num_tokens_post_pad."""
  entries = ids.size
  length = entries + num_experts * (block_size - 1)
  if pad:
    length = -(-length // block_size) * block_size
  if entries < num_experts:
    length = min(entries * block_size, length)
  blocks = -(-length // block_size)
  local = np.arange(num_experts) if expert_map is None else np.asarray(expert_map)
  known = (ids >= 0) & (ids < num_experts)
  if ignore_invalid:
    ids = np.where(known, local[np.where(known, ids, 0)], -1)
  sorted_ids, owners, used = _place(_runs(ids, num_experts), block_size, length, entries)
  if not ignore_invalid:
    owners = [local[e] for e in owners]
  return sorted_ids.astype(np.int32), _padded(owners, blocks, -1), np.array([used], np.int32)


def batched_align(most: int, block_size: int, counts):
  """vLLM's arrays for tokens that lie in batches, one for each expert."""
  counts = np.clip(np.asarray(counts, np.int64), 0, most)
  runs = [b * most + np.arange(c) for b, c in enumerate(counts)]
  length = len(counts) * -(-most // block_size) * block_size
  sorted_ids, owners, used = _place(runs, block_size, length, len(counts) * most)
  expert_ids = _padded(owners, length // block_size, -1)
  return sorted_ids.astype(np.int32), expert_ids, np.array([used], np.int32)


def check_equal(got: Any, want: Any, names: Any = None) -> None:
  """Equal arrays to the bit, but for the bits of a NaN; dtypes and shapes too."""
  for i, (a, b) in enumerate(zip(got, want, strict=True)):
    a = np.asarray(a)
    name = str(i if names is None else names[i])
    assert a.dtype == b.dtype and a.shape == b.shape, (name, a.dtype, a.shape, b.shape)
    np.testing.assert_array_equal(a, b, err_msg=name)
    assert np.array_equal(np.signbit(a[a == a]), np.signbit(b[b == b])), name


def make_ids(rng, tokens: int, k: int, num_experts: int, kind: str = "distinct") -> np.ndarray:
  """Ids `[tokens, k]` int32.

  distinct: none twice in a row. random: with duplicates. one: all tokens to one expert. outside:
  all ids out of range. mixed: some out of range.
  """
  if kind == "distinct":
    ids = np.argsort(rng.random((tokens, num_experts)), axis=-1)[:, :k]
  elif kind == "one":
    ids = np.full((tokens, k), num_experts // 2)
  else:
    ids = rng.integers(0, num_experts, (tokens, k))
    outside = rng.choice([-1, num_experts, num_experts + 5, -(2**31), 2**31 - 1], (tokens, k))
    share = {"random": 0.0, "mixed": 0.3, "outside": 1.0}[kind]
    ids = np.where(rng.random((tokens, k)) < share, outside, ids)
  return ids.astype(np.int32)
