"""Times `dense_moe_fc2` beside a plain matmul by XLA and `jax.lax.ragged_dot`, in one process.

    python benchmarks/experts.py [--output benchmarks/results] [--samples 30] [--quick]

The second matmul of a Mixture-of-Experts layer, M tokens, on a GPU the sizes of DeepSeek-V3 on one
of 8 devices: M x 65536 times 65536 x 7168, E = 256, k = 8. Beside it

    matmul   plain XLA (cuBLAS) on the same operands, without any weights, the faster of two layouts
    folded   the same with alpha multiplied into h first, what one writes without this package
    ragged   `jax.lax.ragged_dot` of the rows of the chosen experts in the order of a plan, with the
             gather of the rows before it and `combine` after it

and, in float8, a matmul by XLA without any scales. light is max(bytes / rate of a copy, operations
/ rate of a matmul of 8192 cubed), both measured before; the rate in float8 is taken as twice that
of bfloat16. Each time is the median of one run; on a GPU the lower half of the table is a second
run, times are of kernels, and wall is ours with what the host takes: where there is no kernel of
ours, it waits to see whether the result is finite.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gpu_timing
import jax_router
import timing
from gpu_timing import Queue

GPU_TOKENS = (1, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 272, 288, 320, 384, 512)
QUICK_TOKENS = (16, 128, 192, 256, 288, 384)
CPU_MOST_RAGGED = 8  # tokens; ragged_dot multiplies every row by every expert
GPU_SIZES = (256, 256, 7168, 8)
CPU_SIZES = (64, 256, 1792, 8)
CPU_TOKENS = (1, 8, 32, 128, 256)


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes, dtype and how the tokens choose their experts."""

  tokens: int
  experts: int
  depth: int
  hidden: int
  k: int
  dtype: str
  load: str = "even"

  def __str__(self) -> str:
    return f"{self.tokens:5} {self.dtype:9} {self.load:5}"

  def routing(self) -> jax_router.Routing:
    """Distinct experts for each token, all as likely or by Zipf's law."""
    rng = np.random.default_rng(self.tokens)
    likely = np.log(1 / np.arange(1, self.experts + 1)) if self.load == "zipf" else 0.0
    keys = likely + rng.gumbel(size=(self.tokens, self.experts))
    chosen = (-keys).argsort(axis=1)[:, : self.k].astype(np.int32)
    weights = rng.dirichlet(np.ones(self.k), self.tokens).astype(np.float32)
    return jax_router.Routing(jnp.asarray(weights), jnp.asarray(chosen))

  def activations(self) -> jax.Array:
    """h `[M, E, I]`."""
    shape = (self.tokens, self.experts, self.depth)
    dtype = "bfloat16" if self.dtype == "float8" else self.dtype
    return jax.random.normal(jax.random.key(self.tokens), shape, dtype)

  def light_us(self, bytes_per_s: float, operations_per_s: float) -> float:
    """The least time on a device of these rates."""
    size = {"float8": 1, "bfloat16": 2, "float32": 4}[self.dtype]
    columns = self.experts * self.depth
    moved = size * columns * (self.tokens + self.hidden) + 2 * self.tokens * self.hidden
    operations = 2 * self.tokens * columns * self.hidden
    rate = operations_per_s * (2 if self.dtype == "float8" else 1)
    return 1e6 * max(moved / bytes_per_s, operations / rate)


def make_w2(sizes: tuple[int, ...], dtype: str) -> jax.Array:
  """Random weights `[E, I, H]`."""
  experts, depth, hidden, _ = sizes
  scale = jnp.asarray(depth**-0.5, dtype)
  return jax.random.normal(jax.random.key(0), (experts, depth, hidden), dtype) * scale


# ---- what is timed ----


def ours(h: jax.Array, w2: jax.Array, alpha: jax.Array) -> jax.Array:
  """Weights on float32 sums, or folded into h where there is no kernel."""
  return jax_router.dense_moe_fc2(h, w2, alpha)


def matmul(h: jax.Array, w2: jax.Array) -> jax.Array:
  """No weights at all; `w2` `[E, I, H]`."""
  return h.reshape(len(h), -1) @ w2.reshape(-1, w2.shape[-1])


def matmul_transposed(h: jax.Array, packed: jax.Array) -> jax.Array:
  """The same of weights that lie as `[H, E * I]`; the result is in bfloat16, float8 has none."""
  return jax.lax.dot_general(
    h.reshape(len(h), -1), packed, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16
  )


def folded(h: jax.Array, w2: jax.Array, alpha: jax.Array) -> jax.Array:
  """alpha multiplied into h, not minding what experts that were not chosen hold."""
  return matmul((h.astype(jnp.float32) * alpha[..., None]).astype(h.dtype), w2)


def ragged(h: jax.Array, w2: jax.Array, routing: jax_router.Routing) -> jax.Array:
  """The chosen experts alone: gather, `jax.lax.ragged_dot`, combine."""
  plan = jax_router.plan(routing.experts, len(w2))
  token, slot = jnp.divmod(plan.order, routing.experts.shape[1])
  rows = h[token, routing.experts[token, slot]]
  return jax_router.combine(
    jax.lax.ragged_dot(rows, w2, plan.group_sizes), routing.weights, plan
  )  # fmt: skip


def quantized(h: jax.Array) -> tuple[jax.Array, jax.Array]:
  """float8 of h with a scale for every 128 columns."""
  blocks = h.astype(jnp.float32).reshape(len(h), -1, 128)
  scale = jnp.max(jnp.abs(blocks), axis=2) / 448
  return (blocks / scale[:, :, None]).reshape(h.shape).astype(jnp.float8_e4m3fn), scale


def check(got: jax.Array, want: jax.Array, allowed: float) -> None:
  """ValueError unless two results agree in the Frobenius norm."""
  a, b = got.astype(jnp.float32), want.astype(jnp.float32)
  error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
  if not error <= allowed:
    raise ValueError(f"results differ by {error:.2e} of their norm, allowed are {allowed:.0e}")


def calls(
  case: Case, w2: Any, packed: jax.Array | None, with_ragged: bool
) -> dict[str, tuple[Callable, tuple]]:
  """Functions and their arguments by name; the results of those that weigh are compared."""
  h, routing = case.activations(), case.routing()
  alpha = jax_router.alpha_from_topk(routing.experts, routing.weights, case.experts)
  if case.dtype == "float8":
    q, scale = quantized(h)

    def scaled(h, w2, alpha, scale):
      return jax_router.dense_moe_fc2(h, w2, alpha, h_scale=scale)

    return {"ours": (scaled, (q, w2, alpha, scale)), "matmul": (matmul_transposed, (q, w2.q))}
  found: dict[str, tuple[Callable, tuple]] = {
    "ours": (ours, (h, w2, alpha)),
    "matmul": (matmul, (h, w2)),
    "folded": (folded, (h, w2, alpha)),
  }
  if packed is not None:
    found["transposed"] = (matmul_transposed, (h, packed))
  if with_ragged:
    found["ragged"] = (ragged, (h, w2, routing))
  result = jax.jit(ours)(h, w2, alpha)
  for name in ("folded", "ragged"):
    if name in found:
      function, arguments = found[name]
      check(jax.jit(function)(*arguments), result, 1e-2)
  return found


# ---- the two halves ----


def line(report: timing.Report, case: Case, times: dict[str, float], light: float, run: int):
  """One line, and the row behind it; times in microseconds."""
  plain = min(times[name] for name in ("matmul", "transposed") if name in times)
  others = "".join(
    f"{times[name]:10.1f}" if name in times else f"{'':10}" for name in ("folded", "ragged", "wall")
  )
  text = f"{case} {times['ours']:10.1f}{light / times['ours']:7.2f}{plain:10.1f}"
  report.line(text + f"{times['ours'] / plain:7.2f}x{others}")
  report.row(**vars(case), run=run, light_us=light, **{f"{n}_us": t for n, t in times.items()})


HEAD = f"{'M':>5} {'dtype':9} {'load':5} {'ours':>10}{'eff':>7}{'matmul':>10}{'':8}{'folded':>10}"
HEAD += f"{'ragged':>10}{'wall':>10}"


def matmul_operations_per_s() -> float:
  """Rate of a matmul of 8192 cubed in bfloat16, the best of five rounds."""
  x = jnp.ones((8192, 8192), jnp.bfloat16)
  queue = Queue(jax.jit(jnp.matmul), [(x, x)])
  clock_ms = [timing.median_ms(lambda: queue.run(20), samples=3) for _ in range(5)]
  return 20 * 2 * 8192**3 / (min(clock_ms) / 1e3)


def run_gpu(output: pathlib.Path | None, samples: int, quick: bool) -> timing.Report:
  """Kernel times by CUPTI. The weights are larger than any cache, so they need not take turns."""
  clock = gpu_timing.Clock(samples)
  copy, matmul_rate = gpu_timing.copy_gb_per_s() * 1e9, matmul_operations_per_s()
  report = timing.Report(
    "experts_gpu",
    output,
    copy_gb_per_s=round(copy / 1e9),
    matmul_tflop_per_s=round(matmul_rate / 1e12),
    method=clock.method,
  )
  report.line(f"\nus; E, I, H, k = {GPU_SIZES}; eff = light / ours; x = ours / matmul")
  report.line(HEAD)
  w2 = make_w2(GPU_SIZES, "bfloat16")
  columns = w2.shape[0] * w2.shape[1]
  packed = {"bfloat16": jnp.transpose(w2, (2, 0, 1)).reshape(w2.shape[2], columns)}
  weights = {"bfloat16": w2, "float8": jax.jit(jax_router.pack_w2)(w2)}
  cases = [
    Case(tokens, *GPU_SIZES, dtype, load)
    for dtype, load in (("bfloat16", "even"), ("bfloat16", "zipf"), ("float8", "even"))
    for tokens in (QUICK_TOKENS if quick else GPU_TOKENS)
  ]
  for run in (1, 2):
    for case in cases:
      with report.attempt(str(case)):
        found = calls(case, weights[case.dtype], packed.get(case.dtype), True)
        options = gpu_timing.COMPILER_OPTIONS
        queues = [
          Queue(jax.jit(f).lower(*args).compile(compiler_options=options), [args])
          for f, args in found.values()
        ]
        times = dict(zip(found, (t.us for t in clock.times(*queues)), strict=True))
        times["wall"] = clock.wall_us(queues[0])
        line(report, case, times, case.light_us(copy, matmul_rate), run)
  report.save()
  return report


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
  report.line(f"\nus; E, I, H, k = {CPU_SIZES}; eff = light / ours; x = ours / matmul")
  report.line("light is of the dense form: experts that are skipped make an efficiency above 1")
  report.line(HEAD)
  for dtype in ("float32", "bfloat16"):
    w2 = make_w2(CPU_SIZES, dtype)
    for tokens in CPU_TOKENS:
      case = Case(tokens, *CPU_SIZES, dtype)
      with report.attempt(str(case)):
        found = calls(case, w2, None, tokens <= CPU_MOST_RAGGED)
        bound = [functools.partial(jax.jit(f), *args) for f, args in found.values()]
        times = [1e3 * ms for ms in timing.compared_ms(bound, samples=samples)]
        light = case.light_us(copy, rate)
        line(report, case, dict(zip(found, times, strict=True)), light, 1)
  report.save()
  return report


def main() -> None:
  command = timing.parser(__doc__)
  command.add_argument("--quick", action="store_true", help="GPU: fewer tokens")
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
