"""`aux_scores`: normalized scores of all experts, for losses that balance their load."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_router import _operands, _reference
from jax_router._options import SCORES
from jax_router._primitive import Operation, Result, make_primitive, reference_tangents


def aux_scores(
  logits: jax.Array | np.ndarray,
  score: str = "softmax",
  *,
  where: jax.Array | np.ndarray | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Scores every expert of every token; the scores of a token add up to 1.

  With y = score(logits):

      aux_scores = softmax(logits)             "softmax"
                 = y / (sum(y) + 1e-20)        every other score, also for a single expert

  These are the probabilities in the load-balancing loss of Switch Transformers (Fedus et al., 2021)
  and of the models after it; their sums over the tokens, times the number of tokens that chose an
  expert, make the loss.

  A NaN or -inf logit has score 0 and spoils no other; a token with nothing else has scores of 0
  throughout. A +inf logit scores like the largest float32. So scores are always finite, but for
  "none", where they are what float32 makes of the formula.

  Differentiable in `logits` in reverse mode, twice; the logits are all that the backward keeps. For
  forward mode use `implementation="reference"`. Logits that are not finite get no gradient, and the
  cotangents of scores that are 0 because of a NaN or -inf logit are ignored, even NaN.

  Args:
    logits: `[..., E]` float32, bfloat16 or float16. All arithmetic is float32.
    score: static, "softmax", "sigmoid", "sqrtsoftplus" (sqrt(log(1 + exp(x)))) or "none" (the input
      is already a score).
    where: `[...]` bool, False marks padding. Such a token gets scores of 0 and no gradient.
    implementation: None (best for the platform), "cpu", "cuda" or "reference" (plain JAX).

  Returns:
    `[..., E]` float32, whatever the dtype of the logits.

  Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: an argument out of range or of the wrong shape, an implementation that is not there,
      or, with Explicit sharding, logits sharded along their experts.

  Example:
    >>> import jax.numpy as jnp, jax_router
    >>> jax_router.aux_scores(jnp.array([[1.0, 3.0, 0.0, 4.0]]), "none").tolist()
    [[0.125, 0.375, 0.0, 0.5]]
  """
  given, options = _operands.check_arguments(
    logits, 1, score=score, renormalize=True, scale=1.0, bias=None, groups=None,
    where=where, experts=None, implementation=implementation,
  )  # fmt: skip
  folded = _operands.fold_tokens(given)
  scores: jax.Array
  if implementation == "reference":
    scores = _reference.aux_scores(folded.logits, folded.where, score=options.score)
  else:
    scores = _scores(_Static(options.score, implementation), folded.logits, folded.where)
  return scores.reshape(given.logits.shape)


# ---- the primitives: (the cotangent,) logits `[*B, T, E]` and, where present, where `[*B, T]` ----


def _forward_reference(logits, where=None, *, score: str):
  return [_reference.aux_scores(logits, where, score=score)]


def _backward_reference(cotangent, logits, where=None, *, score: str, dtype: np.dtype):
  del dtype
  return [_reference.aux_scores_backward(cotangent, logits, where, score=score)]


def _make(name: str, reference: Callable[..., list[jax.Array]], result_dtype: Callable[..., Any]):
  return make_primitive(
    Operation(
      name=name,
      batch_ndim=lambda shapes, **_: len(shapes[0]) - 1,
      results=lambda shapes, **params: [Result(shapes[0][-1:], result_dtype(**params))],
      attributes=lambda *, score, **_: {"score": SCORES.index(score)},
      reference=reference,
      tangents=reference_tangents(reference),
    )
  )


_bind_forward = _make("scores", _forward_reference, lambda **_: np.dtype(np.float32))
_bind_backward = _make("scores_backward", _backward_reference, lambda *, dtype, **_: dtype)


# ---- the differentiable function ----


class _Static(NamedTuple):
  score: str
  implementation: str | None


def _run_forward(static: _Static, logits, where):
  operands = (logits,) if where is None else (logits, where)
  return _bind_forward(*operands, **static._asdict())[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(static: _Static, logits, where):
  return _run_forward(static, logits, where)


def _scores_forward(static: _Static, logits, where):
  return _run_forward(static, logits, where), (logits, where)


def _scores_backward(static: _Static, residuals, cotangent):
  operands = (x for x in (cotangent, *residuals) if x is not None)
  return _bind_backward(*operands, dtype=residuals[0].dtype, **static._asdict())[0], None


_scores.defvjp(_scores_forward, _scores_backward)
