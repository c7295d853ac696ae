"""A Mixture-of-Experts layer in Equinox, trained on a task that needs experts.

  python examples/equinox_moe.py

takes seconds on a CPU. Tokens are of several kinds, and each kind has a linear map of its own that
the layer must learn; to learn it, the layer must send different kinds to different experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jax_router
from expert_matmul import grouped_matmul

WIDTH, HIDDEN, EXPERTS, K = 16, 32, 8, 2
TOKENS = 256
BALANCE_COEFFICIENT = 0.01


class MoE(eqx.Module):
  """A layer of experts, for all tokens at once: what balances them are sums over the tokens."""

  router: eqx.nn.Linear
  up: jax.Array
  down: jax.Array
  k: int = eqx.field(static=True)

  def __init__(self, width: int, hidden: int, experts: int, k: int, key: jax.Array):
    router_key, up_key, down_key = jax.random.split(key, 3)
    self.router = eqx.nn.Linear(width, experts, use_bias=False, key=router_key)
    self.up = jax.random.normal(up_key, (experts, width, hidden)) / width**0.5
    self.down = jax.random.normal(down_key, (experts, hidden, width)) / hidden**0.5
    self.k = k

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax_router.RouterStats]:
    """Output of tokens `[N, D]`, and how evenly the experts are used."""
    logits = jax.vmap(self.router)(x)
    (weights, experts), stats = jax_router.route_with_stats(logits, self.k)
    plan = jax_router.plan(experts, len(self.up))
    rows = jax_router.permute(x, plan)  # sorted by expert, so that each expert is one matmul
    hidden = jax.nn.relu(grouped_matmul(rows, self.up, plan.group_sizes))
    outputs = grouped_matmul(hidden, self.down, plan.group_sizes)
    return jax_router.combine(outputs, weights, plan), stats


def make_batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Tokens `[N, D]`, each near the center of its kind, and their products with its matrix."""
  centers_key, matrices_key = jax.random.split(jax.random.key(0))
  centers = 2 * jax.random.normal(centers_key, (EXPERTS, WIDTH))
  matrices = jax.random.normal(matrices_key, (EXPERTS, WIDTH, WIDTH)) / WIDTH**0.5
  kind_key, noise_key = jax.random.split(key)
  kind = jax.random.randint(kind_key, (TOKENS,), 0, EXPERTS)
  x = centers[kind] + jax.random.normal(noise_key, (TOKENS, WIDTH))
  return x, jnp.einsum("nd,nde->ne", x, matrices[kind])


@eqx.filter_jit
def train_step(model, state, optimizer, key):
  """Updates the model and the optimizer's state on a new batch; returns the error before."""
  x, target = make_batch(key)

  @eqx.filter_value_and_grad(has_aux=True)
  def objective(model):
    y, stats = model(x)
    error = jnp.mean((y - target) ** 2)
    return error + jax_router.load_balance_loss(stats, model.k, BALANCE_COEFFICIENT), error

  (_, error), gradient = objective(model)
  updates, state = optimizer.update(gradient, state)
  return eqx.apply_updates(model, updates), state, error


def train(steps: int) -> list[float]:
  """The mean squared error of every step."""
  model = MoE(WIDTH, HIDDEN, EXPERTS, K, jax.random.key(1))
  optimizer = optax.adam(1e-2)
  state = optimizer.init(eqx.filter(model, eqx.is_array))
  errors = []
  for key in jax.random.split(jax.random.key(2), steps):
    model, state, error = train_step(model, state, optimizer, key)
    errors.append(float(error))
  return errors


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains, and prints the first and the last loss."""
  parser = argparse.ArgumentParser(description="Trains an MoE layer in Equinox.")
  parser.add_argument("--steps", type=int, default=300, help="default 300")
  steps = parser.parse_args(arguments).steps
  if steps < 1:
    parser.error(f"--steps must be at least 1, got {steps}")
  errors = train(steps)
  print(f"loss: {errors[0]:.3f} in step 1, {errors[-1]:.3f} in step {steps}")


if __name__ == "__main__":
  main()
