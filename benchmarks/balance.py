"""Times replicas and `quantile_histogram` against plain JAX, and routing with replicas.

    python benchmarks/balance.py [--output benchmarks/results] [--samples 30]

Plain JAX is what one writes without this package: gathers from the replica table and a bincount; a
scatter-add of one into the bins. Both assign the same replicas and count the same bins. Then comes
what replicas add to `route` of DeepSeek-V3: `route_and_assign_replicas`, and `assign_replicas`
after `route` in one program. A time on the CPU is the wall time of a call, on a GPU the sum of its
kernels, whose inputs take turns in memory. Kernels that overlap count twice in that sum, so for
routing the time of a call among many queued stands below it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpu_timing
import jax_router
import timing
from jax_router import presets

MOST_ADDED = 0.10  # of the time of routing


@dataclasses.dataclass(frozen=True)
class Case:
  """One size; for the histogram `width` is its number of bins."""

  word: str
  tokens: int
  experts: int
  k: int
  width: int
  kind: str

  def __str__(self) -> str:
    return (
      f"{self.word:16} {self.tokens:6} {self.experts:5} {self.k:3} {self.width:5} {self.kind:14}"
    )


CASES = (
  *(Case("replicas", 8192, 256, 8, 2, kind) for kind in ("hash", "xorshift", "one expert")),
  Case("replicas", 8192, 256, 8, 1, "hash"), Case("replicas", 64, 256, 8, 2, "hash"),
  Case("replicas", 8192, 896, 16, 2, "hash"), Case("replicas", 131072, 256, 8, 2, "hash"),
  *(Case("route", tokens, 256, 8, r, "deepseek_v3") for tokens in (8192, 64) for r in (1, 2, 3, 4)),
  Case("histogram", 8192, 256, 8, 1000, "sigmoid"),
)  # fmt: skip

Program = Callable[..., Any]


# ---- replicas ----


def make_replicas(case: Case) -> tuple[tuple[np.ndarray, ...], int]:
  """Ids `[T, k]`, the table and its counts, and the number of slots."""
  rng = np.random.default_rng(0)
  counts = rng.integers(1, case.width + 1, size=case.experts).astype(np.int32)
  table = np.full((case.experts, case.width), -1, np.int32)
  table[np.arange(case.width) < counts[:, None]] = rng.permutation(int(counts.sum()))
  logits = rng.normal(size=(case.tokens, case.experts))
  ids = np.argpartition(logits, -case.k)[:, -case.k :].astype(np.int32)
  if case.kind == "one expert":
    ids[:] = case.experts // 2
  return (ids, table, counts), int(counts.sum())


def plain_replicas(ids, table, counts, *, slots: int, policy: str) -> tuple[jax.Array, jax.Array]:
  """Physical ids and the load of slots."""
  draw = jnp.arange(ids.shape[0], dtype=jnp.uint32)[:, None]
  if policy == "xorshift":
    draw ^= draw >> np.uint32(7)
    draw ^= draw << np.uint32(9)
    draw ^= draw >> np.uint32(13)
  else:
    draw += ids.astype(jnp.uint32) * np.uint32(0x9E3779B9)
    draw = (draw ^ (draw >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    draw = (draw ^ (draw >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    draw ^= draw >> np.uint32(16)
  physical = table[ids, (draw % counts[ids].astype(jnp.uint32)).astype(jnp.int32)]
  return physical, jnp.bincount(physical.reshape(-1), length=slots)


def replicas(case: Case) -> tuple[tuple[np.ndarray, ...], list[Program]]:
  """Arguments, ours and plain JAX."""
  arrays, slots = make_replicas(case)
  policy = "xorshift" if case.kind == "xorshift" else "hash"
  ours = functools.partial(
    jax_router.assign_replicas, num_physical=slots, policy=policy, load="physical"
  )
  return arrays, [ours, functools.partial(plain_replicas, slots=slots, policy=policy)]


def routing(case: Case) -> tuple[tuple[np.ndarray, ...], list[Program]]:
  """Arguments, routing with replicas in one call and in two, and routing alone."""
  (_, table, counts), slots = make_replicas(case)
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(case.tokens, case.experts)).astype(np.float32)
  bias = (rng.normal(size=case.experts) / 100).astype(np.float32)

  def alone(logits, bias, table, counts):
    return tuple(jax_router.route(logits, bias=bias, **presets.deepseek_v3))

  def chain(logits, bias, table, counts):
    weights, experts = alone(logits, bias, table, counts)
    assigned = jax_router.assign_replicas(
      experts, table, counts, num_physical=slots, load="physical"
    )
    return weights, experts, *assigned

  def fused(logits, bias, table, counts):
    (weights, experts), *assigned = jax_router.route_and_assign_replicas(
      logits, replica_table=table, replica_counts=counts, num_physical=slots, load="physical",
      bias=bias, **presets.deepseek_v3,
    )  # fmt: skip
    return weights, experts, *assigned

  return (logits, bias, table, counts), [fused, chain, alone]


# ---- histogram ----


def histogram(case: Case) -> tuple[tuple[np.ndarray, ...], list[Program]]:
  """Arguments, ours and plain JAX; scores of powers of two, so that no rounding moves a bin."""
  rng = np.random.default_rng(2)
  scores = (rng.integers(0, 2**10, size=(case.tokens, case.experts)) / 2**10).astype(np.float32)
  cutoff = np.sort(scores, axis=1)[:, -case.k - 1]
  bounds = np.array([-1.0, 1.0], np.float32)

  def ours(scores, cutoff, bounds):
    return jax_router.quantile_histogram(
      scores, cutoff, bounds=bounds, num_bins=case.width, score="none"
    )

  def plain(scores, cutoff, bounds):
    position = (cutoff[:, None] - scores - bounds[0]) * (case.width / (bounds[1] - bounds[0]))
    bins = jnp.clip(position, 0, case.width - 1).astype(jnp.int32)
    expert = jnp.broadcast_to(jnp.arange(case.experts), bins.shape)
    return jnp.zeros((case.experts, case.width), jnp.int32).at[expert, bins].add(1)

  return (scores, cutoff, bounds), [ours, plain]


MAKERS = {"replicas": replicas, "route": routing, "histogram": histogram}


# ---- comparison ----


def programs(case: Case, options: dict[str, Any] | None = None):
  """Arguments on the device, and the programs compiled, the first two with equal results."""
  arrays, functions = MAKERS[case.word](case)
  arrays = jax.device_put(arrays)
  compiled = [jax.jit(f).lower(*arrays).compile(compiler_options=options) for f in functions]
  results = [jax.tree.leaves(f(*arrays)) for f in compiled[:2]]
  for ours, other in zip(*results, strict=True):
    if not np.array_equal(ours, other):
      raise ValueError("ours is not what the other program gives")
  return arrays, compiled


def added(times: Sequence[float]) -> str:
  """What one call and two add to routing alone."""
  one, two, alone = times
  return (
    f"{100 * (one / alone - 1):+.1f} % of routing alone, as two {100 * (two / alone - 1):+.1f} %"
  )


def compare(report: timing.Report, case: Case, times: Sequence[float]) -> None:
  """One line."""
  ours, other = times[:2]
  line, row = f"{case} {ours:10.2f} {other:10.2f}", {"us": ours, "plain_us": other}
  if case.word == "route":
    line += f"  {added(times)}, bar {100 * MOST_ADDED:.0f} %"
    row = {"us": ours, "chain_us": other, "alone_us": times[2]}
  else:
    line += f"  {other / ours:.1f}x"
  report.line(line)
  report.row(**dataclasses.asdict(case), **row)


HEADER = (
  "\nmedian us; route: with replicas in one call, and in two\n"
  f"{'word':16} {'T':>6} {'E':>5} {'k':>3} {'R/B':>5} {'kind':14} {'ours':>10} {'plain JAX':>10}"
)


def run_cpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """Wall times."""
  # Others at work on the machine would show here.
  load = round(os.getloadavg()[0], 1)
  report = timing.Report(f"balance_{jax.default_backend()}", output, load_average=load)
  report.line(HEADER)
  for case in CASES:
    with report.attempt(str(case)):
      arrays, compiled = programs(case)
      times = timing.compared_ms(compiled, *arrays, samples=samples)
      compare(report, case, [1e3 * ms for ms in times])
  report.save()
  return report


def run_gpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """Times of kernels."""
  clock = gpu_timing.Clock(samples)
  report = timing.Report(
    "balance_gpu", output, launch_us=round(clock.launch_us(), 3), method=clock.method
  )
  report.line(HEADER)
  for case in CASES:
    with report.attempt(str(case)):
      arrays, compiled = programs(case, gpu_timing.COMPILER_OPTIONS)
      size = sum(x.nbytes for x in arrays)
      inputs = [tuple(map(jnp.array, arrays)) for _ in range(gpu_timing.input_count(size))]
      queues = [gpu_timing.Queue(f, inputs) for f in compiled]
      times = clock.times(*queues)
      compare(report, case, [t.us for t in times])
      kernels = zip(times[0].kernels, times[0].kernel_us, strict=False)
      report.line("  " + ", ".join(f"{name} {us:.2f}" for name, us in kernels))
      if case.word == "route":
        queued = [clock.wall_us(queue) for queue in queues]
        report.line("  queued " + ", ".join(f"{us:.2f}" for us in queued) + f": {added(queued)}")
  report.line(clock.summary())
  report.save()
  return report


def main() -> None:
  arguments = timing.parser(__doc__).parse_args()
  run = run_gpu if jax.default_backend() == "gpu" else run_cpu
  report = run(arguments.output, arguments.samples)
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
