"""`plan` by appending every entry to the list of its expert, and inputs for it."""

from __future__ import annotations

import numpy as np

KINDS = (
  "random",
  "distinct",
  "ascending",
  "descending",
  "one expert",
  "last expert",
  "two experts",
  "skewed",
  "no group",
  "some in no group",
)


def plan(experts, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Order, inverse and group sizes of ids `[T, k]`."""
  groups: list[list[int]] = [[] for _ in range(num_experts)]
  rest: list[int] = []
  for entry, expert in enumerate(np.asarray(experts).reshape(-1).tolist()):
    (groups[expert] if 0 <= expert < num_experts else rest).append(entry)
  order = [entry for group in (*groups, rest) for entry in group]
  inverse = np.zeros(len(order), np.int32)
  for position, entry in enumerate(order):
    inverse[entry] = position
  sizes = [len(group) for group in groups]
  return np.array(order, np.int32), inverse, np.array(sizes, np.int32)


def make_experts(kind: str, tokens: int, k: int, num_experts: int) -> np.ndarray:
  """Ids `[T, k]` int32 of a kind."""
  rng = np.random.default_rng([tokens, k, num_experts, KINDS.index(kind)])
  random = rng.integers(0, num_experts, (tokens, k))
  outside = rng.choice([-1, num_experts, num_experts + 5, -(2**31), 2**31 - 1], (tokens, k))
  match kind:
    case "distinct":  # within a row, as a router gives them, if there are enough experts
      steps = 1 + np.arange(k) * max(1, num_experts // max(k, 1))
      ids = (rng.integers(0, num_experts, (tokens, 1)) + steps) % num_experts
    case "ascending":
      ids = np.sort(random, axis=None).reshape(tokens, k)
    case "descending":
      ids = np.sort(random, axis=None)[::-1].reshape(tokens, k)
    case "one expert":
      ids = np.full((tokens, k), num_experts // 3)
    case "last expert":
      ids = np.full((tokens, k), num_experts - 1)
    case "two experts":
      ids = np.where(random % 2 == 0, 0, num_experts - 1)
    case "skewed":
      ids = np.where(rng.random((tokens, k)) < 0.9, num_experts // 2, random)
    case "no group":
      ids = outside
    case "some in no group":
      ids = np.where(rng.random((tokens, k)) < 0.3, outside, random)
    case _:
      ids = random
  return ids.astype(np.int32)
