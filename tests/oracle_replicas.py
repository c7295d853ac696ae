"""`assign_replicas` in Python integers, written independently of the package; tables for tests."""

from __future__ import annotations

import numpy as np

_BITS = 2**32


def xorshift(token: int) -> int:
  """One step of a 32-bit xorshift."""
  s = token % _BITS
  s ^= s >> 7
  s ^= (s << 9) % _BITS
  return s ^ (s >> 13)


def mixed(token: int, expert: int) -> int:
  """MurmurHash3's finalizer of the token's index and the expert."""
  h = (token + expert * 0x9E3779B9) % _BITS
  h ^= h >> 16
  h = h * 0x85EBCA6B % _BITS
  h ^= h >> 13
  h = h * 0xC2B2AE35 % _BITS
  return h ^ (h >> 16)


def assign(
  experts, table, counts, *, num_physical, policy="hash", load="logical", where=None, offset=0
) -> tuple[np.ndarray, np.ndarray]:
  """Physical ids `[T, k]` and load of one row of tokens."""
  experts = np.asarray(experts)
  num_experts, width = np.shape(table)
  physical = np.full(experts.shape, num_physical, np.int64)
  loads = np.zeros(num_experts if load == "logical" else num_physical, np.int64)
  for (t, j), e in np.ndenumerate(experts):
    if where is not None and not where[t]:
      continue
    if not 0 <= e < num_experts or not 1 <= counts[e] <= width:
      continue
    draw = xorshift(offset + t) if policy == "xorshift" else mixed(offset + t, int(e))
    slot = int(table[e][draw % int(counts[e])])
    if 0 <= slot < num_physical:
      physical[t, j] = slot
      loads[e if load == "logical" else slot] += 1
  return physical, loads


def make_table(rng, num_experts: int, width: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Slots dealt at random to replicas of experts: table `[E, R]` int32, counts `[E]` int32, P."""
  counts = rng.integers(1, width + 1, size=num_experts).astype(np.int32)
  num_physical = int(counts.sum())
  table = np.full((num_experts, width), -1, np.int32)
  table[np.arange(width) < counts[:, None]] = rng.permutation(num_physical)
  return table, counts, num_physical


def make_experts(rng, *shape: int, num_experts: int) -> np.ndarray:
  """Ids, a few of them out of range."""
  return rng.integers(-1, num_experts + 2, size=shape).astype(np.int32)
