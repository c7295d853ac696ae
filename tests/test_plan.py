"""`plan` against lists of entries, and against JAX's own stable sort."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
import oracle_plan
from jax_router import Plan

GOLDEN = [[0, 3, 5], [2, 3, 5], [1, 3, 5], [1, 2, 3], [1, 3, 5]]


@functools.cache
def compiled(num_experts: int, implementation: str | None):
  return jax.jit(
    functools.partial(jax_router.plan, num_experts=num_experts, implementation=implementation)
  )


@pytest.fixture
def plan(implementation):
  """`jax_router.plan` under jit, compiled once for each number of experts."""
  return lambda experts, num_experts: compiled(num_experts, implementation)(experts)


@pytest.fixture
def kernel_plan(kernel):
  """`plan` of the kernels only."""
  return lambda experts, num_experts: compiled(num_experts, kernel)(experts)


def check(got: Plan, want):
  """Every integer, and its dtype."""
  for name, value, expected in zip(Plan._fields, got, want, strict=True):
    assert value.dtype == np.int32
    np.testing.assert_array_equal(value, expected, err_msg=name)


def check_against_oracle(got: Plan, experts, num_experts: int):
  check(got, oracle_plan.plan(experts, num_experts))


# ---- values ----


def test_golden_vector(plan):
  got = plan(np.array(GOLDEN, np.int32), 6)
  assert got.order.tolist() == [0, 6, 9, 12, 3, 10, 1, 4, 7, 11, 13, 2, 5, 8, 14]
  assert got.inverse.tolist() == [0, 6, 11, 4, 7, 12, 1, 8, 13, 2, 5, 9, 3, 10, 14]
  assert got.group_sizes.tolist() == [1, 3, 2, 5, 0, 4]


def test_entries_in_no_group(plan):
  got = plan(np.array([[3, 1], [-1, 0], [7, 1], [0, 3]], np.int32), 3)
  assert got.order.tolist() == [3, 6, 1, 5, 0, 2, 4, 7]
  assert got.inverse.tolist() == [4, 2, 5, 0, 6, 3, 1, 7]
  assert got.group_sizes.tolist() == [2, 2, 0]


# Few entries, and sizes around those at which kernels change their way; 9000 tokens of 8 slots are
# cut into blocks by every one.
SIZES = ((1, 1), (1, 5), (7, 3), (33, 8), (127, 9), (512, 4), (683, 6), (1025, 8), (9000, 8))


@pytest.mark.parametrize("num_experts", (1, 7, 256, 2304))
@pytest.mark.parametrize("tokens, k", SIZES)
def test_grid(kernel_plan, tokens, k, num_experts):
  experts = oracle_plan.make_experts("some in no group", tokens, k, num_experts)
  check_against_oracle(kernel_plan(experts, num_experts), experts, num_experts)


@pytest.mark.parametrize("num_experts", (2, 33, 257, 896, 4096, 8192))
@pytest.mark.parametrize("kind", oracle_plan.KINDS)
def test_kinds_of_input(kernel_plan, kind, num_experts):
  for tokens, k in ((97, 5), (2500, 8)):
    experts = oracle_plan.make_experts(kind, tokens, k, num_experts)
    check_against_oracle(kernel_plan(experts, num_experts), experts, num_experts)


@pytest.mark.parametrize("num_experts", (1, 33))
def test_kinds_of_input_of_every_implementation(plan, num_experts):
  for kind in oracle_plan.KINDS:
    experts = oracle_plan.make_experts(kind, 97, 5, num_experts)
    check_against_oracle(plan(experts, num_experts), experts, num_experts)


@pytest.mark.parametrize(
  "tokens, k, num_experts",
  ((4096, 8, 128), (4096, 8, 256), (4096, 22, 512), (2048, 36, 2304), (255, 255, 257)),
)
def test_is_the_stable_sort(plan, tokens, k, num_experts):
  experts = oracle_plan.make_experts("distinct", tokens, k, num_experts)
  got = plan(experts, num_experts)
  order = jnp.argsort(experts.reshape(-1), stable=True)
  check(got, (order, jnp.argsort(order), jnp.bincount(experts.reshape(-1), length=num_experts)))


@pytest.mark.parametrize("shape", ((0, 4), (5, 0), (0, 0), (2, 0, 3), (2, 3, 0), (0, 3, 4)))
def test_nothing_to_sort(plan, shape):
  got = plan(np.zeros(shape, np.int32), 6)
  assert got.order.shape == got.inverse.shape == (*shape[:-2], shape[-2] * shape[-1])
  np.testing.assert_array_equal(got.group_sizes, np.zeros((*shape[:-2], 6), np.int32))


def test_many_experts(plan):
  for tokens, k, num_experts in ((4, 3, 16384), (3000, 8, 16384), (9001, 2, 16383)):
    experts = oracle_plan.make_experts("some in no group", tokens, k, num_experts)
    check_against_oracle(plan(experts, num_experts), experts, num_experts)


@pytest.mark.parametrize("implementation", (None, "cpu", "reference"))
def test_more_experts_than_a_gpu_can_hold(implementation):
  device = None if implementation is None else jax.devices("cpu")[0]
  with jax.default_device(device):
    for tokens, k, num_experts in ((4, 3, 16385), (3000, 8, 65536), (2, 2, 2**20)):
      experts = oracle_plan.make_experts("some in no group", tokens, k, num_experts)
      got = compiled(num_experts, implementation)(experts)
      check_against_oracle(got, experts, num_experts)


@pytest.mark.parametrize(
  "dtype", (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
)
@pytest.mark.parametrize("x64", (False, True))
def test_integer_dtypes(implementation, dtype, x64):
  """Also the extreme values, which int32 cannot always hold, and more experts than a dtype has."""
  num_experts, info = 256, np.iinfo(dtype)
  inside = np.arange(min(num_experts, info.max + 1)).astype(dtype)[::-1]
  extreme = np.array([info.min, info.max, info.max - 1, info.max // 2 + 1, 0, 1], dtype)
  experts = np.concatenate([inside, extreme, inside]).reshape(2, -1)
  if info.bits == 64:  # what the lower half alone would make expert 3
    experts[0, :2] = np.array([2**32 + 3, 2**63 - 2**32 + 3], dtype)
  call = functools.partial(jax_router.plan, implementation=implementation)
  with jax.enable_x64(x64):
    check_against_oracle(call(experts, num_experts), experts, num_experts)
    if info.bits < 64 or x64:
      check_against_oracle(jax.jit(call, static_argnums=1)(experts, 256), experts, num_experts)


def test_routing_and_back(implementation, rng):
  """The plan of a routing with padding: permuting and going back gives every row again."""
  logits = rng.normal(size=(50, 16)).astype(np.float32)
  where = rng.random(50) < 0.8
  routing = jax_router.route(logits, 3, where=where, implementation=implementation)
  got = jax_router.plan(routing.experts, 16, implementation=implementation)
  check_against_oracle(got, routing.experts, 16)
  assert int(got.group_sizes.sum()) == 3 * int(where.sum())
  x = rng.normal(size=150)
  np.testing.assert_array_equal(x[got.order][got.inverse], x)


def test_eager(implementation):
  got = jax_router.plan(np.array(GOLDEN), 6, implementation=implementation)
  check_against_oracle(got, GOLDEN, 6)


def test_repeats_have_the_same_bits(plan):
  experts = jnp.asarray(oracle_plan.make_experts("skewed", 5000, 8, 300))
  first = jax.device_get(plan(experts, 300))
  for _ in range(50):
    check(jax.device_get(plan(experts, 300)), first)


_HASH = """
import hashlib, os, jax, jax_router, oracle_plan
digest = hashlib.sha256()
for tokens, k, experts in ((4096, 8, 128), (2048, 36, 2304), (30000, 8, 65536)):
  ids = oracle_plan.make_experts("some in no group", tokens, k, experts)
  for x in jax.jit(jax_router.plan, static_argnums=1)(ids, experts):
    digest.update(jax.device_get(x).tobytes())
print(digest.hexdigest(), len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_do_not_matter_to_the_bits():
  """Two processes, whose pools have 1 and 4 threads, print the same hash."""
  base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  printed = [
    subprocess.run(
      [sys.executable, "-c", _HASH],
      env=base | {"JAX_PLATFORMS": "cpu", "NPROC": threads},
      cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True,
    ).stdout.split()
    for threads in ("1", "4")
  ]  # fmt: skip
  (one, few), (four, more) = printed
  assert one == four
  assert int(few) < int(more)


# ---- errors ----


def raises(error, pattern, experts, num_experts=4, **options):
  with pytest.raises(error, match=pattern):
    jax_router.plan(experts, num_experts, **options)


def test_errors():
  ids = np.zeros((3, 2), np.int32)
  raises(TypeError, r"experts must be an array, got list", GOLDEN)
  raises(
    TypeError, r"experts must have an integer dtype, got float32", np.zeros((3, 2), np.float32)
  )
  raises(TypeError, r"experts must have an integer dtype, got bool", np.zeros((3, 2), bool))
  raises(ValueError, r"experts must have shape \[\.\.\., T, k\], got \(3,\)", ids[:, 0])
  raises(ValueError, r"num_experts must be between 1 and 16777216, got 0", ids, 0)
  raises(ValueError, r"num_experts must be between 1 and 16777216, got 16777217", ids, 2**24 + 1)
  raises(TypeError, r"num_experts must be a static integer, got float", ids, 4.0)
  raises(TypeError, r"num_experts must be an integer, got True", ids, True)
  raises(ValueError, r"implementation must be one of .*, got 'gpu'", ids, implementation="gpu")


def test_number_of_entries():
  def trace(*shape):
    experts = jax.ShapeDtypeStruct(shape, np.int32)
    return jax.eval_shape(lambda x: jax_router.plan(x, 4), experts)

  assert trace(2**31 - 1, 1).order.shape == (2**31 - 1,)
  assert trace(2, 2**30, 1).order.shape == (2, 2**30)
  with pytest.raises(ValueError, match=r"experts must have at most 2147483647 entries T \* k"):
    trace(2**28, 8)
