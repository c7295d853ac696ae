"""Quantile balancing under TransformerEngine's names: what its PyTorch tests check, and more."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import transformer_engine_oracle as oracle
from jax_router.compat.transformer_engine import fused_topk_with_score_function
from programs import assert_equal, collectives, loop, put
from transformer_engine_oracle import run

FORMS = {
  "bytemap": {},
  "bitmap": {"routing_map_format": "bitmap_u8"},
  "int16": {"topk_indices_dtype": np.int16},
  "int32": {"topk_indices_dtype": np.int32},
}


def make_case(rng, tokens, experts, bins):
  logits = rng.normal(size=(tokens, experts)).astype(np.float32)
  bias = np.linspace(-0.2, 0.2, experts, dtype=np.float32)
  bounds = np.array([bias.min() - 1, bias.max() + 1], np.float32)
  histogram = rng.integers(0, 9, size=(experts, bins)).astype(np.int32)
  return logits, {"expert_bias": bias, "qb_bounds": bounds, "qb_histogram": histogram}


def call(implementation, logits, topk, cotangents=(), **options):
  options = {"score_function": "sigmoid"} | options
  return run(implementation, logits, topk, cotangents, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", (8, 16))
def test_histogram_and_routing(kernel, rng, form, k):
  """TransformerEngine's case: 257 tokens, 896 experts, 1000 bins, a random cotangent."""
  logits, operands = make_case(rng, 257, 896, 1000)
  before = operands["qb_histogram"].copy()
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  (probs, routing, histogram), (gradient,) = call(
    kernel, logits, k, [cotangent], scaling_factor=1.2, **FORMS[form], **operands
  )
  options = {"score_function": "sigmoid", "scaling_factor": 1.2}
  want = oracle.choose(logits, k, expert_bias=operands["expert_bias"], **options)
  np.testing.assert_allclose(probs, want.probs, rtol=1.3e-6, atol=1e-5)
  want_gradient = oracle.choice_gradient(logits, want, cotangent, **options)
  np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-5)
  routing = np.asarray(routing)
  if form == "bitmap":
    np.testing.assert_array_equal(routing, np.packbits(want.routing_map, -1, bitorder="little"))
  elif form == "bytemap":
    assert routing.dtype == np.bool_
    np.testing.assert_array_equal(routing, want.routing_map)
  else:
    assert routing.dtype == FORMS[form]["topk_indices_dtype"]
    np.testing.assert_array_equal(routing, want.indices)
  assert histogram.dtype == jnp.int32
  counts = oracle.quantile_counts(logits, operands["expert_bias"], k, operands["qb_bounds"], 1000)
  oracle.check_counts(np.asarray(histogram) - before, counts)
  np.testing.assert_array_equal(operands["qb_histogram"], before)  # accumulated into a new one


@pytest.mark.parametrize("experts, k, bins", ((3, 1, 7), (7, 6, 1), (130, 1, 64), (33, 32, 4096)))
def test_odd_sizes(kernel, rng, experts, k, bins):
  logits, operands = make_case(rng, 65, experts, bins)
  (probs, routing_map, histogram), _ = call(kernel, logits, k, **operands)
  options = {"score_function": "sigmoid", "expert_bias": operands["expert_bias"]}
  want = oracle.choose(logits, k, **options)
  oracle.check_close(probs, want.probs)
  np.testing.assert_array_equal(routing_map, want.routing_map)
  counts = oracle.quantile_counts(logits, operands["expert_bias"], k, operands["qb_bounds"], bins)
  oracle.check_counts(np.asarray(histogram) - operands["qb_histogram"], counts)


def test_golden_histogram(implementation):
  """Logits whose scores are those of the golden vector; scale 4, so no bin edge is near but 0."""
  scores = np.array([[0.9, 0.6, 0.3, 0.1], [0.2, 0.8, 0.5, 0.7]])
  logits = np.log(scores / (1 - scores)).astype(np.float32)
  (_, indices, histogram), _ = call(
    implementation, logits, 2, topk_indices_dtype=np.int32, expert_bias=np.zeros(4, np.float32),
    qb_histogram=np.zeros((4, 8), np.int32), qb_bounds=np.array([-1, 1], np.float32),
  )  # fmt: skip
  assert indices.tolist() == [[0, 1], [1, 3]]
  assert histogram.tolist() == [
    [0, 1, 0, 0, 0, 1, 0, 0],
    [0, 0, 2, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 2, 0, 0, 0],
    [0, 0, 0, 1, 1, 0, 0, 0],
  ]


def test_tie_drops_the_highest_expert_and_ends_take_the_rest(kernel):
  logits = np.array([[2, 2, 2, 0, 0, -8, -8, -8]], np.float32)
  (_, routing_map, histogram), _ = call(
    kernel, logits, 2, expert_bias=np.zeros(8, np.float32),
    qb_histogram=np.zeros((8, 8), np.int32), qb_bounds=np.array([-0.05, 0.05], np.float32),
  )  # fmt: skip
  assert np.flatnonzero(routing_map[0]).tolist() == [0, 1]
  bins = [np.flatnonzero(row).tolist() for row in np.asarray(histogram)]
  assert bins == [[4], [4], [4], [7], [7], [7], [7], [7]]  # r = 0, then far above
  (_, _, histogram), _ = call(
    kernel, logits, 2, expert_bias=np.full(8, -3, np.float32),
    qb_histogram=np.zeros((8, 8), np.int32), qb_bounds=np.array([-0.05, 0.05], np.float32),
  )  # fmt: skip
  assert (np.asarray(histogram) == np.eye(8, dtype=int)[0]).all()  # far below


def test_micro_batches_add_up_to_one_call(kernel, rng):
  logits, operands = make_case(rng, 320, 64, 100)
  want = call(kernel, logits, 8, **operands)[0][2]
  first = call(kernel, logits[:127], 8, **operands)[0][2]
  got = call(kernel, logits[127:], 8, **operands | {"qb_histogram": first})[0][2]
  assert_equal(got, want)
  assert not np.array_equal(first, want)


def test_leading_dimensions_and_one_token(implementation, rng):
  logits, operands = make_case(rng, 24, 16, 50)
  want = call(implementation, logits, 4, **operands)[0]
  got = call(implementation, logits.reshape(2, 3, 4, 16), 4, **operands)[0]
  np.testing.assert_allclose(np.reshape(got[0], (24, 16)), want[0], rtol=1e-6)
  assert_equal([np.reshape(got[1], (24, 16)), got[2]], want[1:])
  one = call(implementation, logits[3], 4, **operands)[0]
  assert one[0].shape == one[1].shape == (16,)
  oracle.check_close(one[0], want[0][3])
  assert (np.asarray(one[2]) - operands["qb_histogram"]).sum() == 16


def test_no_tokens_count_nothing(implementation, rng):
  _, operands = make_case(rng, 1, 16, 50)
  (probs, _, histogram), _ = call(implementation, np.zeros((0, 16), np.float32), 4, **operands)
  assert probs.shape == (0, 16)
  assert_equal(histogram, operands["qb_histogram"])


def test_vmap_over_every_operand(kernel, rng):
  cases = [make_case(rng, 12, 16, 30) for _ in range(3)]
  logits = jnp.stack([case[0] for case in cases], axis=-1)
  names = ("expert_bias", "qb_histogram", "qb_bounds")
  stacked = [jnp.stack([case[1][name] * (1 + i) for i, case in enumerate(cases)]).astype(
    cases[0][1][name].dtype) for name in names]  # fmt: skip

  def function(logits, *operands):
    return fused_topk_with_score_function(
      logits,
      4,
      score_function="sigmoid",
      implementation=kernel,
      **dict(zip(names, operands, strict=True)),
    )

  for axes in ((2, 0, 0, 0), (2, None, None, None), (None, 0, None, 0)):
    args = [x if a is not None else jnp.take(x, 0, axis=-1 if i == 0 else 0)
            for i, (x, a) in enumerate(zip((logits, *stacked), axes, strict=True))]  # fmt: skip
    got = jax.jit(jax.vmap(function, axes))(*args)
    want = loop(jax.jit(function), axes, 0, *args)
    assert_equal(got[1:], want[1:])
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)


def test_histograms_of_shards_add_up(make_mesh, rng):
  mesh = make_mesh(AxisType.Auto)
  logits, operands = make_case(rng, 64, 16, 100)
  zeros = jnp.zeros_like(operands["qb_histogram"])
  routed = functools.partial(
    fused_topk_with_score_function, topk=4, score_function="sigmoid",
    expert_bias=operands["expert_bias"], qb_bounds=operands["qb_bounds"],
  )  # fmt: skip

  def local(logits):
    return jax.lax.psum(routed(logits, qb_histogram=zeros)[2], "d")

  mapped = jax.shard_map(local, mesh=mesh, in_specs=P("d", None), out_specs=P())
  want = jax.jit(lambda x: routed(x, qb_histogram=zeros)[2])(logits)
  assert_equal(jax.jit(mapped)(logits), want)
  assert np.asarray(want).sum() == 64 * 16


def test_tokens_sharded_under_plain_jit(make_mesh, rng):
  """Each device counts its tokens; the histograms are added, and nothing is gathered."""
  mesh = make_mesh(AxisType.Auto)
  logits, operands = make_case(rng, 64, 16, 100)
  bounds = operands.pop("qb_bounds")

  def function(logits, bias, histogram):
    return fused_topk_with_score_function(
      logits, 4, score_function="sigmoid", expert_bias=bias, qb_bounds=bounds,
      qb_histogram=histogram,
    )  # fmt: skip

  args = logits, operands["expert_bias"], operands["qb_histogram"]
  want = jax.jit(function)(*args)
  with jax.set_mesh(mesh):
    args = [put(mesh, x, *spec) for x, spec in zip(args, (("d", None), (), ()), strict=True)]
    assert collectives(function, *args) == {"all-reduce"}
    assert_equal(jax.jit(function)(*args), want)


def test_repeats_have_the_same_bits(kernel, rng):
  logits, operands = make_case(rng, 257, 64, 100)
  cotangent = rng.normal(size=logits.shape).astype(np.float32)
  first = call(kernel, logits, 8, [cotangent], **operands)
  for _ in range(20):
    assert_equal(call(kernel, logits, 8, [cotangent], **operands), first)


def test_traced_bounds_compile_once_and_invalid_ones_count_nothing(kernel, rng):
  logits, operands = make_case(rng, 9, 16, 50)
  bounds = operands.pop("qb_bounds")
  traces = []

  @jax.jit
  def function(bounds):
    traces.append(bounds)
    return fused_topk_with_score_function(
      logits, 4, score_function="sigmoid", implementation=kernel, qb_bounds=bounds, **operands
    )

  for scale in (1, 2):
    histogram = function(bounds * np.float32(scale))[2]
    counts = oracle.quantile_counts(logits, operands["expert_bias"], 4, bounds * scale, 50)
    oracle.check_counts(np.asarray(histogram) - operands["qb_histogram"], counts)
  for invalid in ([1, 1], [1, -1], [np.nan, 1], [-1, np.inf]):
    assert_equal(function(np.array(invalid, np.float32))[2], operands["qb_histogram"])
  assert len(traces) == 1


# ---- bad arguments ----


@pytest.mark.parametrize(
  "changes, exception, text",
  (
    ({"qb_bounds": None}, ValueError, "must be provided together, qb_bounds is None"),
    ({"qb_histogram": None}, ValueError, "must be provided together, qb_histogram is None"),
    ({"score_function": "softmax", "expert_bias": None}, ValueError, "only supports .*'softmax'"),
    ({"score_function": "sqrtsoftplus"}, ValueError, "only supports .* got 'sqrtsoftplus'"),
    ({"expert_bias": None}, ValueError, "only supports a float32 expert_bias, got None"),
    ({"expert_bias": np.zeros(16, np.float16)}, ValueError, "only supports .* got float16"),
    ({"num_groups": 4, "group_topk": 2}, ValueError, "only supports a choice without groups"),
    ({"use_pre_softmax": True}, ValueError, "only supports use_pre_softmax=False"),
    ({"topk": 16}, ValueError, "only supports topk < num_experts = 16, got 16"),
    ({"qb_bounds": np.array([1, 1], np.float32)}, ValueError, "finite with lower < upper"),
    ({"qb_bounds": jnp.array([1.0, -1.0])}, ValueError, "finite with lower < upper"),
    ({"qb_bounds": np.array([np.nan, 1], np.float32)}, ValueError, "finite with lower < upper"),
    ({"qb_bounds": np.array([-1, 1])}, TypeError, "qb_bounds must have dtype float32"),
    ({"qb_bounds": np.zeros(3, np.float32)}, ValueError, r"qb_bounds must have shape \[2\]"),
    ({"qb_histogram": np.zeros((16, 5), np.int16)}, TypeError, "qb_histogram must have dtype"),
    ({"qb_histogram": np.zeros((15, 5), np.int32)}, ValueError, r"qb_histogram .* got \(15, 5\)"),
    ({"qb_histogram": np.zeros((16, 0), np.int32)}, ValueError, r"qb_histogram .* num_bins >= 1"),
    ({"qb_histogram": np.zeros(16, np.int32)}, ValueError, r"qb_histogram .* got \(16,\)"),
    ({"compute_aux_scores": True}, ValueError, "cannot be combined with .*qb_histogram"),
  ),
)
def test_bad_arguments_are_refused_while_tracing(rng, changes, exception, text):
  _, operands = make_case(rng, 1, 16, 5)
  arguments = {"topk": 4, "score_function": "sigmoid"} | operands | changes
  function = functools.partial(fused_topk_with_score_function, **arguments)
  with pytest.raises(exception, match=text):
    jax.eval_shape(function, jax.ShapeDtypeStruct((5, 16), jnp.float32))
