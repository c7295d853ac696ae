"""Presets of published models: what they choose, by each model's own formula."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
import pytest

import jax_router
import oracle
import shapes
from jax_router import presets, route

NAMES = tuple(
  name for name, value in vars(presets).items()
  if isinstance(value, Mapping) and not name.startswith("_")
)  # fmt: skip

# Preset, experts, whether there is a bias.
MODELS = (
  ("mixtral", 8, False), ("qwen3_moe", 128, False), ("deepseek_v2", 160, False),
  ("deepseek_v3", 256, True), ("deepseek_v4_flash", 256, True), ("kimi_k2", 384, True),
  ("kimi_k3", 896, True), ("glm_4_5", 160, True), ("glm_4_5_air", 128, True),
  ("gpt_oss", 128, False), ("gpt_oss", 32, False), ("llama_4", 128, False), ("llama_4", 16, False),
)  # fmt: skip


def softmax(x):
  y = np.exp(x - x.max())
  return y / y.sum()


def best(values, k):
  return np.argsort(-values, kind="stable")[:k]


def by_sigmoid(x, bias, k, scale, groups=1, keep=1):
  """DeepSeek-V3's rule for one token."""
  y = 1 / (1 + np.exp(-x))
  keys = y + bias
  totals = np.sort(keys.reshape(groups, -1), axis=1)[:, -2:].sum(axis=1)
  kept = np.isin(np.arange(groups), best(totals, keep))
  chosen = best(np.where(np.repeat(kept, len(x) // groups), keys, -np.inf), k)
  return chosen, scale * y[chosen] / y[chosen].sum()


def by_chosen_softmax(x, bias, k):
  chosen = best(x, k)
  return chosen, softmax(x[chosen])


def by_largest_of_groups(x, bias):
  """DeepSeek-V2's rule: 3 of 8 groups, 6 experts, times 16."""
  p = softmax(x)
  kept = best(p.reshape(8, -1).max(axis=1), 3)
  chosen = best(np.where(np.isin(np.arange(160) // 20, kept), p, 0), 6)
  return chosen, 16 * p[chosen]


def by_square_root(x, bias):
  y = np.sqrt(np.log1p(np.exp(x)))
  chosen = best(y + bias, 6)
  return chosen, 1.5 * y[chosen] / y[chosen].sum()


def by_one_sigmoid(x, bias):
  chosen = best(x, 1)
  return chosen, 1 / (1 + np.exp(-x[chosen]))


RULES = {
  "mixtral": lambda x, b: by_chosen_softmax(x, b, 2),
  "qwen3_moe": lambda x, b: by_chosen_softmax(x, b, 8),
  "deepseek_v2": by_largest_of_groups,
  "deepseek_v3": lambda x, b: by_sigmoid(x, b, 8, 2.5, 8, 4),
  "deepseek_v4_flash": by_square_root,
  "kimi_k2": lambda x, b: by_sigmoid(x, b, 8, 2.827),
  "kimi_k3": lambda x, b: by_sigmoid(x, b, 16, 1.0),
  "glm_4_5": lambda x, b: by_sigmoid(x, b, 8, 2.5),
  "glm_4_5_air": lambda x, b: by_sigmoid(x, b, 8, 1.0),
  "gpt_oss": lambda x, b: by_chosen_softmax(x, b, 4),
  "llama_4": by_one_sigmoid,
}


@pytest.mark.parametrize("name, experts, biased", MODELS)
def test_presets_route_as_the_model(kernel, rng, name, experts, biased):
  logits = rng.permuted(np.tile(np.linspace(-4, 4, experts), (40, 1)), axis=1).astype(np.float32)
  bias = rng.permutation(experts).astype(np.float32) / 512 if biased else None
  got = route(logits, bias=bias, implementation=kernel, **getattr(presets, name))
  want = oracle.check_route(got, logits, bias=bias, **getattr(presets, name))
  b = np.zeros(experts) if bias is None else bias.astype(np.float64)
  for t in np.flatnonzero(want.clear):
    chosen, weights = RULES[name](logits[t].astype(np.float64), b)
    assert np.asarray(got.experts)[t].tolist() == chosen.tolist()
    np.testing.assert_allclose(np.asarray(got.weights)[t], weights, rtol=2e-6)
  assert want.clear.sum() > 20


def test_every_preset_is_tested():
  assert {name for name, *_ in MODELS} | {"deepseek_v4"} == set(NAMES)
  assert presets.deepseek_v4 is presets.deepseek_v4_flash


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_read_only_and_can_be_overridden(name):
  preset = getattr(presets, name)
  with pytest.raises(TypeError, match="does not support item assignment"):
    preset["k"] = 1
  logits = shapes.make_logits("random", 3, 160)
  assert route(logits, **{**preset, "k": 1}).experts.shape == (3, 1)


def test_presets_fit_the_other_routers(rng):
  logits = rng.normal(size=(5, 256)).astype(np.float32)
  options = presets.deepseek_v3
  routing, _ = jax.jit(lambda x: jax_router.route_with_stats(x, **options))(logits)
  probs, routing_map = jax.jit(lambda x: jax_router.route_dense(x, **options))(logits)
  want = route(logits, **options)
  np.testing.assert_array_equal(routing.experts, want.experts)
  np.testing.assert_allclose(probs.sum(-1), want.weights.sum(-1), rtol=1e-6)
  assert (np.asarray(routing_map).sum(-1) == 8).all()
