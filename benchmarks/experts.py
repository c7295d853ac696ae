"""Times `dense_moe_fc2` beside a plain matmul by XLA and `jax.lax.ragged_dot`, in one process.

    python benchmarks/experts.py [--output benchmarks/results] [--samples 30] [--all]

The second matmul of a Mixture-of-Experts layer, M tokens, on a GPU the sizes of DeepSeek-V3 on one
of 8 devices: M x 65536 times 65536 x 7168, E = 256, k = 8, in bfloat16 and in float8 with all
scales. Beside it

    matmul   plain XLA on the same operands, without any weights, the faster of two layouts; in
             float8 without any scales. On a GPU by cuBLAS
    folded   the same with alpha multiplied into h first, what one writes without this package
    ragged   `jax.lax.ragged_dot` of the rows of the chosen experts in the order of a plan, with the
             gather of the rows before it and `combine` after it

light is max(bytes / rate of a copy, operations / rate of a matmul of 8192 cubed in that dtype) of
the experts that any token has chosen, measured before. Each time is the median of one run; on a GPU
the lower half of the table is a second run, times are of kernels, wall is ours with what the host
takes, and error is the distance from a float32 sum of the same operands, in the Frobenius norm. A
list of bars, and which of them are met, ends it.
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import experts_cases as cases
import experts_gpu
import jax_router
import timing
from experts_cases import Case

MOST_RAGGED = 8  # tokens; ragged_dot multiplies every row by every expert
SIZES = (64, 256, 1792, 8)
TOKENS = (1, 8, 32, 128, 256)


def calls(case: Case, w2: jax.Array) -> dict[str, tuple[Callable, tuple]]:
  """Functions and their arguments by name; the results of those that weigh are compared."""
  h, routing = case.activations(), case.routing()
  alpha = jax_router.alpha_from_topk(routing.experts, routing.weights, case.experts)
  found: dict[str, tuple[Callable, tuple[Any, ...]]] = {
    "ours": (cases.ours, (h, w2, alpha)),
    "matmul": (cases.matmul, (h, w2)),
    "folded": (cases.folded, (h, w2, alpha)),
  }
  if case.tokens <= MOST_RAGGED:
    found["ragged"] = (cases.ragged, (h, w2, routing))
  result = jax.jit(cases.ours)(h, w2, alpha)
  for name in ("folded", "ragged"):
    if name in found:
      function, arguments = found[name]
      cases.check(jax.jit(function)(*arguments), result, 1e-2)
  return found


def copy_bytes_per_s() -> float:
  """Bytes read and written in a second by copies of 256 MiB on this processor."""
  x = jnp.ones((2**26,), jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  return 2 * x.nbytes / (timing.median_ms(copy, x, samples=5) / 1e3)


def run_cpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """Wall time of smaller sizes, medians of three rounds."""
  square = jnp.ones((2048, 2048), jnp.float32)
  rounds = [timing.median_ms(jax.jit(jnp.matmul), square, square, samples=3) for _ in range(3)]
  rate = 2 * 2048**3 / (statistics.median(rounds) / 1e3)
  copy = copy_bytes_per_s()
  report = timing.Report(
    "experts_cpu", output, copy_gb_per_s=round(copy / 1e9, 1), matmul_gflop_per_s=round(rate / 1e9)
  )
  report.line(f"\nus; E, I, H, k = {SIZES}; eff = light / ours; x = ours / matmul")
  report.line("light is of all products of the chosen experts; leaving out those with 0 beats it")
  head = f"{'M':>5} {'dtype':9} {'load':5} {'ours':>10}{'eff':>7}{'matmul':>10}{'':8}"
  report.line(head + f"{'folded':>10}{'ragged':>10}")
  for dtype in ("float32", "bfloat16"):
    w2 = cases.make_w2(SIZES, dtype)
    for tokens in TOKENS:
      case = Case(tokens, *SIZES, dtype)
      with report.attempt(str(case)):
        found = calls(case, w2)
        bound = [functools.partial(jax.jit(f), *args) for f, args in found.values()]
        measured = [1e3 * ms for ms in timing.compared_ms(bound, samples=samples)]
        times = dict(zip(found, measured, strict=True))
        light = case.light_us(copy, rate, case.chosen())
        line = f"{case} {times['ours']:10.1f}{light / times['ours']:7.2f}{times['matmul']:10.1f}"
        line += f"{times['ours'] / times['matmul']:7.2f}x{times['folded']:10.1f}"
        report.line(line + (f"{times['ragged']:10.1f}" if "ragged" in times else ""))
        named = {f"{name}_us": us for name, us in times.items()}
        report.row(**vars(case), light_us=light, **named)
  report.save()
  return report


def main() -> None:
  command = timing.parser(__doc__)
  command.add_argument("--all", action="store_true", help="GPU: more numbers of tokens")
  arguments = command.parse_args()
  if jax.default_backend() == "gpu":
    report = experts_gpu.run(arguments.output, arguments.samples, arguments.all)
  elif arguments.all:
    command.error("--all is for GPUs")
  else:
    report = run_cpu(arguments.output, arguments.samples)
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
