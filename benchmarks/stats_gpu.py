"""Times `route_with_stats` and `aux_scores` on a GPU beside light and XLA. Started by stats.py.

Light, efficiency and what a time is are those of route_gpu.py; the bytes of a call are those of
cases.Case. A step is timed twice: by its kernels, and by the wall clock over many queued calls of
the program as `jax.jit` compiles it. The second holds the launches and what the host takes, which
is most of it where kernels are short.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpu_timing
import jax_router
import route_gpu
import stats_cases
import timing
from cases import Case
from gpu_timing import Queue, Timing
from route_gpu import compiled, rotated

# fmt: off
SHAPES = (
  (128, 8), (256, 8), (384, 8), (512, 4), (512, 8), (512, 22), (512, 36), (896, 16),
  (2304, 8), (2304, 36),
)
# fmt: on
TOKENS = 8192
FEW_TOKENS = (64, 1024)
SCORES_EXPERTS = (128, 512, 2304)
STATS_BAR = 1.15
STEP_BARS_US = {(2304, 36): 105, (512, 22): 27}


def short_name(kernel: str) -> str:
  """The function in the mangled name of a kernel."""
  found = re.search(r"[a-z][a-z_]*_kernel", kernel)
  return found.group() if found else kernel[:40]


def kernel_times(time_: Timing) -> list[tuple[str, float]]:
  """Short name and microseconds of each kernel."""
  names = [short_name(name) for name in time_.kernels]
  return list(zip(names, (round(us, 3) for us in time_.kernel_us), strict=True))


def own_us(time_: Timing) -> float:
  """What the package's kernels take, without XLA's for the losses between them."""
  pairs = zip(time_.kernels, time_.kernel_us, strict=True)
  return sum(us for name, us in pairs if "jax_router" in name)


def check_kernels(time_: Timing, *wanted: str) -> None:
  """Whether the package's kernels were timed: XLA's fallback must not pass for them."""
  names = [short_name(name) for name in time_.kernels]
  if names and not all(any(re.search(part, name) for name in names) for part in wanted):
    raise RuntimeError(f"no kernels like {wanted} among {names}")


# ---- programs ----


class Programs(NamedTuple):
  """Compiled functions of one case.

  `route(x, bias)` and `forward(x, bias)` give what is saved for the backward and, of `forward`, the
  statistics; `backward(saved, x, cotangents)` gives the gradient. `step` and `queued`, both
  `(x, cotangent, bias)`, are the step without CUDA graphs and as `jax.jit` has it.
  """

  route: Any
  forward: Any
  backward: Any
  step: Any
  queued: Any


class Steps(NamedTuple):
  """XLA's step without CUDA graphs and as `jax.jit` has it."""

  step: Any
  queued: Any


def saving(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Forward and backward of `function(x, bias)`, which gives results and what else there is.

  The forward gives what the backward reads, and the latter.
  """
  structures = []

  def forward(x, bias):
    _, pull_back, rest = jax.vjp(lambda x: function(x, bias), x, has_aux=True)
    saved, structure = jax.tree.flatten(pull_back)
    structures.append(structure)
    return [None if leaf is x else leaf for leaf in saved], rest

  def backward(saved, x, cotangents):
    leaves = [x if leaf is None else leaf for leaf in saved]
    return jax.tree.unflatten(structures[0], leaves)(cotangents)[0]

  return forward, backward


def compile_ours(case: Case) -> Programs:
  """Compiles what is timed of the package."""

  def route(x, bias):
    weights, _ = jax_router.route(x, case.k, **stats_cases.options(case, bias))
    return weights, ()

  def stats(x, bias):
    keywords = stats_cases.options(case, bias)
    routing, sums = jax_router.route_with_stats(x, case.k, **keywords)
    return (routing.weights, sums.score_sums, sums.z_sum), tuple(sums)

  x, cotangent, bias = stats_cases.arguments(case)
  forward, backward = saving(stats)
  compiled_forward = compiled(forward, x, bias)
  saved, (_, score_sums, z_sum, _) = jax.eval_shape(forward, x, bias)
  step = stats_cases.our_step(case)
  return Programs(
    compiled(saving(route)[0], x, bias),
    compiled_forward,
    compiled(backward, saved, x, (cotangent, score_sums, z_sum)),
    compiled(step, x, cotangent, bias),
    jax.jit(step).lower(x, cotangent, bias).compile(),
  )


def compile_reference(case: Case) -> Any:
  """Compiles what the step is checked against."""
  x, cotangent, bias = stats_cases.arguments(case)
  experts = jax.ShapeDtypeStruct(cotangent.shape, "int32")
  return compiled(stats_cases.reference_step(case), x, cotangent, bias, experts)


def compile_xla(case: Case, counts: str) -> Steps:
  """Compiles XLA's step."""
  step, args = stats_cases.xla_step(case, counts), stats_cases.arguments(case)
  return Steps(compiled(step, *args), jax.jit(step).lower(*args).compile())


def compile_scores(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
  """Compiles `aux_scores` and its gradient from logits and cotangent, which needs no forward."""
  x = stats_cases.arguments(case)[0]
  cotangent = jax.ShapeDtypeStruct(x.shape, "float32")
  functions: dict[str, Callable[[jax.Array], jax.Array]] = {
    "ours": jax_router.aux_scores,
    "reference": lambda x: jax_router.aux_scores(x, implementation="reference"),
    "XLA": lambda x: jax.nn.softmax(x.astype(jnp.float32), axis=-1),
  }

  def gradient_of(function):
    return lambda x, cotangent: jax.vjp(function, x)[1](cotangent)[0]

  forward = {name: compiled(function, x) for name, function in functions.items()}
  backward = {name: compiled(gradient_of(f), x, cotangent) for name, f in functions.items()}
  return forward, backward


# ---- the benchmark ----


class Benchmark:
  """Measures cases and writes tables."""

  def __init__(self, report: timing.Report, clock: gpu_timing.Clock, light: gpu_timing.Light):
    self._report, self._clock, self._light = report, clock, light
    self._programs: dict[tuple[Case, str], Future[Any]] = {}
    self._memories: list[stats_cases.Memory] = []
    self._kernels: list[tuple[Case, Timing]] = []

  def compile(self, wanted: Sequence[Case]) -> None:
    """Compiles everything before anything is timed."""
    start = time.perf_counter()
    jobs: dict[tuple[Case, str], Callable[[], Any]] = {}
    for case in wanted:
      jobs[case, "ours"] = functools.partial(compile_ours, case)
      jobs[case, "reference"] = functools.partial(compile_reference, case)
      for counts in stats_cases.COUNTS:
        jobs[case, counts] = functools.partial(compile_xla, case, counts)
    self._programs = gpu_timing.compile_all(jobs)
    seconds = time.perf_counter() - start
    self._report.line(f"\n{len(jobs)} jobs compiled in {seconds:.0f} s")

  def table(self, wanted: Sequence[Case]) -> None:
    """One line a case; below it the kernels of the steps, their memory and their repeats."""
    self.compile(wanted)
    with self._report.attempt("dispatch"):
      self._dispatch_line()
    self._report.line(
      "\nus; step: sum of the package's own kernels, of all, then wall clock of queued calls; "
      f"* over {STATS_BAR}x route"
    )
    self._report.line(
      f"{'E/k':8} {'dtype':8} {'T':>5}  {'option':14}{'route':>8}{'stats':>8}{'ratio':>8}{'eff':>6}"
      f"{'backward':>10}{'eff':>6}{'own':>9}{'step':>9}{'XLA':>9}{'':7}{'wall':>9}{'XLA':>9}"
    )
    for case in wanted:
      with self._report.attempt(str(case)):
        self._line(case)
    if self._kernels:
      self._report.line("\nkernels of the step, us")
    for case, step in self._kernels:
      text = ", ".join(f"{name} {us:.2f}" for name, us in kernel_times(step))
      self._report.line(f"{case}{step.us:8.2f}: {text}")
    stats_cases.memory_table(self._report, self._memories)
    self._report.save()

  def _dispatch_line(self) -> None:
    """What the host takes for a call."""
    x = jnp.zeros((4, 16))
    us = timing.dispatch_us(jax.jit(lambda x: [x + i for i in range(6)]), x, calls=2000)
    self._report.line(f"a queued jitted call that only adds, of as many results: {us:.1f} us")
    self._report.row(dispatch_us=us)

  def _line(self, case: Case) -> None:
    programs: Programs = self._programs[case, "ours"].result()
    rows, cotangent_rows, bias = route_gpu.base_inputs(case.experts, case.k, case.dtype, False)
    bias = bias if case.biased else None
    count = gpu_timing.input_count(case.tokens * rows.nbytes // len(rows))
    inputs = rotated(rows, case.tokens, count)
    cotangents = rotated(cotangent_rows, case.tokens, count)
    arguments = [(x, c, bias) for x, c in zip(inputs, cotangents, strict=True)]
    expected = self._check(case, programs, arguments[0])
    saved = [programs.forward(x, bias)[0] for x in inputs]
    of_stats = jax.random.normal(jax.random.key(3), (case.experts,)), jnp.ones((), jnp.float32)
    route, forward, backward, step = self._clock.times(
      Queue(programs.route, [(x, bias) for x in inputs]),
      Queue(programs.forward, [(x, bias) for x in inputs]),
      Queue(
        programs.backward,
        [(s, x, (c, *of_stats)) for s, x, c in zip(saved, inputs, cotangents, strict=True)],
      ),
      Queue(programs.step, arguments),
    )
    check_kernels(route, "^route_(?!backward)")
    check_kernels(forward, "_stats_kernel", "stats_sum")
    check_kernels(backward, "^route_.*backward")
    check_kernels(step, "_stats_kernel", "stats_sum", "^route_.*backward")
    wall = self._clock.wall_us(Queue(programs.queued, arguments))
    del saved
    row = dataclasses.asdict(case) | {
      "route_us": route.us,
      "stats_us": forward.us,
      "stats_ratio": forward.us / route.us,
      "stats_efficiency": self._light.us(case.stats_forward_bytes) / forward.us,
      "backward_us": backward.us,
      "backward_efficiency": self._light.us(case.joint_backward_bytes) / backward.us,
      "step_us": step.us,
      "step_own_us": own_us(step),
      "step_wall_us": wall,
      "kernels": list(step.kernels),
      "kernel_us": list(step.kernel_us),
      "forward_kernels": kernel_times(forward),
      "backward_kernels": kernel_times(backward),
    }
    if step.kernels:
      self._kernels.append((case, step))
    xla, sizes = self._xla_times(case, arguments, expected)
    row |= {"xla": xla}
    bar = STEP_BARS_US.get((case.experts, case.k)) if case.tokens == TOKENS else None
    if bar is not None:
      row["step_bar_us"] = bar
    self._report.line(line_text(case, row))
    self._report.row(**row)
    result = programs.queued(*arguments[0])
    agree = stats_cases.repeats_agree(programs.queued, result, *arguments[0])
    ours = stats_cases.temporary_bytes(programs.queued)
    self._memories.append(stats_cases.Memory(case, ours, sizes, agree))

  def _check(self, case: Case, programs: Programs, arguments: tuple[Any, ...]) -> Any:
    """Compares both programs of the step with the reference; gives the reference's step.

    They run in memory that was NaN before.
    """
    reference = self._programs[case, "reference"].result()
    expected = None
    for step in (programs.step, programs.queued):
      route_gpu.poison_memory(step(*arguments))
      result = step(*arguments)
      chosen, expected = reference(*arguments, result.experts)
      stats_cases.check_step(case, result, chosen, expected)
    return expected

  def _xla_times(
    self, case: Case, arguments: Sequence[tuple[Any, ...]], expected: stats_cases.Step
  ) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Of each way to count its times and its temporary memory. An error must not cost our line."""
    times: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    for counts in stats_cases.COUNTS:
      with self._report.attempt(f"{case} XLA {counts}"):
        programs: Steps = self._programs[case, counts].result()
        stats_cases.check_losses(programs.step(*arguments[0]), expected, 1e-3)
        (step,) = self._clock.times(Queue(programs.step, arguments))
        wall = self._clock.wall_us(Queue(programs.queued, arguments))
        times[counts] = {"step_us": step.us, "wall_us": wall, "kernels": kernel_times(step)}
        sizes[counts] = stats_cases.temporary_bytes(programs.queued)
    return times, sizes

  def scores_table(self, wanted: Sequence[Case]) -> None:
    """Forward and backward of `aux_scores`."""
    self._report.line(
      f"\naux_scores, us\n{'E':8} {'dtype':8} {'T':>5} {'forward':>9}{'eff':>6}{'XLA':>9}"
      f"{'':7}{'backward':>10}{'eff':>6}{'XLA':>9}"
    )
    every = gpu_timing.compile_all(
      {case: functools.partial(compile_scores, case) for case in wanted}
    )
    for case in wanted:
      with self._report.attempt(f"aux_scores {case}"):
        self._scores_line(case, *every[case].result())
    self._report.save()

  def _scores_line(self, case: Case, forward: dict[str, Any], backward: dict[str, Any]) -> None:
    rows, cotangent_rows, _ = route_gpu.base_inputs(case.experts, case.k, "float32", True)
    rows = rows.astype(case.dtype)
    size = case.tokens * rows.nbytes // len(rows)
    count = gpu_timing.input_count(size)
    inputs = rotated(rows, case.tokens, count)
    cotangents = rotated(cotangent_rows, case.tokens, count)
    pairs = list(zip(inputs, cotangents, strict=True))
    for programs, args in ((forward, pairs[0][:1]), (backward, pairs[0])):
      route_gpu.poison_memory([programs["ours"](*args)])
      wrong = stats_cases.wrong_rows(programs["ours"](*args), programs["reference"](*args))
      if wrong.any():
        raise ValueError(f"{100 * np.mean(wrong):.1f} % of the rows differ from the reference")
    times = self._clock.times(
      *(Queue(forward[name], [(x,) for x in inputs]) for name in ("ours", "XLA")),
      *(Queue(backward[name], pairs) for name in ("ours", "XLA")),
    )
    check_kernels(times[0], "^scores_(?!backward)")
    check_kernels(times[2], "^scores_backward")
    scores_size = 4 * case.tokens * case.experts
    text = f"{case.experts:<8} {case.dtype:8} {case.tokens:5} "
    row: dict[str, Any] = {"operation": "aux_scores", **dataclasses.asdict(case)}
    for i, (name, moved) in enumerate(
      (("forward", size + scores_size), ("backward", 2 * size + scores_size))
    ):
      own, xla = times[2 * i].us, times[2 * i + 1].us
      efficiency = self._light.us(moved) / own
      text += f"{own:{9 + i}.2f}{efficiency:6.2f}{xla:9.1f}{xla / own:6.1f}x"
      row |= {f"{name}_us": own, f"{name}_efficiency": efficiency, f"{name}_xla_us": xla}
      row |= {f"{name}_kernels": kernel_times(times[2 * i])}
    self._report.line(text)
    self._report.row(**row)


def line_text(case: Case, row: dict[str, Any]) -> str:
  """One line of the main table."""
  mark = "*" if row["stats_ratio"] > STATS_BAR else " "
  text = (
    f"{case}{row['route_us']:8.2f}{row['stats_us']:8.2f}{row['stats_ratio']:6.2f}x{mark}"
    f"{row['stats_efficiency']:6.2f}{row['backward_us']:10.2f}{row['backward_efficiency']:6.2f}"
    f"{row['step_own_us']:9.2f}"
  )
  for ours, xla in (("step_us", "step_us"), ("step_wall_us", "wall_us")):
    text += f"{row[ours]:9.2f}"
    if row["xla"]:
      best = min(times[xla] for times in row["xla"].values())
      text += f"{best:9.1f}{best / row[ours]:6.1f}x"
    else:
      text += " " * 16
  if row["xla"]:
    text += f"  {min(row['xla'], key=lambda counts: row['xla'][counts]['step_us']):8}"
  if "step_bar_us" in row:
    own, all_, bar = row["step_own_us"], row["step_us"], row["step_bar_us"]
    text += f"   own {own / bar:.2f}, all {all_ / bar:.2f} of the bar, {bar} us"
  return text.rstrip()


def run(output: pathlib.Path | None, samples: int, quick: bool) -> timing.Report:
  """All tables."""
  start = time.perf_counter()
  clock = gpu_timing.Clock(route_gpu.QUICK_SAMPLES if quick else samples)
  light = gpu_timing.Light(clock.launch_us(), gpu_timing.copy_gb_per_s())
  report = timing.Report(
    "stats_gpu",
    output,
    launch_us=round(light.launch_us, 3),
    copy_gb_per_s=round(light.copy_gb_per_s),
    method=clock.method,
  )
  benchmark = Benchmark(report, clock, light)
  dtypes = route_gpu.DTYPES
  wanted = [Case(*shape, dtype, TOKENS) for shape in SHAPES for dtype in dtypes]
  wanted += [Case(256, 8, dtype, TOKENS, "sigmoid + bias") for dtype in dtypes]
  if not quick:
    wanted += [Case(256, 8, dtype, tokens) for dtype in dtypes for tokens in FEW_TOKENS]
  benchmark.table(wanted)
  benchmark.scores_table([Case(e, 1, dtype, TOKENS) for e in SCORES_EXPERTS for dtype in dtypes])
  report.line(f"\n{clock.summary()} of {time.perf_counter() - start:.0f} s")
  report.line(f"{report.failures} failures")
  report.save()
  return report
