"""What only a GPU can show of `route_and_assign_replicas`: kernels, repeats, command buffers."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import oracle_replicas
import shapes
from jax_router import assign_replicas, route, route_and_assign_replicas
from test_cuda import KERNELS, ODD, Case, check_same_bits, count_custom_calls, on_cpu

pytestmark = pytest.mark.gpu

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
GIVEN = Case("general-given", 256, 8)
CASES = (*KERNELS, *ODD, Case("joint-260", 260, 8), Case("shared-4096", 4096, 8), GIVEN)
TOKENS = (1, 67, 8197)  # so many that a warp of the joint kernel takes four
RULES = (("hash", "physical"), ("xorshift", "logical"), ("hash", "logical"))


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  with jax.default_device(cuda_device):
    yield cuda_device


def make_table(num_experts: int):
  return oracle_replicas.make_table(np.random.default_rng(num_experts), num_experts, 3)


def operands(case: Case, tokens: int) -> dict[str, np.ndarray]:
  """Padding and, for that case, given experts."""
  rng = np.random.default_rng([tokens, case.experts])
  found = {"where": rng.random(tokens) < 0.9}
  if case is GIVEN:
    found["experts"] = rng.integers(-1, case.experts + 1, (tokens, case.k)).astype(np.int32)
  return found


def replicas_of(case: Case, policy: str, load: str):
  table, counts, num_physical = make_table(case.experts)
  static = {"num_physical": num_physical, "policy": policy, "load": load, "token_offset": 5}
  return (table, counts), static


def fused(case, implementation, logits, given, policy="hash", load="physical"):
  tables, static = replicas_of(case, policy, load)
  options = case.arguments(implementation) | static
  return route_and_assign_replicas(logits, case.k, *tables, **options, **given)


def chain(case, implementation, logits, given, policy="hash", load="physical"):
  tables, static = replicas_of(case, policy, load)
  routing = route(logits, case.k, **case.arguments(implementation), **given)
  return routing, *assign_replicas(
    routing.experts, *tables, where=given["where"], implementation=implementation, **static
  )


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.experts}")
def test_kernels(case, tokens, dtype):
  """The bits of the chain, and the integers of the CPU."""
  given = operands(case, tokens)
  logits = shapes.make_logits("random", tokens, case.experts, dtype)
  static = dict(zip(("policy", "load"), RULES[TOKENS.index(tokens)], strict=True))
  got, want = (
    jax.device_get(jax.jit(functools.partial(f, case, "cuda", **static))(logits, given))
    for f in (fused, chain)
  )
  check_same_bits(got, want)
  of_cpu = on_cpu(functools.partial(fused, case, "cpu", **static), logits, given)
  check_same_bits((got[0].experts, *got[1:]), (of_cpu[0].experts, *of_cpu[1:]))
  assert got[2].sum() == (got[0].experts < case.experts).sum()
  assert got[2].any() or tokens == 1


@pytest.mark.parametrize("case", CASES[:13], ids=lambda case: case.name)
@pytest.mark.parametrize("tokens", (64, 8192))
def test_a_hundred_repeats_have_the_same_bits(case, tokens):
  """The load is clear before any block adds to it, whatever filled its memory before."""
  given = operands(case, tokens)
  logits = jax.device_put(shapes.make_logits("random", tokens, case.experts, ml_dtypes.bfloat16))
  run = jax.jit(functools.partial(fused, case, "cuda"))
  first = jax.device_get(run(logits, given))
  check_same_bits(
    first, jax.device_get(jax.jit(functools.partial(chain, case, "cuda"))(logits, given))
  )
  for i in range(100):
    rubbish = [jnp.full(x.shape, i + 1, x.dtype) for x in jax.tree.leaves(first)]
    del rubbish
    check_same_bits(jax.device_get(run(logits, given)), first)


def test_many_calls_in_one_program(rng):
  """Each result is read by the next kernel, and memory is used again and again."""
  case = KERNELS[1]
  tokens = 512
  given = {"where": np.ones(tokens, bool)}
  logits = shapes.make_logits("random", tokens, case.experts)

  def run(function):
    def step(carry, _):
      shift, total = carry
      routing, physical, load = function(case, "cuda", logits + shift, given)
      moved = jnp.sum(load * jnp.arange(load.size)) + jnp.sum(physical)
      shift = shift + routing.weights.sum() * np.float32(1e-3)
      return (shift, total + load), moved

    start = jnp.float32(0), jnp.zeros(make_table(case.experts)[2], jnp.int32)
    return jax.jit(lambda: jax.lax.scan(step, start, None, length=50))()

  check_same_bits(jax.device_get(run(fused)), jax.device_get(run(chain)))


@pytest.mark.parametrize("batch, tokens", ((300, 7), (9, 500)))
def test_batch_rows_with_offsets(rng, batch, tokens):
  tables = [oracle_replicas.make_table(rng, 64, 3)[:2] for _ in range(batch)]
  table, counts = (np.stack(x) for x in zip(*tables, strict=True))
  offsets = rng.integers(0, 2**32, batch, dtype=np.uint32)
  logits = shapes.make_logits("random", batch * tokens, 64).reshape(batch, tokens, 64)

  def run(logits, table, counts, offset):
    static = {"num_physical": 192, "load": "physical", "implementation": "cuda"}
    return route_and_assign_replicas(logits, 4, table, counts, token_offset=offset, **static)

  routing, physical, load = jax.device_get(jax.jit(jax.vmap(run))(logits, table, counts, offsets))
  for i in range(0, batch, max(1, batch // 20)):
    want = oracle_replicas.assign(
      routing.experts[i], *tables[i], num_physical=192, load="physical", offset=int(offsets[i])
    )
    check_same_bits((physical[i], load[i]), [x.astype(np.int32) for x in want])


def test_no_tokens_clear_the_load():
  case = KERNELS[0]
  logits, given = np.zeros((0, case.experts), np.float32), {"where": np.zeros(0, bool)}
  assert not jax.jit(functools.partial(fused, case, "cuda"))(logits, given)[2].any()


def test_command_buffers(tmp_path):
  """XLA captures the clearing and the kernel that overlaps it; replays are right."""
  cases, tokens = (KERNELS[1], KERNELS[3], KERNELS[7], KERNELS[9]), 300
  given = {"where": np.ones(tokens, bool)}
  logits = [jnp.asarray(shapes.make_logits("random", tokens, c.experts)) for c in cases]

  def run(*logits):
    return [fused(c, "cuda", x, given) for c, x in zip(cases, logits, strict=True)]

  compiled = (
    jax.jit(run)
    .lower(*logits)
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  targets = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
  assert targets == ["jax_router_route_and_assign_replicas"] * 4
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps
  for dump in dumps:
    assert count_custom_calls(dump.read_text()) == (4, 0)
  chains = jax.jit(lambda *xs: [chain(c, "cuda", x, given) for c, x in zip(cases, xs, strict=True)])
  for _ in range(5):
    check_same_bits(jax.device_get(compiled(*logits)), jax.device_get(chains(*logits)))
    logits = [-x * 3 + 1 for x in logits]
