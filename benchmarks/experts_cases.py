"""What benchmarks/experts.py times: sizes, routings, and the functions beside `dense_moe_fc2`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jax_router


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes, dtype and how the tokens choose their experts."""

  tokens: int
  experts: int
  depth: int
  hidden: int
  k: int
  dtype: str
  load: str = "even"

  def __str__(self) -> str:
    return f"{self.tokens:5} {self.dtype:9} {self.load:5}"

  def routing(self) -> jax_router.Routing:
    """Distinct experts for each token, all as likely or by Zipf's law."""
    rng = np.random.default_rng(self.tokens)
    likely = np.log(1 / np.arange(1, self.experts + 1)) if self.load == "zipf" else 0.0
    keys = likely + rng.gumbel(size=(self.tokens, self.experts))
    chosen = (-keys).argsort(axis=1)[:, : self.k].astype(np.int32)
    weights = rng.dirichlet(np.ones(self.k), self.tokens).astype(np.float32)
    return jax_router.Routing(jnp.asarray(weights), jnp.asarray(chosen))

  def activations(self) -> jax.Array:
    """h `[M, E, I]`."""
    shape = (self.tokens, self.experts, self.depth)
    dtype = "bfloat16" if self.dtype == "float8" else self.dtype
    return jax.random.normal(jax.random.key(self.tokens), shape, dtype)

  def chosen(self) -> int:
    """How many experts any token has chosen."""
    return len(np.unique(np.asarray(self.routing().experts)))

  def light_us(self, bytes_per_s: float, operations_per_s: float, chosen: int) -> float:
    """The least time on a device of these rates in the dense form of so many experts."""
    size = {"float8": 1, "bfloat16": 2, "float32": 4}[self.dtype]
    columns = chosen * self.depth
    moved = size * columns * (self.tokens + self.hidden) + 2 * self.tokens * self.hidden
    operations = 2 * self.tokens * columns * self.hidden
    return 1e6 * max(moved / bytes_per_s, operations / operations_per_s)


def make_w2(sizes: tuple[int, ...], dtype: str) -> jax.Array:
  """Random weights `[E, I, H]`."""
  experts, depth, hidden, _ = sizes
  scale = jnp.asarray(depth**-0.5, dtype)
  return jax.random.normal(jax.random.key(0), (experts, depth, hidden), dtype) * scale


# ---- what is timed ----


def ours(
  h: jax.Array, w2: jax.Array, alpha: jax.Array, *, implementation: str | None = None
) -> jax.Array:
  """Weights on float32 sums, or folded into h where there is no kernel."""
  return jax_router.dense_moe_fc2(h, w2, alpha, implementation=implementation)


def matmul(h: jax.Array, w2: jax.Array) -> jax.Array:
  """No weights at all; `w2` `[E, I, H]`."""
  return h.reshape(len(h), -1) @ w2.reshape(-1, w2.shape[-1])


def matmul_transposed(h: jax.Array, packed: jax.Array) -> jax.Array:
  """The same of weights that lie as `[H, E * I]`; the result is in bfloat16, float8 has none."""
  return jax.lax.dot_general(
    h.reshape(len(h), -1), packed, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
  )


def folded(h: jax.Array, w2: jax.Array, alpha: jax.Array) -> jax.Array:
  """alpha multiplied into h, not minding what experts that were not chosen hold."""
  return matmul((h.astype(jnp.float32) * alpha[..., None]).astype(h.dtype), w2)


def ragged(h: jax.Array, w2: jax.Array, routing: jax_router.Routing) -> jax.Array:
  """The chosen experts alone: gather, `jax.lax.ragged_dot`, combine."""
  plan = jax_router.plan(routing.experts, len(w2))
  token, slot = jnp.divmod(plan.order, routing.experts.shape[1])
  rows = h[token, routing.experts[token, slot]]
  return jax_router.combine(
    jax.lax.ragged_dot(rows, w2, plan.group_sizes), routing.weights, plan
  )  # fmt: skip


def quantized(h: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float8 of h with a scale for every 128 columns."""
  blocks = h.astype(jnp.float32).reshape(len(h), -1, 128)
  scale = jnp.max(jnp.abs(blocks), axis=2) / 448
  return (blocks / scale[:, :, None]).reshape(h.shape).astype(jnp.float8_e4m3fn), scale


def distance(got: jax.Array, want: jax.Array) -> float:
  """Of two results in the Frobenius norm, relative to the second one."""
  a, b = got.astype(jnp.float32), want.astype(jnp.float32)
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def check(got: jax.Array, want: jax.Array, allowed: float) -> None:
  """ValueError unless two results agree in the Frobenius norm."""
  error = distance(got, want)
  if not error <= allowed:
    raise ValueError(f"results differ by {error:.2e} of their norm, allowed are {allowed:.0e}")
