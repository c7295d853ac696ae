"""A byte-level Mixture-of-Experts transformer in Flax NNX; train_moe.py trains it.

`MoE` shows all that `jax_router` needs around it. The rest is an ordinary transformer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import jax_router
from expert_matmul import grouped_matmul

VOCABULARY = 256
HEAD_SIZE = 64
BALANCE_COEFFICIENT = 0.03
Z_COEFFICIENT = 0.001


def expert_mlps(
  x: jax.Array,
  weights: jax.Array,
  experts: jax.Array,
  up: jax.Array,
  down: jax.Array,
  implementation: str | None = None,
) -> jax.Array:
  """Sends every token through its k experts and adds up what they return, weighted.

  No token is dropped, however uneven the load: the rows are sorted by expert.

  Args:
    x: `[N, D]` tokens.
    weights, experts: `[N, k]`, from `route`.
    up, down: `[E, D, F]` and `[E, F, D]` in the dtype of `x`, the MLP of each expert.
    implementation: of `jax_router`'s operations.
  """
  plan = jax_router.plan(experts, len(up), implementation=implementation)
  rows = jax_router.permute(x, plan, implementation=implementation)
  hidden = jax.nn.relu(grouped_matmul(rows, up, plan.group_sizes)) ** 2
  outputs = grouped_matmul(hidden, down, plan.group_sizes)
  return jax_router.combine(outputs, weights, plan, implementation=implementation)


def route(
  logits: jax.Array, k: int, implementation: str | None
) -> tuple[jax_router.Routing, jax.Array, jax.Array]:
  """Weights and experts of tokens, the loss of the router, and the tokens of each expert `[E]`.

  The load-balance loss (Switch Transformer) is 1 when the load is even, and its gradient lowers the
  logits of busy experts. The z-loss (ST-MoE) keeps logits small. Each is times its coefficient.
  """
  routing, stats = jax_router.route_with_stats(logits, k, implementation=implementation)
  balance = jax_router.load_balance_loss(stats, k, BALANCE_COEFFICIENT)
  return routing, balance + jax_router.z_loss(stats, Z_COEFFICIENT), stats.expert_counts


class MoE(nnx.Module):
  """A layer of experts: a linear router, the choice of experts, and the experts' MLPs."""

  def __init__(
    self,
    width: int,
    experts: int,
    k: int,
    expert_dtype: str,
    implementation: str | None,
    rngs: nnx.Rngs,
  ):
    init = nnx.initializers.lecun_normal(batch_axis=0)
    self.k = k
    self.expert_dtype = expert_dtype
    self.implementation = implementation
    self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
    self.up = nnx.Param(init(rngs.params(), (experts, width, width)))
    self.down = nnx.Param(init(rngs.params(), (experts, width, width)))

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output of tokens `[N, D]`, loss of the router, and how many tokens each expert got `[E]`."""
    (weights, experts), loss, load = route(self.router(x), self.k, self.implementation)
    rows, up, down = (a.astype(self.expert_dtype) for a in (x, self.up[...], self.down[...]))
    y = expert_mlps(rows, weights, experts, up, down, self.implementation)
    return y.astype(x.dtype), loss, load


def rotate(x: jax.Array) -> jax.Array:
  """Rotary position embedding of queries or keys `[B, T, heads, HEAD_SIZE]`."""
  frequency = 10_000.0 ** -jnp.linspace(0, 1, HEAD_SIZE // 2, endpoint=False)
  angle = jnp.outer(jnp.arange(x.shape[1], dtype=x.dtype), frequency)[None, :, None, :]
  left, right = jnp.split(x, 2, axis=-1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


class Attention(nnx.Module):
  """Causal self-attention."""

  def __init__(self, width: int, rngs: nnx.Rngs):
    self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
    self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    heads = (*x.shape[:2], -1, HEAD_SIZE)
    q, k, v = (part.reshape(heads) for part in jnp.split(self.qkv(x), 3, axis=-1))
    y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return self.out(y.reshape(x.shape))


class Block(nnx.Module):
  """Attention, then experts, each on its normalized input and added to it."""

  def __init__(self, width: int, moe: MoE, rngs: nnx.Rngs):
    self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
    self.attention = Attention(width, rngs)
    self.moe_norm = nnx.RMSNorm(width, rngs=rngs)
    self.moe = moe

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = x + self.attention(self.attention_norm(x))
    y, loss, load = self.moe(self.moe_norm(x).reshape(-1, x.shape[-1]))
    return x + y.reshape(x.shape), loss, load


class LanguageModel(nnx.Module):
  """Predicts each byte from the bytes before it."""

  def __init__(
    self,
    *,
    width: int,
    layers: int,
    experts: int,
    k: int,
    expert_dtype: str = "float32",
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    def block() -> Block:
      return Block(width, MoE(width, experts, k, expert_dtype, implementation, rngs), rngs)

    self.embedding = nnx.Embed(VOCABULARY, width, rngs=rngs)
    self.blocks = nnx.List([block() for _ in range(layers)])
    self.norm = nnx.RMSNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

  def __call__(self, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits `[B, T, 256]`, the sum of the routers' losses, and the load `[layers, E]`."""
    x = self.embedding(text)
    losses, loads = [], []
    for block in self.blocks:
      x, loss, load = block(x)
      losses.append(loss)
      loads.append(load)
    return self.head(self.norm(x)), jnp.stack(losses).sum(), jnp.stack(loads)
