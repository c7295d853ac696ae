"""Times the routing of a training step: as the model does it, and as separate operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jax_router
from moe_transformer import BALANCE_COEFFICIENT, Z_COEFFICIENT, route

REPEATS = 20


class RoutingTimes(NamedTuple):
  """Seconds of a step's routing: choice, load, losses and the gradient of the logits."""

  together: float
  separate: float


def route_separately(
  logits: jax.Array, k: int, implementation: str | None
) -> tuple[jax_router.Routing, jax.Array, jax.Array]:
  """What `route` returns, with the statistics and the losses in plain JAX."""
  tokens, experts = logits.shape
  routing = jax_router.route(logits, k, implementation=implementation)
  load = jnp.bincount(routing.experts.reshape(-1), length=experts)
  probabilities = jax.nn.softmax(logits).sum(axis=0)
  balance = experts / (k * tokens**2) * jnp.vdot(load.astype(logits.dtype), probabilities)
  z = jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
  return routing, BALANCE_COEFFICIENT * balance + Z_COEFFICIENT * z, load


def time_routing(
  shape: tuple[int, int], k: int, layers: int, implementation: str | None
) -> RoutingTimes:
  """Times of all layers of a step, for random logits `[N, E]` of a shape.

  The repeats run in one compiled loop, so that the time to start a computation does not count. Each
  subtracts the gradient of the one before, so that none can be left out; the subtraction counts.
  """
  logits = jax.random.normal(jax.random.key(0), shape)
  cotangent = jax.random.normal(jax.random.key(1), (shape[0], k))

  def measure(route: Callable) -> float:
    def objective(logits):
      routing, loss, _ = route(logits, k, implementation)
      return jnp.vdot(routing.weights, cotangent) + loss

    def once(_, logits):
      return logits - jax.grad(objective)(logits)

    loop = jax.jit(lambda logits: jax.lax.fori_loop(0, REPEATS, once, logits))
    times = []
    for _ in range(10):
      begin = time.perf_counter()
      loop(logits).block_until_ready()
      times.append((time.perf_counter() - begin) / REPEATS)
    # The first run compiles.
    return layers * statistics.median(times[1:])

  return RoutingTimes(measure(route), measure(route_separately))
