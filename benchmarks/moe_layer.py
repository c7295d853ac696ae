"""Times an MoE layer and its parts, this package's beside plain JAX's, forward and backward.

    python benchmarks/moe_layer.py [--output benchmarks/results] [--implementation hopper]

Parts are the choice of experts, the plan, the permutation of the rows, the expert matmuls (SwiGLU)
and the sum back into tokens. Plain JAX is top-k and softmax, two argsorts and a bincount, a gather,
and a gather with a weighted sum. Both sides have the same expert matmuls: those that
examples/expert_matmul.py chooses, or the ones given; others that are there are timed alone. A share
is that of the sum of the parts. The whole layer has the router's matmul too.

On a GPU a time is the sum of a call's kernels, and "wall" the wall clock over many queued calls as
`jax.jit` compiles them; inputs have left the cache. On a CPU it is the wall clock of a call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

import jax

import gpu_timing
import moe_layer_cases as cases
import route_gpu
import timing
from gpu_timing import Queue
from moe_layer_cases import OURS, PLAIN, Layer, Part, available

SIDES = {"plain": PLAIN, "ours": OURS}
AROUND = ("route", "plan", "permute", "combine")
MATMULS = "expert matmuls"
WHOLE = "whole layer"
WALL = "whole layer, wall"
FORWARD, BOTH = "forward", "forward + backward"
BAR = 0.25
LOWERING = threading.Lock()

# What is timed: the part; "plain" or "ours", of the matmuls the implementation; the direction.
Key = tuple[str, str, str]


class Meter:
  """Microseconds of calls: of their kernels on a GPU, by the wall clock elsewhere."""

  def __init__(self, samples: int):
    self.is_gpu = jax.default_backend() == "gpu"
    self._samples = samples
    self._clock = gpu_timing.Clock(samples) if self.is_gpu else None
    self.method = self._clock.method if self._clock else "wall clock"

  def us(self, queue: Queue) -> float:
    """Median time of a call."""
    if self._clock is not None:
      return self._clock.times(queue)[0].us
    call = functools.partial(queue.function, *queue.inputs[0])
    return 1e3 * timing.compared_ms([call], samples=self._samples)[0]

  def wall_us(self, queue: Queue) -> float:
    """Wall clock of a queued call, on a GPU."""
    assert self._clock is not None
    return self._clock.wall_us(queue)


class Benchmark:
  """Measures one layer and writes its tables."""

  def __init__(self, report: timing.Report, meter: Meter, layer: Layer, implementation: str | None):
    self._report, self._meter, self._layer = report, meter, layer
    make = jax.jit(functools.partial(cases.make_inputs, layer))
    first = make(0)
    ways = available(first.rows, first.gate_up)
    self._choice = implementation or ways[0]
    # On a GPU those in plain JAX take too long, or too much memory.
    ways = [name for name in ways if not meter.is_gpu or name not in ("blocks", "lax")]
    self._ways = [self._choice, *(name for name in ways if name != self._choice)]
    # The parameters are far larger than the cache, so all inputs share them.
    shared = {"router": first.router, "gate_up": first.gate_up, "down": first.down}
    count = gpu_timing.input_count(first.x.nbytes) if meter.is_gpu else 1
    self._inputs = [first, *(make(seed)._replace(**shared) for seed in range(1, count))]
    self._one_expert = jax.jit(functools.partial(cases.one_expert, layer))
    self._one_expert_of = jax.jit(functools.partial(cases.one_expert_of, layer))
    self._programs: dict[Key, Future[Any]] = {}
    self._us: dict[Key, float] = {}

  def run(self) -> None:
    """Compiles, checks and times everything; what fails is left out."""
    self._report.line(f"\n{self._layer}; expert matmuls: {self._choice}")
    self._compile()
    for key in self._programs:
      with self._report.attempt(", ".join(key)):
        self._measure(*key)
    self._table()
    self._report.save()

  def _part(self, name: str, side: str, inputs: cases.Inputs) -> Part:
    if name == WHOLE:
      return cases.layer_part(self._layer, SIDES[side], self._choice, inputs)
    if name == MATMULS:
      return cases.matmul_part(side, inputs)
    return cases.parts(self._layer, SIDES[side], inputs)[name]

  def _compile(self) -> None:
    """Compiles everything before anything is timed."""
    start = time.perf_counter()
    pairs = [(part, side) for part in (*AROUND, WHOLE) for side in SIDES]
    pairs += [(MATMULS, way) for way in self._ways]
    keys = [(*pair, way) for pair in pairs for way in (FORWARD, BOTH)]
    # A plan is integers: nothing to differentiate.
    keys = [key for key in keys if (key[0], key[2]) != ("plan", BOTH)]
    jobs = {key: functools.partial(self._compiled, *key) for key in keys}
    self._programs = gpu_timing.compile_all(jobs)
    self._report.line(f"{len(jobs)} jobs compiled in {time.perf_counter() - start:.0f} s")

  def _compiled(self, name: str, side: str, direction: str) -> tuple[Any, Any]:
    """The program without CUDA graphs, and as `jax.jit` has it."""
    part = self._part(name, side, self._inputs[0])
    function, args = part.forward, part.arguments
    if direction == BOTH:
      function, args = part.both, (*args, part.value_shape())
    # Python lowers Pallas kernels, one at a time in any case.
    with LOWERING:
      lowered = jax.jit(function).lower(*args)
    program = lowered.compile(compiler_options=gpu_timing.COMPILER_OPTIONS)
    return program, lowered.compile() if name == WHOLE and self._meter.is_gpu else None

  def _measure(self, name: str, side: str, direction: str) -> None:
    program, queued = self._programs[name, side, direction].result()
    every = [self._part(name, side, inputs) for inputs in self._inputs]
    args = [part.arguments for part in every]
    if direction == BOTH:
      shape = every[0].value_shape()
      keys = jax.random.split(jax.random.key(2), len(args))
      normal = (jax.random.normal(key, shape.shape, shape.dtype) for key in keys)
      args = [(*a, cotangent) for a, cotangent in zip(args, normal, strict=True)]
    self._check(name, side, direction, args[0])
    self._us[name, side, direction] = self._meter.us(Queue(program, args))
    if queued is not None:
      self._us[WALL, side, direction] = self._meter.wall_us(Queue(queued, args))

  def _check(self, name: str, side: str, direction: str, args: tuple[Any, ...]) -> None:
    """Compares with plain JAX, the matmuls for some experts; in memory that was NaN before."""
    program, _ = self._programs[name, side, direction].result()
    route_gpu.poison_memory(jax.tree.leaves(program(*args)))
    results = program(*args)
    if name == MATMULS:
      inputs = self._inputs[0]
      cotangent = args[-1] if direction == BOTH else inputs.outputs
      for expert in (0, self._layer.experts - 1):
        expected = self._one_expert(inputs, expert, cotangent)
        actual = self._one_expert_of(inputs, expert, results)
        cases.check_distances(self._layer, actual, expected[: len(actual)])
    elif side == "ours":
      expected, _ = self._programs[name, "plain", direction].result()
      cases.check_distances(self._layer, results, expected(*args))

  # ---- tables ----

  def _time(self, name: str, side: str, direction: str) -> float:
    """Microseconds; NaN if they could not be measured."""
    if name == "plan":
      direction = FORWARD
    if name == MATMULS:
      side = self._choice
    return self._us.get((name, side, direction), math.nan)

  def _table(self) -> None:
    """Times of all parts, and the share of those around the matmuls."""
    names = (*AROUND[:3], MATMULS, AROUND[3])
    side = f"{'ours':>10}{'plain':>10}{'':8}{'share':>6}{'plain':>7}"
    self._report.line(f"{'us':20}{FORWARD:^41}   {BOTH:^41}\n{'':20}{side}   {side}")
    for name in (*names, WHOLE, WALL) if self._meter.is_gpu else (*names, WHOLE):
      text = f"{name:20}"
      row: dict[str, Any] = {**dataclasses.asdict(self._layer), "matmuls": self._choice}
      for direction in (FORWARD, BOTH):
        ours, plain = (self._time(name, side, direction) for side in ("ours", "plain"))
        text += f"{ours:10.1f}{plain:10.1f}{plain / ours:7.1f}x"
        key = direction.replace(" + ", "_")
        row |= {"part": name, f"{key}_us": ours, f"{key}_plain_us": plain}
        if name in names:
          shares = [
            self._time(name, side, direction) / sum(self._time(n, side, direction) for n in names)
            for side in ("ours", "plain")
          ]
          text += f"{100 * shares[0]:5.0f}%{100 * shares[1]:6.0f}%   "
        else:
          text += " " * 16
      self._report.line(text.rstrip())
      self._row(**row)
    for direction in (FORWARD, BOTH):
      ours, plain = (
        sum(self._time(name, side, direction) for name in AROUND)
        / self._time(MATMULS, side, direction)
        for side in ("ours", "plain")
      )
      bar = f" (bar {100 * BAR:.0f} %)" if direction == FORWARD and self._meter.is_gpu else ""
      self._report.line(
        f"{' + '.join(AROUND)} against the expert matmuls, {direction}: "
        f"{100 * ours:.1f} %{bar}, plain JAX {100 * plain:.1f} %"
      )
      self._row(direction=direction, share=ours, plain_share=plain)
    for way in self._ways:
      times = [self._us.get((MATMULS, way, direction), math.nan) for direction in (FORWARD, BOTH)]
      rates = [n * self._layer.matmul_flops / us / 1e6 for n, us in zip((1, 3), times, strict=True)]
      self._report.line(
        f"{MATMULS}, {way}: {FORWARD} {times[0]:.1f} us, {rates[0]:.3g} TFLOP/s; "
        f"{BOTH} {times[1]:.1f} us, {rates[1]:.3g} TFLOP/s"
      )
      self._row(matmuls=way, forward_us=times[0], forward_backward_us=times[1])

  def _row(self, **values: Any) -> None:
    """Numbers behind a line: null what could not be measured, for JSON has no NaN."""
    self._report.row(**{name: None if x != x else x for name, x in values.items()})


def main() -> None:
  command = timing.parser(__doc__)
  command.add_argument("--implementation", help="of the expert matmuls in the layer")
  command.set_defaults(samples=10)
  arguments = command.parse_args()
  start = time.perf_counter()
  meter = Meter(arguments.samples)
  platform = jax.default_backend()
  name = f"moe_layer_{platform}"
  report = timing.Report(name, arguments.output, method=meter.method)
  for layer in cases.GPU_LAYERS if meter.is_gpu else cases.CPU_LAYERS:
    with report.attempt(str(layer)):
      Benchmark(report, meter, layer, arguments.implementation).run()
  report.line(f"\n{time.perf_counter() - start:.0f} s, {report.failures} failures")
  report.save()
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
