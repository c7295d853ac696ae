"""Memory of a compiled call beyond its operands and results, by XLA's own account."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jax_router

TOKENS, EXPERTS, K = 4096, 256, 8
ROW_OF_SLOTS = K * 4


def temporary_bytes(function, *operands) -> int:
  analysis = jax.jit(function).lower(*operands).compile().memory_analysis()
  assert analysis is not None
  return analysis.temp_size_in_bytes


@pytest.mark.parametrize("options", ({}, {"renormalize": False}, {"score": "sigmoid"}))
def test_forward_needs_one_number_a_token(options):
  logits = jnp.zeros((TOKENS, EXPERTS))
  used = temporary_bytes(lambda x: jax_router.route(x, K, **options), logits)
  assert used <= TOKENS * 4 + 4096


@pytest.mark.parametrize("options", ({}, {"renormalize": False}, {"score": "sigmoid"}))
def test_gradient_keeps_nothing_of_the_size_of_the_logits(options):
  logits, cotangent = jnp.zeros((TOKENS, EXPERTS)), jnp.zeros((TOKENS, K))

  def gradient(logits, cotangent):
    weights, pull_back = jax.vjp(lambda x: jax_router.route(x, K, **options).weights, logits)
    return weights, pull_back(cotangent)

  used = temporary_bytes(gradient, logits, cotangent)
  assert used <= TOKENS * (2 * ROW_OF_SLOTS + 4) + 4096
  assert used < TOKENS * EXPERTS * 4 / 8
