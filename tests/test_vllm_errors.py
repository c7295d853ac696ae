"""Bad arguments of the vLLM layer are refused while tracing, by its own names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router.compat import vllm


def shape(*sizes, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def trace(function, given):
  """Abstract evaluation with every `ShapeDtypeStruct` as an operand."""
  arrays = {k: v for k, v in given.items() if isinstance(v, jax.ShapeDtypeStruct)}
  static = {k: v for k, v in given.items() if k not in arrays}
  return jax.eval_shape(lambda arrays: function(**arrays, **static), arrays)


FLOATS = shape(5, 12, dtype=jnp.float32)
ROUTE = {"gating_output": FLOATS, "topk": 3, "renormalize": True}
BIAS = shape(12, dtype=jnp.float32)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"gating_output": shape(5, 12)}, TypeError, "gating_output must be one of .* got int32"),
    ({"gating_output": BIAS}, ValueError, r"gating_output must have shape \[..., T, E\], got"),
    ({"gating_output": [[1.0]]}, TypeError, "gating_output must be an array, got list"),
    ({"topk": 0}, ValueError, "topk must be between 1 and num_experts = 12, got 0"),
    ({"topk": 13}, ValueError, "topk must be between 1 and num_experts = 12, got 13"),
    ({"topk": 2.0}, TypeError, "topk must be a static integer, got float"),
    ({"renormalize": None}, TypeError, "renormalize must be a static bool, got NoneType"),
    ({"e_score_correction_bias": shape(12)}, TypeError, "e_score_correction_bias .* got int32"),
    ({"e_score_correction_bias": shape(11, dtype=jnp.float32)}, ValueError,
     r"e_score_correction_bias must have shape \[E\] = \(12,\), got \(11,\)"),
    ({"implementation": "rocm"}, ValueError, "implementation must be one of .* got 'rocm'"),
  ),
)  # fmt: skip
@pytest.mark.parametrize("name", ("topk_softmax", "topk_sigmoid", "grouped_topk"))
def test_routing(name, arguments, exception, text):
  given = ROUTE | ({"hidden_states": None} if name == "grouped_topk" else {})
  with pytest.raises(exception, match=text):
    trace(getattr(vllm, name), given | arguments)


@pytest.mark.parametrize(
  "value, exception, text",
  (
    (np.int16, TypeError, "indices_type must be one of int32, uint32, int64, got .*int16"),
    ("ids", TypeError, "indices_type must be one of .* got 'ids'"),
    (None, TypeError, "indices_type must be one of .* got None"),
    (np.int64, ValueError, "indices_type int64 needs jax_enable_x64, which is off"),
  ),
)
def test_indices_type(value, exception, text):
  with pytest.raises(exception, match=text):
    trace(vllm.topk_softmax, ROUTE | {"indices_type": value})


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"scoring_func": "sqrtsoftplus"}, ValueError, "scoring_func must be one of 'softmax', 'sigm"),
    ({"hidden_states": shape(4, 7, dtype=jnp.float32)}, ValueError,
     r"hidden_states must have the tokens of gating_output, shape \(5, 'd'\), got \(4, 7\)"),
    ({"hidden_states": jnp.float32(1)}, ValueError, r"hidden_states must have .* got \(\)"),
    ({"hidden_states": [1]}, TypeError, "hidden_states must be an array, got list"),
  ),
)  # fmt: skip
@pytest.mark.parametrize("name", ("fused_topk", "grouped_topk"))
def test_scoring_and_hidden_states(name, arguments, exception, text):
  with pytest.raises(exception, match=text):
    trace(getattr(vllm, name), ROUTE | {"hidden_states": None} | arguments)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"topk_group": 0}, ValueError, "topk_group must be between 1 and num_expert_group = 4, got 0"),
    ({"topk_group": 5}, ValueError, "topk_group must be between 1 and num_expert_group = 4, got 5"),
    ({"topk_group": 1.0}, TypeError, "topk_group must be a static integer, got float"),
    ({"num_expert_group": None}, TypeError, "num_expert_group must be a static integer"),
    ({"topk": 7}, ValueError, "topk must be at most topk_group .* = 6, got 7"),
    ({"routed_scaling_factor": None}, TypeError, "routed_scaling_factor must be .* NoneType"),
    ({"routed_scaling_factor": np.inf}, ValueError, "routed_scaling_factor must be .* got inf"),
  ),
)
def test_grouped_topk(arguments, exception, text):
  given = ROUTE | {"hidden_states": None, "num_expert_group": 4, "topk_group": 2}
  with pytest.raises(exception, match=text):
    trace(vllm.grouped_topk, given | arguments)


ALIGN = {"topk_ids": shape(5, 3), "block_size": 4, "num_experts": 6}


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"topk_ids": FLOATS}, TypeError, "topk_ids must have an integer dtype, got float32"),
    ({"topk_ids": shape(5)}, ValueError, r"topk_ids must have shape .* got \(5,\)"),
    ({"topk_ids": shape(5, 0)}, ValueError, r"topk_ids must have K >= 1 slots, got .* \(5, 0\)"),
    ({"topk_ids": shape(2**28, 8)}, ValueError, "topk_ids must have at most 2147483647 entries"),
    ({"block_size": 0}, ValueError, "block_size must be between 1 .* got 0"),
    ({"num_experts": 0}, ValueError, "num_experts must be between 1 .* got 0"),
    ({"num_experts": True}, TypeError, "num_experts must be an integer, got True"),
    ({"block_size": 2**29}, ValueError, r"sorted_ids would be .* = T \* K \+ E"),
    ({"expert_map": shape(5)}, ValueError, r"expert_map must have shape .* = \(6,\), got \(5,\)"),
    ({"expert_map": BIAS}, TypeError, "expert_map must have an integer dtype, got float32"),
    ({"expert_map": [0] * 6}, TypeError, "expert_map must be an array, got list"),
    ({"pad_sorted_ids": 1}, TypeError, "pad_sorted_ids must be a static bool, got int"),
    ({"ignore_invalid_experts": 0}, TypeError, "ignore_invalid_experts must be a static bool"),
    ({"implementation": "rocm"}, ValueError, "implementation must be one of .* got 'rocm'"),
  ),
)
def test_align(arguments, exception, text):
  with pytest.raises(exception, match=text):
    trace(vllm.moe_align_block_size, ALIGN | arguments)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"max_tokens_per_batch": -1}, ValueError, "max_tokens_per_batch must be between 0 .* got -1"),
    ({"block_size": 0}, ValueError, "block_size must be between 1 .* got 0"),
    ({"expert_num_tokens": BIAS}, TypeError, "expert_num_tokens .* integer dtype, got float32"),
    ({"expert_num_tokens": shape()}, ValueError, r"expert_num_tokens must have .* got \(\)"),
    ({"expert_num_tokens": shape(0)}, ValueError, r"expert_num_tokens must have .* got \(0,\)"),
    ({"expert_num_tokens": [3]}, TypeError, "expert_num_tokens must be an array, got list"),
    ({"max_tokens_per_batch": 2**30}, ValueError, "sorted_ids would be 3221225472 = B"),
  ),
)
def test_batched_align(arguments, exception, text):
  given = {"max_tokens_per_batch": 8, "block_size": 4, "expert_num_tokens": shape(3)}
  with pytest.raises(exception, match=text):
    trace(vllm.batched_moe_align_block_size, given | arguments)
