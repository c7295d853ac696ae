"""Bad arguments of the TransformerEngine layer are refused while tracing, by its own names."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router.compat.transformer_engine import (
  fused_moe_aux_loss,
  fused_score_for_moe_aux_loss,
  fused_topk_with_score_function,
)

GROUPS = {"num_groups": 4, "group_topk": 2}


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"topk": 0}, ValueError, "topk must be between 1 and num_experts = 12, got 0"),
    ({"topk": 13}, ValueError, "topk must be between 1 and num_experts = 12, got 13"),
    ({"topk": 2.0}, TypeError, "topk must be a static integer, got float"),
    ({"use_pre_softmax": 1}, TypeError, "use_pre_softmax must be a static bool, got int"),
    ({"compute_aux_scores": None}, TypeError, "compute_aux_scores must be a static bool"),
    ({"scaling_factor": None}, TypeError, "scaling_factor must be a Python int or float.*NoneType"),
    ({"scaling_factor": np.float32(1)}, TypeError, "scaling_factor must be .* got float32"),
    ({"scaling_factor": True}, TypeError, "scaling_factor must be .* got bool"),
    ({"scaling_factor": np.inf}, ValueError, "scaling_factor must be .* got inf"),
    ({"scaling_factor": np.nan}, ValueError, "scaling_factor must be .* got nan"),
    ({"scaling_factor": -1e-40}, ValueError, "scaling_factor must be .* got -1e-40"),
    ({"score_function": "relu"}, ValueError, "score_function must be one of 'sigmoid', 'softmax', "
     "'sqrtsoftplus' .* got 'relu'"),
    ({"score_function": 3}, ValueError, "score_function must be one of .* got 3"),
    ({"score_function": None}, ValueError, "score_function must be one of .* got None"),
    ({"score_function": True}, ValueError, "score_function must be one of .* got True"),
    ({"routing_map_format": "bitmap"}, ValueError, "routing_map_format must be one of 'bytemap', "
     "'bitmap_u8' .* got 'bitmap'"),
    ({"routing_map_format": 2}, ValueError, "routing_map_format must be one of .* got 2"),
    ({"routing_map_format": 1.0}, ValueError, "routing_map_format must be one of .* got 1.0"),
    ({"expert_bias": np.ones(12, np.float32), "score_function": "softmax"}, ValueError,
     "expert_bias only goes with .* got 'softmax'"),
    ({"expert_bias": np.ones(11, np.float32)}, ValueError, r"expert_bias must have .* got \(11,\)"),
    ({"expert_bias": np.ones(12, np.int32)}, TypeError, "expert_bias .* floating dtype, got int32"),
    ({"expert_bias": [0.0] * 12}, TypeError, "expert_bias must be an array, got list"),
    ({"group_topk": 2}, ValueError, "num_groups must be positive where group_topk = 2 is, got -1"),
    (GROUPS | {"num_groups": None}, ValueError, "num_groups must be positive .* got None"),
    (GROUPS | {"num_groups": 5}, ValueError, "num_groups must divide num_experts = 12, got 5"),
    (GROUPS | {"num_groups": 13}, ValueError, "num_groups must be between .* got 13"),
    (GROUPS | {"group_topk": 6}, ValueError, "group_topk must be between 1 and num_groups = 4"),
    (GROUPS | {"topk": 3}, ValueError, "group_topk must divide topk = 3, got 2"),
    (GROUPS | {"topk": 8}, ValueError, "topk / group_topk must be at most .* = 3, got 8 / 2"),
    (GROUPS | {"group_topk": 1.5}, TypeError, "group_topk must be a static integer, got float"),
    ({"topk_indices_dtype": np.uint8}, TypeError, "topk_indices_dtype must be one of int16, int32"),
    ({"topk_indices_dtype": "indices"}, TypeError, "topk_indices_dtype .* got 'indices'"),
    ({"topk_indices_dtype": np.int64}, ValueError, "topk_indices_dtype int64 needs jax_enable_x64"),
    ({"topk_indices_dtype": np.int32, "routing_map_format": "bitmap_u8"}, ValueError,
     "topk_indices_dtype .* cannot be combined with routing_map_format=BITMAP_U8"),
    ({"topk_indices_dtype": np.int32, "compute_aux_scores": True}, ValueError,
     "compute_aux_scores=True cannot be combined with topk_indices_dtype"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)  # fmt: skip
def test_choice(arguments, exception, text):
  arguments = {"topk": 4, "score_function": "sigmoid"} | arguments
  function = functools.partial(fused_topk_with_score_function, **arguments)
  with pytest.raises(exception, match=text):
    jax.eval_shape(function, jax.ShapeDtypeStruct((5, 12), jnp.float32))


@pytest.mark.parametrize(
  "logits, exception, text",
  (
    (np.ones((5, 12)), TypeError, "logits must be one of .* got float64"),
    (jnp.ones((5, 12), jnp.int32), TypeError, "logits must be one of .* got int32"),
    ([[1.0, 2.0, 3.0]], TypeError, "logits must be an array, got list"),
    (jnp.float32(1), ValueError, "logits must have shape .* got a scalar"),
    (jnp.ones((5, 0)), ValueError, "logits must have at least one expert"),
  ),
)
def test_logits(logits, exception, text):
  with jax.enable_x64(True):
    for function in (
      lambda: fused_topk_with_score_function(logits, 1),
      lambda: fused_score_for_moe_aux_loss(logits, 1, "softmax"),
    ):
      with pytest.raises(exception, match=text):
        function()


def test_int16_indices_hold_32767_experts():
  def indices(experts):
    logits = jax.ShapeDtypeStruct((1, experts), jnp.float32)
    function = functools.partial(fused_topk_with_score_function, topk_indices_dtype=jnp.int16)
    return jax.eval_shape(lambda x: function(x, 2), logits)[1]

  assert indices(32767).shape == (1, 2)
  with pytest.raises(ValueError, match="topk_indices_dtype int16 needs at most 32767 experts"):
    indices(32768)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"topk": 13}, ValueError, "topk must be between 1 and num_experts = 12, got 13"),
    ({"score_function": "relu"}, ValueError, "score_function must be one of .* got 'relu'"),
    ({"routing_map_format": 7}, ValueError, "routing_map_format must be one of .* got 7"),
    ({"implementation": "tpu"}, ValueError, "implementation must be one of .* got 'tpu'"),
  ),
)
def test_scores(arguments, exception, text):
  arguments = {"topk": 4, "score_function": "sigmoid"} | arguments
  function = functools.partial(fused_score_for_moe_aux_loss, **arguments)
  with pytest.raises(exception, match=text):
    jax.eval_shape(function, jax.ShapeDtypeStruct((5, 12), jnp.float32))


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"probs": jnp.ones((5, 12), jnp.int32)}, TypeError, "probs must be one of .* got int32"),
    ({"probs": jnp.float32(1)}, ValueError, r"probs must have shape .* got \(\)"),
    ({"probs": jnp.ones((5, 0))}, ValueError, r"probs must have shape .* got \(5, 0\)"),
    ({"tokens_per_expert": jnp.ones(12, bool)}, TypeError, "tokens_per_expert .* got bool"),
    ({"tokens_per_expert": jnp.ones(11)}, ValueError, r"tokens_per_expert .* got \(11,\)"),
    ({"tokens_per_expert": [1] * 12}, TypeError, "tokens_per_expert must be an array, got list"),
    ({"topk": 0}, ValueError, "topk must be between 1 and num_experts = 12, got 0"),
    ({"topk": 4, "num_experts": 3}, ValueError, "topk must be .* num_experts = 3, got 4"),
    ({"coeff": jnp.float32(1)}, TypeError, "coeff must be a Python int or float"),
    ({"coeff": np.inf}, ValueError, "coeff must be .* got inf"),
    ({"num_experts": 5}, ValueError, r"num_experts must divide probs.shape\[-1\] = 12, got 5"),
    ({"num_experts": 24}, ValueError, r"num_experts must be between 1 and probs.shape\[-1\] = 12"),
    ({"num_experts": 0}, ValueError, "num_experts must be between 1"),
    ({"total_num_tokens": 0}, ValueError, "total_num_tokens must be between 1 .* got 0"),
    ({"total_num_tokens": True}, TypeError, "total_num_tokens must be an integer"),
    ({"total_num_tokens": 1.0}, TypeError, "total_num_tokens must be an array, got float"),
    ({"total_num_tokens": jnp.float32(1)}, TypeError, "total_num_tokens .* got float32"),
    ({"total_num_tokens": jnp.ones(1, jnp.int32)}, ValueError, r"total_num_tokens .* got \(1,\)"),
  ),
)
def test_loss(arguments, exception, text):
  counts = jnp.ones(12, jnp.int32)
  given = {"probs": jnp.ones((5, 12)), "tokens_per_expert": counts, "topk": 2, "coeff": 0.1}
  with pytest.raises(exception, match=text):
    fused_moe_aux_loss(**given | arguments)
