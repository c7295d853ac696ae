"""Times `route` and its gradient against XLA's top-k and softmax, in one process.

    python benchmarks/route.py [--output benchmarks/results]

A step is the choice and the gradient of the logits for a random cotangent of the weights. XLA's
side is what one writes without this package: `jax.lax.top_k` of the logits and a softmax over the k
chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jax_router
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


def xla(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The same in plain JAX."""
  best, experts = jax.lax.top_k(x, k)
  return jax.nn.softmax(best, axis=-1), experts


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
    functions = forward_and_step(ours, k) + forward_and_step(xla, k)
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


def adverse_inputs(tokens: int, experts: int) -> dict[str, np.ndarray]:
  """Random rows, and rows that could slow a selection down."""
  rng = np.random.default_rng(0)
  random = rng.standard_normal((tokens, experts)).astype(np.float32)
  one_lane = random.copy()
  one_lane[:, ::64] += 100
  half_lanes = random.copy()
  half_lanes[:, np.arange(experts) % 64 < 18] += 100
  return {
    "random": random,
    "ascending": np.sort(random, axis=-1),
    "descending": -np.sort(-random, axis=-1),
    "all equal": np.zeros_like(random),
    "two values": np.sign(random),
    "large values in one lane": one_lane,
    "large values in half the lanes": half_lanes,
  }


def compare_inputs(report: timing.Report, samples: int) -> None:
  """Forward times on adverse inputs."""
  for tokens, experts, k in ((4096, 256, 8), (2048, 2304, 36)):
    report.line(f"\nT={tokens} E={experts} k={k}, forward by input, ms")
    choose = jax.jit(lambda x, k=k: ours(x, k))
    inputs = adverse_inputs(tokens, experts)
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


def main() -> None:
  arguments = timing.parser(__doc__).parse_args()
  report = timing.Report(f"route_{jax.default_backend()}", arguments.output)
  compare_with_xla(report, arguments.samples)
  compare_options(report, arguments.samples)
  compare_inputs(report, arguments.samples)
  compare_dispatch(report)
  report.save()


if __name__ == "__main__":
  main()
