"""TransformerEngine's scores for the auxiliary loss, and the loss, against float64."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import test_transformer_engine as topk_tests
import transformer_engine_oracle as oracle
from jax_router.compat.transformer_engine import (
  fused_moe_aux_loss,
  fused_score_for_moe_aux_loss,
  fused_topk_with_score_function,
)
from transformer_engine_oracle import SCORES, assert_same_bits, check_close, make_logits, run

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


# ---- scores ----


def check_scores(implementation, rng, logits, k, score, tolerance=1e-5):
  cotangents = [np.ones(logits.shape, np.float32), rng.normal(size=logits.shape).astype(np.float32)]
  (scores, routing_map), gradients = run(
    implementation, logits, k, cotangents, name="scores", score_function=score
  )
  assert scores.dtype == np.float32 and scores.shape == logits.shape
  want = oracle.aux_scores(logits, score)
  check_close(scores, want)
  assert routing_map.dtype == np.bool_
  np.testing.assert_array_equal(routing_map, oracle.mark(oracle.best(want, k), logits.shape[-1]))
  for cotangent, gradient in zip(cotangents, gradients, strict=True):
    assert gradient.dtype == logits.dtype
    check_close(gradient, oracle.aux_scores_gradient(logits, cotangent, score), tolerance)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
  "tokens, experts, k",
  ((128, 32, 4), (2048, 128, 4), (2048, 256, 8), (7168, 128, 8), (7168, 32, 4)),
)
def test_scores_of_the_jax_grid(kernel, rng, tokens, experts, k, score):
  check_scores(kernel, rng, make_logits(tokens, experts, score), k, score)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tokens", (2048, 7168))
@pytest.mark.parametrize("experts", (1024, 256, 128, 32))
@pytest.mark.parametrize("k", (1, 4, 8, 16, 32))
def test_scores_of_the_pytorch_grid(kernel, rng, tokens, experts, k, score):
  check_scores(kernel, rng, make_logits(tokens, experts, score), k, score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("k", (1, 3, 33))
def test_scores_by_every_implementation(implementation, rng, k, score):
  """They are normalised for k = 1 too; k matters for the map only."""
  logits = rng.normal(size=(65, 33)).astype(np.float32) * 2
  check_scores(implementation, rng, logits, k, score)
  (scores, _), _ = run(implementation, logits, k, name="scores", score_function=score)
  check_close(np.asarray(scores).sum(-1), 1)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("score", SCORES)
def test_scores_of_halves_are_float32(implementation, rng, dtype, score):
  """Scores and their cotangent are float32; only the gradient is rounded to the logits' dtype."""
  logits = (rng.permuted(np.tile(np.arange(-20, 20), (48, 1)), axis=1) / 16).astype(dtype)
  ulp = float(ml_dtypes.finfo(dtype).eps)
  check_scores(implementation, rng, logits, 4, score, tolerance=ulp)


# Of the logits of the golden vectors: scores, and their gradient.
GOLDEN = {
  "softmax": (
    (0.0845664, 0.0188693, 0.3790001, 0.0512921, 0.2298752, 0.0311102, 0.1394264, 0.0658603),
    (-0.0279355, -0.0043463, -0.0493981, -0.0015561, 0.0160136, 0.0052782, 0.0375980, 0.0243461),
  ),
  "sigmoid": (
    (0.1307537, 0.0564938, 0.1850201, 0.1050299, 0.1717396, 0.0793061, 0.1535661, 0.1180907),
    (-0.0176388, -0.0106272, -0.0034696, -0.0030099, 0.0013373, 0.0070437, 0.0100230, 0.0177178),
  ),
}


@pytest.mark.parametrize("score", GOLDEN)
def test_golden_scores(implementation, score):
  (scores, routing_map), (gradient,) = run(
    implementation, topk_tests.LOGITS, 3, [topk_tests.COTANGENT], name="scores",
    score_function=score, routing_map_format="bitmap_u8",
  )  # fmt: skip
  np.testing.assert_allclose(scores[0], GOLDEN[score][0], rtol=2e-7, atol=1e-7)
  np.testing.assert_allclose(gradient[0], GOLDEN[score][1], rtol=1e-6, atol=1.1e-7)
  assert routing_map.tolist() == [[4 + 16 + 64]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tokens, experts, k", ((128, 32, 4), (256, 128, 8), (256, 130, 8)))
def test_scores_and_map_in_every_form(kernel, tokens, experts, k, score):
  """As bitmap, and as the other function's flag, which ignores what steers a choice."""
  logits = make_logits(tokens, experts, score)
  call = functools.partial(fused_score_for_moe_aux_loss, implementation=kernel)
  scores, routing_map = call(logits, k, score)
  packed = np.packbits(routing_map, axis=-1, bitorder="little")
  got = call(logits, k, score, routing_map_format="bitmap_u8")
  assert_same_bits(got, (scores, packed))
  got = fused_topk_with_score_function(
    logits, k, True, 8, 4, 1.2, score, np.ones(experts, np.float32), True, implementation=kernel
  )
  assert_same_bits(got, (scores, routing_map))


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_masked_experts_are_zero(implementation, rng, score):
  logits = rng.normal(size=(16, 40)).astype(np.float32)
  logits[:, :10] = -np.inf  # first in the row, where a running maximum starts
  logits[:, 10:15] = np.nan
  (scores, routing_map), (gradient,) = run(
    implementation, logits, 4, [np.ones_like(logits)], name="scores", score_function=score
  )
  assert (np.asarray(scores)[:, :15] == 0).all() and not np.asarray(routing_map)[:, :15].any()
  check_close(scores[:, 15:], oracle.aux_scores(logits[:, 15:], score))
  assert np.isfinite(gradient).all()


def test_scores_of_no_tokens(implementation):
  logits = np.zeros((0, 12), ml_dtypes.bfloat16)
  (scores, routing_map), _ = run(implementation, logits, 4, name="scores", score_function="sigmoid")
  assert scores.shape == routing_map.shape == (0, 12) and scores.dtype == np.float32


# ---- loss ----


@functools.cache
def _loss(topk: int, coeff: float, num_experts: int | None, static_total):
  """Loss and gradient under jit; a total that is not None is static, else an operand may follow."""

  def function(probs, counts, *total):
    if static_total is not None:
      total = (static_total,)
    given = {"total_num_tokens": total[0]} if total else {}
    return fused_moe_aux_loss(probs, counts, topk, coeff, num_experts=num_experts, **given)

  return jax.jit(jax.value_and_grad(function))


def check_loss(probs, counts, topk, *, total=None, num_experts=None, coeff=0.01, tolerance=1e-5):
  """By default, with a static total and with a traced one."""
  rows, columns = probs.shape
  want = oracle.aux_loss(
    probs, counts, topk, coeff, rows if total is None else total, num_experts or columns
  )
  results = []
  if total is None:
    results.append(_loss(topk, coeff, num_experts, None)(probs, counts))
  known = rows if total is None else total
  results.append(_loss(topk, coeff, num_experts, known)(probs, counts))
  results.append(_loss(topk, coeff, num_experts, None)(probs, counts, jnp.int32(known)))
  for loss, gradient in results:
    assert loss.shape == () and loss.dtype == gradient.dtype == probs.dtype
    check_close(loss, want[0], tolerance)
    check_close(gradient, want[1], tolerance)
    # The gradient is far below 1e-5 for many tokens.
    np.testing.assert_allclose(np.asarray(gradient, np.float64), want[1], rtol=tolerance)


def make_counts(rng, columns: int) -> np.ndarray:
  return rng.integers(1, 1000, size=columns).astype(np.int32)


@pytest.fixture
def any_device(kernel):
  """The loss is plain JAX: the fixture only picks the device."""
  return kernel


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
  "tokens, experts, k",
  ((128, 32, 4), (2048, 128, 4), (2048, 256, 4), (7168, 128, 4), (7168, 32, 4)),
)
def test_loss_of_the_jax_grid(rng, tokens, experts, k):
  check_loss(make_logits(tokens, experts, "sigmoid"), make_counts(rng, experts), k)


@pytest.mark.slow
@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("sequences", (1, 2))
@pytest.mark.parametrize("tokens", (2048, 7168, 14234))
@pytest.mark.parametrize("experts", (1024, 256, 128, 32))
@pytest.mark.parametrize("k", (4, 32))
def test_loss_of_the_pytorch_grid(rng, tokens, experts, k, sequences):
  columns = experts * sequences
  probs = make_logits(tokens, columns, "sigmoid")
  check_loss(probs, make_counts(rng, columns), k, num_experts=experts)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("total", (4096, 2048, 2 * 4096 - 17))
def test_loss_with_another_total(rng, total):
  """TransformerEngine's test under graph capture: 4096 rows, 128 experts, k = 4."""
  check_loss(make_logits(4096, 128, "sigmoid"), make_counts(rng, 128), 4, total=total)


@pytest.mark.usefixtures("any_device")
def test_golden_loss():
  probs = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], np.float32)
  loss, gradient = jax.value_and_grad(fused_moe_aux_loss)(probs, np.array([3, 1, 2]), 1, 0.01)
  np.testing.assert_allclose(loss, 0.02775, rtol=1e-6)
  np.testing.assert_allclose(gradient, [[0.0225, 0.0075, 0.015]] * 2, rtol=1e-6)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_loss_of_halves_is_summed_in_float32(rng, dtype):
  """A sum of 3000 halves in their own dtype would stall, or overflow."""
  probs = rng.uniform(30, 40, size=(3000, 16)).astype(dtype)
  counts = make_counts(rng, 16)
  loss, gradient = _loss(4, 0.01, None, None)(probs, counts)
  want = oracle.aux_loss(probs, counts, 4, 0.01, 3000, 16)
  ulp = float(ml_dtypes.finfo(dtype).eps)
  assert loss.dtype == gradient.dtype == dtype
  np.testing.assert_allclose(np.float64(loss), want[0], rtol=ulp)
  smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
  np.testing.assert_allclose(np.asarray(gradient, np.float64), want[1], rtol=ulp, atol=smallest)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
  "dtype", (np.int16, np.int32, np.uint32, np.float32, ml_dtypes.bfloat16, np.float16)
)
def test_counts_of_any_dtype(rng, dtype):
  probs = rng.random(size=(40, 12)).astype(np.float32)
  counts = rng.integers(1, 200, size=12).astype(dtype)
  check_loss(probs, counts, 3)
  if jnp.issubdtype(dtype, jnp.floating):
    gradient = jax.grad(fused_moe_aux_loss, argnums=1)(probs, counts, 3, 0.01)
    assert gradient.dtype == dtype and (np.asarray(gradient) == 0).all()


@pytest.mark.usefixtures("any_device")
def test_sequence_form_is_the_sum_over_sequences(rng):
  sequences, length, experts = 5, 64, 12
  probs = rng.random(size=(sequences, length, experts)).astype(np.float32)
  counts = rng.integers(0, 40, size=(sequences, experts)).astype(np.int32)
  wide = probs.transpose(1, 0, 2).reshape(length, sequences * experts)
  got = _loss(2, 0.3, experts, None)(wide, counts.reshape(-1))
  each = [
    oracle.aux_loss(p, n, 2, 0.3, length, experts) for p, n in zip(probs, counts, strict=True)
  ]
  check_close(got[0], sum(loss for loss, _ in each))
  check_close(got[1], np.concatenate([gradient for _, gradient in each], axis=1))


@pytest.mark.usefixtures("any_device")
def test_global_batch_is_the_sum_over_ranks(rng):
  ranks, length, experts = 4, 96, 20
  probs = rng.random(size=(ranks, length, experts)).astype(np.float32)
  counts = rng.integers(0, 99, size=experts).astype(np.int32)
  total = ranks * length - 7  # 7 rows are padding
  losses = [_loss(3, 0.1, None, total)(p, counts)[0] for p in probs]
  want = oracle.aux_loss(probs.reshape(-1, experts), counts, 3, 0.1, total, experts)[0]
  check_close(sum(np.float64(x) for x in losses), want)


@pytest.mark.usefixtures("any_device")
def test_loss_of_no_tokens_is_zero():
  counts = np.zeros(4, np.int32)
  loss, gradient = _loss(2, 0.01, None, None)(np.zeros((0, 4), np.float32), counts)
  assert loss == 0 and gradient.shape == (0, 4)
  probs, counts = np.ones((3, 4), np.float32), np.ones(4, np.int32)
  loss, gradient = _loss(2, 0.01, None, None)(probs, counts, jnp.int32(0))
  assert loss == 0 and (np.asarray(gradient) == 0).all()


@pytest.mark.usefixtures("any_device")
def test_traced_total_compiles_once(rng):
  probs, counts = rng.random(size=(30, 8)).astype(np.float32), make_counts(rng, 8)
  traces = []

  @jax.jit
  def loss(total):
    traces.append(total)
    return fused_moe_aux_loss(probs, counts, 2, 0.01, total_num_tokens=total)

  for total in (30, 31, 1000):
    check_close(loss(jnp.int32(total)), oracle.aux_loss(probs, counts, 2, 0.01, total, 8)[0])
  assert len(traces) == 1


@pytest.mark.usefixtures("any_device")
def test_loss_of_any_leading_dimensions(rng):
  probs, counts = rng.random(size=(24, 8)).astype(np.float32), make_counts(rng, 8)
  want = oracle.aux_loss(probs, counts, 2, 0.01, 24, 8)[0]
  for lead in ((4, 6), (2, 3, 4), (1, 24)):
    check_close(fused_moe_aux_loss(probs.reshape(*lead, 8), counts, 2, 0.01), want)


def test_loss_of_a_symbolic_number_of_tokens(any_device, rng):
  """An exported program divides by the number of tokens that it is called with."""
  shape = jax.export.symbolic_shape("t, 8")
  function = jax.jit(lambda p, n: fused_moe_aux_loss(p, n, 2, 0.01))
  args = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
  exported = jax.export.export(function, platforms=[any_device])(*args)
  for tokens in (5, 24):
    probs, counts = rng.random(size=(tokens, 8)).astype(np.float32), make_counts(rng, 8)
    check_close(exported.call(probs, counts), oracle.aux_loss(probs, counts, 2, 0.01, tokens, 8)[0])
