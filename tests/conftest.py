"""Settings and fixtures of all tests."""

from __future__ import annotations

import functools
import os

# Read when JAX starts its CPU backend, so before the import; a GPU backend is not affected.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_router

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def cuda_device():
  """The first CUDA device, None where JAX has none."""
  try:
    return jax.devices("cuda")[0]
  except RuntimeError:
    return None


KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _on_its_device(implementation: str, cuda_device):
  if implementation == "cuda" and cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  device = cuda_device if implementation == "cuda" else jax.devices("cpu")[0]
  with jax.default_device(device):
    yield implementation


@pytest.fixture(params=["reference", *KERNELS])
def implementation(request, cuda_device):
  """Every implementation in turn, with its device as the default one."""
  yield from _on_its_device(request.param, cuda_device)


@pytest.fixture(params=KERNELS)
def kernel(request, cuda_device):
  """Every implementation but the reference, for larger grids and comparisons with the reference."""
  yield from _on_its_device(request.param, cuda_device)


@functools.cache
def _compiled(word: str, differentiate: bool, k: int, static: tuple):
  function = getattr(jax_router, word)

  def values_and_result(logits, operands):
    result = function(logits, k, **operands, **dict(static))
    return result[0], result

  def forward(logits, operands):
    return values_and_result(logits, operands)[1]

  def forward_and_gradient(logits, cotangent, operands):
    _, vjp, result = jax.vjp(lambda x: values_and_result(x, operands), logits, has_aux=True)
    return result, vjp(cotangent)[0]

  return jax.jit(forward_and_gradient if differentiate else forward)


def _split(options: dict) -> tuple[tuple, dict]:
  names = [name for name in ("bias", "where", "experts") if options.get(name) is not None]
  static = {name: v for name, v in options.items() if name not in ("bias", "where", "experts")}
  return tuple(sorted(static.items())), {name: options[name] for name in names}


def _router(word: str, implementation: str):
  def call(logits, k, **options):
    static, operands = _split(options | {"implementation": implementation})
    return _compiled(word, False, k, static)(logits, operands)

  return call


def _differentiator(word: str, implementation: str):
  def call(logits, k, cotangent, **options):
    static, operands = _split(options | {"implementation": implementation})
    return _compiled(word, True, k, static)(logits, cotangent, operands)

  return call


@pytest.fixture
def route(implementation):
  """`jax_router.route` under jit, compiled once for each set of static options."""
  return _router("route", implementation)


@pytest.fixture
def kernel_route(kernel):
  """`route` of the kernels only."""
  return _router("route", kernel)


@pytest.fixture
def route_and_gradient(implementation):
  """`(logits, k, cotangent, **options) -> (Routing, gradient of the logits)`, under jit."""
  return _differentiator("route", implementation)


@pytest.fixture
def kernel_route_and_gradient(kernel):
  """`route_and_gradient` of the kernels only."""
  return _differentiator("route", kernel)


@pytest.fixture
def route_dense(implementation):
  """`jax_router.route_dense` under jit, compiled once for each set of static options."""
  return _router("route_dense", implementation)


@pytest.fixture
def kernel_route_dense(kernel):
  """`route_dense` of the kernels only."""
  return _router("route_dense", kernel)


@pytest.fixture
def route_dense_and_gradient(implementation):
  """`(logits, k, cotangent, **options) -> (DenseRouting, gradient of the logits)`, under jit."""
  return _differentiator("route_dense", implementation)


@pytest.fixture
def kernel_route_dense_and_gradient(kernel):
  """`route_dense_and_gradient` of the kernels only."""
  return _differentiator("route_dense", kernel)


@pytest.fixture
def route_with_stats(implementation):
  """`jax_router.route_with_stats` under jit, compiled once for each set of static options."""
  return _router("route_with_stats", implementation)


@pytest.fixture
def kernel_route_with_stats(kernel):
  """`route_with_stats` of the kernels only."""
  return _router("route_with_stats", kernel)


@functools.cache
def _compiled_stats_gradient(k: int, static: tuple):
  def forward_and_gradient(logits, cotangents, operands):
    def values_and_result(x):
      routing, stats = jax_router.route_with_stats(x, k, **operands, **dict(static))
      values = {"weights": routing.weights, "score_sums": stats.score_sums, "z_sum": stats.z_sum}
      return {name: values[name] for name in cotangents}, (routing, stats)

    _, vjp, result = jax.vjp(values_and_result, logits, has_aux=True)
    return result, vjp(cotangents)[0]

  return jax.jit(forward_and_gradient)


def _stats_differentiator(implementation: str):
  def call(logits, k, cotangents, **options):
    static, operands = _split(options | {"implementation": implementation})
    return _compiled_stats_gradient(k, static)(logits, cotangents, operands)

  return call


@pytest.fixture
def stats_and_gradient(implementation):
  """`(logits, k, cotangents, **options) -> ((Routing, RouterStats), gradient)`, under jit.

  `cotangents`: a dict of those of weights, score_sums and z_sum; the others are not used.
  """
  return _stats_differentiator(implementation)


@pytest.fixture
def kernel_stats_and_gradient(kernel):
  """`stats_and_gradient` of the kernels only."""
  return _stats_differentiator(kernel)


@pytest.fixture
def make_mesh():
  """`(kind, sizes) -> Mesh` over 8 devices with axes "d" and, for two sizes, "m"."""
  if len(jax.devices()) < 8:
    pytest.skip("sharding is tested on 8 devices of the default backend")

  def make(kind: AxisType, sizes: tuple[int, ...] = (8,)):
    names = ("d", "m")[: len(sizes)]
    return jax.make_mesh(sizes, names, (kind,) * len(sizes), devices=jax.devices()[:8])

  return make


@pytest.fixture
def rng():
  """Random numbers, the same in every run."""
  return np.random.default_rng(2024)
