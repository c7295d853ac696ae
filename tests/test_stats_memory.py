"""Memory of a step with statistics beyond its operands and results, by XLA's own account."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jax_router
from jax_router import _compat

K = 8


def step(logits, score: str):
  """Value and gradient of weights and both losses."""

  def total(x):
    routing, stats = jax_router.route_with_stats(x, K, score=score)
    losses = jax_router.load_balance_loss(stats, K) + jax_router.z_loss(stats)
    return jnp.sum(jnp.sin(routing.weights)) + losses

  return jax.value_and_grad(total)(logits)


def temporary_bytes(tokens: int, experts: int, score: str) -> int:
  function = jax.jit(step, static_argnums=1)
  logits = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
  analysis = function.lower(logits, score).compile().memory_analysis()
  assert analysis is not None
  return analysis.temp_size_in_bytes


def allowed_bytes(tokens: int, experts: int, groups: int) -> int:
  """Weights, experts and two arrays made of them; normalizer and softmax; the sums of blocks."""
  blocks = groups * -(-(tokens // groups) // max(16, -(-(tokens // groups) // 128)))
  of_tokens = tokens * (4 * 4 * K + 12)
  of_blocks = 4 * blocks * (2 * experts + 2)
  of_groups = 4 * 4 * groups * (2 * experts + 2)
  return of_tokens + of_blocks + of_groups + 8192


@pytest.mark.parametrize("devices", (1, 8))
@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
@pytest.mark.parametrize("experts", (256, 2304))
def test_step_keeps_nothing_of_the_size_of_the_logits(monkeypatch, experts, score, devices):
  monkeypatch.setattr(_compat, "automatic_devices", lambda: devices)
  used = temporary_bytes(4096, experts, score)
  assert used <= allowed_bytes(4096, experts, devices)
  assert used < 4096 * experts * 4 / 4


def test_sums_of_blocks_do_not_grow_with_the_tokens(monkeypatch):
  monkeypatch.setattr(_compat, "automatic_devices", lambda: 1)
  few, many = (temporary_bytes(tokens, 2304, "softmax") for tokens in (4096, 16384))
  assert many - few <= (16384 - 4096) * (4 * 4 * K + 12) + 4096
