"""aiter's names under vmap, differentiation, meshes and `shard_map`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import oracle
import oracle_layouts
from jax_router.compat import aiter
from oracle_layouts import make_ids
from programs import assert_equal, calls, collectives, loop, put

NUM_EXPERTS, K, BLOCK = 9, 3, 4


def sort(ids, weights, local_tokens=None, mask=None, **options):
  return aiter.moe_sorting(
    ids, weights, NUM_EXPERTS, 5, jnp.bfloat16, BLOCK, mask, local_tokens,
    return_local_topk_ids=True, output_aux=True, **options,
  )  # fmt: skip


def fused(logits, **options):
  return aiter.topk_softmax_sorting(logits, K, NUM_EXPERTS, 5, jnp.bfloat16, True, BLOCK, **options)


def wide(weights):
  """Logits of NUM_EXPERTS experts made of K weights each."""
  return jnp.concatenate([weights, 2 * weights, -weights], axis=-1)


def make(rng, *lead, tokens=11):
  ids = np.stack([make_ids(rng, tokens, K, NUM_EXPERTS, "mixed") for _ in range(np.prod(lead))])
  ids = jnp.asarray(ids.reshape(*lead, tokens, K))
  return ids, jnp.asarray(rng.normal(size=ids.shape), jnp.float32)


# ---- vmap, leading dimensions ----


@pytest.mark.parametrize(
  "in_axes", ((0, 0, None, None), (1, 1, 0, None), (None, 0, 0, 0), (2, 2, None, 1))
)
def test_vmap_over_any_axis_and_operand(kernel, rng, in_axes):
  ids, weights = make(rng, 3)
  first = [x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in (
    (ids, in_axes[0]), (weights, in_axes[1])
  )]  # fmt: skip
  local_tokens = jnp.int32(7) if in_axes[2] is None else jnp.array([0, 5, 11], jnp.int32)
  mask = rng.integers(0, 2, {None: (9,), 0: (3, 9), 1: (9, 3)}[in_axes[3]])
  args = *first, local_tokens, jnp.asarray(mask, jnp.int32)

  def function(*args):
    return sort(*args, implementation=kernel)

  got = jax.jit(jax.vmap(function, in_axes))(*args)
  assert_equal(got, loop(function, in_axes, 0, *args))


def test_leading_dimensions_are_calls_of_their_own(implementation, rng):
  ids, weights = make(rng, 2, 3)
  local_tokens = jnp.arange(6, dtype=jnp.int32).reshape(2, 3) * 2
  mask = jnp.asarray(rng.random(NUM_EXPERTS) < 0.6)
  got = sort(ids, weights, local_tokens, mask, implementation=implementation)
  routed = fused(wide(weights), num_local_tokens=local_tokens, implementation=implementation)
  for i in range(2):
    for j in range(3):
      want = sort(ids[i, j], weights[i, j], local_tokens[i, j], mask, implementation=implementation)
      assert_equal([x[i, j] for x in got], want)
      assert [x[i, j].shape for x in got] == [x.shape for x in want]
      want = fused(
        wide(weights[i, j]), num_local_tokens=local_tokens[i, j], implementation=implementation
      )
      assert_equal([x[i, j] for x in routed], want)


def test_vmap_of_the_fused_operation_is_one_launch(rng):
  logits = jnp.asarray(rng.normal(size=(4, 7, 12)), jnp.float32)

  def function(logits):
    return fused(logits, implementation="cpu")

  assert calls("route_and_plan_blocks", jax.vmap(function), logits)[0] == 1
  assert_equal(jax.vmap(function)(logits), loop(function, (0,), 0, logits))


# ---- gradients ----


def test_gradient_of_the_weights(implementation, rng):
  """Each slot gets the cotangent of its position, a dropped one 0."""
  ids, weights = make(rng, 1)
  ids, weights = ids[0], weights[0]
  mask = rng.random(NUM_EXPERTS) < 0.6
  want = oracle_layouts.moe_sorting(np.asarray(ids), weights, NUM_EXPERTS, BLOCK, mask=mask,
                                    local_tokens=8)  # fmt: skip
  cotangent = rng.normal(size=want["sorted_weights"].shape).astype(np.float32)

  def loss(weights):
    sorted_weights = sort(ids, weights, 8, mask, implementation=implementation)[1]
    return jnp.vdot(sorted_weights, cotangent)

  position = want["reverse_sorted"]
  slots = np.where(position < 0, 0, cotangent[position]).reshape(ids.shape)
  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(weights), slots)
  assert np.count_nonzero(slots) > 5


@pytest.mark.parametrize("options", ({}, {"num_local_tokens": 6}))
@pytest.mark.parametrize("need_renorm", (True, False))
def test_gradient_of_the_logits(implementation, rng, options, need_renorm):
  logits = rng.normal(size=(11, NUM_EXPERTS)).astype(np.float32)
  choice = oracle.route(logits, K, renormalize=need_renorm)
  want = oracle_layouts.moe_sorting(
    choice.experts, choice.weights, NUM_EXPERTS, BLOCK, local_tokens=options.get("num_local_tokens")
  )
  cotangent = rng.normal(size=want["sorted_weights"].shape).astype(np.float32)

  def loss(logits):
    sorted_weights = aiter.topk_softmax_sorting(
      logits, K, NUM_EXPERTS, 5, jnp.bfloat16, need_renorm, BLOCK, implementation=implementation,
      **options,
    )[1]  # fmt: skip
    return jnp.vdot(sorted_weights, cotangent)

  position = want["reverse_sorted"].reshape(11, K)
  slots = np.where(position < 0, 0, cotangent[position])
  got = jax.jit(jax.grad(loss))(logits)
  oracle.check_gradient(got, logits, choice, slots, renormalize=need_renorm)


def test_gradient_of_shared_experts(implementation, rng):
  logits = rng.normal(size=(7, NUM_EXPERTS + 2)).astype(np.float32)
  cotangent = rng.normal(size=(7, K + 2)).astype(np.float32)

  def loss(logits):
    weights = aiter.topk_softmax(logits, K, True, 2, "sigmoid", implementation=implementation)[0]
    return jnp.vdot(weights, cotangent)

  got = np.asarray(jax.jit(jax.grad(loss))(logits))
  routed = logits[:, :NUM_EXPERTS]
  oracle.check_gradient(got[:, :NUM_EXPERTS], routed, oracle.route(routed, K), cotangent[:, :K])
  y = 1 / (1 + np.exp(-logits[:, NUM_EXPERTS:].astype(np.float64)))
  np.testing.assert_allclose(got[:, NUM_EXPERTS:], cotangent[:, K:] * y * (1 - y), rtol=1e-5)


# ---- sharding ----

KINDS = pytest.mark.parametrize(
  "kind", (AxisType.Auto, AxisType.Explicit), ids=("auto", "explicit")
)


@KINDS
def test_leading_dimensions_carry_the_sharding(make_mesh, rng, kind):
  """Every option, with no collective and the sharding of the operands."""
  mesh = make_mesh(kind)
  ids, weights = make(rng, 8)
  mask = jnp.asarray(rng.random(NUM_EXPERTS) < 0.6)
  local_tokens = jnp.arange(8, dtype=jnp.int32)

  def plain(ids, weights):
    return sort(ids, weights), fused(wide(weights))

  def optional(ids, weights, local_tokens, mask):
    return sort(ids, weights, local_tokens, mask), fused(
      wide(weights), num_local_tokens=local_tokens
    )

  cases = ((plain, (ids, weights)), (optional, (ids, weights, local_tokens, mask)))
  for function, args in cases:
    want = jax.jit(function)(*args)
    with jax.set_mesh(mesh):
      sharded = [put(mesh, x, *(() if x is mask else ("d",))) for x in args]
      assert collectives(function, *sharded) == set()
      got = jax.jit(function)(*sharded)
    assert_equal(got, want)
    for x in got[0][:4]:
      assert x.sharding.spec[0] == "d"


@KINDS
@pytest.mark.parametrize("check_vma", (True, False))
def test_shard_map(make_mesh, rng, kind, check_vma):
  """Tokens of each device on their own."""
  mesh = make_mesh(kind)
  ids, weights = make(rng, 8)

  def function(ids, weights):
    return *sort(ids, weights), *fused(wide(weights))

  want = [x.reshape(-1, *x.shape[2:]) for x in function(ids, weights)]
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma
  )
  got = jax.jit(mapped)(*(put(mesh, x.reshape(-1, K), "d") for x in (ids, weights)))
  assert_equal(got, want)


def test_sharded_tokens_are_refused(make_mesh, rng):
  ids, weights = make(rng, 1, tokens=16)
  ids, weights = ids[0], weights[0]
  mesh = make_mesh(AxisType.Explicit)
  with jax.set_mesh(mesh):
    whole, split = P(), P("d")
    for args, name in (((split, whole), "topk_ids"), ((whole, split), "topk_weights")):
      args = [put(mesh, x, *spec) for x, spec in zip((ids, weights), args, strict=True)]
      with pytest.raises(ValueError, match=rf"{name} must not be .* moe_sorting .*shard_map"):
        sort(*args)
    with pytest.raises(ValueError, match=r"gating_output must not be .* topk_softmax_sorting"):
      fused(put(mesh, jnp.ones((16, NUM_EXPERTS)), "d"))
    for function in (fused, lambda x: aiter.topk_softmax(x, 2, True)):
      with pytest.raises(ValueError, match="gating_output must not be sharded along its experts"):
        function(put(mesh, jnp.ones((16, 16)), None, "d"))
  mesh = make_mesh(AxisType.Auto)
  args = [put(mesh, x, "d") for x in (ids, weights)]
  with pytest.raises(ValueError, match="cannot tell"):
    jax.jit(sort)(*args)
  assert_equal(jax.jit(sort)(*(x[None] for x in args)), [x[None] for x in sort(ids, weights)])
