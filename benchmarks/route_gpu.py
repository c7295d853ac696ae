"""Times `route` and `route_dense` on a GPU beside light and XLA. Started by route.py.

    light = launch + bytes / copy        efficiency = light / measured

`launch` is the time of an almost empty kernel and `copy` the bytes a second that a large copy reads
and writes, both measured here. `bytes` are every input read once and every output written once. A
time is the sum of the kernels of a call; copies and fills by the driver are not counted. Inputs,
and in the backward what the forward saved, have left the cache, unless 64 of them fit. XLA's
backward is its forward and backward less its forward, so it finds the results in the cache.

Logits are 1024 random rows over and over, so that one call of the reference checks every row up to
T = 8192.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cases
import gpu_timing
import timing
from cases import Case
from gpu_timing import Queue, Timing

# fmt: off
SHAPES = (
  (128, 8), (256, 8), (384, 8), (512, 4), (512, 8), (512, 22), (512, 36), (896, 16),
  (2304, 4), (2304, 8), (2304, 22), (2304, 36),
)
# fmt: on
TOKENS = (1, 64, 1024, 8192, 65536)
DECODE_SHAPES = ((128, 8), (256, 8), (512, 8))
DECODE_TOKENS = (1, 2, 8, 32, 64, 128)
ADVERSE_SHAPES = ((256, 8), (512, 8), (512, 36), (2304, 36))
DTYPES = ("float32", "bfloat16")
QUICK_SAMPLES = 10
CHECKED_TOKENS = 8192


# ---- programs ----


class Programs(NamedTuple):
  """Compiled functions of one case.

  `step(x, bias, cotangent)` gives the result, the choice and the gradient. Of ours, `forward(x,
  bias)` gives what is saved for `backward(saved, x, cotangent)`; of XLA's, result and choice.
  """

  step: Any
  forward: Any = None
  backward: Any = None


def compile_case(case: Case) -> Programs:
  """Compiles what is timed and what is checked."""
  x = jax.ShapeDtypeStruct((case.tokens, case.experts), case.dtype)
  bias = jax.ShapeDtypeStruct((case.experts,), "float32") if case.biased else None
  cotangent = jax.eval_shape(case.function, x, bias)[0]
  structures = []

  def vjp(x, bias):
    return jax.vjp(lambda x: case.function(x, bias), x, has_aux=True)

  def step(x, bias, cotangent):
    value, pull_back, choice = vjp(x, bias)
    return value, choice, pull_back(cotangent)[0]

  def forward(x, bias):
    # Weights and experts are among what is saved; XLA would copy what is returned twice.
    saved, structure = jax.tree.flatten(vjp(x, bias)[1])
    structures.append(structure)
    return [None if leaf is x else leaf for leaf in saved]

  def backward(saved, x, cotangent):
    leaves = [x if leaf is None else leaf for leaf in saved]
    return jax.tree.unflatten(structures[0], leaves)(cotangent)[0]

  compiled_step = compiled(step, x, bias, cotangent)
  if case.implementation == "xla":
    return Programs(compiled_step, compiled(case.function, x, bias))
  if case.implementation == "reference":
    return Programs(compiled_step)
  saved = jax.eval_shape(forward, x, bias)
  compiled_backward = compiled(backward, saved, x, cotangent)
  return Programs(compiled_step, compiled(forward, x, bias), compiled_backward)


def compiled(function: Callable[..., Any], *shapes: Any) -> Callable[..., Any]:
  """The function compiled for arguments of these shapes."""
  lowered = jax.jit(function).lower(*shapes)
  return lowered.compile(compiler_options=gpu_timing.COMPILER_OPTIONS)


# ---- inputs and checks ----


@functools.partial(jax.jit, static_argnames=("tokens",))
def repeated(base: jax.Array, shift: int, *, tokens: int) -> jax.Array:
  """The rows of `base` over and over, from row `shift` on."""
  return base[(jnp.arange(tokens) + shift) % len(base)]


def rotated(base: jax.Array, tokens: int, count: int) -> list[jax.Array]:
  """That many different arrays of the rows of `base`."""
  return [repeated(base, 7 * i, tokens=tokens) for i in range(count)]


@functools.cache
def base_inputs(experts: int, k: int, dtype: str, dense: bool) -> tuple[jax.Array, ...]:
  """1024 rows of logits and cotangents, and a bias."""
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (cases.BASE_ROWS, experts)).astype(dtype)
  cotangent = jax.random.normal(keys[1], (cases.BASE_ROWS, experts if dense else k))
  bias = 0.1 * jax.random.normal(keys[2], (experts,))
  return x, cotangent.astype(dtype if dense else "float32"), bias


@functools.partial(jax.jit, static_argnames=("size",))
def poison(size: int) -> jax.Array:
  """Bytes that are NaN in every floating dtype."""
  return jnp.full((size,), 255, jnp.uint8)


def poison_memory(results: Sequence[jax.Array]) -> None:
  """Fills memory of the size of these results, which the next call will be given."""
  sizes = [x.nbytes for x in results]
  for x in results:
    x.delete()
  jax.block_until_ready([poison(size) for size in sizes])


def wrong_rows(got: Sequence[jax.Array], expected: Sequence[np.ndarray]) -> float:
  """Share of the rows of (result, choice, gradient) that differ from the repeated rows expected."""
  wrong = np.zeros(len(got[0]), bool)
  for i, (array, rows) in enumerate(zip(got, expected, strict=True)):
    rows = rows[: len(array)].astype(np.float32)
    values = np.asarray(array).astype(np.float32).reshape(-1, *rows.shape)
    relative = 1e-5 if array.dtype == jnp.float32 else 1e-2
    tolerance = 0.0 if i == 1 else 5e-6 + relative * np.abs(rows)
    # Not "greater than": a NaN must count as wrong.
    wrong |= ~(np.abs(values - rows) <= tolerance).all(axis=-1).reshape(-1)
  return float(wrong.mean())


# ---- the benchmark ----


class Benchmark:
  """Measures cases and writes tables."""

  def __init__(self, report: timing.Report, clock: gpu_timing.Clock, light: gpu_timing.Light):
    self._report, self._clock, self._light = report, clock, light
    self._programs: dict[Case, Any] = {}

  def compile(self, wanted: Iterable[Case]) -> None:
    """Compiles the cases, their references and XLA's programs before anything is timed."""
    start = time.perf_counter()
    every: dict[Case, None] = {}
    for case in wanted:
      every[case] = None
      if case.implementation is None:
        every[case.reference] = None
    self._programs = gpu_timing.compile_all(
      {case: functools.partial(compile_case, case) for case in every}
    )
    seconds = time.perf_counter() - start
    self._report.line(f"\n{len(every)} cases compiled in {seconds:.0f} s")

  def table(self, title: str, wanted: Sequence[Case], *, with_xla: bool = False) -> None:
    """One line a case."""
    wanted = [case for case in wanted if case.possible]
    baseline = [case.xla for case in wanted if with_xla and case.option == "softmax"]
    self.compile([*wanted, *baseline])
    columns = f"{'us':>9} {'GB/s':>5} {'eff':>5}" + (f"{'XLA us':>10}{'':7}" if with_xla else "")
    width = len(columns)
    self._report.line(f"{title}\n{'':39}{'forward':>9}{'':{width - 6}}{'backward':>9}")
    self._report.line(
      f"{'E/k':8} {'dtype':8} {'T':>5}  {'option':14}{columns}   {columns}".rstrip()
    )
    for case in wanted:
      with self._report.attempt(str(case)):
        self._line(case, with_xla)
    self._report.save()

  def _line(self, case: Case, with_xla: bool) -> None:
    forward, backward = self._times(case)
    row = dataclasses.asdict(case) | {"kernels": [*forward.kernels, *backward.kernels]}
    xla_us = (None, None)
    if with_xla and case.option == "softmax":
      # An error of XLA must not cost our line.
      with self._report.attempt(f"{case} XLA"):
        xla_us = self._xla_times(case)
    texts = []
    sizes = (case.forward_bytes, case.backward_bytes)
    for name, time_, size, xla in zip(
      ("forward", "backward"), (forward, backward), sizes, xla_us, strict=True
    ):
      efficiency = self._light.us(size) / time_.us
      rate = size / time_.us / 1e3
      text = f"{time_.us:9.2f} {rate:5.0f} {efficiency:5.2f}"
      if xla is not None:
        text += f"{xla:10.1f}{xla / time_.us:6.1f}x"
      elif with_xla:
        text += " " * 17
      texts.append(text)
      row |= {f"{name}_us": time_.us, f"{name}_gb_per_s": rate}
      row |= {f"{name}_efficiency": efficiency, f"{name}_light_us": self._light.us(size)}
      row |= {f"{name}_xla_us": xla}
    other = {name for name in row["kernels"] if "route" not in name}
    note = f"   with {', '.join(sorted(other))}" if other else ""
    self._report.line(f"{case}{texts[0]}   {texts[1]}{note}".rstrip())
    self._report.row(**row)

  def _times(self, case: Case) -> tuple[Timing, Timing]:
    """Forward and backward, each with everything it reads out of the cache."""
    base, base_cotangent, bias = base_inputs(case.experts, case.k, case.dtype, case.dense)
    programs = self._programs[case].result()
    bias = bias if case.biased else None
    if case.tokens <= CHECKED_TOKENS:
      self.check(case, base)
    count = gpu_timing.input_count(case.tokens * base.nbytes // cases.BASE_ROWS)
    inputs = rotated(base, case.tokens, count)
    cotangents = rotated(base_cotangent, case.tokens, count)
    saved = [programs.forward(x, bias) for x in inputs]
    forward, backward = self._clock.times(
      Queue(programs.forward, [(x, bias) for x in inputs]),
      Queue(programs.backward, list(zip(saved, inputs, cotangents, strict=True))),
    )
    check_kernels(forward, backward=False)
    check_kernels(backward, backward=True)
    return forward, backward

  def _xla_times(self, case: Case) -> tuple[float, float]:
    """Forward, and forward and backward less the forward."""
    programs = self._programs[case.xla].result()
    base, base_cotangent, _ = base_inputs(case.experts, case.k, case.dtype, False)
    count = gpu_timing.input_count(case.tokens * base.nbytes // cases.BASE_ROWS)
    inputs = rotated(base, case.tokens, count)
    cotangent = repeated(base_cotangent, 0, tokens=case.tokens)
    forward, step = self._clock.times(
      Queue(programs.forward, [(x, None) for x in inputs]),
      Queue(programs.step, [(x, None, cotangent) for x in inputs]),
    )
    return forward.us, step.us - forward.us

  def check(self, case: Case, base: jax.Array) -> None:
    """Compares all rows with the reference, in memory that was NaN before."""
    _, cotangent, bias = base_inputs(case.experts, case.k, case.dtype, case.dense)
    bias = bias if case.biased else None
    reference = self._programs[case.reference].result()
    expected = [np.asarray(x) for x in reference.step(base, bias, cotangent)]
    x, cotangent = (repeated(rows, 0, tokens=case.tokens) for rows in (base, cotangent))
    step = self._programs[case].result().step
    poison_memory(step(x, bias, cotangent))
    share = wrong_rows(step(x, bias, cotangent), expected)
    # Scores rounded differently may swap two experts whose keys are almost equal.
    if share > 0.01:
      raise ValueError(f"{100 * share:.1f} % of the rows differ from the reference")

  def adverse(self, tokens: int) -> None:
    """Forward times by kind of input, beside those of random input."""
    wanted = [Case(experts, k, "float32", tokens) for experts, k in ADVERSE_SHAPES]
    self.compile(wanted)
    self._report.line(f"adverse inputs, float32, T = {tokens}, forward, us")
    for case in wanted:
      with self._report.attempt(f"adverse inputs {case}"):
        self._adverse_lines(case)
    self._report.save()

  def _adverse_lines(self, case: Case) -> None:
    programs = self._programs[case].result()
    kinds = adverse_rows(case.experts)
    queues = []
    for rows in kinds.values():
      base = jnp.asarray(rows)
      self.check(case, base)
      count = gpu_timing.input_count(case.tokens * base.nbytes // cases.BASE_ROWS)
      inputs = rotated(base, case.tokens, count)
      queues.append(Queue(programs.forward, [(x, None) for x in inputs]))
    times = dict(zip(kinds, self._clock.times(*queues), strict=True))
    for name, time_ in times.items():
      check_kernels(time_, backward=False)
      ratio = time_.us / times["random"].us
      mark = "   more than 2x" if ratio > 2 else ""
      self._report.line(f"{case} {name:36}{time_.us:9.2f}{ratio:7.2f}x random{mark}")
      self._report.row(**dataclasses.asdict(case), input=name, forward_us=time_.us, ratio=ratio)


def adverse_rows(experts: int) -> dict[str, np.ndarray]:
  """The inputs of the CPU benchmark and two that only a GPU may mind."""
  kinds = cases.adverse_inputs(cases.BASE_ROWS, experts)
  # A lane that loads 16 bytes at a time gets four neighbours out of every 128 float32.
  one_lane = kinds["random"].copy()
  one_lane[:, np.arange(experts) % 128 < 4] += 100
  one_expert = kinds["random"].copy()
  one_expert[:, 7] += 100
  return kinds | {"large values in one lane of 16 bytes": one_lane, "one expert": one_expert}


def check_kernels(time_: Timing, *, backward: bool) -> None:
  """Whether the kernel that was timed is the package's: XLA's fallback must not pass for it."""
  own = [name for name in time_.kernels if "route" in name]
  if time_.kernels and not any(("route_backward" in name) == backward for name in own):
    raise RuntimeError(f"no kernel of the package among {time_.kernels}")


def run(output: pathlib.Path | None, samples: int, quick: bool) -> timing.Report:
  """All tables."""
  start = time.perf_counter()
  clock = gpu_timing.Clock(QUICK_SAMPLES if quick else samples)
  light = gpu_timing.Light(clock.launch_us(), gpu_timing.copy_gb_per_s())
  report = timing.Report(
    "route_gpu",
    output,
    launch_us=round(light.launch_us, 3),
    copy_gb_per_s=round(light.copy_gb_per_s),
    method=clock.method,
  )
  benchmark = Benchmark(report, clock, light)
  grid = [(e, k, dtype) for e, k in SHAPES for dtype in DTYPES]
  benchmark.table(
    "route",
    [
      Case(*shape, tokens, option)
      for shape in grid
      for tokens in ((8192,) if quick else TOKENS)
      for option in ("softmax", "sigmoid + bias", "groups")
    ],
    with_xla=True,
  )
  benchmark.table(
    "softmax over all experts: the backward reads the logits",
    [Case(*shape, 8192, "over all") for shape in grid],
  )
  benchmark.table(
    "route_dense, probs and bytemap", [Case(*shape, 8192, dense=True) for shape in grid]
  )
  benchmark.adverse(8192)
  if not quick:
    benchmark.table(
      "decode",
      [
        Case(experts, k, dtype, tokens)
        for experts, k in DECODE_SHAPES
        for dtype in DTYPES
        for tokens in DECODE_TOKENS
      ],
    )
  report.line(f"\n{clock.summary()} of {time.perf_counter() - start:.0f} s")
  report.line(f"{report.failures} failures")
  report.save()
  return report
