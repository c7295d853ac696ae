"""Times `permute`, `combine` and their backward beside plain JAX, in one process.

    python benchmarks/permute.py [--output benchmarks/results] [--quick]

Plain JAX is `x[order // k]`, `sum(y[inverse] * weights)` and their gradients by JAX. On a GPU
efficiency is light over measured, light a launch and a copy of the bytes: every row once, rows of
no group only where zeros are written. Kernels are timed, not calls.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from typing import Any

import jax

import gpu_timing
import permute_cases
import timing
from gpu_timing import Queue
from permute_cases import Case

# fmt: off
GPU_CASES = (
  *(Case(8192, 8, width, "bfloat16") for width in (2048, 4096, 7168)),
  Case(8192, 8, 4096, "float32"),
  *(Case(8192, 8, 4096, "bfloat16", plan=plan) for plan in permute_cases.PLANS[1:]),
  Case(8192, 2, 4096, "bfloat16", 8), Case(8192, 4, 2880, "bfloat16", 128),
  Case(8192, 22, 1024, "bfloat16", 512), Case(65536, 8, 256, "bfloat16"),
  *(Case(tokens, 8, 7168, "bfloat16", 256) for tokens in (1, 64)),
)
CPU_CASES = (
  Case(512, 8, 1024, "float32"), Case(512, 8, 1024, "bfloat16"), Case(512, 2, 4096, "bfloat16", 8),
  Case(512, 8, 1024, "float32", plan="one expert"), Case(8192, 8, 64, "float32"),
)
# fmt: on
BAR = 0.85


def compile_case(case: Case) -> dict[tuple[str, str], Any]:
  """Every call, ours and plain JAX, without CUDA graphs."""
  shapes = jax.eval_shape(case.arguments)
  programs = {}
  for owner, functions in (("ours", permute_cases.OURS), ("jax", permute_cases.IN_JAX)):
    for name, function in functions.items():
      lowered = jax.jit(function).lower(shapes)
      programs[owner, name] = lowered.compile(compiler_options=gpu_timing.COMPILER_OPTIONS)
  return programs


def run_gpu(output: pathlib.Path | None, samples: int, quick: bool) -> timing.Report:
  """One line a call; plans with padding have no plain JAX beside them."""
  clock = gpu_timing.Clock(10 if quick else samples)
  light = gpu_timing.Light(clock.launch_us(), gpu_timing.copy_gb_per_s())
  report = timing.Report(
    "permute_gpu",
    output,
    launch_us=round(light.launch_us, 3),
    copy_gb_per_s=round(light.copy_gb_per_s),
    method=clock.method,
  )
  wanted = GPU_CASES[:4] if quick else GPU_CASES
  programs = gpu_timing.compile_all({c: functools.partial(compile_case, c) for c in wanted})
  report.line(f"\nus; * below an efficiency of {BAR}")
  report.line(
    f"{'T':>6} {'k':>3} {'d':>6} {'dtype':9} {'plan':13} {'':18}{'us':>9}{'eff':>7}{'JAX':>10}"
  )
  for case in wanted:
    with report.attempt(str(case)):
      gpu_lines(report, clock, light, case, programs[case].result())
  report.save()
  return report


def gpu_lines(report, clock, light, case: Case, programs) -> None:
  """The calls of one case."""
  first = case.arguments()
  inputs = [first]
  count = min(8, gpu_timing.input_count(first.y.nbytes))
  inputs += [case.arguments(seed) for seed in range(1, count)]
  sizes = case.bytes(int(first.plan.group_sizes.sum()))
  for name, size in sizes.items():
    queues = [Queue(programs["ours", name], [(a,) for a in inputs])]
    beside = case.plan != "half padding"
    if beside:
      permute_cases.check(programs["ours", name](first), programs["jax", name](first), case.k)
      queues.append(Queue(programs["jax", name], [(a,) for a in inputs]))
    times = clock.times(*queues)
    efficiency = light.us(size) / times[0].us
    mark = "*" if efficiency < BAR else " "
    text = f"{case} {name:18}{times[0].us:9.2f}{efficiency:6.2f}{mark}"
    row = {"us": times[0].us, "efficiency": efficiency, "kernels": list(times[0].kernels)}
    if beside:
      text += f"{times[1].us:10.1f}{times[1].us / times[0].us:6.1f}x"
      row["jax_us"] = times[1].us
    report.line(text)
    report.row(**vars(case), call=name, bytes=size, **row)


def run_cpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """One line a call, wall time."""
  report = timing.Report("permute_cpu", output)
  report.line("\nmedian ms, the median of three rounds")
  report.line(
    f"{'T':>6} {'k':>3} {'d':>6} {'dtype':9} {'plan':13} {'':18}{'ms':>9}{'GB/s':>7}{'JAX':>10}"
  )
  for case in CPU_CASES:
    with report.attempt(str(case)):
      arguments = case.arguments()
      for name, size in case.bytes(case.tokens * case.k).items():
        pair = [jax.jit(f[name]) for f in (permute_cases.OURS, permute_cases.IN_JAX)]
        got, want = (f(arguments) for f in pair)
        permute_cases.check(got, want, case.k)
        ours, beside = timing.compared_ms(pair, arguments, samples=samples)
        report.line(
          f"{case} {name:18}{ours:9.3f}{size / ours / 1e6:7.1f}{beside:10.2f}{beside / ours:6.1f}x"
        )
        report.row(**vars(case), call=name, bytes=size, ms=ours, jax_ms=beside)
  report.save()
  return report


def main() -> None:
  command = timing.parser(__doc__)
  command.add_argument("--quick", action="store_true", help="GPU: the first cases, 10 samples")
  arguments = command.parse_args()
  if jax.default_backend() == "gpu":
    report = run_gpu(arguments.output, arguments.samples, arguments.quick)
  elif arguments.quick:
    command.error("--quick is for GPUs")
  else:
    report = run_cpu(arguments.output, arguments.samples)
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
