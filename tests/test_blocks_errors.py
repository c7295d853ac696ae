"""What `plan_blocks` refuses, and the limits of its layouts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router import Routing, plan_blocks

W, IDS = np.zeros((3, 5, 2), np.float32), np.zeros((3, 5, 2), np.int32)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"routing": W}, TypeError, "routing must be a jax_router.Routing, got ndarray"),
    ({"routing": (W, IDS, IDS)}, TypeError, "routing must be a jax_router.Routing, got tuple"),
    ({"routing": (W.tolist(), IDS)}, TypeError, "routing.weights must be an array, got list"),
    ({"routing": (IDS, IDS)}, TypeError, "routing.weights must have a floating dtype, got int32"),
    ({"routing": (W, W)}, TypeError, "routing.experts must have an integer dtype, got float32"),
    ({"routing": (W[0, 0], IDS[0, 0])}, ValueError, r"routing.experts must have shape .* \(2,\)"),
    ({"routing": (W[:, :4], IDS)}, ValueError, r"routing.weights must have shape .* \(3, 4, 2\)"),
    ({"routing": (W[..., :0], IDS[..., :0])}, ValueError, "routing.experts must have k >= 1"),
    ({"num_experts": 0}, ValueError, "num_experts must be between 1 and 2147483647, got 0"),
    ({"num_experts": 6.0}, TypeError, "num_experts must be a static integer, got float"),
    ({"block_size": 0}, ValueError, "block_size must be between 1 and 2147483647, got 0"),
    ({"block_size": -4}, ValueError, "block_size must be between 1 and .*, got -4"),
    ({"block_size": True}, TypeError, "block_size must be an integer, got True"),
    ({"block_size": 2**31 - 1}, ValueError, "block_size 2147483647 needs .* positions .* int32"),
    ({"layout": "dense"}, ValueError, "layout must be one of 'flat', 'packed', got 'dense'"),
    ({"expert_mask": [1] * 6}, TypeError, "expert_mask must be an array, got list"),
    ({"expert_mask": np.ones(6)}, TypeError, "expert_mask must have dtype bool or an integer one"),
    ({"expert_mask": np.ones(5, bool)}, ValueError, r"expert_mask must have shape .* got \(5,\)"),
    ({"expert_mask": np.ones((3, 6), bool)}, ValueError, r"expert_mask must .* got \(3, 6\)"),
    ({"num_valid": 2.0}, TypeError, "num_valid must be an integer or an integer array, got float"),
    ({"num_valid": np.float32(2)}, TypeError, "num_valid must have an integer dtype, got float32"),
    ({"num_valid": np.array(True)}, TypeError, "num_valid must have an integer dtype, got bool"),
    ({"num_valid": np.ones(5, int)}, ValueError, r"num_valid must have shape \(\) or \(3,\), got"),
    ({"num_valid": np.ones((3, 5), int)}, ValueError, r"num_valid must .* got \(3, 5\)"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_bad_arguments(arguments, exception, text):
  with pytest.raises(exception, match=text):
    plan_blocks(**{"routing": Routing(W, IDS), "num_experts": 6, "block_size": 4} | arguments)


def plan_of(tokens: int, k: int, num_experts: int, block_size: int, layout: str):
  """Types of a plan of so many tokens, without making it."""
  shape = (tokens, k)
  routing = Routing(
    jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
  )
  return jax.eval_shape(lambda r: plan_blocks(r, num_experts, block_size, layout=layout), routing)


def test_most_tokens_of_the_packed_layout():
  """2**24 - 1 tokens: the pad's token field is the number of tokens and must fit 24 bits."""
  assert plan_of(2**24 - 1, 1, 4, 16, "packed").inverse.shape == (2**24 - 1, 1)
  with pytest.raises(
    ValueError, match=r"'packed' holds at most .* 16777215 tokens, got .*16777216"
  ):
    plan_of(2**24, 1, 4, 16, "packed")
  assert plan_of(2**24, 1, 4, 16, "flat").inverse.shape == (2**24, 1)


def test_most_slots_of_the_packed_layout():
  """255 slots: the pad's slot field is their number and must fit 8 bits."""
  assert plan_of(4, 255, 300, 16, "packed").inverse.shape == (4, 255)
  with pytest.raises(ValueError, match=r"'packed' holds at most k = 255 slots .* got .*\(4, 256\)"):
    plan_of(4, 256, 300, 16, "packed")
  assert plan_of(4, 256, 300, 16, "flat").inverse.shape == (4, 256)


def test_most_entries():
  assert plan_of(2**31 - 1, 1, 4, 1, "flat").ids.shape == (2**31 - 1,)
  with pytest.raises(ValueError, match=r"routing.experts must have at most 2147483647 entries"):
    plan_of(2**30, 2, 4, 1, "flat")
  with pytest.raises(ValueError, match="block_size 2 needs 2147483652 positions"):
    plan_of(2**31 - 1, 1, 4, 2, "flat")
  assert plan_of(2**31 - 8, 1, 4, 2, "flat").ids.shape == (2**31 - 4,)


def test_static_shapes_only():
  (tokens,) = jax.export.symbolic_shape("t")
  shape = (tokens, 2)
  routing = Routing(
    jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)
  )
  with pytest.raises(ValueError, match=r"a block plan needs a static number of tokens"):
    jax.export.export(jax.jit(lambda r: plan_blocks(r, 6, 4)))(routing)


def test_more_experts_than_the_gpu_kernel_takes():
  """Plain JAX takes over there, and an explicit choice is refused."""
  from jax_router import _blocks

  most = _blocks._MOST_CUDA_EXPERTS
  assert _blocks.runs_on("cuda", (), num_experts=most)
  assert not _blocks.runs_on("cuda", (), num_experts=most + 1)
  assert _blocks.runs_on("cpu", (), num_experts=most + 1)
