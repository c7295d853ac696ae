"""Loads the compiled modules, checks their FFI version, and registers their handlers with XLA.

XLA refuses handlers compiled against headers newer than its own, and on the CPU that refusal breaks
every JAX call of the process. So the versions are compared before anything is registered.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import re
from types import ModuleType

import jax
import jax.export

_MODULES = {"cpu": "jax_router._cpu", "cuda": "jax_router._cuda"}
_XLA_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}


def runtime_version() -> tuple[int, int]:
  """FFI API version (major, minor) of the installed jaxlib, read from its headers."""
  header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
  text = header.read_text(encoding="utf-8")
  found = re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text)
  version = {name: int(number) for name, number in found}
  return version["MAJOR"], version["MINOR"]


def check_version(name: str, compiled: tuple[int, int], runtime: tuple[int, int]) -> None:
  """ImportError if a module was compiled for a newer FFI than the installed jaxlib has."""
  if compiled > runtime:
    raise ImportError(
      f"{name} was compiled for XLA FFI {compiled[0]}.{compiled[1]}, but the installed jaxlib has "
      f"{runtime[0]}.{runtime[1]}. Upgrade jax and jaxlib, or rebuild jax_router with build "
      "isolation (plain `pip install .`), which compiles against the oldest supported headers."
    )


def _import(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ImportError(
      f"{name} is not built. If this is the source tree, install it with `pip install .` and run "
      "Python from another folder, or install it with `pip install -e .`"
    ) from error


def _load(platform: str, runtime: tuple[int, int]) -> tuple[str, ...]:
  module = _import(_MODULES[platform])
  check_version(module.__name__, module.ffi_api_version(), runtime)
  handlers = module.handlers()
  for word, capsule in handlers.items():
    target = f"jax_router_{word}"
    jax.ffi.register_ffi_target(target, capsule, platform=_XLA_PLATFORMS[platform])
  return tuple(handlers)


@functools.cache
def platforms() -> dict[str, tuple[str, ...]]:
  """Platforms with a compiled module, and the words each module has a handler for."""
  runtime = runtime_version()
  found = {"cpu": _load("cpu", runtime)}
  if importlib.util.find_spec(_MODULES["cuda"]) is not None:
    found["cuda"] = _load("cuda", runtime)
  return found


def max_fused_tokens(experts: int, k: int, group_count: int, device: int) -> int:
  """What the CUDA module says of `route_and_plan_blocks` on a GPU; 0 without the module."""
  if "cuda" not in platforms():
    return 0
  return _import(_MODULES["cuda"]).max_fused_tokens(experts, k, group_count, device)


def experts_run(device: int) -> bool:
  """Whether the CUDA module has the kernel of `dense_moe_fc2` for a GPU, by its number."""
  return "cuda" in platforms() and _import(_MODULES["cuda"]).experts_run(device)


def experts_scratch(float8: bool, tokens: int, experts: int, depth: int, hidden: int) -> int:
  """Elements of 4 bytes that this kernel wants beside its result; the module must be there."""
  return _import(_MODULES["cuda"]).experts_scratch(float8, tokens, experts, depth, hidden)


@functools.cache
def _has_gpu() -> bool:
  try:
    return bool(jax.devices("cuda"))
  except RuntimeError:
    return False


def check_implementation(implementation: str | None) -> None:
  """ValueError if the implementation asked for is not there."""
  if implementation in (None, "reference"):
    return
  if implementation not in platforms():
    raise ValueError(
      f"implementation={implementation!r} is not there: this build of jax_router has no "
      f"{implementation} module (it has {', '.join(platforms())})"
    )
  if implementation == "cuda" and not _has_gpu():
    raise ValueError("implementation='cuda' is not there: JAX sees no CUDA device")


DISABLE_JAX_EXPORT_CHECKS = tuple(
  jax.export.DisabledSafetyCheck.custom_call(f"jax_router_{word}")
  for word in sorted({word for words in platforms().values() for word in words})
)
"""Pass as `disabled_checks` to `jax.export.export`: our custom calls are stable targets."""
