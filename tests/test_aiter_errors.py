"""Bad arguments of the aiter layer are refused while tracing, by its own names."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router.compat import aiter


def shape(*sizes, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(sizes, dtype)


SORT = {
  "topk_ids": shape(5, 3), "topk_weights": shape(5, 3, dtype=jnp.float32), "num_experts": 6,
  "model_dim": 4, "moebuf_dtype": jnp.bfloat16,
}  # fmt: skip


def trace(function, given):
  """Abstract evaluation with every `ShapeDtypeStruct` as an operand."""
  arrays = {k: v for k, v in given.items() if isinstance(v, jax.ShapeDtypeStruct)}
  static = {k: v for k, v in given.items() if k not in arrays}
  return jax.eval_shape(lambda arrays: function(**arrays, **static), arrays)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"topk_ids": shape(5, 3, dtype=jnp.float32)}, TypeError, "topk_ids .* integer dtype, got f"),
    ({"topk_ids": shape(5)}, ValueError, r"topk_ids must have shape .* got \(5,\)"),
    ({"topk_ids": [[1]]}, TypeError, "topk_ids must be an array, got list"),
    ({"topk_weights": shape(5, 2, dtype=jnp.float32)}, ValueError,
     r"topk_weights must have shape topk_ids.shape = \(5, 3\), got \(5, 2\)"),
    ({"topk_weights": shape(5, 3)}, TypeError, "topk_weights .* floating dtype, got int32"),
    ({"num_experts": 0}, ValueError, "num_experts must be between 1 .* got 0"),
    ({"num_experts": 2}, ValueError, r"K of a token must be between 1 and .* = 2, got K = 3"),
    ({"topk_ids": shape(5, 0), "topk_weights": shape(5, 0, dtype=jnp.float32)}, ValueError,
     "K of a token must be between 1 .* got K = 0"),
    ({"topk_ids": shape(5, 256), "topk_weights": shape(5, 256, dtype=jnp.float32),
      "num_experts": 300}, ValueError, "K of a token must be between 1 and .* 255, got K = 256"),
    ({"topk_ids": shape(2**24, 1), "topk_weights": shape(2**24, 1, dtype=jnp.float32)}, ValueError,
     "topk_ids must have at most 16777215 tokens, got 16777216"),
    ({"block_size": 0}, ValueError, "block_size must be between 1 .* got 0"),
    ({"block_size": 2**29}, ValueError, r"sorted_ids would be 3221225484 = T \* K \+ E"),
    ({"block_size": 4.0}, TypeError, "block_size must be a static integer, got float"),
    ({"model_dim": -1}, ValueError, "model_dim must be between 0 .* got -1"),
    ({"moebuf_dtype": "nothing"}, TypeError, "moebuf_dtype must be a floating or .* got 'nothing'"),
    ({"moebuf_dtype": None}, TypeError, "moebuf_dtype must be a floating or .* got None"),
    ({"moebuf_dtype": np.complex64}, TypeError, "moebuf_dtype must be a floating or integer"),
    ({"moebuf_dtype": np.float64}, ValueError, "moebuf_dtype float64 needs jax_enable_x64"),
    ({"expert_mask": shape(5)}, ValueError, r"expert_mask must have shape .* = \(6,\), got \(5,\)"),
    ({"expert_mask": shape(6, dtype=jnp.float32)}, TypeError, "expert_mask must .* got float32"),
    ({"num_local_tokens": 2.5}, TypeError, "num_local_tokens must be .* integer, got float"),
    ({"num_local_tokens": True}, TypeError, "num_local_tokens must be an integer, got True"),
    ({"num_local_tokens": shape(2)}, ValueError,
     r"num_local_tokens must have shape \(1,\) or \(\), got \(2,\)"),
    ({"num_local_tokens": shape(1, dtype=jnp.float32)}, TypeError,
     "num_local_tokens must have an integer dtype, got float32"),
    ({"dispatch_policy": 3}, ValueError, "dispatch_policy must be between 0 and 2, got 3"),
    ({"dispatch_policy": -1}, ValueError, "dispatch_policy must be between 0 and 2, got -1"),
    ({"return_local_topk_ids": 1}, TypeError, "return_local_topk_ids must be a static bool"),
    ({"accumulate": None}, TypeError, "accumulate must be a static bool, got NoneType"),
    ({"output_aux": "yes"}, TypeError, "output_aux must be a static bool, got str"),
    ({"implementation": "rocm"}, ValueError, "implementation must be one of .* got 'rocm'"),
  ),
)  # fmt: skip
def test_moe_sorting(arguments, exception, text):
  with pytest.raises(exception, match=text):
    trace(aiter.moe_sorting, SORT | arguments)


LOGITS = {"gating_output": shape(5, 8, dtype=jnp.float32)}
TOPK = LOGITS | {"topk": 3, "need_renorm": True}
FUSED = TOPK | {"num_experts": 6, "model_dim": 4, "moebuf_dtype": jnp.bfloat16}
OF_LOGITS = (
  ({"gating_output": shape(5, 8)}, TypeError, "gating_output must be one of .* got int32"),
  ({"gating_output": shape(8, dtype=jnp.float32)}, ValueError, r"gating_output must .* \[..., T"),
  ({"gating_output": shape(5, 0, dtype=jnp.float32)}, ValueError, "gating_output must .* one exp"),
  ({"gating_output": None}, TypeError, "gating_output must be an array, got NoneType"),
  ({"topk": 0}, ValueError, "topk must be between 1 and num_experts = ., got 0"),
  ({"topk": 9}, ValueError, "topk must be between 1 and num_experts = ., got 9"),
  ({"need_renorm": 1}, TypeError, "need_renorm must be a static bool, got int"),
  ({"implementation": "rocm"}, ValueError, "implementation must be one of .* got 'rocm'"),
)


@pytest.mark.parametrize("arguments, exception, text", OF_LOGITS)
@pytest.mark.parametrize("name", ("topk_softmax", "topk_softmax_sorting"))
def test_logits(name, arguments, exception, text):
  given = TOPK if name == "topk_softmax" else FUSED
  with pytest.raises(exception, match=text):
    trace(getattr(aiter, name), given | arguments)


@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"num_shared_experts": 8}, ValueError, "num_shared_experts must be between 0 and .* = 7"),
    ({"num_shared_experts": 1}, ValueError, "shared_expert_scoring_func must be .* got ''"),
    ({"shared_expert_scoring_func": "softmax"}, ValueError, "shared_expert_scoring_func must be"),
    ({"num_shared_experts": 6, "shared_expert_scoring_func": "sigmoid"}, ValueError,
     "topk must be between 1 and num_experts = 2, got 3"),
  ),
)  # fmt: skip
def test_topk_softmax(arguments, exception, text):
  with pytest.raises(exception, match=text):
    trace(aiter.topk_softmax, TOPK | arguments)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
  "arguments, exception, text",
  (
    ({"num_experts": 9}, ValueError, r"num_experts must be between 1 and gating_output.* = 8"),
    ({"dispatch_policy": 3}, ValueError, "dispatch_policy must be between 0 and 2, got 3"),
    ({"model_dim": -1}, ValueError, "model_dim must be between 0 .* got -1"),
    ({"moebuf_dtype": None}, TypeError, "moebuf_dtype must be a floating or .* got None"),
    ({"block_size": 0}, ValueError, "block_size must be between 1 .* got 0"),
    ({"gating_output": shape(2**24, 8, dtype=jnp.float32)}, ValueError,
     "gating_output must have at most 16777215 tokens"),
  ),
)  # fmt: skip
def test_topk_softmax_sorting(masked, arguments, exception, text):
  given = FUSED | arguments | ({"expert_mask": np.ones(6, bool)} if masked else {})
  if masked and given["num_experts"] != 6:
    given["expert_mask"] = np.ones(given["num_experts"], bool)
  with pytest.raises(exception, match=text):
    trace(aiter.topk_softmax_sorting, given)


def test_the_fused_operation():
  function = functools.partial(aiter.fused_topk_moe_sorting_fwd, model_dim=4, moebuf_dtype=None)
  with pytest.raises(ValueError, match=r"unit_size must be between 1 .* got 0"):
    function(jnp.ones((5, 8)), 8, 3, 0, True)
  with pytest.raises(TypeError, match="moebuf_dtype"):
    function(jnp.ones((5, 8)), 8, 3, 4, True)
  with pytest.raises(ValueError, match="topk must be between 1 and num_experts = 8, got 9"):
    aiter.fused_topk_moe_sorting_max_tokens(8, 9)
  with pytest.raises(TypeError, match="num_experts must be a static integer, got float"):
    aiter.fused_topk_moe_sorting_max_tokens(8.0, 2)
