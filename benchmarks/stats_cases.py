"""The routing step that benchmarks of the statistics run: ours, the reference's and XLA's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cases
import jax_router
import timing
from cases import Case

# How plain JAX counts the tokens of an expert; which of them is faster depends on the device.
COUNTS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
  "bincount": lambda experts, length: jnp.bincount(experts.reshape(-1), length=length),
  "one-hot": lambda experts, length: jnp.sum(
    jax.nn.one_hot(experts, length, dtype=jnp.int32), (0, 1)
  ),
}
REPEATS = 200


class Step(NamedTuple):
  """Results of a routing step."""

  weights: jax.Array  # [T, k]
  experts: jax.Array  # [T, k]
  counts: jax.Array  # [E]
  load_balance: jax.Array  # []
  z: jax.Array  # []
  gradient: jax.Array  # [T, E]


# ---- programs ----


def options(case: Case, bias: jax.Array | None) -> dict[str, Any]:
  """Keyword arguments of `jax_router.route` but for the implementation."""
  return {**cases.OPTIONS[case.option], "bias": bias}


def coefficients(case: Case) -> tuple[float, float]:
  """Of the two losses: so large that the check of the gradient sees their part of it."""
  return float(case.tokens * case.experts), case.tokens * case.experts / 16


def our_losses(case: Case, x: jax.Array, **keywords: Any) -> tuple[Any, Any]:
  """(weights, load-balancing loss, z-loss) and (experts, counts) of the package."""
  balance, z = coefficients(case)
  routing, stats = jax_router.route_with_stats(x, case.k, **keywords)
  losses = (
    jax_router.load_balance_loss(stats, case.k, balance),
    jax_router.z_loss(stats, z),
  )
  return (routing.weights, *losses), (routing.experts, stats.expert_counts)


def xla_losses(
  case: Case, x: jax.Array, bias: jax.Array | None, counts_of: Callable[..., jax.Array]
) -> tuple[Any, Any]:
  """The same as one writes it without this package."""
  logits = x.astype(jnp.float32)
  if bias is None:
    weights, experts = cases.xla_route(x, case.k)
    scores = jax.nn.softmax(logits, axis=-1)
  else:
    y = jax.nn.sigmoid(logits)
    experts = jax.lax.top_k(y + bias, case.k)[1]
    weights = jnp.take_along_axis(y, experts, axis=-1)
    weights /= jnp.sum(weights, axis=-1, keepdims=True)
    scores = y / jnp.sum(y, axis=-1, keepdims=True)
  counts = counts_of(experts, case.experts)
  balance, z = coefficients(case)
  shares = counts.astype(jnp.float32) / (case.tokens * case.k)
  loss = balance * case.experts * jnp.sum(shares * jnp.mean(scores, axis=0))
  z_loss = z * jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
  return (weights, loss, z_loss), (experts, counts)


def step_of(losses: Callable[..., tuple[Any, Any]]) -> Callable[..., Step]:
  """The choice, the losses, and the gradient of the logits for cotangent 1 of each loss."""

  def step(x, cotangent, *rest):
    values, pull_back, (experts, counts) = jax.vjp(lambda x: losses(x, *rest), x, has_aux=True)
    weights, balance, z = values
    one = jnp.ones((), jnp.float32)
    (gradient,) = pull_back((cotangent, one, one))
    return Step(weights, experts, counts, balance, z, gradient)

  return step


def our_step(case: Case) -> Callable[..., Step]:
  """`step(x, cotangent, bias)` of the package."""
  return step_of(lambda x, bias: our_losses(case, x, **options(case, bias)))


def xla_step(case: Case, counts: str) -> Callable[..., Step]:
  """`step(x, cotangent, bias)` without it."""
  return step_of(lambda x, bias: xla_losses(case, x, bias, COUNTS[counts]))


def reference_step(case: Case) -> Callable[..., Any]:
  """`step(x, cotangent, bias, experts)`: the reference's own choice, and its step for `experts`."""

  def step(x, cotangent, bias, experts):
    kwargs: dict[str, Any] = {"implementation": "reference"}
    # JAX would round each part of a bfloat16 gradient and then their sum.
    x = x.astype(jnp.float32)
    chosen = jax_router.route(x, case.k, **options(case, bias), **kwargs).experts
    # Two choices that differ by rounding would have other counts, and so other gradients.
    kwargs |= options(case, None) | {"experts": experts}
    return chosen, step_of(lambda x: our_losses(case, x, **kwargs))(x, cotangent)

  return step


def arguments(case: Case) -> tuple[Any, Any, Any]:
  """Shapes of x, cotangent and bias."""
  return (
    jax.ShapeDtypeStruct((case.tokens, case.experts), case.dtype),
    jax.ShapeDtypeStruct((case.tokens, case.k), "float32"),
    jax.ShapeDtypeStruct((case.experts,), "float32") if case.biased else None,
  )


# ---- checks ----


def wrong_rows(got: jax.Array, expected: jax.Array) -> np.ndarray:
  """Which rows differ by more than rounding."""
  relative = 1e-5 if got.dtype == jnp.float32 else 1e-2
  values, wanted = (np.asarray(x).astype(np.float32) for x in (got, expected))
  size = np.abs(wanted)
  # A small entry may be a difference of large ones.
  tolerance = relative * size + 2e-5 * size.max(axis=-1, keepdims=True)
  # Not "greater than": a NaN must count as wrong.
  return ~(np.abs(values - wanted) <= tolerance).all(axis=-1)


def check_step(case: Case, got: Step, chosen: jax.Array, expected: Step) -> None:
  """Raises if a step differs from the reference's for the same experts."""
  experts = np.asarray(got.experts)
  other = (experts != np.asarray(chosen)).any(axis=-1)
  # Scores rounded differently may swap two experts whose keys are almost equal.
  if other.mean() > (0.01 if case.biased else 0):
    raise ValueError(f"{100 * other.mean():.1f} % of the rows chose other experts")
  counts = np.bincount(experts.reshape(-1), minlength=case.experts)
  if not np.array_equal(np.asarray(got.counts), counts):
    raise ValueError("the counts are not those of the experts chosen")
  check_losses(got, expected, 1e-4)
  wrong = wrong_rows(got.weights, expected.weights) | wrong_rows(got.gradient, expected.gradient)
  if wrong.mean() > 0.01:
    raise ValueError(f"{100 * wrong.mean():.1f} % of the rows differ from the reference")


def check_losses(got: Step, expected: Step, relative: float) -> None:
  """Raises if a loss is another."""
  for name in ("load_balance", "z"):
    value, wanted = (float(getattr(step, name)) for step in (got, expected))
    if not abs(value - wanted) <= relative * abs(wanted):
      raise ValueError(f"{name} loss is {value}, must be {wanted}")


def _bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")


@jax.jit
def _still_same(same: jax.Array, first: Sequence[jax.Array], now: Sequence[jax.Array]) -> jax.Array:
  for a, b in zip(first, now, strict=True):
    same &= jnp.array_equal(_bits(a), _bits(b))
  return same


def repeats_agree(function: Callable[..., Any], first: Sequence[jax.Array], *args: Any) -> bool:
  """Whether many calls all have the bits of `first`."""
  same = jnp.array(True)
  for _ in range(REPEATS):
    same = _still_same(same, tuple(first), tuple(function(*args)))
  return bool(same)


# ---- memory ----


def temporary_bytes(program: Any) -> int:
  """What a compiled program allocates besides arguments and results, by XLA's account."""
  return int(program.memory_analysis().temp_size_in_bytes)


def most_temporary_bytes(case: Case) -> int:
  """Most our step may need: sums of token blocks; of every token the normalizer and the softmax.

  Weights, experts, counts and the gradient are results. XLA may keep the sums of the blocks where
  the gradient goes later.
  """
  tokens_of_block = max(16, -(-case.tokens // 128))
  blocks = -(-case.tokens // tokens_of_block)
  return 4 * blocks * (2 * case.experts + 2) + 12 * case.tokens


class Memory(NamedTuple):
  """Temporary memory of the step of one case, and whether its repeats agree."""

  case: Case
  ours: int
  xla: dict[str, int]
  repeats_agree: bool


def memory_table(report: timing.Report, memories: Sequence[Memory]) -> None:
  """Writes a line a case. Repeats that differ are a failure."""
  report.line(
    f"\ntemporary memory of the step by XLA's account, KiB; {REPEATS} repeats the same to the bit\n"
    f"{'E/k':8} {'dtype':8} {'T':>5}  {'option':14}{'ours':>10}{'formula':>10}"
    + "".join(f"{f'XLA {name}':>14}" for name in COUNTS)
    + "   same"
  )
  for case, ours, xla, agree in memories:
    most = most_temporary_bytes(case)
    sizes = "".join(f"{xla[name] / 1024:14.0f}" if name in xla else f"{'-':>14}" for name in COUNTS)
    report.line(f"{case}{ours / 1024:10.0f}{most / 1024:10.0f}{sizes}   {'yes' if agree else 'NO'}")
    report.row(
      **dataclasses.asdict(case),
      temporary_bytes=ours,
      most_temporary_bytes=most,
      xla_temporary_bytes=xla,
      repeats_agree=agree,
    )
    with report.attempt(f"repeats {case}"):
      if not agree:
        raise ValueError("repeats differ")
