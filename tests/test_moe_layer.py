"""The matmuls of experts, and the layer of docs/moe_layer.md around them."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_router
from test_examples import EXAMPLES, load_example

expert_matmul = load_example("expert_matmul")

SIZES = {
  "even": [40, 40, 40],
  "empty groups": [0, 0, 129, 0, 31, 0],
  "one group": [77],
  "edges of blocks": [64, 63, 1, 65, 0, 128, 127],
  "many groups": [2, 0, 1] * 30,
  "one row": [0, 1, 0],
  "no rows": [0, 0],
}


@pytest.fixture(
  params=["blocks", "lax", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("tokamax", "hopper"))]
)
def way(request, cuda_device):
  """Every implementation in turn, on the device it is for."""
  name = request.param
  if name == "tokamax":
    pytest.importorskip("tokamax")
  if name in ("tokamax", "hopper"):
    if cuda_device is None:
      pytest.skip("JAX sees no CUDA device")
    if name == "hopper" and cuda_device.compute_capability != "9.0":
      pytest.skip("the kernels are for compute capability 9.0")
  with jax.default_device(cuda_device if name in ("tokamax", "hopper") else jax.devices("cpu")[0]):
    yield name


def make(sizes: list[int], tail: int, depth: int, width: int, dtype: str, seed: int = 0):
  """Operands and cotangent; zeros in the rows past the groups."""
  rng = np.random.default_rng(seed)
  rows = sum(sizes) + tail
  in_group = np.arange(rows)[:, None] < sum(sizes)
  lhs = rng.standard_normal((rows, depth)) * in_group
  rhs = rng.standard_normal((len(sizes), depth, width)) / depth**0.5
  cotangent = rng.standard_normal((rows, width)) * in_group
  return *(jnp.asarray(x, dtype) for x in (lhs, rhs, cotangent)), jnp.asarray(sizes, jnp.int32)


def oracle(lhs, rhs, cotangent, group_sizes):
  """Result and gradients of the rows in groups, group by group in float64."""
  lhs, rhs, cotangent = (np.asarray(x, np.float64) for x in (lhs, rhs, cotangent))
  result, of_lhs, of_rhs = [], [], []
  ends = np.cumsum(group_sizes)
  for begin, end, matrix in zip(ends - group_sizes, ends, rhs, strict=True):
    result.append(lhs[begin:end] @ matrix)
    of_lhs.append(cotangent[begin:end] @ matrix.T)
    of_rhs.append(lhs[begin:end].T @ cotangent[begin:end])
  return np.concatenate(result), np.concatenate(of_lhs), np.stack(of_rhs)


def compute(way, lhs, rhs, cotangent, group_sizes):
  def forward(lhs, rhs):
    return expert_matmul.grouped_matmul(lhs, rhs, group_sizes, way)

  @jax.jit
  def both(lhs, rhs, cotangent):
    result, pull_back = jax.vjp(forward, lhs, rhs)
    return result, *pull_back(cotangent)

  with jax.default_matmul_precision("highest"):
    return both(lhs, rhs, cotangent)


def check(way, sizes, tail, depth, width, dtype):
  operands = make(sizes, tail, depth, width, dtype)
  actual = compute(way, *operands)
  expected = oracle(*operands)
  atol = 1e-5 if dtype == "float32" else 2e-2
  for name, a, b in zip(("result", "of lhs", "of rhs"), actual, expected, strict=True):
    assert a.dtype == dtype
    if name != "of rhs":
      a = a[: sum(sizes)]  # what lies past the groups may be anything, also no number at all
    a = np.asarray(a, np.float64)
    scale = max(1.0, np.abs(b).max(initial=0))
    np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("tail", [0, 70])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_grouped_matmul(way, sizes, tail):
  """Result and both gradients of every group, rows past the groups or not."""
  if way in ("blocks", "lax"):
    check(way, sizes, tail, 24, 40, "float32")
  elif sum(sizes) + tail:
    tail += -(sum(sizes) + tail) % 8
    check(way, sizes, tail, 128, 256, "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(way, dtype):
  check(way, [150, 0, 1, 90, 199], 0, 256, 128, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [8, 128])
def test_many_rows_on_a_gpu(way, experts):
  """Groups of many blocks, uneven as a router's."""
  if way in ("blocks", "lax"):
    pytest.skip("for kernels")
  rng = np.random.default_rng(1)
  sizes = np.bincount((rng.random(8192) ** 2 * experts).astype(int), minlength=experts)
  check(way, sizes.tolist(), 0, 256, 384, "bfloat16")


def test_rows_past_the_groups_do_not_count(way):
  """What stands in the cotangent of rows past the groups, if finite, changes no gradient."""
  dtype = "float32" if way in ("blocks", "lax") else "bfloat16"
  lhs, rhs, cotangent, group_sizes = make([70, 0, 100], 30, 128, 128, dtype)
  expected = compute(way, lhs, rhs, cotangent, group_sizes)
  actual = compute(way, lhs, rhs, cotangent.at[170:].set(1e3), group_sizes)
  np.testing.assert_array_equal(actual[1][:170], expected[1][:170])
  np.testing.assert_array_equal(actual[2], expected[2])


@pytest.fixture
def cuda_lowering(monkeypatch):
  """Lets the kernels for Hopper be lowered where there is no GPU."""
  monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(core_count=132)])


@pytest.mark.parametrize("rows, experts", [(8192, 64), (104, 3)])
def test_hopper_kernels_lower(cuda_lowering, rows, experts):
  """The gradient of the kernels for Hopper is three of them, whatever the device of the test."""

  def gradient(lhs, rhs, group_sizes, cotangent):
    result, pull_back = jax.vjp(
      lambda lhs, rhs: expert_matmul.grouped_matmul(lhs, rhs, group_sizes, "hopper"), lhs, rhs
    )
    return result, *pull_back(cotangent)

  shapes = ((rows, 256), (experts, 256, 384), (rows, 384))
  lhs, rhs, cotangent = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
  group_sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)
  traced = jax.jit(gradient).trace(lhs, rhs, group_sizes, cotangent)
  assert [x.shape for x in traced.out_info] == [(rows, 384), (rows, 256), (experts, 256, 384)]
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize("check_vma", [True, False])
def test_hopper_kernels_in_shard_map(monkeypatch, check_vma):
  """Matrices that all devices share get the sum of the devices' gradients."""
  mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
  specs = P("data"), P(), P("data")
  grouped_matmul = functools.partial(expert_matmul.grouped_matmul, implementation="hopper")
  sharded = jax.shard_map(
    grouped_matmul, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma
  )

  def loss(rhs, lhs, group_sizes):
    return sharded(lhs, rhs, group_sizes).sum()

  rhs, lhs = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in ((3, 128, 256), (64, 128)))
  group_sizes = jax.ShapeDtypeStruct((6,), jnp.int32)
  monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(core_count=132)])
  text = str(jax.make_jaxpr(jax.grad(loss))(rhs, lhs, group_sizes))
  assert re.search(r"bf16\[3,128,256\] = psum", text)


def chosen(monkeypatch, device: dict, tokamax: bool, lhs, rhs) -> str:
  find_spec = importlib.util.find_spec
  fake = types.SimpleNamespace(**device)
  monkeypatch.setattr(expert_matmul, "_default_device", lambda: fake)
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: tokamax or None if name == "tokamax" else find_spec(name),
  )
  return expert_matmul.choose(*(jax.ShapeDtypeStruct(*x) for x in (lhs, rhs)))


HOPPER = {"platform": "gpu", "compute_capability": "9.0"}
ROWS, MATRICES = ((512, 256), jnp.bfloat16), ((8, 256, 384), jnp.bfloat16)


@pytest.mark.parametrize(
  ("device", "tokamax", "lhs", "rhs", "expected"),
  [
    (HOPPER, False, ROWS, MATRICES, "hopper"),
    (HOPPER, False, ((508, 256), jnp.bfloat16), MATRICES, "blocks"),
    (HOPPER, True, ROWS, MATRICES, "tokamax"),
    (HOPPER, False, ((512, 256), jnp.float32), ((8, 256, 384), jnp.float32), "blocks"),
    (HOPPER, False, ((512, 256), jnp.float16), MATRICES, "blocks"),
    (HOPPER, False, ((512, 192), jnp.bfloat16), ((8, 192, 384), jnp.bfloat16), "blocks"),
    (HOPPER, False, ROWS, ((8, 256, 320), jnp.bfloat16), "blocks"),
    (HOPPER, False, ((0, 256), jnp.bfloat16), MATRICES, "blocks"),
    (HOPPER | {"compute_capability": "10.0"}, False, ROWS, MATRICES, "blocks"),
    ({"platform": "gpu"}, False, ROWS, MATRICES, "blocks"),
    ({"platform": "cpu"}, True, ROWS, MATRICES, "blocks"),
    ({"platform": "tpu"}, False, ROWS, MATRICES, "lax"),
    ({"platform": "tpu"}, True, ROWS, MATRICES, "tokamax"),
  ],
)
def test_choice(monkeypatch, device, tokamax, lhs, rhs, expected):
  assert chosen(monkeypatch, device, tokamax, lhs, rhs) == expected


def test_default_device_decides():
  lhs, rhs = (jax.ShapeDtypeStruct(*x) for x in (ROWS, MATRICES))
  with jax.default_device(jax.devices("cpu")[0]):
    assert expert_matmul.choose(lhs, rhs) == "blocks"


def test_unknown_implementation():
  lhs, rhs, _, group_sizes = make([3, 4], 0, 8, 8, "float32")
  with pytest.raises(ValueError, match=r"one of \['tokamax', 'hopper', 'blocks', 'lax'\], got 'x'"):
    expert_matmul.grouped_matmul(lhs, rhs, group_sizes, "x")


def test_operands_that_do_not_fit_hopper():
  lhs, rhs, _, group_sizes = make([3, 4], 0, 128, 128, "bfloat16")
  with pytest.raises(ValueError, match=r"M a multiple of 8, .* got bfloat16 \(7, 128\)"):
    expert_matmul.grouped_matmul(lhs, rhs, group_sizes, "hopper")


# ---- docs/moe_layer.md ----

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "moe_layer.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
  return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def page():
  """What the layer of the page defines."""
  names = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    exec(compile(blocks("python")[0], "moe_layer.md", "exec"), names)
  return names


def dense_layer(params, x, k):
  """What every expert on every token gives, weighted with 0 where it is not chosen."""
  weights, experts = jax.lax.top_k(x @ params["router"], k)
  chosen = jax.nn.one_hot(experts, params["router"].shape[1])
  gates = jnp.einsum("tk,tke->te", jax.nn.softmax(weights), chosen)
  gate, up = jnp.split(jnp.einsum("td,edf->etf", x, params["gate_up"]), 2, axis=2)
  outputs = jnp.einsum("etf,efd->etd", jax.nn.silu(gate) * up, params["down"])
  return jnp.einsum("te,etd->td", gates, outputs)


def compare_gradients(actual, expected, *args):
  """Value and gradients of a random function of what two functions give."""
  for a, b in zip(
    *(
      jax.tree.leaves(
        jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1)))(*args)
      )
      for f in (actual, expected)
    ),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


def test_layer_of_the_page(page):
  """The layer is what all experts on all tokens would give, forward and backward."""
  k, params, x = page["k"], page["params"], page["x"]
  with jax.default_matmul_precision("highest"):
    assert page["y"].shape == x.shape
    np.testing.assert_allclose(page["y"], dense_layer(params, x, k), atol=2e-5)
    compare_gradients(
      lambda params, x: page["moe_layer"](params, x, k)[0],
      lambda params, x: dense_layer(params, x, k),
      params,
      x,
    )
  assert 0.009 < page["loss"] < 0.02


def test_sharded_layer_of_the_page(page):
  exec(compile(blocks("python")[2], "moe_layer.md", "exec"), page)
  args = page["params"], page["x"]
  compare_gradients(page["sharded"], lambda *args: page["moe_layer"](*args, page["k"])[0], *args)


def test_padding_of_the_page(page):
  """The page's line keeps a NaN past the groups out of the result and of all gradients."""
  (line,) = (x for x in blocks("python")[0].splitlines() if "gate_up = grouped_matmul" in x)
  text = blocks("python")[0].replace("logits, k)", "logits, k, where=where)")
  text = text.replace("(params, x, k)", "(params, x, k, where)", 1)
  mask = "".join(f"  {x}\n" for x in blocks("python")[1].splitlines())
  text = text.replace(line, f"{line}\n{mask}").replace(line, line.replace("grouped_", "careless_"))
  text = text[: text.index("tokens, width")]
  names = {"careless_matmul": careless_matmul}
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    exec(compile(text, "moe_layer.md", "exec"), names)
  params, x, k = page["params"], page["x"], page["k"]
  where = jnp.arange(len(x)) % 3 > 0

  def expected(params, x):
    return jnp.where(where[:, None], dense_layer(params, x, k), 0)

  with jax.default_matmul_precision("highest"):
    compare_gradients(lambda *args: names["moe_layer"](*args, k, where)[0], expected, params, x)


@jax.custom_vjp
def careless_matmul(lhs, rhs, group_sizes):
  """Leaves NaN past the groups, and counts all rows of the last block in the gradient."""
  past = jnp.arange(len(lhs))[:, None] >= group_sizes.sum()
  return jnp.where(past, jnp.nan, expert_matmul.grouped_matmul(lhs, rhs, group_sizes))


def _careless_forward(lhs, rhs, group_sizes):
  return careless_matmul(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _careless_backward(saved, cotangent):
  lhs, rhs, group_sizes = saved
  _, pull_back = jax.vjp(lambda *x: expert_matmul.grouped_matmul(*x, group_sizes), lhs, rhs)
  of_lhs, of_rhs = pull_back(cotangent)
  past = jnp.arange(len(lhs))[:, None] >= group_sizes.sum()
  leak = jnp.sum(jnp.where(past, 0 * cotangent, 0)) + jnp.sum(jnp.where(past, 0 * lhs, 0))
  return jnp.where(past, jnp.nan, of_lhs), of_rhs + leak, None


careless_matmul.defvjp(_careless_forward, _careless_backward)


def test_diff_of_the_page():
  """Both sides of the diff of a MaxText-style layer compute the same."""
  (diff,) = blocks("diff")
  keys = jax.random.split(jax.random.key(0), 3)
  num_experts, k, d = 8, 3, 16
  matrices = jax.random.normal(keys[2], (num_experts, d, d))

  def side(sign):
    lines = (line[1:] for line in diff.splitlines() if line[:1] in (sign, " "))
    code = compile("\n".join(lines), "moe_layer.md", "exec")

    def layer(x, gate_logits):
      names = {"jax": jax, "jnp": jnp, "jax_router": jax_router, "x": x, "k": k, "d": d}
      names |= {"gate_logits": gate_logits, "num_experts": num_experts}
      names["experts_of_rows"] = lambda rows, sizes: jax.lax.ragged_dot(rows, matrices, sizes)
      exec(code, names)
      return names["y"]

    return layer

  x = jax.random.normal(keys[0], (2, 20, d))
  logits = jax.random.normal(keys[1], (2, 20, num_experts))
  with jax.default_matmul_precision("highest"):
    compare_gradients(side("+"), side("-"), x, logits)
