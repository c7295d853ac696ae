"""Times `route` and its gradient against XLA's top-k and softmax, in one process.

    python benchmarks/route.py [--output benchmarks/results] [--quick]

On a GPU it times kernels, those of `route_dense` too: see route_gpu.py.

On the CPU a step is the choice and the gradient of the logits for a random cotangent of the
weights. XLA's side is what one writes without this package: `jax.lax.top_k` of the logits and a
softmax over the k chosen.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

import cases
import jax_router
import route_gpu
import timing

SHAPES = ((4096, 64, 2), (4096, 128, 8), (4096, 256, 8), (4096, 512, 22), (2048, 2304, 36))
OPTIONS = {
  "softmax": {},
  "softmax over all": {"renormalize": False},
  "sigmoid + bias": {"score": "sigmoid", "bias": True},
  "sigmoid + bias, 8 groups keep 4": {
    "score": "sigmoid",
    "bias": True,
    "groups": jax_router.Groups(8, 4),
  },
}


def ours(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The package, best implementation for the platform."""
  weights, experts = jax_router.route(x, k)
  return weights, experts


def forward_and_step(choose: Callable, k: int) -> tuple[Callable, Callable]:
  """Jitted forward and forward + backward of `choose`."""

  def step(x, cotangent):
    weights, pull_back, experts = jax.vjp(lambda x: choose(x, k), x, has_aux=True)
    return weights, experts, pull_back(cotangent)

  return jax.jit(lambda x, _: choose(x, k)), jax.jit(step)


def compare_with_xla(report: timing.Report, samples: int) -> None:
  """Forward and step at the main shapes."""
  report.line(f"\n{'float32, ms':22}{'forward':>9}{'XLA':>9}{'':>8}{'step':>9}{'XLA':>9}")
  ratios = []
  for tokens, experts, k in SHAPES:
    x = jax.random.normal(jax.random.key(0), (tokens, experts))
    cotangent = jax.random.normal(jax.random.key(1), (tokens, k))
    functions = forward_and_step(ours, k) + forward_and_step(cases.xla_route, k)
    forward, step, xla_forward, xla_step = timing.compared_ms(
      functions, x, cotangent, samples=samples
    )
    ratios.append((xla_forward / forward, xla_step / step))
    report.line(
      f"{f'T={tokens} E={experts} k={k}':22}{forward:9.3f}{xla_forward:9.3f}"
      f"{ratios[-1][0]:7.1f}x{step:9.3f}{xla_step:9.3f}{ratios[-1][1]:7.1f}x"
    )
    report.row(
      tokens=tokens,
      experts=experts,
      k=k,
      forward_ms=forward,
      step_ms=step,
      xla_forward_ms=xla_forward,
      xla_step_ms=xla_step,
    )
  means = [math.prod(r[i] for r in ratios) ** (1 / len(ratios)) for i in (0, 1)]
  report.line(f"geometric mean: forward {means[0]:.1f}x, step {means[1]:.1f}x")
  report.row(forward_speedup=means[0], step_speedup=means[1])


def compare_options(report: timing.Report, samples: int) -> None:
  """Forward and step of the other options beside the plain JAX reference of the same."""
  tokens, experts, k = 4096, 256, 8
  report.line(f"\nT={tokens} E={experts} k={k}, ms; beside it the reference (plain JAX)")
  for name, options in OPTIONS.items():
    for dtype in ("float32", "bfloat16"):
      x = jax.random.normal(jax.random.key(0), (tokens, experts)).astype(dtype)
      cotangent = jax.random.normal(jax.random.key(1), (tokens, k))
      kwargs = dict(options)
      if kwargs.pop("bias", False):
        kwargs["bias"] = jax.random.normal(jax.random.key(2), (experts,)) * 0.1

      def choose(x, k, implementation=None, kwargs=kwargs):
        return tuple(jax_router.route(x, k, implementation=implementation, **kwargs))

      functions = forward_and_step(choose, k)
      functions += forward_and_step(lambda x, k, choose=choose: choose(x, k, "reference"), k)
      times = timing.compared_ms(functions, x, cotangent, samples=samples)
      report.line(
        f"{name:34}{dtype:10} forward {times[0]:7.3f} ({times[2]:7.3f})"
        f"   step {times[1]:7.3f} ({times[3]:7.3f})"
      )
      report.row(option=name, dtype=dtype, forward_ms=times[0], step_ms=times[1])


def compare_inputs(report: timing.Report, samples: int) -> None:
  """Forward times on adverse inputs."""
  for tokens, experts, k in ((4096, 256, 8), (2048, 2304, 36)):
    report.line(f"\nT={tokens} E={experts} k={k}, forward by input, ms")
    choose = jax.jit(lambda x, k=k: ours(x, k))
    inputs = cases.adverse_inputs(tokens, experts)
    times = {
      name: timing.median_ms(choose, jnp.asarray(x), samples=samples) for name, x in inputs.items()
    }
    for name, time in times.items():
      report.line(f"{name:34}{time:7.3f}{time / times['random']:7.2f}x random")
      report.row(tokens=tokens, experts=experts, k=k, input=name, forward_ms=time)


def compare_dispatch(report: timing.Report) -> None:
  """Cost of a jitted call on a tiny input."""
  x = jnp.zeros((4, 16))
  route = timing.dispatch_us(jax.jit(lambda x: ours(x, 2)), x)
  empty = timing.dispatch_us(jax.jit(lambda x: (x[:, :2] + 1, x[:, :2] + 2)), x)
  report.line(
    f"\njitted call on a [4, 16] input: {route:.1f} us; a jitted function that only adds,"
    f" of as many results: {empty:.1f} us ({route / empty:.2f}x)"
  )
  report.row(dispatch_us=route, empty_dispatch_us=empty)


def run_cpu(output: pathlib.Path | None, samples: int) -> timing.Report:
  """All comparisons of the CPU."""
  report = timing.Report(f"route_{jax.default_backend()}", output)
  compare_with_xla(report, samples)
  compare_options(report, samples)
  compare_inputs(report, samples)
  compare_dispatch(report)
  report.save()
  return report


def main() -> None:
  command = timing.parser(__doc__)
  command.add_argument("--quick", action="store_true", help="GPU: T = 8192 alone, 10 samples")
  arguments = command.parse_args()
  if jax.default_backend() == "gpu":
    report = route_gpu.run(arguments.output, arguments.samples, arguments.quick)
  elif arguments.quick:
    command.error("--quick is for GPUs")
  else:
    report = run_cpu(arguments.output, arguments.samples)
  sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
  main()
