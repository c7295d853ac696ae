"""The GPU half of benchmarks/experts.py: times at the sizes of DeepSeek-V3, and the bars."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import experts_cases as cases
import gpu_timing
import jax_router
import timing
from experts_cases import Case
from gpu_timing import Queue

SIZES = (256, 256, 7168, 8)  # E, I, H, k on one of 8 devices
TOKENS = (1, 8, 16, 32, 64, 128, 192, 256, 288, 384)
ALL_TOKENS = (1, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 272, 288, 320, 384, 512)
ZIPF_TOKENS = (16, 128, 288)
RAGGED_TOKENS = 128

# What must hold, and what is hoped for. Times of a plain matmul by cuBLAS in the same run:
BAR_TOKENS = (128, 192, 256, 288, 384)
MOST = {"bfloat16": (1.00, 0.95), "float8": (1.00, 0.90)}
LEAST_SKIPPING = {1: 5.0, 8: 1.5, 16: 1.5, 32: 1.5}
MOST_STEP = 1.25  # from 256 to 288 tokens
LEAST_RAGGED = 3.0
MOST_ERROR = 4e-3

# Matmuls by cuBLAS alone, without the search for kernels of another kind, which takes long.
CUBLAS = gpu_timing.COMPILER_OPTIONS | {"xla_gpu_enable_triton_gemm": False}


class Bar(NamedTuple):
  """One line of the summary: a measured value that must be at most or at least something."""

  name: str
  value: float
  bar: float
  at_most: bool
  hoped: float | None = None

  def met(self, bar: float) -> bool:
    return self.value <= bar if self.at_most else self.value >= bar

  def __str__(self) -> str:
    sign = "<=" if self.at_most else ">="
    text = f"{'met   ' if self.met(self.bar) else 'MISSED'} {self.name:44} "
    text += f"{self.value:9.4g} {sign} {self.bar:g}"
    if self.hoped is not None:
      text += f"   hoped for {self.hoped:g}: {'met' if self.met(self.hoped) else 'missed'}"
    return text


def exact(h: jax.Array, wide: jax.Array, alpha: jax.Array) -> jax.Array:
  """The sum in float32 of float32 operands; `wide` `[H, E * I]`."""
  rows = (h * alpha[..., None]).reshape(len(h), -1)
  return jax.lax.dot_general(
    rows, wide, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
  )  # fmt: skip


def scaled(h: jax.Array, w2: Any, alpha: jax.Array, h_scale: jax.Array) -> jax.Array:
  """Float8 with all its scales."""
  return jax_router.dense_moe_fc2(h, w2, alpha, h_scale=h_scale)


class Operands:
  """Weights in every layout, and the activations of the largest case; others take a part."""

  def __init__(self, most: int):
    w2 = cases.make_w2(SIZES, "bfloat16")
    columns = w2.shape[0] * w2.shape[1]
    self.w2 = w2
    self.transposed = jnp.transpose(w2, (2, 0, 1)).reshape(-1, columns)
    self.packed = jax.jit(jax_router.pack_w2)(w2)
    self.h = Case(most, *SIZES, "bfloat16").activations()
    self.q, self.h_scale = jax.jit(cases.quantized)(self.h)

  def wide(self, dtype: str) -> tuple[jax.Array, jax.Array]:
    """float32 of the activations `[M, E, I]` and of the weights `[H, E * I]`."""
    if dtype == "bfloat16":
      return self.h.astype(jnp.float32), self.transposed.astype(jnp.float32)

    @jax.jit
    def widened(q, h_scale, packed):
      scale = jnp.repeat(jnp.repeat(packed.scale, 128, axis=0), 128, axis=1)
      h = q.astype(jnp.float32) * jnp.repeat(h_scale, 128, axis=1).reshape(q.shape)
      return h, packed.q.astype(jnp.float32) * scale

    return widened(self.q, self.h_scale, self.packed)

  def calls(self, case: Case) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], Any]]:
    """Name, function, arguments and compiler options of what is timed."""
    n, alpha = case.tokens, alpha_of(case)
    options = gpu_timing.COMPILER_OPTIONS
    if case.dtype == "float8":
      q, scale = self.q[:n], self.h_scale[:n]
      yield "ours", scaled, (q, self.packed, alpha, scale), options
      yield "matmul", cases.matmul_transposed, (q, self.packed.q), CUBLAS
      yield "by default", cases.matmul_transposed, (q, self.packed.q), options
      return
    h = self.h[:n]
    # The kernel, also where it is not the way that is taken by default.
    ours = functools.partial(cases.ours, implementation="cuda")
    yield "ours", ours, (h, self.w2, alpha), options
    yield "matmul", cases.matmul, (h, self.w2), CUBLAS
    yield "transposed", cases.matmul_transposed, (h, self.transposed), CUBLAS
    if n == RAGGED_TOKENS:
      yield "folded", cases.folded, (h, self.w2, alpha), CUBLAS
      yield "ragged", cases.ragged, (h, self.w2, case.routing()), options


PLAIN = ("matmul", "transposed", "by default")


def alpha_of(case: Case) -> jax.Array:
  """Weights `[M, E]`."""
  routing = case.routing()
  alpha = np.zeros((case.tokens, case.experts), np.float32)
  np.put_along_axis(alpha, np.asarray(routing.experts), np.asarray(routing.weights), axis=1)
  return jnp.asarray(alpha)


def operations_per_s(dtype: Any) -> float:
  """Rate of a matmul of 8192 cubed, the best of five rounds."""
  x = jnp.ones((8192, 8192), dtype)
  program = jax.jit(cases.matmul_transposed).lower(x, x).compile(compiler_options=CUBLAS)
  queue = Queue(program, [(x, x)])
  clock_ms = [timing.median_ms(lambda: queue.run(20), samples=3) for _ in range(5)]
  return 20 * 2 * 8192**3 / (min(clock_ms) / 1e3)


class Benchmark:
  """Times all cases twice and says which bars are met."""

  def __init__(self, output: pathlib.Path | None, samples: int, every: bool):
    self._clock = gpu_timing.Clock(samples)
    self._copy = gpu_timing.copy_gb_per_s() * 1e9
    dtypes = {"bfloat16": jnp.bfloat16, "float8": jnp.float8_e4m3fn}
    self._rates = {name: operations_per_s(dtype) for name, dtype in dtypes.items()}
    self.report = timing.Report(
      "experts_gpu",
      output,
      copy_gb_per_s=round(self._copy / 1e9),
      matmul_tflop_per_s=round(self._rates["bfloat16"] / 1e12),
      float8_tflop_per_s=round(self._rates["float8"] / 1e12),
      method=self._clock.method,
    )
    tokens = ALL_TOKENS if every else TOKENS
    self._cases = [Case(n, *SIZES, dtype) for dtype in dtypes for n in tokens]
    self._cases += [Case(n, *SIZES, dtype, "zipf") for dtype in dtypes for n in ZIPF_TOKENS]
    self._operands = Operands(max(tokens))
    self._times: dict[Case, list[dict[str, float]]] = {case: [] for case in self._cases}
    self._errors: dict[Case, float] = {}

  def run(self) -> None:
    self._compile()
    for dtype in self._rates:
      self._check(dtype)
    self.report.line(f"\nus; E, I, H, k = {SIZES}; eff = light / ours; x = ours / matmul")
    head = f"{'M':>5} {'dtype':9} {'load':5}{'chosen':>7}{'ours':>10}{'eff':>7}{'matmul':>10}{'':8}"
    self.report.line(head + f"{'wall':>10}{'folded':>10}{'ragged':>10}{'error':>10}")
    for run in (1, 2):
      for case in self._cases:
        # What was not right is not timed.
        if case in self._errors:
          with self.report.attempt(f"{case} run {run}"):
            self._measure(case, run)
    self._summary()
    self.report.save()

  def _compile(self) -> None:
    """Compiles everything before anything is timed. Loads differ in values alone."""
    start = time.perf_counter()
    jobs = {
      (case.tokens, case.dtype, name): functools.partial(self._compiled, function, args, options)
      for case in self._cases
      if case.load == "even"
      for name, function, args, options in self._operands.calls(case)
    }
    self._programs = gpu_timing.compile_all(jobs)
    self.report.line(f"{len(jobs)} jobs compiled in {time.perf_counter() - start:.0f} s")

  @staticmethod
  def _compiled(function: Callable[..., Any], args: tuple[Any, ...], options: Any) -> Any:
    return jax.jit(function).lower(*args).compile(compiler_options=options)

  def _queues(self, case: Case) -> dict[str, Queue]:
    """What is timed of a case; other loads than an even one are timed of ours alone."""
    return {
      name: Queue(self._programs[case.tokens, case.dtype, name].result(), [args])
      for name, _, args, _ in self._operands.calls(case)
      if case.load == "even" or name == "ours"
    }

  def _check(self, dtype: str) -> None:
    """Distances from the sum in float32 of the same operands, for all of one dtype."""
    h, wide = self._operands.wide(dtype)
    run = jax.jit(exact, compiler_options=CUBLAS)
    for case in self._cases:
      if case.dtype == dtype:
        with self.report.attempt(f"{case} check"):
          want = run(h[: case.tokens], wide, alpha_of(case))
          for name, queue in self._queues(case).items():
            if name not in PLAIN:
              error = cases.distance(queue.run(1), want)
              if not error <= 1e-2:
                raise ValueError(f"{name} differs by {error:.2e} of the norm")
              if name == "ours":
                self._errors[case] = error

  def _measure(self, case: Case, run: int) -> None:
    """One line, and the row behind it."""
    queues = self._queues(case)
    found = dict(zip(queues, self._clock.times(*queues.values()), strict=True))
    times = {name: timed.us for name, timed in found.items()}
    times["wall"] = self._clock.wall_us(queues["ours"])
    if case.load == "even":
      times["plain"] = min(times[name] for name in PLAIN if name in times)
    chosen = case.chosen()
    light = case.light_us(self._copy, self._rates[case.dtype], chosen)
    self._times[case].append(times)
    text = f"{case}{chosen:7}{times['ours']:10.1f}{light / times['ours']:7.2f}"
    if "plain" in times:
      text += f"{times['plain']:10.1f}{times['ours'] / times['plain']:7.2f}x"
    else:
      text += " " * 18
    for name in ("wall", "folded", "ragged"):
      text += f"{times[name]:10.1f}" if name in times else " " * 10
    self.report.line(text + f"{self._errors[case]:10.1e}")
    named = {f"{name.replace(' ', '_')}_us": us for name, us in times.items()}
    error = self._errors[case]
    self.report.row(**vars(case), run=run, chosen=chosen, light_us=light, error=error, **named)

  def _summary(self) -> None:
    """Bars, of the worse of both runs."""
    bars = list(self._bars())
    self.report.line("\nbars, of the worse of both runs; a plain matmul by cuBLAS has no weights")
    for bar in bars:
      self.report.line(str(bar))
      self.report.row(**bar._asdict(), met=bar.met(bar.bar))
    met = sum(bar.met(bar.bar) for bar in bars)
    self.report.line(f"{met} of {len(bars)} bars met, {self.report.failures} failures")

  def _bars(self) -> Iterator[Bar]:
    for dtype, (most, hoped) in MOST.items():
      of = {
        case.tokens: self._times[case]
        for case in self._cases
        if case.dtype == dtype and case.load == "even" and self._times[case]
      }
      for n in BAR_TOKENS:
        if n in of:
          value = max(t["ours"] / t["plain"] for t in of[n])
          yield Bar(f"{dtype}, {n} tokens: ours / matmul", value, most, True, hoped)
      for n, least in LEAST_SKIPPING.items():
        if n in of:
          value = min(t["plain"] / t["ours"] for t in of[n])
          yield Bar(f"{dtype}, {n} tokens, skipping: matmul / ours", value, least, False)
      if 256 in of and 288 in of:
        value = max(b["ours"] / a["ours"] for a, b in zip(of[256], of[288], strict=False))
        yield Bar(f"{dtype}: 288 tokens / 256 tokens", value, MOST_STEP, True)
      if any("ragged" in t for t in of.get(RAGGED_TOKENS, ())):
        value = min(t["ragged"] / t["ours"] for t in of[RAGGED_TOKENS])
        yield Bar(f"{dtype}, {RAGGED_TOKENS} tokens: ragged / ours", value, LEAST_RAGGED, False)
      errors = [error for case, error in self._errors.items() if case.dtype == dtype]
      if errors:
        yield Bar(f"{dtype}: relative error, the largest", max(errors), MOST_ERROR, True)


def run(output: pathlib.Path | None, samples: int, every: bool) -> timing.Report:
  """Kernel times by CUPTI. The weights are larger than any cache, so they need not take turns."""
  start = time.perf_counter()
  benchmark = Benchmark(output, samples, every)
  benchmark.run()
  benchmark.report.line(f"{time.perf_counter() - start:.0f} s; {benchmark._clock.summary()}")
  return benchmark.report
