"""Times `route_with_stats`, the routing step and `aux_scores` against XLA's, in one process.

    python benchmarks/stats.py [--output benchmarks/results] [--quick]

A step is the choice, its counts, the load-balancing loss, the z-loss and the gradient of the logits
for a random cotangent of the weights and cotangent 1 of each loss. XLA's side is what one writes
without this package: `jax.lax.top_k`, softmax, logsumexp, and counts by `jnp.bincount` or by a sum
of one-hot rows, whichever is faster.

On a GPU it times kernels: see stats_gpu.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import sys

import jax

import jax_router
import stats_cases
import stats_gpu
import timing
from cases import Case

SHAPES = ((4096, 64, 2), (4096, 128, 8), (4096, 256, 8), (4096, 512, 22), (2048, 2304, 36))


def inputs(case: Case) -> tuple[jax.Array, jax.Array, None]:
  """Random logits and cotangents, and no bias."""
  x = jax.random.normal(jax.random.key(0), (case.tokens, case.experts)).astype(case.dtype)
  return x, jax.random.normal(jax.random.key(1), (case.tokens, case.k)), None


def compare_steps(report: timing.Report, samples: int) -> list[stats_cases.Memory]:
  """Forward and step at the main shapes."""
  report.line(
    "\nmedian ms, the median of three rounds; bars: stats 1.15x route, step 5x XLA\n"
    f"{'':39}{'route':>8}{'stats':>8}{'':8}{'step':>8}{'XLA':>9}"
  )
  memories, ratios, speedups = [], [], []
  for tokens, experts, k in SHAPES:
    case = Case(experts, k, "float32", tokens)
    with report.attempt(str(case)):
      memory, ratio, speedup = compare_step(report, case, samples)
      memories.append(memory)
      ratios.append(ratio)
      speedups.append(speedup)
  if speedups:
    ratio, speedup = (math.prod(x) ** (1 / len(x)) for x in (ratios, speedups))
    report.line(f"geometric mean: stats {ratio:.2f}x route, step {speedup:.1f}x XLA")
    report.row(stats_ratio=ratio, step_speedup=speedup)
  return memories


def compare_step(
  report: timing.Report, case: Case, samples: int
) -> tuple[stats_cases.Memory, float, float]:
  """One line; gives the ratio of stats to route and of XLA's step to ours."""
  args = inputs(case)
  step = jax.jit(stats_cases.our_step(case)).lower(*args).compile()
  result = step(*args)
  reference = jax.jit(stats_cases.reference_step(case))(*args, result.experts)
  stats_cases.check_step(case, result, *reference)
  xla = {}
  for name in stats_cases.COUNTS:
    xla[name] = jax.jit(stats_cases.xla_step(case, name)).lower(*args).compile()
    stats_cases.check_losses(xla[name](*args), reference[1], 1e-3)
  functions = (
    jax.jit(lambda x, cotangent, bias: jax_router.route(x, case.k)),
    jax.jit(lambda x, cotangent, bias: jax_router.route_with_stats(x, case.k)),
    step,
    *xla.values(),
  )
  times = timing.compared_ms(functions, *args, samples=samples)
  route, stats, ours, *others = times
  best = min(others)
  ratio, speedup = stats / route, best / ours
  way = list(xla)[others.index(best)]
  report.line(
    f"{case}{route:8.3f}{stats:8.3f}{ratio:7.2f}x{ours:8.3f}{best:9.3f}{speedup:6.1f}x  {way}"
  )
  report.row(
    **dataclasses.asdict(case),
    route_ms=route,
    stats_ms=stats,
    step_ms=ours,
    xla_step_ms=dict(zip(xla, others, strict=True)),
  )
  sizes = {name: stats_cases.temporary_bytes(program) for name, program in xla.items()}
  agree = stats_cases.repeats_agree(step, result, *args)
  memory = stats_cases.Memory(case, stats_cases.temporary_bytes(step), sizes, agree)
  return memory, ratio, speedup


def run_cpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """All comparisons of the CPU."""
  # Others at work on the machine would show here.
  load = round(os.getloadavg()[0], 1)
  report = timing.Report(f"stats_{jax.default_backend()}", output, load_average=load)
  stats_cases.memory_table(report, compare_steps(report, samples))
  report.save()
  return report


def main() -> None:
  command = timing.parser(__doc__)
  command.add_argument("--quick", action="store_true", help="GPU: T = 8192 alone, 10 samples")
  arguments = command.parse_args()
  if jax.default_backend() == "gpu":
    report = stats_gpu.run(arguments.output, arguments.samples, arguments.quick)
  elif arguments.quick:
    command.error("--quick is for GPUs")
  else:
    report = run_cpu(arguments.output, arguments.samples)
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
