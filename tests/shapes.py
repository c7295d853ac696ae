"""Shapes of real models and kinds of logits, for the tests and the benchmarks."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import jax_router


class Model(NamedTuple):
  """The router of a published model.

  Attributes:
    name: the model, or a family that shares its router.
    experts: routed experts E.
    k: experts for each token.
    score, renormalize, scale: as in `jax_router.route`.
    bias: whether a bias steers the choice.
    groups: (count, keep, score) or None.
  """

  name: str
  experts: int
  k: int
  score: str = "softmax"
  renormalize: bool = True
  scale: float = 1.0
  bias: bool = False
  groups: tuple[int, int, str] | None = None

  @property
  def options(self) -> dict[str, Any]:
    """The static options of `jax_router.route`."""
    groups = None if self.groups is None else jax_router.Groups(*self.groups)
    return {
      "score": self.score, "renormalize": self.renormalize, "scale": self.scale, "groups": groups
    }  # fmt: skip


MODELS = (
  Model("mixtral-8x7b", 8, 2),
  Model("dbrx", 16, 4),
  Model("gpt-oss-120b", 128, 4),
  Model("qwen3-30b-a3b", 128, 8),
  Model("qwen3-next-80b-a3b", 512, 10),
  Model("olmoe-1b-7b", 64, 8, renormalize=False),
  Model("llama-4-maverick", 128, 1, "sigmoid", renormalize=False),
  Model("minimax-m2", 256, 8, "sigmoid", bias=True),
  Model("glm-4.5-air", 128, 8, "sigmoid", bias=True),
  Model("kimi-k2", 384, 8, "sigmoid", scale=2.827, bias=True),
  Model("deepseek-v2", 160, 6, renormalize=False, scale=16.0, groups=(8, 3, "max")),
  Model("deepseek-v3", 256, 8, "sigmoid", scale=2.5, bias=True, groups=(8, 4, "top2")),
  Model("sqrtsoftplus-256", 256, 6, "sqrtsoftplus", scale=1.5, bias=True),
  Model("softmax-512-22", 512, 22),
  Model("softmax-896-16", 896, 16),
  Model("softmax-2304-36", 2304, 36),
)

# Kinds of logits that are finite throughout, and those that are not.
FINITE_KINDS = (
  "random", "tied", "equal", "quantized", "zeros", "extreme", "ascending", "descending", "lane",
)  # fmt: skip
SPECIAL_KINDS = ("nan", "minus_inf", "plus_inf", "dead")


def make_logits(
  kind: str, tokens: int, experts: int, dtype: Any = np.float32, seed: int = 0
) -> np.ndarray:
  """Logits `[tokens, experts]` of one kind.

  random: normal. tied: five values. equal: one value. quantized: normal, rounded to bfloat16.
  zeros: +0 and -0 with a few others. extreme: from the smallest to the largest magnitudes.
  ascending, descending: sorted along the experts. lane: every 32nd expert is large. nan, minus_inf:
  a third of the entries. plus_inf: one entry of each row. dead: rows without a number, or with very
  few.
  """
  rng = np.random.default_rng([seed, tokens, experts, len(kind)])
  x = rng.normal(size=(tokens, experts)) * 3
  column = np.arange(experts)
  if kind == "tied":
    x = rng.integers(-2, 3, size=x.shape) / 2 + 0.125
  elif kind == "equal":
    x = np.full(x.shape, 0.75)
  elif kind == "quantized":
    x = x.astype(ml_dtypes.bfloat16)
  elif kind == "zeros":
    x = rng.choice(np.array([0.0, -0.0, 0.0, -0.0, 1.0, -2.0]), size=x.shape)
  elif kind == "extreme":
    small, large = (6e-8, 6e4) if dtype == np.float16 else (1e-40, 1e30)
    x = np.abs(rng.choice(np.array([small, large, 0.0, 80.0, 0.5, large / 2]), size=x.shape))
    x[: tokens // 2] *= rng.choice(np.array([1, -1]), size=(tokens // 2, 1))
  elif kind == "ascending":
    x = np.broadcast_to(column / 16 - experts / 32, x.shape)
  elif kind == "descending":
    x = np.broadcast_to(experts / 32 - column / 16, x.shape)
  elif kind == "lane":
    x = np.where(column % 32 == 5 % experts, np.abs(x) + 20, x)
  elif kind == "nan":
    x = np.where(rng.random(x.shape) < 1 / 3, np.nan, x)
  elif kind == "minus_inf":
    x = np.where(rng.random(x.shape) < 1 / 3, -np.inf, x)
  elif kind == "plus_inf":
    x[np.arange(tokens), rng.integers(experts, size=tokens)] = np.inf
  elif kind == "dead":
    fates = (np.nan, -np.inf, -np.nan)
    for t in range(tokens):
      alive = rng.choice(experts, size=min(experts, (0, 0, 0, 0, 1, 2)[t % 6]), replace=False)
      row = np.full(experts, fates[t % 3]) if t % 6 < 3 else rng.choice(fates, size=experts)
      row[alive] = x[t, alive]
      x[t] = row
  elif kind != "random":
    raise ValueError(kind)
  return np.asarray(x).astype(dtype)
