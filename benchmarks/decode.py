"""Times `route_and_plan_blocks` on decode-sized batches, beside its two parts and XLA.

    python benchmarks/decode.py [--output benchmarks/results] [--samples 30]

The parts are `route` and `plan_blocks`, one after the other; XLA's side is `lax.top_k`, softmax, a
stable `argsort` of the ids and `jnp.bincount`, which is less: it pads nothing to blocks. Every
result is compared with plain JAX first. A time on the CPU is the wall time of a call, on a GPU the
sum of its kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpu_timing
import jax_router
import timing

BLOCK_SIZE = 32
GPU_BAR_US = 6.0  # at 256/8, up to 128 tokens


@dataclasses.dataclass(frozen=True)
class Case:
  """One size; `model` names other options than softmax."""

  tokens: int
  experts: int
  k: int
  model: str = "softmax"

  def __str__(self) -> str:
    return f"{f'{self.experts}/{self.k}':8} {self.tokens:5}  {self.model:12}"

  @property
  def options(self) -> dict[str, Any]:
    """The options of `route`."""
    if self.model == "softmax":
      return {}
    bias = np.linspace(-0.1, 0.1, self.experts, dtype=np.float32)
    groups = jax_router.Groups(8, 4) if self.model == "deepseek-v3" else None
    return {"score": "sigmoid", "bias": bias, "groups": groups, "scale": 2.5}

  @property
  def bar_us(self) -> float | None:
    """What the time must not exceed on a GPU."""
    small = self.tokens <= 128 and (self.experts, self.k) == (256, 8)
    return GPU_BAR_US if small and self.model == "softmax" else None


CASES = tuple(
  Case(tokens, experts, k)
  for experts, k in ((256, 8), (128, 4), (512, 10))
  for tokens in (1, 8, 32, 64, 128, 256, 512)
) + tuple(
  Case(tokens, 256, 8, model)
  for model in ("deepseek-v3", "sigmoid+bias")
  for tokens in (1, 64, 128)
)


def fused(logits: jax.Array, *, case: Case, implementation: str | None = None) -> Any:
  """Both in one call."""
  return jax_router.route_and_plan_blocks(
    logits, case.k, BLOCK_SIZE, layout="packed", implementation=implementation, **case.options
  )


def parts(logits: jax.Array, *, case: Case) -> Any:
  """One after the other."""
  routing = jax_router.route(logits, case.k, **case.options)
  return routing, jax_router.plan_blocks(routing, case.experts, BLOCK_SIZE, layout="packed")


def xla(logits: jax.Array, *, case: Case) -> Any:
  """Top-k, the order and the sizes."""
  values, experts = jax.lax.top_k(logits, case.k)
  order = jnp.argsort(experts.reshape(-1), stable=True)
  return jax.nn.softmax(values), order, jnp.bincount(experts.reshape(-1), length=case.experts)


def check(case: Case, logits: jax.Array, result: Any) -> None:
  """Raises if integers differ from plain JAX, or weights by more than rounding."""
  wanted = jax.jit(functools.partial(fused, case=case, implementation="reference"))(logits)
  for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
    if jnp.issubdtype(want.dtype, jnp.floating):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    else:
      np.testing.assert_array_equal(got, want)


def compiled(case: Case, options: dict[str, Any] | None) -> dict[str, Callable[..., Any]]:
  """Functions of the logits."""
  shape = jax.ShapeDtypeStruct((case.tokens, case.experts), np.float32)
  functions = {"fused": fused, "parts": parts, "XLA": xla}
  return {
    name: jax.jit(functools.partial(f, case=case)).lower(shape).compile(compiler_options=options)
    for name, f in functions.items()
  }


def run_case(case: Case, report: timing.Report, clock: gpu_timing.Clock | None, samples: int):
  """One line."""
  functions = compiled(case, None if clock is None else gpu_timing.COMPILER_OPTIONS)
  count = 1 if clock is None else gpu_timing.input_count(4 * case.tokens * case.experts)
  shape = (case.tokens, case.experts)
  inputs = [jax.random.normal(jax.random.key(i), shape) for i in range(count)]
  check(case, inputs[0], functions["fused"](inputs[0]))
  kernels: list[tuple[str, float]] = []
  if clock is None:
    milliseconds = timing.compared_ms(tuple(functions.values()), inputs[0], samples=samples)
    times = [1e3 * ms for ms in milliseconds]
  else:
    timed = clock.times(*(gpu_timing.Queue(f, [(x,) for x in inputs]) for f in functions.values()))
    times = [t.us for t in timed]
    kernels = list(zip(timed[0].kernels, timed[0].kernel_us, strict=False))
  own, chain, baseline = times
  bar = "" if clock is None or case.bar_us is None else f"   {own / case.bar_us:.2f} of the bar"
  launches = "" if clock is None else f"{len(kernels):3}"
  report.line(
    f"{case}{own:9.2f}{launches}{chain:9.2f}{baseline:9.1f}{baseline / own:6.1f}x{bar}".rstrip()
  )
  report.row(**dataclasses.asdict(case), us=own, parts_us=chain, xla_us=baseline, kernels=kernels)


def run(output: pathlib.Path | None, samples: int) -> timing.Report:
  """All cases on the default backend."""
  on_gpu = jax.default_backend() == "gpu"
  clock = gpu_timing.Clock(samples) if on_gpu else None
  method = "wall clock" if clock is None else clock.method
  report = timing.Report(f"decode_{jax.default_backend()}", output, method=method)
  heads = f"{'fused':>9}{'   ' if on_gpu else ''}{'parts':>9}{'XLA':>9}"
  report.line(f"\nus{', kernels of the fused call' if on_gpu else ''}")
  report.line(f"{'E/k':8} {'T':>5}  {'options':12}{heads}")
  for case in CASES:
    with report.attempt(str(case)):
      run_case(case, report, clock, samples)
  sizes = ((128, 4), (256, 8), (512, 10), (2304, 36))
  limits = ", ".join(f"{e}/{k} {jax_router.max_fused_tokens(e, k)}" for e, k in sizes)
  report.line(f"most tokens of one kernel: {limits}")
  report.save()
  return report


def main() -> None:
  arguments = timing.parser(__doc__).parse_args()
  report = run(arguments.output, arguments.samples)
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
