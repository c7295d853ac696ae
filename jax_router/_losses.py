"""Losses made of `RouterStats`: a few operations of plain JAX on `[..., E]`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router import _options
from jax_router._options import RouterStats


def load_balance_loss(
  stats: RouterStats, k: int, coeff: float = 1.0, *, num_tokens: int | jax.Array | None = None
) -> jax.Array:
  """The auxiliary loss that is lowest where tokens are spread evenly over the experts.

  With E experts, N tokens and sums over the experts:

      loss = coeff * E / (k * N**2) * sum(expert_counts * score_sums)

  (Switch Transformer, arXiv:2101.03961, equations 4 to 6, for k experts a token.) An even load
  gives `coeff`. The gradient goes through `score_sums`; counts have none.

  Leading dimensions are kept: of statistics per sequence this is a loss per sequence. For one loss
  of the whole batch add the statistics up first, over leading dimensions or, in `shard_map`, by
  `jax.lax.psum(stats, axis)`.

  Args:
    stats: from `jax_router.route_with_stats`, `[..., E]`.
    k: static, experts for each token, 1 <= k <= E.
    coeff: what the loss is multiplied by, a finite number.
    num_tokens: N, a static integer >= 0 or an integer array that broadcasts with `[...]`;
      `stats.num_tokens` by default. Where it is 0 the loss is 0.

  Returns:
    `[...]` float32.

  Raises:
    TypeError: `stats` is not a `RouterStats`; `k`, `coeff` or `num_tokens` of a wrong type.
    ValueError: a value out of range, or shapes that do not fit each other.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> _, stats = jax_router.route_with_stats(jnp.zeros((6, 4)), 4)
    >>> jax_router.load_balance_loss(stats, 4, 0.5).item()
    0.5
  """
  _check_stats(stats)
  num_experts = stats.expert_counts.shape[-1]
  k = _options.check_int("k", k, 1, num_experts, "num_experts")
  coeff = _check_coeff(coeff)
  tokens, empty = _tokens(stats, num_tokens)
  products = stats.expert_counts.astype(jnp.float32) * stats.score_sums
  # Divided twice: the square of a number of tokens may be large.
  loss = np.float32(num_experts * coeff / k) * jnp.sum(products, axis=-1) / tokens / tokens
  return jnp.where(empty, np.float32(0), loss)


def z_loss(
  stats: RouterStats, coeff: float = 1.0, *, num_tokens: int | jax.Array | None = None
) -> jax.Array:
  """The loss that keeps logits small: the mean over the tokens of logsumexp(logits)**2.

      loss = coeff * z_sum / N

  (ST-MoE, arXiv:2202.08906, equation 5.) Leading dimensions are kept, as by `load_balance_loss`.

  Args:
    stats: from `jax_router.route_with_stats`, `[..., E]`.
    coeff: what the loss is multiplied by, a finite number.
    num_tokens: N, a static integer >= 0 or an integer array that broadcasts with `[...]`;
      `stats.num_tokens` by default. Where it is 0 the loss is 0.

  Returns:
    `[...]` float32.

  Raises:
    TypeError: `stats` is not a `RouterStats`; `coeff` or `num_tokens` of a wrong type.
    ValueError: a value out of range, or shapes that do not fit each other.
  """
  _check_stats(stats)
  coeff = _check_coeff(coeff)
  tokens, empty = _tokens(stats, num_tokens)
  return jnp.where(empty, np.float32(0), np.float32(coeff) * stats.z_sum / tokens)


def _check_stats(stats: Any) -> None:
  if not isinstance(stats, RouterStats):
    raise TypeError(f"stats must be a jax_router.RouterStats, got {type(stats).__name__}")
  lead = stats.expert_counts.shape[:-1]
  expected = (stats.expert_counts.shape, lead, lead)
  for name, shape in zip(("score_sums", "z_sum", "num_tokens"), expected, strict=True):
    meaning = f"that of stats.expert_counts {stats.expert_counts.shape}, so"
    _options.check_shape(f"stats.{name}", getattr(stats, name).shape, shape, meaning)


def _check_coeff(coeff: Any) -> float:
  if isinstance(coeff, bool) or not isinstance(coeff, (int, float, np.integer, np.floating)):
    raise TypeError(f"coeff must be a static Python number, got {type(coeff).__name__}")
  if not math.isfinite(coeff):
    raise ValueError(f"coeff must be finite, got {coeff}")
  return float(coeff)


def _tokens(stats: RouterStats, num_tokens: Any) -> tuple[jax.Array, jax.Array]:
  """Number of tokens `[...]` in float32, 1 where it is 0, and where that is."""
  lead = stats.num_tokens.shape
  if num_tokens is None:
    tokens = stats.num_tokens
  elif isinstance(num_tokens, (jax.Array, np.ndarray, np.integer)):
    tokens = jnp.asarray(num_tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise TypeError(f"num_tokens must have an integer dtype, got {tokens.dtype.name}")
    pairs = zip(reversed(tokens.shape), reversed(lead), strict=False)
    if tokens.ndim > len(lead) or any(size not in (1, wanted) for size, wanted in pairs):
      raise ValueError(f"num_tokens must broadcast to {lead}, got shape {tokens.shape}")
    tokens = jnp.broadcast_to(tokens, lead)
  else:
    tokens = jnp.full(lead, _options.check_int("num_tokens", num_tokens, 0, 2**31 - 1))
  empty = tokens <= 0
  return jnp.where(empty, np.float32(1), tokens.astype(jnp.float32)), empty
