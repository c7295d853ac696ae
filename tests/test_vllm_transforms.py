"""vLLM's names under vmap, differentiation, meshes and `shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import oracle
from jax_router import Groups
from jax_router.compat import vllm
from oracle_layouts import make_ids
from programs import assert_equal, calls, collectives, loop, put

NUM_EXPERTS, K, BLOCK = 16, 3, 4
LOCAL = np.array([3, -1, 0, 1, -1, 2, *[-1] * 10], np.int32)
KINDS = pytest.mark.parametrize(
  "kind", (AxisType.Auto, AxisType.Explicit), ids=("auto", "explicit")
)
FORMS = {"no map": (None, False), "map last": (LOCAL, False), "map first": (LOCAL, True)}
BY_FORM = pytest.mark.parametrize("form", FORMS)


def aligner(form, implementation=None):
  local, ignore = FORMS[form]

  def align(ids, local=local):
    return vllm.moe_align_block_size(
      ids, BLOCK, NUM_EXPERTS, local, True, ignore, implementation=implementation
    )

  return align


def grouped(logits, bias=None, implementation=None):
  return vllm.grouped_topk(
    None, logits, K, True, 4, 2, "sigmoid", 2.5, bias, implementation=implementation
  )


def make(rng, *lead, tokens=11):
  ids = [make_ids(rng, tokens, K, NUM_EXPERTS, "mixed") for _ in range(np.prod(lead))]
  return jnp.asarray(np.stack(ids).reshape(*lead, tokens, K))


# ---- vmap, leading dimensions ----


@BY_FORM
@pytest.mark.parametrize("axis", (0, 1, 2))
def test_vmap_of_the_ids_is_one_launch(kernel, rng, form, axis):
  ids = jnp.moveaxis(make(rng, 3), 0, axis)
  align = aligner(form, kernel)
  assert_equal(jax.vmap(align, axis)(ids), loop(align, (axis,), 0, ids))
  if kernel == "cpu":
    assert calls("blocks", jax.vmap(align, axis), ids)[0] == 1


@pytest.mark.parametrize("form", ("map last", "map first"))
@pytest.mark.parametrize("in_axes", ((None, 0), (0, 1)))
def test_vmap_of_the_map(kernel, rng, form, in_axes):
  ids = make(rng, 3) if in_axes[0] == 0 else make(rng, 1)[0]
  local = jnp.asarray(np.stack([rng.permutation(LOCAL) for _ in range(3)], in_axes[1]))
  align = aligner(form, kernel)
  assert_equal(jax.vmap(align, in_axes)(ids, local), loop(align, in_axes, 0, ids, local))


@BY_FORM
def test_leading_dimensions_are_calls_of_their_own(implementation, rng, form):
  ids = make(rng, 2, 3)
  align = aligner(form, implementation)
  got = align(ids)
  for i in range(2):
    for j in range(3):
      assert_equal([x[i, j] for x in got], align(ids[i, j]))
      assert [x[i, j].shape for x in got] == [x.shape for x in align(ids[i, j])]


@pytest.mark.parametrize("in_axes", ((0, None), (None, 0), (2, 1)))
def test_vmap_of_grouped_topk(kernel, rng, in_axes):
  shapes = {0: (3, 11, 16), None: (11, 16), 2: (11, 16, 3)}
  logits = jnp.asarray(rng.normal(size=shapes[in_axes[0]]), jnp.float32)
  bias = rng.normal(size={None: (16,), 0: (3, 16), 1: (16, 3)}[in_axes[1]])
  args = logits, jnp.asarray(bias, jnp.float32)

  def function(logits, bias):
    return grouped(logits, bias, kernel)

  assert_equal(jax.vmap(function, in_axes)(*args), loop(function, in_axes, 0, *args))


def test_token_expert_indices_of_leading_dimensions(rng):
  logits = jnp.asarray(rng.normal(size=(2, 5, 9)), jnp.float32)
  got = vllm.topk_softmax(logits, 2)
  mapped = jax.vmap(lambda x: vllm.topk_softmax(x, 2))(logits)
  assert_equal(got, mapped)
  assert got[2].tolist() == [[[t, 5 + t] for t in range(5)]] * 2


# ---- gradients ----


@pytest.mark.parametrize("name", ("topk_softmax", "topk_sigmoid"))
@pytest.mark.parametrize("renormalize", (True, False))
def test_gradient_of_topk(implementation, rng, name, renormalize):
  logits = rng.normal(size=(11, NUM_EXPERTS)).astype(np.float32)
  cotangent = rng.normal(size=(11, K)).astype(np.float32)

  def loss(logits):
    weights = getattr(vllm, name)(logits, K, renormalize, implementation=implementation)[0]
    return jnp.vdot(weights, cotangent)

  options = {"score": name.removeprefix("topk_"), "renormalize": renormalize}
  choice = oracle.route(logits, K, **options)
  oracle.check_gradient(jax.jit(jax.grad(loss))(logits), logits, choice, cotangent, **options)


def test_gradient_of_grouped_topk(implementation, rng):
  logits = rng.normal(size=(11, NUM_EXPERTS)).astype(np.float32)
  bias = rng.normal(size=NUM_EXPERTS).astype(np.float32)
  cotangent = rng.normal(size=(11, K)).astype(np.float32)

  def loss(logits, bias):
    return jnp.vdot(grouped(logits, bias, implementation)[0], cotangent)

  got, of_bias = jax.jit(jax.grad(loss, (0, 1)))(logits, bias)
  options = {"score": "sigmoid", "scale": 2.5}
  choice = oracle.route(logits, K, bias=bias, groups=Groups(4, 2), **options)
  assert choice.clear.all()
  oracle.check_gradient(got, logits, choice, cotangent, **options)
  assert not np.any(of_bias)


# ---- sharding ----


@KINDS
@BY_FORM
def test_leading_dimensions_carry_the_sharding(make_mesh, rng, kind, form):
  mesh = make_mesh(kind)
  ids = make(rng, 8)
  align = aligner(form)
  with jax.set_mesh(mesh):
    sharded = put(mesh, ids, "d")
    assert collectives(align, sharded) == set()
    got = jax.jit(align)(sharded)
  assert_equal(got, align(ids))
  for x in got:
    assert x.sharding.spec[0] == "d"


@KINDS
def test_sharded_tokens_of_routing(make_mesh, rng, kind):
  """Routing has no order over tokens: they may be sharded."""
  mesh = make_mesh(kind)
  logits = jnp.asarray(rng.normal(size=(16, NUM_EXPERTS)), jnp.float32)

  def function(logits):
    return *vllm.topk_softmax(logits, K, True), *grouped(logits)

  with jax.set_mesh(mesh):
    sharded = put(mesh, logits, "d")
    assert collectives(function, sharded) == set()
    got = jax.jit(function)(sharded)
  assert_equal(got, function(logits))


@KINDS
@BY_FORM
def test_shard_map(make_mesh, rng, kind, form):
  mesh = make_mesh(kind)
  ids, align = make(rng, 8), aligner(form)
  mapped = jax.shard_map(align, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
  got = jax.jit(mapped)(put(mesh, ids.reshape(-1, K), "d"))
  assert_equal(got, [x.reshape(-1) for x in align(ids)])


def test_sharded_tokens_are_refused(make_mesh, rng):
  ids = make(rng, 1, tokens=16)[0]
  align = aligner("no map")
  mesh = make_mesh(AxisType.Explicit)
  with (
    jax.set_mesh(mesh),
    pytest.raises(ValueError, match=r"topk_ids must not be .* moe_align_block_size .*shard_map"),
  ):
    align(put(mesh, ids, "d"))
  with (
    jax.set_mesh(mesh),
    pytest.raises(ValueError, match="gating_output must not be sharded along its experts"),
  ):
    grouped(put(mesh, jnp.ones((4, NUM_EXPERTS)), None, "d"))
  ids = put(make_mesh(AxisType.Auto), ids, "d")
  with pytest.raises(ValueError, match="cannot tell"):
    jax.jit(align)(ids)
  assert_equal(jax.jit(align)(ids[None]), [x[None] for x in align(jax.device_get(ids))])
