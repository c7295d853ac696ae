"""Times `plan` against XLA's sorts, in one process, on the CPU or on a GPU.

    python benchmarks/plan.py [--output benchmarks/results] [--samples 30]

XLA's side is what one writes without this package: a stable `argsort`, `jnp.bincount`, and the
inverse by a second `argsort` or by a scatter. The inputs are the ids of a router, distinct within a
token and spread evenly, and ids that could slow a counting sort down. A time on the CPU is the wall
time of a call, on a GPU the sum of its kernels, whose inputs take turns in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpu_timing
import jax_router
import timing

CPU_SPEEDUP_BAR = 20
GPU_BARS_US = {(65536, 256): 9.0, (294912, 2304): 25.0}


@dataclasses.dataclass(frozen=True)
class Case:
  """One size."""

  tokens: int
  experts: int
  k: int

  def __str__(self) -> str:
    return f"{f'{self.experts}/{self.k}':8} {self.tokens:6} {self.entries:8}"

  @property
  def entries(self) -> int:
    """How many ids are sorted."""
    return self.tokens * self.k


CPU_CASES = (
  Case(4096, 64, 2), Case(4096, 128, 8), Case(4096, 256, 8), Case(4096, 512, 22),
  Case(2048, 2304, 36), Case(131072, 256, 8),
)  # fmt: skip
GPU_CASES = (
  Case(1, 256, 8), Case(64, 256, 8), Case(1024, 256, 8), Case(2048, 256, 8), Case(4096, 256, 8),
  Case(8192, 64, 2), Case(8192, 128, 8), Case(8192, 256, 8), Case(8192, 512, 22),
  Case(8192, 512, 36), Case(8192, 2304, 36), Case(131072, 256, 8),
)  # fmt: skip


def make_inputs(case: Case) -> dict[str, np.ndarray]:
  """Ids `[T, k]` of a router, and adverse ones."""
  rng = np.random.default_rng(0)
  shape = case.tokens, case.k
  # Distinct within a token, as top-k gives them.
  step = max(1, case.experts // case.k)
  start = rng.integers(0, case.experts, (case.tokens, 1))
  routed = (start + step * rng.permuted(np.tile(np.arange(case.k), (case.tokens, 1)), axis=1)) % (
    case.experts
  )
  inputs = {
    "routed": routed,
    "one expert": np.full(shape, case.experts // 2),
    "two experts": rng.choice([0, case.experts - 1], shape),
    "ascending": np.sort(routed, axis=None).reshape(shape),
    "half in no group": np.where(np.arange(case.tokens)[:, None] % 2 == 0, routed, case.experts),
  }
  return {name: ids.astype(np.int32) for name, ids in inputs.items()}


def ours(experts: jax.Array, *, num_experts: int) -> tuple[jax.Array, ...]:
  """The plan of the package."""
  return tuple(jax_router.plan(experts, num_experts))


def xla(experts: jax.Array, *, num_experts: int, inverse: str) -> tuple[jax.Array, ...]:
  """The plan in plain JAX, for ids that are all in range or too large."""
  ids = experts.reshape(-1)
  order = jnp.argsort(ids, stable=True)
  if inverse == "argsort":
    positions = jnp.argsort(order)
  else:
    positions = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
  return order, positions, jnp.bincount(ids, length=num_experts)


def check(case: Case, ids: np.ndarray, got: tuple[jax.Array, ...]) -> None:
  """Raises if the plan is not that of numpy."""
  order = np.argsort(ids.reshape(-1), kind="stable")
  inverse = np.empty_like(order)
  inverse[order] = np.arange(len(order))
  sizes = np.bincount(ids.reshape(-1), minlength=case.experts)[: case.experts]
  for name, value, wanted in zip(
    jax_router.Plan._fields, got, (order, inverse, sizes), strict=True
  ):
    if not np.array_equal(value, wanted):
      raise ValueError(f"{name} is not that of numpy's stable sort")


def programs(case: Case, options: dict[str, Any] | None = None) -> dict[str, Any]:
  """Compiled functions of the ids."""
  shape = jax.ShapeDtypeStruct((case.tokens, case.k), np.int32)
  functions = {
    "ours": functools.partial(ours, num_experts=case.experts),
    "argsort": functools.partial(xla, num_experts=case.experts, inverse="argsort"),
    "scatter": functools.partial(xla, num_experts=case.experts, inverse="scatter"),
  }
  return {
    name: jax.jit(f).lower(shape).compile(compiler_options=options) for name, f in functions.items()
  }


def run_cpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """Wall times."""
  # Others at work on the machine would show here.
  load = round(os.getloadavg()[0], 1)
  report = timing.Report(f"plan_{jax.default_backend()}", output, load_average=load)
  report.line(
    f"\nmedian us, the median of three rounds; XLA's inverse by argsort, by a scatter; bar: routed "
    f"ids {CPU_SPEEDUP_BAR}x the two argsorts\n{'E/k':8} {'T':>6} {'entries':>8} {'ids':18}"
    f"{'ours':>9}{'argsort':>10}{'':8}{'scatter':>10}"
  )
  speedups = []
  for case in CPU_CASES:
    with report.attempt(str(case)):
      compiled = programs(case)
      for name, ids in make_inputs(case).items():
        x = jnp.asarray(ids)
        check(case, ids, compiled["ours"](x))
        times = timing.compared_ms(tuple(compiled.values()), x, samples=samples)
        mine, argsort, scatter = (1e3 * ms for ms in times)
        report.line(
          f"{case} {name:18}{mine:9.0f}{argsort:10.0f}{argsort / mine:7.1f}x{scatter:10.0f}"
          f"{scatter / mine:7.1f}x"
        )
        report.row(
          **dataclasses.asdict(case), ids=name, us=mine, argsort_us=argsort, scatter_us=scatter
        )
        if name == "routed":
          speedups.append(argsort / mine)
  if speedups:
    mean = math.prod(speedups) ** (1 / len(speedups))
    report.line(f"geometric mean of routed ids: {mean:.1f}x the two argsorts")
    report.row(speedup=mean)
  report.save()
  return report


def run_gpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """Times of kernels."""
  clock = gpu_timing.Clock(samples)
  report = timing.Report(
    "plan_gpu", output, launch_us=round(clock.launch_us(), 3), method=clock.method
  )
  report.line(
    f"\nus; XLA's inverse by argsort, by a scatter; times routed ids; kernels of ours\n"
    f"{'E/k':8} {'T':>6} {'entries':>8} {'ids':18}{'ours':>9}{'bar':>7}{'argsort':>10}"
    f"{'scatter':>10}"
  )
  for case in GPU_CASES:
    with report.attempt(str(case)):
      compare_gpu(report, clock, case)
  report.line(clock.summary())
  report.save()
  return report


def compare_gpu(report: timing.Report, clock: gpu_timing.Clock, case: Case) -> None:
  """A line for each input of a case."""
  compiled = programs(case, gpu_timing.COMPILER_OPTIONS)
  bar = GPU_BARS_US.get((case.entries, case.experts))
  routed = math.nan
  for name, ids in make_inputs(case).items():
    x = jnp.asarray(ids)
    check(case, ids, compiled["ours"](x))
    # Equal ids at other places in memory, for all that the time may depend on is the ids.
    inputs = [(jnp.array(x),) for _ in range(gpu_timing.input_count(12 * case.entries))]
    times = clock.times(*(gpu_timing.Queue(f, inputs) for f in compiled.values()))
    mine, argsort, scatter = times
    routed = mine.us if name == "routed" else routed
    kernels = " ".join(f"{us:.2f}" for us in mine.kernel_us)
    report.line(
      f"{case} {name:18}{mine.us:9.2f}{'' if bar is None else bar:>7}{argsort.us:10.1f}"
      f"{scatter.us:10.1f}{mine.us / routed:7.2f}x  {kernels}"
    )
    report.row(
      **dataclasses.asdict(case),
      ids=name,
      us=mine.us,
      bar_us=bar,
      kernels=list(zip(mine.kernels, mine.kernel_us, strict=False)),
      argsort_us=argsort.us,
      scatter_us=scatter.us,
    )


def main() -> None:
  arguments = timing.parser(__doc__).parse_args()
  run = run_gpu if jax.default_backend() == "gpu" else run_cpu
  report = run(arguments.output, arguments.samples)
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
