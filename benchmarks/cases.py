"""What the routing benchmarks run: configurations, inputs that could slow a selection down, XLA."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_router

OPTIONS = {
  "softmax": {},
  "sigmoid + bias": {"score": "sigmoid"},
  "groups": {"score": "sigmoid", "groups": jax_router.Groups(8, 4)},
  "over all": {"renormalize": False},
}
# Rows that a GPU benchmark repeats.
BASE_ROWS = 1024


def xla_route(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest logits and their softmax in plain JAX."""
  best, experts = jax.lax.top_k(x, k)
  return jax.nn.softmax(best.astype(jnp.float32), axis=-1), experts


def adverse_inputs(tokens: int, experts: int) -> dict[str, np.ndarray]:
  """Random rows, and rows that could slow a selection down."""
  rng = np.random.default_rng(0)
  random = rng.standard_normal((tokens, experts)).astype(np.float32)
  one_lane = random.copy()
  one_lane[:, ::64] += 100
  half_lanes = random.copy()
  half_lanes[:, np.arange(experts) % 64 < 18] += 100
  return {
    "random": random,
    "ascending": np.sort(random, axis=-1),
    "descending": -np.sort(-random, axis=-1),
    "all equal": np.zeros_like(random),
    "two values": np.sign(random),
    "large values in one lane": one_lane,
    "large values in half the lanes": half_lanes,
  }


@dataclasses.dataclass(frozen=True)
class Case:
  """One configuration."""

  experts: int
  k: int
  dtype: str
  tokens: int
  option: str = "softmax"
  dense: bool = False
  implementation: str | None = None

  def __str__(self) -> str:
    option = f"dense {self.option}" if self.dense else self.option
    return f"{f'{self.experts}/{self.k}':8} {self.dtype:8} {self.tokens:5}  {option:14}"

  @property
  def possible(self) -> bool:
    """Whether the groups kept hold k experts."""
    return self.option != "groups" or self.k <= self.experts // 2

  @property
  def biased(self) -> bool:
    """Whether a bias steers the choice."""
    return self.option in ("sigmoid + bias", "groups")

  @property
  def reference(self) -> Case:
    """The same in plain JAX, of the rows that repeat."""
    return dataclasses.replace(self, tokens=BASE_ROWS, implementation="reference")

  @property
  def xla(self) -> Case:
    """The same as one writes it without this package."""
    return dataclasses.replace(self, implementation="xla")

  @property
  def _slots(self) -> int:
    return self.tokens * self.k

  @property
  def _row_bytes(self) -> int:
    return self.tokens * self.experts * jnp.dtype(self.dtype).itemsize

  @property
  def forward_bytes(self) -> int:
    """Logits; weights, experts and the normalizer; of the dense form its results too."""
    results = self._row_bytes + self.tokens * self.experts if self.dense else 0
    return self._row_bytes + results + 8 * self._slots + 4 * self.tokens

  @property
  def backward_bytes(self) -> int:
    """Gradient; weights, experts, normalizer, cotangents; logits where all get a gradient."""
    cotangent = jnp.dtype(self.dtype).itemsize if self.dense else 4
    logits = self._row_bytes if self.option == "over all" else 0
    return self._row_bytes + logits + (8 + cotangent) * self._slots + 4 * self.tokens

  @property
  def stats_forward_bytes(self) -> int:
    """Of the forward; the softmax of every token; counts, sums, z sum and number of tokens."""
    return self.forward_bytes + 8 * self.tokens + 8 * self.experts + 8

  @property
  def joint_backward_bytes(self) -> int:
    """Logits and gradient; weights, experts and cotangents; normalizer and softmax."""
    return 2 * self._row_bytes + 12 * self._slots + 12 * self.tokens

  def function(self, x: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The differentiable result, and the choice."""
    if self.implementation == "xla":
      return xla_route(x, self.k)
    options: dict[str, Any] = {**OPTIONS[self.option], "bias": bias}
    if self.dense and self.implementation is None:
      probs, routing_map = jax_router.route_dense(x, self.k, **options)
      return probs, routing_map
    weights, experts = jax_router.route(x, self.k, implementation=self.implementation, **options)
    if not self.dense:
      return weights, experts
    rows = jnp.arange(len(x))[:, None]
    probs = jnp.zeros(x.shape, x.dtype).at[rows, experts].set(weights.astype(x.dtype))
    return probs, jnp.zeros(x.shape, bool).at[rows, experts].set(True)
