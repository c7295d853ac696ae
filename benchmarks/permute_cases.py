"""What the benchmark of `permute` and `combine` runs: sizes, plans, and the same in plain JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_router

PLANS = ("random", "one expert", "half padding")


class Arguments(NamedTuple):
  """Tokens and their cotangent `[T, d]`, rows and their cotangent `[n, d]`, weights, the plan."""

  x: jax.Array
  x_cotangent: jax.Array
  y: jax.Array
  y_cotangent: jax.Array
  weights: jax.Array
  plan: jax_router.Plan


@dataclasses.dataclass(frozen=True)
class Case:
  """One configuration."""

  tokens: int
  k: int
  width: int
  dtype: str
  experts: int = 64
  plan: str = "random"

  def __str__(self) -> str:
    return f"{self.tokens:6} {self.k:3} {self.width:6} {self.dtype:9} {self.plan:13}"

  def arguments(self, seed: int = 0) -> Arguments:
    """Random arrays, and a plan of this kind."""
    rng = np.random.default_rng(seed)
    ids = rng.random((self.tokens, self.experts)).argsort(axis=1)[:, : self.k].astype(np.int32)
    if self.plan == "one expert":
      ids[:, 0] = 0
    elif self.plan == "half padding":
      ids[rng.random(self.tokens) < 0.5] = self.experts
    keys = jax.random.split(jax.random.key(seed), 5)
    rows, entries = (self.tokens, self.width), (self.tokens * self.k, self.width)
    x, x_cotangent, y, y_cotangent = (
      jax.random.normal(key, shape, self.dtype)
      for key, shape in zip(keys[:4], (rows, rows, entries, entries), strict=True)
    )
    weights = jax.random.normal(keys[4], (self.tokens, self.k), jnp.float32)
    plan = jax_router.plan(ids, self.experts)
    return Arguments(x, x_cotangent, y, y_cotangent, weights, plan)

  def bytes(self, grouped: int) -> dict[str, int]:
    """Bytes that each call must move: every row once, those of no group only where written."""
    element = jnp.dtype(self.dtype).itemsize
    tokens, entries = (
      self.tokens * self.width * element,
      self.tokens * self.k * self.width * element,
    )
    read = grouped * self.width * element
    plan = 4 * self.tokens * self.k + 4 * self.experts
    weights = 4 * self.tokens * self.k
    return {
      "permute": tokens + entries + plan,
      "permute backward": read + tokens + plan,
      "combine": read + tokens + weights + plan,
      "combine backward": tokens + read + entries + 2 * weights + plan,
      "of the rows alone": tokens + entries + weights + plan,
    }


def permute_in_jax(x: jax.Array, plan: jax_router.Plan) -> jax.Array:
  """What one writes without this package, for plans without padding."""
  return x[plan.order // (len(plan.order) // len(x))]


def combine_in_jax(y: jax.Array, weights: jax.Array, plan: jax_router.Plan) -> jax.Array:
  """What one writes without this package, for plans without padding."""
  rows = y[plan.inverse].reshape(*weights.shape, y.shape[-1]).astype(jnp.float32)
  return jnp.sum(rows * weights[..., None], axis=1).astype(y.dtype)


def functions(permute: Callable[..., Any], combine: Callable[..., Any]) -> dict[str, Any]:
  """Every call by name, of `Arguments`."""
  return {
    "permute": lambda a: permute(a.x, a.plan),
    "permute backward": lambda a: jax.vjp(lambda x: permute(x, a.plan), a.x)[1](a.y_cotangent),
    "combine": lambda a: combine(a.y, a.weights, a.plan),
    "combine backward": lambda a: jax.vjp(lambda y, w: combine(y, w, a.plan), a.y, a.weights)[1](
      a.x_cotangent
    ),
    "of the rows alone": lambda a: jax.vjp(lambda y: combine(y, a.weights, a.plan), a.y)[1](
      a.x_cotangent
    ),
  }


OURS = functions(jax_router.permute, jax_router.combine)
IN_JAX = functions(permute_in_jax, combine_in_jax)


def check(got: Any, want: Any, k: int) -> None:
  """ValueError unless results, sums of up to k terms, agree within the rounding of their dtype."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    if a.shape != b.shape or a.dtype != b.dtype:
      raise ValueError(f"{a.dtype}{a.shape} in place of {b.dtype}{b.shape}")
    wide, expected = a.astype(jnp.float32), b.astype(jnp.float32)
    # Sums in plain JAX may be taken in bfloat16, where terms cancel.
    tolerance = 1e-4 if a.dtype == jnp.float32 else 0.1 * max(1, k / 8)
    wrong = jnp.abs(wide - expected) > tolerance * (1 + jnp.abs(expected))
    if bool(jnp.any(wrong)):
      raise ValueError(f"{100 * float(jnp.mean(wrong)):.1f} % of the elements differ")
