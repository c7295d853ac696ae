"""Loading of the compiled modules, and what is compiled for which platform."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
from jax_router import _native

WORDS = {"route", "route_backward", "dense", "dense_backward"}
LOGITS = jax.ShapeDtypeStruct((16, 32), jnp.float32)


def lowered(platform: str, function=None, **options) -> str:
  function = function or functools.partial(jax_router.route, k=4, **options)
  return jax.jit(function).trace(LOGITS).lower(lowering_platforms=(platform,)).as_text()


def gradient(logits):
  return jax.grad(lambda x: jax_router.route(x, 4).weights[:, 0].sum())(logits)


def test_cpu_module_is_loaded_with_every_handler():
  assert set(_native.platforms()["cpu"]) >= WORDS


def test_runtime_version_is_at_least_the_compiled_one():
  from jax_router import _cpu

  major, minor = _native.runtime_version()
  assert (0, 0) < tuple(_cpu.ffi_api_version()) <= (major, minor)


@pytest.mark.parametrize("newer", ((0, 1), (1, 0)))
def test_newer_module_is_refused(newer):
  runtime = _native.runtime_version()
  compiled = (runtime[0] + newer[0], runtime[1] + newer[1])
  with pytest.raises(
    ImportError, match=rf"_fake was compiled for XLA FFI {compiled[0]}.{compiled[1]}"
  ):
    _native.check_version("jax_router._fake", compiled, runtime)


def test_equal_and_older_modules_are_accepted():
  for compiled in ((0, 3), (0, 2), (0, 0)):
    _native.check_version("jax_router._fake", compiled, (0, 3))
  _native.check_version("jax_router._fake", (0, 9), (1, 0))


def test_newer_module_registers_nothing_and_jax_still_works():
  """In a fresh process: the import fails, no handler was touched, JAX computes."""
  script = """
    import sys, types
    import jax
    touched = []
    fake = types.ModuleType("jax_router._cpu")
    fake.ffi_api_version = lambda: (99, 0)
    fake.handlers = lambda: touched.append("handlers") or {}
    jax.ffi.register_ffi_target = lambda *args, **kwargs: touched.append("register")
    sys.modules["jax_router._cpu"] = fake
    try:
      import jax_router
    except ImportError as error:
      assert "99.0" in str(error), error
    else:
      raise AssertionError("a newer module was accepted")
    assert not touched, touched
    assert float(jax.jit(lambda x: x + 1)(1.0)) == 2.0
    print("still works")
  """
  result = subprocess.run(
    [sys.executable, "-P", "-c", textwrap.dedent(script)],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  assert "still works" in result.stdout


def test_missing_cuda_module_leaves_the_cpu(monkeypatch):
  monkeypatch.setitem(_native._MODULES, "cuda", "jax_router._not_built")
  assert set(_native.platforms.__wrapped__()) == {"cpu"}


@pytest.mark.parametrize("platform", ("tpu", "rocm"))
def test_other_platforms_get_plain_jax(platform):
  for text in (lowered(platform, score="sigmoid"), lowered(platform, gradient)):
    assert "@jax_router" not in text
    assert "top_k" in text or "stablehlo.sort" in text


@pytest.mark.parametrize("platform", ("tpu", "rocm"))
def test_a_kernel_asked_for_is_not_replaced(platform):
  with pytest.raises(ValueError, match="implementation='cpu' of route cannot run here"):
    lowered(platform, implementation="cpu")


def test_cpu_gets_the_kernels():
  assert "@jax_router_route(" in lowered("cpu")
  assert "@jax_router_route_backward(" in lowered("cpu", gradient)
  assert "@jax_router" not in lowered("cpu", implementation="reference")


def test_cuda_lowering_follows_the_build():
  """Code for NVIDIA GPUs can be made on any host, with the kernel where its module was built."""
  built = "route" in _native.platforms().get("cuda", ())
  assert ("@jax_router_route(" in lowered("cuda")) == built


def test_other_platforms_compute_the_same():
  """What other platforms get runs on the CPU as implementation="reference"."""
  logits = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
  plain = jax_router.route(logits, 4, implementation="reference")
  kernel = jax_router.route(logits, 4)
  np.testing.assert_array_equal(plain.experts, kernel.experts)
  np.testing.assert_allclose(plain.weights, kernel.weights, rtol=1e-6)


def test_export_checks_name_every_target():
  names = {str(check) for check in jax_router.DISABLE_JAX_EXPORT_CHECKS}
  for word in WORDS:
    assert any(name.endswith(f"jax_router_{word}") for name in names), names
