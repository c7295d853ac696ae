"""Times on a GPU: kernels by CUPTI, or queued calls by wall clock where CUPTI does not work."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

# Inputs take turns over more than three times the L2 cache (H100: 50 MB, H200: 60 MB). The cap is
# for inputs so small that all of them together stay in the cache.
ROTATION_BYTES = 200_000_000
MAX_INPUTS = 64

# Many kernels in one CUDA graph would be hard to tell apart, so XLA must not build any.
COMPILER_OPTIONS = {"xla_gpu_graph_min_graph_size": 1_000_000}

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Timing(NamedTuple):
  """Median time of a call; names and times of its kernels in order, none if by wall clock."""

  us: float
  kernels: tuple[str, ...]
  kernel_us: tuple[float, ...] = ()


class Queue(NamedTuple):
  """A compiled function, and the arguments of which its calls take turns."""

  function: Callable[..., Any]
  inputs: Sequence[tuple[Any, ...]]

  def run(self, calls: int) -> Any:
    """Queues calls and returns the last result."""
    result = None
    for i in range(calls):
      result = self.function(*self.inputs[i % len(self.inputs)])
    return result


class Clock:
  """Times queues of calls.

  Between two queues runs a marker, a kernel that nothing else here uses, so that one profiling
  session, which takes long to set up, can time several functions.
  """

  def __init__(self, samples: int):
    self._samples = samples
    self._marker = Queue(jax.jit(jnp.cbrt), [(jnp.ones((1,), jnp.float32),)])
    jax.block_until_ready(self._marker.run(2))
    self._sessions, self._session_s = 0, 0.0
    self._marker_name = ""
    try:
      profiler = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
      self._cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
      records = self._record([self._marker])
      self._marker_name = records[0][0]
      if [name for name, _ in records] != [self._marker_name] * (samples + 1):
        raise RuntimeError(f"{samples + 1} calls of one kernel were recorded as {records}")
      self.method = "CUPTI kernel times"
    except Exception as error:
      self._cupti = None
      self.method = f"wall clock over queued calls (no CUPTI: {type(error).__name__}: {error})"

  def launch_us(self) -> float:
    """Time of an almost empty kernel."""
    if self._cupti is None:
      return self._wall(self._marker).us
    marker = statistics.median(ms for _, ms in self._record([self._marker])) * 1e3
    # Shorter than the marker, for it reads nothing. XLA might make a constant of it, no kernel.
    iota = Queue(jax.jit(lambda: jax.lax.iota(jnp.int32, 32)), [()])
    with contextlib.suppress(RuntimeError):
      return min(marker, self.times(iota)[0].us)
    return marker

  def times(self, *queues: Queue) -> list[Timing]:
    """Median time of a call of each queue, over the samples given."""
    for queue in queues:
      # The last inputs, for their turn comes last in what is timed.
      jax.block_until_ready([queue.function(*arguments) for arguments in queue.inputs[-2:]])
    if self._cupti is None:
      return [self._wall(queue) for queue in queues]
    runs: list[list[tuple[str, float]]] = []
    for name, milliseconds in self._record(queues):
      if name == self._marker_name:
        runs.append([])
      elif not runs:
        raise RuntimeError(f"kernel {name} was recorded before the first marker")
      else:
        runs[-1].append((name, milliseconds))
    if len(runs) != len(queues):
      raise RuntimeError(f"{len(runs)} markers were recorded for {len(queues)} queues")
    return [_per_call(run, self._samples) for run in runs]

  def wall_us(self, queue: Queue) -> float:
    """Wall time of a call among many that are queued, what the host takes included."""
    jax.block_until_ready(queue.run(len(queue.inputs)))
    return self._wall(queue).us

  def summary(self) -> str:
    """What the profiling itself cost."""
    return f"{self._sessions} profiling sessions took {self._session_s:.0f} s"

  def _record(self, queues: Sequence[Queue]) -> list[tuple[str, float]]:
    """Name and milliseconds of each kernel: of a marker and the calls, for every queue."""
    assert self._cupti is not None
    start = time.perf_counter()
    # Work still running would be recorded too.
    jax.block_until_ready(self._marker.run(1))
    self._cupti._cupti_init()
    try:
      for queue in queues:
        self._marker.run(1)
        jax.block_until_ready(queue.run(self._samples))
    finally:
      records = self._cupti._cupti_get_timings(True)
    self._sessions += 1
    self._session_s += time.perf_counter() - start
    return records

  def _wall(self, queue: Queue) -> Timing:
    rounds, calls = [], 3 * self._samples
    for _ in range(3):
      start = time.perf_counter()
      jax.block_until_ready(queue.run(calls))
      rounds.append((time.perf_counter() - start) / calls)
    return Timing(statistics.median(rounds) * 1e6, ())


def _per_call(records: Sequence[tuple[str, float]], calls: int) -> Timing:
  """Median over the calls of the sum of a call's kernels."""
  count = len(records) // calls
  runs = [records[i * count : (i + 1) * count] for i in range(calls)]
  names = {tuple(name for name, _ in run) for run in runs}
  if not count or len(records) % calls or len(names) != 1:
    raise RuntimeError(f"{len(records)} kernels in {calls} calls, not the same in each call")
  total = statistics.median(sum(ms for _, ms in run) for run in runs)
  each = (statistics.median(run[i][1] for run in runs) * 1e3 for i in range(count))
  return Timing(total * 1e3, names.pop(), tuple(each))


@dataclasses.dataclass(frozen=True)
class Light:
  """The least time that bytes can take on this device: a launch and a copy."""

  launch_us: float
  copy_gb_per_s: float

  def us(self, size: int) -> float:
    """Microseconds for so many bytes read and written."""
    return self.launch_us + size / (self.copy_gb_per_s * 1e3)


def copy_gb_per_s() -> float:
  """Bytes read and written in a second by copies of 1 GiB, the best of five rounds."""
  copy = jax.jit(jnp.copy)
  x = jnp.ones((2**28,), jnp.float32)
  queue = Queue(copy, [(x,)])
  jax.block_until_ready(queue.run(2))
  rounds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(queue.run(40))
    rounds.append((time.perf_counter() - start) / 40)
  return 2 * x.nbytes / min(rounds) / 1e9


def input_count(size: int) -> int:
  """How many inputs of so many bytes must take turns."""
  return min(MAX_INPUTS, max(2, -(-ROTATION_BYTES // size)))


def compile_all(
  jobs: Mapping[Key, Callable[[], Value]],
) -> dict[Key, concurrent.futures.Future[Value]]:
  """Runs the jobs, which compile, on up to 16 cores. An error waits in its future."""
  with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
    return {key: pool.submit(job) for key, job in jobs.items()}
