"""A byte-level Mixture-of-Experts transformer in Flax NNX; train_moe.py trains it.

`MoE` shows all that `jax_router` needs around it. The rest is an ordinary transformer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import jax_router

VOCABULARY = 256
HEAD_SIZE = 64
BLOCK_ROWS = 64
BALANCE_COEFFICIENT = 0.03
Z_COEFFICIENT = 0.001


def expert_mlps(
  x: jax.Array, weights: jax.Array, experts: jax.Array, up: jax.Array, down: jax.Array
) -> jax.Array:
  """Sends every token through its k experts and adds up what they return, weighted.

  Each expert gets as many blocks of `BLOCK_ROWS` rows as its tokens fill. So all shapes are static,
  no token is dropped however uneven the load, and the experts are one batched matmul over blocks.

  Args:
    x: `[N, D]` tokens.
    weights, experts: `[N, k]`, from `route`.
    up, down: `[E, D, F]` and `[E, F, D]`, the MLP of each expert.
  """
  (tokens, k), num_experts = experts.shape, up.shape[0]
  slots = experts.reshape(-1)
  belongs = jax.nn.one_hot(slots, num_experts, dtype=jnp.int32)
  # How many slots before this one have the same expert.
  rank = jnp.take_along_axis(jnp.cumsum(belongs, axis=0) - 1, slots[:, None], axis=1)[:, 0]
  blocks = (belongs.sum(axis=0) + BLOCK_ROWS - 1) // BLOCK_ROWS
  end = jnp.cumsum(blocks)
  row = (end - blocks)[slots] * BLOCK_ROWS + rank
  num_blocks = tokens * k // BLOCK_ROWS + num_experts
  # The expert of each block. Blocks behind the last one in use stay empty: any expert will do.
  owner = jnp.searchsorted(end, jnp.arange(num_blocks), side="right").clip(max=num_experts - 1)

  rows = jnp.zeros((num_blocks * BLOCK_ROWS, x.shape[1]), x.dtype)
  rows = rows.at[row].set(jnp.repeat(x, k, axis=0), unique_indices=True)
  hidden = jnp.einsum("brd,bdf->brf", rows.reshape(num_blocks, BLOCK_ROWS, -1), up[owner])
  outputs = jnp.einsum("brf,bfd->brd", jax.nn.relu(hidden) ** 2, down[owner]).reshape(rows.shape)
  outputs = outputs.at[row].get(unique_indices=True).reshape(tokens, k, -1)
  return jnp.sum(outputs * weights[..., None], axis=1)


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

  def __init__(self, width: int, experts: int, k: int, implementation: str | None, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal(batch_axis=0)
    self.k = k
    self.implementation = implementation
    self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
    self.up = nnx.Param(init(rngs.params(), (experts, width, width)))
    self.down = nnx.Param(init(rngs.params(), (experts, width, width)))

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output of tokens `[N, D]`, loss of the router, and how many tokens each expert got `[E]`."""
    (weights, experts), loss, load = route(self.router(x), self.k, self.implementation)
    return expert_mlps(x, weights, experts, self.up[...], self.down[...]), loss, load


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
    implementation: str | None = None,
    rngs: nnx.Rngs,
  ):
    def block() -> Block:
      return Block(width, MoE(width, experts, k, implementation, rngs), rngs)

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
