"""What only a GPU shows of `dense_moe_fc2`: every kernel, where sums are cut, command buffers."""

from __future__ import annotations

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_router
import oracle_experts as oracle
from jax_router import PackedW2, dense_moe_fc2, pack_w2
from test_cuda import check_same_bits, count_custom_calls

pytestmark = pytest.mark.gpu

BFLOAT16, FLOAT16, FLOAT8 = ml_dtypes.bfloat16, np.float16, oracle.FLOAT8
TYPES = pytest.mark.parametrize(
  "dtype", (BFLOAT16, FLOAT16, FLOAT8), ids=lambda dtype: np.dtype(dtype).name
)


@pytest.fixture(autouse=True)
def on_cuda(cuda_device):
  """The CUDA device as the default one."""
  if cuda_device is None:
    pytest.skip("JAX sees no CUDA device")
  oracle.skip_without_kernel("cuda")
  with jax.default_device(cuda_device):
    yield cuda_device


@functools.cache
def compiled(out_dtype=np.float32):
  def run(h, w2, alpha, h_scale):
    return dense_moe_fc2(
      h, w2, alpha, h_scale=h_scale, out_dtype=out_dtype, implementation="cuda"
    )  # fmt: skip

  return jax.jit(run)


def make_case(tokens, experts, depth, width, k, dtype, kind="top-k"):
  """Arguments of the compiled function; in float8 w2 is packed and I is rounded up to 128."""
  if dtype != FLOAT8:
    return *oracle.make_operands(tokens, experts, depth, width, k, dtype, kind), None
  depth = oracle.round_up(depth, 128)
  h, w2, alpha = oracle.make_operands(tokens, experts, depth, width, k, np.float32, kind)
  q, scale = oracle.quantize_h(h)
  return q, jax.tree.map(np.asarray, pack_w2(w2)), alpha, scale


def expected(h, w2, alpha, h_scale) -> oracle.Sum:
  """The sum in float64."""
  if h_scale is None:
    return oracle.fc2(h, w2, alpha)
  return oracle.fc2(*oracle.dequantize(h, h_scale, w2), alpha, oracle.FLOAT8_SUMS)


def check(case, out_dtype=np.float32) -> np.ndarray:
  got = np.asarray(compiled(out_dtype)(*case))
  want = expected(*case)
  want.check(got, out_dtype)
  if np.abs(want.values).max(initial=0) > 0:
    assert oracle.relative_error(got, want.values) < 4e-3
  return got


# ---- every kernel ----

# Tokens, experts, I, H, k. Tokens on each side of every width of a tile and of one tile; one expert
# and one tile; sizes that no tile divides; more experts than a word of the mask has bits.
GRID = (
  (0, 3, 64, 8, 1), (1, 1, 64, 8, 1), (7, 3, 128, 136, 2), (16, 8, 64, 264, 3), (17, 61, 64, 72, 4),
  (33, 3, 192, 520, 2), (65, 8, 64, 128, 8), (97, 5, 64, 8, 2), (113, 33, 64, 136, 3),
  (129, 3, 64, 264, 1), (145, 7, 64, 72, 2), (161, 2, 64, 1000, 1), (193, 5, 128, 264, 2),
  (385, 4, 64, 136, 2),
)  # fmt: skip


@TYPES
def test_grid(dtype):
  """Small enough for compute-sanitizer (tools/gpu.sh)."""
  for i, shape in enumerate(GRID):
    out_dtype = (np.float32, BFLOAT16, FLOAT16)[i % 3]
    check(make_case(*shape, dtype, "some without" if i % 2 else "signed"), out_dtype)


SIZES = ((1, 64), (3, 128), (8, 256), (60, 256), (131, 768))
WIDTHS = (128, 136, 2048, 2880)
TOKENS = (
  1, 7, 8, 63, 64, 65, 127, 128, 129, 192, 224, 225, 256, 257, 288, 384, 512, 700
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
@TYPES
def test_larger_grid(dtype, tokens):
  """All tokens, each with other sizes."""
  at = TOKENS.index(tokens)
  for i in range(2):
    experts, depth = SIZES[(at + 2 * i) % len(SIZES)]
    width = WIDTHS[(at // 2 + i) % len(WIDTHS)]
    if experts * depth * width <= 10**8:
      check(make_case(tokens, experts, depth, width, min(8, experts), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", (16, 128, 288))
@pytest.mark.parametrize("dtype", (BFLOAT16, FLOAT8), ids=("bfloat16", "float8"))
def test_sizes_of_deepseek(dtype, tokens):
  """Some columns of the result, of each kind of tile along H."""
  experts, depth, width, k = 256, 256, 7168, 8
  h = jax.random.normal(jax.random.key(0), (tokens, experts, depth), jnp.bfloat16)
  w2 = jax.random.normal(jax.random.key(1), (experts, depth, width), jnp.bfloat16)
  alpha = oracle.make_alpha("top-k", tokens, experts, k)
  columns = np.r_[0:64, 3500:3564, 7104:7168]
  part = np.asarray(w2[:, :, columns])
  if dtype == BFLOAT16:
    want = oracle.fc2(np.asarray(h), part, alpha)
    got = compiled()(h, w2, alpha, None)
  else:
    packed = jax.jit(pack_w2)(w2)
    del w2
    q, scale = oracle.quantize_h(np.asarray(h))
    rows = np.asarray(packed.q[columns]).astype(np.float64)
    rows *= np.repeat(np.asarray(packed.scale)[columns // 128], 128, axis=1)
    part = np.moveaxis(rows.reshape(len(columns), experts, depth), 0, 2)
    ones = PackedW2(np.ones((1, experts * depth)), np.ones((1, experts * depth // 128)))
    want = oracle.fc2(oracle.dequantize(q, scale, ones)[0], part, alpha, oracle.FLOAT8_SUMS)
    got = compiled()(q, packed, alpha, scale)
  got = np.asarray(got)[:, columns]
  want.check(got, np.float32)
  assert oracle.relative_error(got, want.values) < (1e-4 if dtype == BFLOAT16 else 4e-3)


# ---- weights, masks ----


@TYPES
def test_unselected_experts_add_nothing(dtype):
  """NaN in them leaves every bit as it was, in tiles that others share and in those none needs."""
  for shape in ((150, 9, 128, 264, 2), (5, 40, 128, 136, 1)):
    h, w2, alpha, h_scale = make_case(*shape, dtype)
    alpha[:, 4] = 0
    alpha[0, alpha[0] == 0] = -0.0
    first = check((h, w2, alpha, h_scale))
    nan = np.asarray(np.nan, dtype)
    poisoned = np.where(alpha[:, :, None] == 0, nan, h)
    if h_scale is None:
      others = w2.copy()
      others[4] = nan
    else:
      others = PackedW2(w2.q.copy(), w2.scale.copy())
      others.q[:, 4 * 128 : 5 * 128] = nan
      others.scale[:, 4] = np.inf
      h_scale = np.where(alpha == 0, np.float32(np.inf), h_scale)
    check_same_bits(np.asarray(compiled()(poisoned, others, alpha, h_scale)), first)


def test_scales_of_selected_experts_that_are_not_finite():
  """They reach the tokens that have chosen the expert, and no others of their tile."""
  h, packed, alpha, h_scale = make_case(150, 9, 128, 264, 2, FLOAT8)
  first = check((h, packed, alpha, h_scale))
  chosen = alpha[:, 4] != 0
  assert chosen.any() and not chosen.all()
  scale = packed.scale.copy()
  for special in (np.inf, np.nan):
    scale[:, 4] = special
    got = np.asarray(compiled()(h, PackedW2(packed.q, scale), alpha, h_scale))
    check_same_bits(got[~chosen], first[~chosen])
    assert not np.isfinite(got[chosen]).any()


@TYPES
def test_skipping_changes_no_bit(dtype):
  """A token that has chosen all experts makes the kernel read them all."""
  for tokens in (16, 200):
    h, w2, alpha, h_scale = make_case(tokens, 70, 128, 264, 8, dtype)
    alpha[:, 10:] = 0
    alpha[-1] = 0
    few = check((h, w2, alpha, h_scale))
    alpha[-1] = 1
    every = check((h, w2, alpha, h_scale))
    check_same_bits(every[:-1], few[:-1])
    assert not few[-1].tobytes().strip(b"\0") and (every[-1] != 0).all()


@TYPES
def test_permuted_tokens_have_permuted_bits(rng, dtype):
  for tokens in (100, 300):
    h, w2, alpha, h_scale = make_case(tokens, 12, 128, 264, 2, dtype)
    first = check((h, w2, alpha, h_scale))
    order = rng.permutation(tokens)
    scale = None if h_scale is None else h_scale[order]
    check_same_bits(np.asarray(compiled()(h[order], w2, alpha[order], scale)), first[order])


@TYPES
def test_weights_meet_their_own_scales(dtype):
  """Tiny, huge and negative weights; a product with a scale that no float holds is not 0."""
  h, w2, alpha, h_scale = make_case(6, 4, 128, 16, 1, dtype)
  alpha *= np.array([1e-30, 1e20, -1e-20, 1e6, 1e-6, -1], np.float32)[:, None]
  check((h, w2, alpha, h_scale))
  if h_scale is not None:
    token = np.arange(6)[:, None] == 0
    nan = np.where(token[:, :, None], np.asarray(np.nan, dtype), h)
    scale = np.where(token, np.float32(1e-30), h_scale)
    got = np.asarray(compiled()(nan, w2, alpha, scale))
    assert np.isnan(got[0]).all() and np.isfinite(got[1:]).all()


# ---- bits ----


@TYPES
def test_repeats_have_the_same_bits(dtype):
  """Where many parts of sums are added up, into arrays that were full of NaN."""
  case = [jax.device_put(x) for x in make_case(140, 33, 128, 1000, 3, dtype)]
  first = jax.device_get(compiled()(*case))
  for _ in range(100):
    jax.block_until_ready(jnp.full(first.shape, jnp.nan, first.dtype))
    check_same_bits(jax.device_get(compiled()(*case)), first)


# ---- transformations ----


@TYPES
def test_batches_of_weights(dtype):
  """A launch for each of them, all with the bits of a call of its own."""
  cases = [make_case(20, 5, 128, 136, 2, dtype) for _ in range(3)]
  cases = [(h, w2, alpha * (i + 1), scale) for i, (h, w2, alpha, scale) in enumerate(cases)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *cases)
  got = jax.device_get(jax.jit(jax.vmap(compiled()))(*stacked))
  for one, case in zip(got, cases, strict=True):
    check_same_bits(one, check(case))


@TYPES
def test_scan_and_checkpoint(dtype):
  h, w2, alpha, h_scale = make_case(9, 4, 128, 64, 2, dtype)
  alphas = np.stack([alpha, 2 * alpha, -alpha])

  def total(alphas, wrap):
    def step(carry, alpha):
      return carry + wrap(compiled())(h, w2, alpha, h_scale), None

    return jnp.sum(jnp.sin(jax.lax.scan(step, jnp.zeros((9, 64)), alphas)[0] / 64))

  results = [
    jax.device_get(jax.jit(jax.value_and_grad(functools.partial(total, wrap=wrap)))(alphas))
    for wrap in (lambda f: f, jax.checkpoint)
  ]
  check_same_bits(results[0][0], results[1][0])
  np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
  assert np.abs(results[0][1]).max() > 0.01


@pytest.mark.parametrize("check_vma", [True, False])
@TYPES
def test_shard_map_over_the_gpus(on_cuda, dtype, check_vma):
  """Each GPU has its tokens, and all weights."""
  devices = jax.devices("cuda")
  mesh = jax.make_mesh((len(devices),), ("d",), devices=devices)
  h, w2, alpha, h_scale = make_case(16 * len(devices), 5, 128, 136, 2, dtype)
  tokens, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
  specs = tokens, whole, tokens, tokens
  mapped = jax.shard_map(
    compiled(), mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=check_vma
  )  # fmt: skip
  placed = [
    jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    for x, spec in zip((h, w2, alpha, h_scale), specs, strict=True)
  ]
  got = jax.device_get(jax.jit(mapped)(*placed))
  for i in range(len(devices)):
    part = slice(16 * i, 16 * (i + 1))
    scale = None if h_scale is None else h_scale[part]
    check_same_bits(got[part], check((h[part], w2, alpha[part], scale)))


def test_export():
  pytest.importorskip("flatbuffers", reason="jax.export serializes with flatbuffers")
  case = make_case(20, 5, 64, 136, 2, BFLOAT16)
  exported = jax.export.export(
    compiled(), platforms=["cuda"], disabled_checks=jax_router.DISABLE_JAX_EXPORT_CHECKS
  )(*case)
  assert "@jax_router_experts(" in exported.mlir_module()
  again = jax.export.deserialize(exported.serialize())
  check_same_bits(np.asarray(again.call(*case)), check(case))


# ---- command buffers ----


def test_command_buffers(tmp_path):
  """XLA captures the calls in a CUDA graph; replays, with other values and in other arrays."""
  cases = [make_case(40, 9, 128, 264, 2, dtype) for dtype in (BFLOAT16, FLOAT8)]

  def run(alphas, others):
    return [
      compiled()(h, w2, alpha, scale)
      for alpha, (h, w2, scale) in zip(alphas, others, strict=True)
    ]  # fmt: skip

  others = jax.device_put([(h, w2, scale) for h, w2, _, scale in cases])
  alphas = jax.device_put([alpha for _, _, alpha, _ in cases])
  program = (
    jax.jit(run)
    .lower(alphas, others)
    .compile(compiler_options={"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": str(tmp_path)})
  )
  targets = re.findall(r'custom_call_target="([^"]*)"', program.as_text())
  assert sorted(targets) == ["jax_router_experts", "jax_router_experts_float8"]
  dumps = list(tmp_path.glob("*thunk_sequence_after_thunk_passes*.txt"))
  assert dumps, f"no thunks in the dump: {sorted(path.name for path in tmp_path.iterdir())}"
  for dump in dumps:
    text = dump.read_text()
    assert count_custom_calls(text) == (2, 0), text
  # Which experts are chosen changes too, in place and in new arrays.
  change = jax.jit(lambda xs: [-2 * jnp.roll(x, 1, axis=1) for x in xs], donate_argnums=0)
  for i in range(12):
    got = jax.device_get(program(alphas, others))
    for one, alpha, (h, w2, _, scale) in zip(got, alphas, cases, strict=True):
      expected(h, w2, np.asarray(alpha), scale).check(one, np.float32)
    if i % 4 == 3:
      alphas = [jnp.copy(x) for x in alphas]
    alphas = change(alphas)
