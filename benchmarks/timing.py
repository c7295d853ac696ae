"""What every benchmark shares: timing, the environment, and where results go."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


def median_ms(function: Callable[..., Any], *args: Any, samples: int = 30) -> float:
  """Median wall time of a jitted call in milliseconds, after two calls to warm up."""
  for _ in range(2):
    jax.block_until_ready(function(*args))
  times = []
  for _ in range(samples):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return statistics.median(times) * 1e3


def compared_ms(
  functions: Sequence[Callable[..., Any]], *args: Any, samples: int = 30
) -> list[float]:
  """Median times of several calls, taken in three rounds so that a slow spell hits all alike."""
  rounds = [[median_ms(f, *args, samples=samples // 3 + 1) for f in functions] for _ in range(3)]
  return [statistics.median(times) for times in zip(*rounds, strict=True)]


def dispatch_us(function: Callable[..., Any], *args: Any, calls: int = 5000) -> float:
  """Wall time of one queued jitted call in microseconds: the best of five rounds."""
  jax.block_until_ready(function(*args))
  rounds = []
  for _ in range(5):
    start = time.perf_counter()
    result = None
    for _ in range(calls):
      result = function(*args)
    jax.block_until_ready(result)
    rounds.append((time.perf_counter() - start) / calls)
  return min(rounds) * 1e6


def _output(*command: str) -> str:
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return done.stdout.strip()


def _processor() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    return platform.processor()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()


def environment() -> dict[str, Any]:
  """Device, versions, date and commit, for the head of a result."""
  device = jax.devices()[0]
  found = {
    "device": device.device_kind if device.platform != "cpu" else _processor(),
    "platform": device.platform,
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": importlib.metadata.version("jaxlib"),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    "commit": _output("git", "rev-parse", "--short", "HEAD"),
  }
  if device.platform == "gpu":
    query = ("--query-gpu=driver_version", "--format=csv,noheader")
    found["driver"] = _output("nvidia-smi", *query).partition("\n")[0]
  return found


def parser(description: str | None) -> argparse.ArgumentParser:
  """Command line that all benchmarks share."""
  command = argparse.ArgumentParser(description=description)
  command.add_argument("--output", type=pathlib.Path, help="folder for NAME.json and NAME.txt")
  command.add_argument("--samples", type=int, default=30, help="samples of each time (30)")
  return command


class Report:
  """Prints lines as they come and keeps them, and the rows behind them, for the output folder."""

  def __init__(self, name: str, output: pathlib.Path | None, **measured: Any):
    self.failures = 0
    self._name = name
    self._output = output
    self._lines: list[str] = []
    self._rows: list[dict[str, Any]] = []
    self._environment = environment() | measured
    self.line(", ".join(f"{key} {value}" for key, value in self._environment.items()))

  def line(self, text: str = "") -> None:
    """Prints and keeps one line."""
    print(text)
    sys.stdout.flush()
    self._lines.append(text)

  def row(self, **values: Any) -> None:
    """Keeps the numbers behind a line."""
    self._rows.append(values)

  @contextlib.contextmanager
  def attempt(self, what: str) -> Iterator[None]:
    """Reports and counts an error in its block, so that the rest of a benchmark still runs."""
    try:
      yield
    except Exception as error:
      self.failures += 1
      what = " ".join(what.split())
      reason = str(error).partition("\n")[0]
      self.line(f"FAILED {what}: {type(error).__name__}: {reason}")
      self.row(failed=what, error=f"{type(error).__name__}: {error}")
      traceback.print_exc()

  def save(self) -> None:
    """Writes NAME.json and NAME.txt if an output folder was given."""
    if self._output is None:
      return
    self._output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(self._lines) + "\n"
    (self._output / f"{self._name}.txt").write_text(text, encoding="utf-8")
    # A row a line, so that a diff shows what changed.
    rows = ",\n".join(json.dumps(row) for row in self._rows)
    text = f'{{"environment": {json.dumps(self._environment)},\n"rows": [\n{rows}\n]}}\n'
    (self._output / f"{self._name}.json").write_text(text, encoding="utf-8")
