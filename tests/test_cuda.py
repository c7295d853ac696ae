"""What only a GPU can show: every CUDA kernel, command buffers, offsets beyond 2**31, repeats."""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import shapes
from jax_router import Groups

pytestmark = pytest.mark.gpu

DTYPES = (np.float32, ml_dtypes.bfloat16)


class Case(NamedTuple):
  """Sizes and options that lead to one kernel of src/cuda/route.cu."""

  name: str
  experts: int
  k: int
  options: tuple[tuple[str, Any], ...] = ()
  biased: bool = False
  map_format: str = "bytemap"

  def arguments(self, implementation: str) -> dict[str, Any]:
    """The options of `route`."""
    found = dict(self.options) | {"implementation": implementation}
    if self.biased:
      rng = np.random.default_rng(self.experts)
      found["bias"] = rng.normal(size=self.experts).astype(np.float32)
    return found


# Weights over all experts: the sum over a row shows, and the backward reads the logits.
OF_ALL = (("renormalize", False),)
# Keys without a rounding but that of the sum, so that the CPU must choose the very same experts.
EXACT = (("score", "none"), ("renormalize", False))

KERNELS = (
  Case("lanes-100", 100, 8),
  Case("lanes-256", 256, 8, OF_ALL),
  Case("lanes-biased", 200, 6, EXACT, biased=True),
  Case("joint-512", 512, 8, OF_ALL),
  Case("joint-1000", 1000, 5),
  Case("single-512", 512, 20, OF_ALL),
  Case("single-biased", 1000, 8, EXACT, biased=True),
  Case("shared-2304", 2304, 36),
  Case("shared-8000", 8000, 22, OF_ALL),
  Case("general-60", 512, 60, OF_ALL),
  Case("general-100", 512, 100),
  Case("general-biased", 2304, 8, EXACT, biased=True),
  Case("general-groups", 256, 8, (("groups", Groups(8, 4, "max")),)),
)

# Rows that no vector load can be aligned with. 255 experts fall into 5 groups.
ODD = tuple(
  case._replace(
    experts=case.experts - 1,
    map_format="bitmap",
    options=(("groups", Groups(5, 3, "max")),) if "groups" in dict(case.options) else case.options,
  )
  for case in KERNELS
)

# So many rows that a warp of the joint kernel takes four.
MANY_ROWS = 8192
JOINT = (
  Case("joint-257", 257, 8, map_format="bitmap"),
  Case("joint-260", 260, 3, OF_ALL),
)

each_kernel = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  with jax.default_device(cuda_device):
    yield cuda_device


def choose(case: Case, implementation: str, logits):
  """The forward alone: weights and experts."""
  return jax_router.route(logits, case.k, **case.arguments(implementation))


def route_both(case: Case, implementation: str, logits) -> dict[str, jax.Array]:
  """Results and gradients of `route` and of `route_dense`: all four custom calls."""
  options = case.arguments(implementation)

  def route(x):
    return tuple(jax_router.route(x, case.k, **options))

  def dense(x):
    return tuple(jax_router.route_dense(x, case.k, map_format=case.map_format, **options))

  weights, pull, experts = jax.vjp(route, logits, has_aux=True)
  probs, pull_dense, routing_map = jax.vjp(dense, logits, has_aux=True)
  return {
    "experts": experts,
    "weights": weights,
    "gradient": pull(logits[:, : case.k].astype(weights.dtype))[0],
    "map": routing_map,
    "probs": probs,
    "dense_gradient": pull_dense(logits)[0],
  }


def on_cpu(function, *arguments):
  """The result of a jitted function on the CPU, as NumPy arrays."""
  with jax.default_device(jax.devices("cpu")[0]):
    return jax.device_get(jax.jit(function)(*jax.device_get(arguments)))


def check_like_cpu(got: dict[str, np.ndarray], want: dict[str, np.ndarray]):
  """Experts and maps must be equal, the rest close."""
  for name in ("experts", "map"):
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)
  np.testing.assert_allclose(got["weights"], want["weights"], rtol=1e-5, atol=1e-30)
  for name in ("gradient", "probs", "dense_gradient"):
    narrow = got[name].dtype != np.float32
    a, b = got[name].astype(np.float32), want[name].astype(np.float32)
    np.testing.assert_allclose(a, b, rtol=2**-7 if narrow else 1e-5, atol=1e-5, err_msg=name)


def check_same_bits(got, want):
  """Two trees of arrays are equal to the bit."""
  got, want = jax.tree.leaves_with_path(got), jax.tree.leaves(want)
  for (path, a), b in zip(got, want, strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


# ---- every kernel ----


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize(
  "cases, tokens",
  ((KERNELS, 37), (ODD, 37), (JOINT, MANY_ROWS + 3)),
  ids=("aligned", "unaligned", "many"),
)
def test_grid(cases, tokens, dtype):
  """Every kernel, in few programs: small enough for compute-sanitizer (tools/gpu.sh)."""
  logits = [shapes.make_logits("random", tokens, case.experts, dtype) for case in cases]

  def run(implementation, logits):
    return [route_both(c, implementation, x) for c, x in zip(cases, logits, strict=True)]

  got = jax.device_get(jax.jit(functools.partial(run, "cuda"))(logits))
  for a, b in zip(got, on_cpu(functools.partial(run, "cpu"), logits), strict=True):
    check_like_cpu(a, b)


# From row, to row: alone, in small and in large batches, and at another place in a warp.
SPANS = ((0, 1), (0, 5), (3, 4099), (5, MANY_ROWS + 5), (0, MANY_ROWS), (0, MANY_ROWS + 8))


@each_kernel
def test_a_row_has_the_same_bits_in_every_batch(case):
  logits = shapes.make_logits("random", MANY_ROWS + 8, case.experts, ml_dtypes.bfloat16)

  def run(x):
    return [choose(case, "cuda", x[a:b]) for a, b in SPANS]

  *parts, whole = jax.device_get(jax.jit(run)(logits))
  for (a, b), part in zip(SPANS, parts, strict=False):
    check_same_bits(part, jax.tree.map(lambda x, a=a, b=b: x[a:b], whole))
  want = on_cpu(functools.partial(choose, case, "cpu"), logits)
  np.testing.assert_array_equal(whole.experts, want.experts)
  np.testing.assert_allclose(whole.weights, want.weights, rtol=1e-5, atol=1e-30)


def adverse_logits(experts: int, k: int, dtype) -> np.ndarray:
  """Rows that fill lists of survivors, overload one lane, or hold hardly a number."""
  rng = np.random.default_rng([experts, k])
  x = rng.normal(size=(5, experts))
  column, chance = np.arange(experts), rng.random(x.shape)
  ranks = rng.permuted(np.broadcast_to(column, x.shape), axis=1)
  kinds = ("tied", "equal", "zeros", "dead", "nan", "plus_inf", "ascending", "descending")
  rows = [shapes.make_logits(kind, 7, experts, np.float32) for kind in kinds]
  rows += [
    rng.choice([-1.5, 0.25], size=x.shape),
    rng.choice([-0.0, 0.0], size=x.shape),
    np.where(column < experts // 2, x + 9, x),
    np.where(column >= experts // 2, 9.0, x),
    np.where(column % 2 == 1, x + 9, x),
    np.where(chance < 0.98, np.nan, x),
    np.where(chance < 0.9, -np.nan, np.where(chance < 0.97, -np.inf, 0.5)),
    # One number too few, just enough, one more; the largest k and all others equal.
    *(np.where(ranks < count, x, -np.inf) for count in (3, k - 1, k, k + 1)),
    np.where(ranks < k, 2.0, 1.0),
    np.where(ranks < k - 1, x + 9, 1.0),
  ]
  # Columns that one lane loads: single ones or by fours, over a warp or over eight lanes.
  for width, lanes in ((1, 32), (4, 32), (1, 8), (4, 8)):
    rows += [np.where(column // width % lanes == lane, x + 9, x)[:2] for lane in (0, 5, lanes - 1)]
  return np.concatenate(rows).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@each_kernel
def test_adverse_rows(case, dtype):
  logits = adverse_logits(case.experts, case.k, dtype)
  got = jax.device_get(jax.jit(functools.partial(choose, case, "cuda"))(logits))
  want = on_cpu(functools.partial(choose, case, "cpu"), logits)
  np.testing.assert_array_equal(got.experts, want.experts)


@each_kernel
def test_repeats_have_the_same_bits(case):
  run = jax.jit(functools.partial(route_both, case, "cuda"))
  logits = jnp.asarray(shapes.make_logits("random", 131, case.experts))
  first = jax.device_get(run(logits))
  for _ in range(200):
    check_same_bits(jax.device_get(run(logits)), first)


# ---- command buffers ----


def count_custom_calls(thunks: str) -> tuple[int, int]:
  """Custom calls inside and outside the command buffers of XLA's dump of its thunks.

  A thunk is a line `NNN: kKind`; those of a command buffer are indented below its own line.
  """
  inside = outside = 0
  in_buffer = False
  for indent, kind in re.findall(r"^( *)\d+: (k\w+)", thunks, re.MULTILINE):
    if not indent:
      in_buffer = kind == "kCommandBuffer"
    if kind == "kCustomCall":
      inside, outside = inside + in_buffer, outside + (not in_buffer)
  return inside, outside


def test_command_buffers(tmp_path):
  """XLA captures every custom call in a CUDA graph, and replays of the graph are right.

  The optimized HLO does not show it: XLA forms command buffers later, from the thunks.
  """

  def run(implementation, logits):
    return [route_both(c, implementation, x) for c, x in zip(KERNELS, logits, strict=True)]

  logits = [jnp.asarray(shapes.make_logits("random", 37, case.experts)) for case in KERNELS]
  compiled = (
    jax.jit(functools.partial(run, "cuda"))
    .lower(logits)
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  targets = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
  words = ("route", "route_backward", "dense", "dense_backward")
  assert sorted(targets) == sorted(f"jax_router_{word}" for word in words for _ in KERNELS)
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps, f"no thunks in the dump: {sorted(path.name for path in tmp_path.iterdir())}"
  for dump in dumps:
    text = dump.read_text()
    assert count_custom_calls(text) == (len(targets), 0), text

  # XLA records a graph in the first runs and updates it when an address changes. So values change
  # in place, where the graph is replayed as it is, and in new arrays.
  change = jax.jit(lambda tree: [jnp.sin(3 * x + 1) for x in tree], donate_argnums=0)
  want = functools.partial(on_cpu, jax.jit(functools.partial(run, "cpu")))
  kept = []
  for i in range(12):
    got = jax.device_get(compiled(logits))
    for a, b in zip(got, want(logits), strict=True):
      check_like_cpu(a, b)
    if i % 4 == 3:
      kept.append(logits)
      logits = [jnp.copy(x) for x in logits]
    before = [x.unsafe_buffer_pointer() for x in logits]
    logits = change(logits)
    assert [x.unsafe_buffer_pointer() for x in logits] == before
  pointers = [x.unsafe_buffer_pointer() for held in (*kept, logits) for x in held]
  assert len(set(pointers)) == 4 * len(KERNELS)


# ---- offsets beyond 2**31 ----

HUGE = Case("huge", 896, 8, OF_ALL)
HUGE_TOKENS = 2_460_000
HUGE_BYTES = 40e9


def make_rows(first, rows: int):
  """Logits out of a hash of row and column: all rows differ, and any of them can be made alone."""
  row = first + jax.lax.broadcasted_iota(jnp.uint32, (rows, HUGE.experts), 0)
  column = jax.lax.broadcasted_iota(jnp.uint32, (rows, HUGE.experts), 1)
  bits = row * np.uint32(2654435761) + column * np.uint32(2246822519)
  bits = (bits ^ (bits >> 15)) * np.uint32(3266489917)
  return ((bits >> 16).astype(jnp.float32) / 8192 - 4).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def run_bands(implementation, first, rows, bands):
  """Results of `rows` rows, cut to some bands of them, and whether all rows chose k experts.

  `first` is no constant, so XLA cannot evaluate the logits while it compiles.
  """
  results = route_both(HUGE, implementation, make_rows(first, rows))
  chosen = jnp.sum(results["map"], axis=1, dtype=jnp.int32)
  found = [{name: x[a:b] for name, x in results.items()} for a, b in bands]
  return found, jnp.all(chosen == HUGE.k)


def test_offsets_beyond_31_bits(cuda_device):
  stats = cuda_device.memory_stats() or {}
  if stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) < HUGE_BYTES:
    pytest.skip(f"fewer than {HUGE_BYTES:.0f} bytes of device memory are free")
  assert HUGE_TOKENS * HUGE.experts > 2**31
  width = 3001
  # The first rows, those with the bytes and with the elements that cross 2**31, and the last.
  middles = (2**30 // HUGE.experts, 2**31 // HUGE.experts)
  starts = (0, *(row - width // 2 for row in middles), HUGE_TOKENS - width)
  bands = tuple((a, a + width) for a in starts)
  found, complete = jax.device_get(run_bands("cuda", np.uint32(0), HUGE_TOKENS, bands))
  assert complete
  for start, got in zip(starts, found, strict=True):
    first, whole = np.uint32(start), ((0, width),)
    alone = jax.device_get(run_bands("cuda", first, width, whole))[0][0]
    check_same_bits(got, alone)
    with jax.default_device(jax.devices("cpu")[0]):
      want = jax.device_get(run_bands("cpu", first, width, whole))[0][0]
    check_like_cpu(got, want)


# ---- shard_map ----


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_the_gpus(on_cuda, check_vma):
  """Choice, weights and gradient in shard_map, over all GPUs there are, are those without it."""
  devices = jax.devices("cuda")
  mesh = jax.make_mesh((len(devices),), ("d",), devices=devices)
  rng = np.random.default_rng(5)
  logits = jax.device_put(rng.normal(size=(8 * len(devices), 256)).astype(np.float32), on_cuda)
  cotangent = jax.device_put(rng.normal(size=(len(logits), 8)).astype(np.float32), on_cuda)

  def step(x, g):
    weights, pull_back, experts = jax.vjp(
      lambda x: tuple(jax_router.route(x, 8, implementation="cuda")), x, has_aux=True
    )
    return weights, experts, pull_back(g)[0]

  tokens = jax.sharding.PartitionSpec("d")
  mapped = jax.shard_map(
    step, mesh=mesh, in_specs=(tokens, tokens), out_specs=tokens, check_vma=check_vma
  )
  sharding = jax.sharding.NamedSharding(mesh, tokens)
  results = jax.jit(mapped)(*jax.device_put((logits, cotangent), sharding))
  for result, expected in zip(results, jax.jit(step)(logits, cotangent), strict=True):
    np.testing.assert_array_equal(result, expected)
