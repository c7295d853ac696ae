"""Gradients of `dense_moe_fc2`, in the dense form and of the weights of chosen experts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import oracle_experts as oracle
from jax_router import alpha_from_topk, dense_moe_fc2
from oracle_experts import DTYPES, FOLD, make_operands, make_operands_for
from oracle_permute import make_rows

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)


@pytest.fixture(autouse=True)
def _only_what_is_built(request):
  for name in ("implementation", "kernel"):
    if name in request.fixturenames:
      oracle.skip_without_kernel(request.getfixturevalue(name))


@functools.cache
def compiled(implementation, **options):
  """`(h, w2, alpha, cotangent) -> gradients` of all three."""

  @jax.jit
  def run(h, w2, alpha, cotangent):
    function = functools.partial(dense_moe_fc2, implementation=implementation, **options)
    return jax.vjp(function, h, w2, alpha)[1](cotangent)

  return run


def make_case(implementation, *shape, dtype=None, kind="top-k"):
  """Operands and a cotangent of the result."""
  operands = make_operands_for(implementation, *shape, dtype, kind)
  rng = np.random.default_rng(len(shape))
  h, w2 = operands[:2]
  return *operands, make_rows(rng, shape[0], w2.shape[2], dtype=h.dtype)


def fold(dtype) -> float:
  """What a gradient in bfloat16 rounds more than the sums."""
  return FOLD if np.dtype(dtype).name == "bfloat16" else 0.0


def check(got, h, w2, alpha, cotangent):
  want = oracle.gradients(cotangent, h, w2, alpha, fold(h.dtype))
  for gradient, expected, like in zip(got, want, (h, w2, alpha), strict=True):
    expected.check(gradient, like.dtype)


@DTYPE
@pytest.mark.parametrize("shape", ((1, 1, 1, 1, 1), (9, 7, 12, 10, 2), (40, 5, 33, 65, 3)), ids=str)
def test_gradients(implementation, shape, dtype):
  """That of alpha is dense: experts of weight 0 have one too."""
  case = make_case(implementation, *shape, dtype=dtype)
  got = compiled(implementation)(*case)
  check(got, *case)
  alpha, of_alpha = case[2], np.asarray(got[2])
  assert (of_alpha[alpha == 0] != 0).all()
  assert (np.asarray(got[0])[alpha == 0] == 0).all()


@pytest.mark.parametrize("kind", ("dense", "signed", "one expert", "some without", "none"))
def test_weights(implementation, kind):
  case = make_case(implementation, 15, 6, 10, 8, 2, kind=kind)
  check(compiled(implementation)(*case), *case)


def test_float32_results_of_bfloat16_operands(implementation):
  h, w2, alpha, cotangent = make_case(implementation, 15, 6, 10, 8, 2, dtype=DTYPES[1])
  case = h, w2, alpha, cotangent.astype(np.float32)
  check(compiled(implementation, out_dtype=jnp.float32)(*case), *case)


def test_skip_unselected_leaves_the_result_alone(implementation):
  h, w2, alpha, cotangent = make_case(implementation, 15, 6, 10, 8, 2)
  run = functools.partial(dense_moe_fc2, implementation=implementation)
  got = run(h, w2, alpha, skip_unselected=True)
  np.testing.assert_array_equal(got, run(h, w2, alpha))
  dense = compiled(implementation)(h, w2, alpha, cotangent)
  skipped = compiled(implementation, skip_unselected=True)(h, w2, alpha, cotangent)
  np.testing.assert_array_equal(skipped[2], np.where(alpha == 0, 0, dense[2]))
  for a, b in zip(skipped[:2], dense[:2], strict=True):
    tolerance = fold(h.dtype) or 1e-6
    a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=2 * tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("repeated", (False, True))
def test_gradient_of_the_weights_of_chosen_experts(implementation, rng, repeated):
  """The entries of the dense gradient at the chosen experts."""
  h, w2, _, cotangent = make_case(implementation, 20, 7, 12, 10, 3)
  experts = rng.random((20, 8)).argsort(axis=1)[:, :3].astype(np.int32)  # id 7: in no expert
  if repeated:
    experts[:, 1] = experts[:, 0]
  weights = rng.normal(size=(20, 3)).astype(np.float32)

  def layer(h, w2, weights):
    alpha = alpha_from_topk(experts, weights, 7)
    return dense_moe_fc2(h, w2, alpha, implementation=implementation)

  alpha = np.zeros((20, 8))
  np.add.at(alpha, (np.arange(20)[:, None], experts), weights)
  alpha = alpha[:, :7].astype(np.float32)
  want, pull_back = jax.vjp(layer, h, w2, weights)
  oracle.fc2(h, w2, alpha).check(want, h.dtype)
  got = pull_back(cotangent)
  of_h, of_w2, of_alpha = oracle.gradients(cotangent, h, w2, alpha, fold(h.dtype))
  of_h.check(got[0], h.dtype)
  of_w2.check(got[1], h.dtype)
  outside = experts == 7
  assert outside.any()
  at = np.minimum(experts, 6)
  values, tolerance = (np.take_along_axis(x, at, axis=1) * ~outside for x in of_alpha)
  oracle.Sum(values, tolerance).check(got[2], np.float32)


@pytest.mark.parametrize("special", (np.nan, np.inf))
@DTYPE
def test_unselected_experts_that_are_not_finite(implementation, dtype, special):
  """They have gradient 0 and spoil none of the others."""
  h, w2, alpha, cotangent = make_case(implementation, 9, 5, 8, 10, 2, dtype=dtype)
  alpha[:, 3] = 0
  poisoned = np.where(alpha[:, :, None] == 0, dtype(special), h)
  h[alpha == 0] = 0
  got = compiled(implementation)(poisoned, w2, alpha, cotangent)
  check(got, h, w2, alpha, cotangent)
  w2[3] = special
  poisoned = np.where(np.arange(5)[:, None] == 3, dtype(1), poisoned)
  h[:, 3] = 1
  got = compiled(implementation)(poisoned, w2, alpha, cotangent)
  w2[3] = 0
  check(got, h, w2, alpha, cotangent)


# ---- second order, forward mode ----


def weighed_sum(implementation, h, w2, alpha):
  result = dense_moe_fc2(h, w2, alpha, out_dtype=np.float32, implementation=implementation)
  return jnp.sum(jnp.sin(result / 4))


def test_second_order_is_the_references(kernel, rng):
  operands = make_operands_for(kernel, 6, 5, 4, 3, 2)
  directions = [make_rows(rng, *x.shape, dtype=x.dtype) for x in operands]

  @functools.partial(jax.jit, static_argnums=0)
  def products(implementation, *operands):
    def along(*operands):
      gradients = jax.grad(functools.partial(weighed_sum, implementation), (0, 1, 2))(*operands)
      pairs = zip(gradients, directions, strict=True)
      return sum(jnp.vdot(g.astype(jnp.float32), d.astype(np.float32)) for g, d in pairs)

    return along(*operands), jax.grad(along, (0, 1, 2))(*operands)

  got, want = products(kernel, *operands), products("reference", *operands)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
    # In bfloat16 the reference rounds its result elsewhere, and the loss is bent there.
    bar = 0.1 if fold(operands[0].dtype) else 1e-4
    assert oracle.relative_error(a, b) < bar
    assert np.abs(b).max() > 0.1


@pytest.mark.parametrize("name, modes, order", ((None, ("rev",), 2), ("reference", ("fwd",), 1)))
def test_check_grads(name, modes, order):
  function = jax.jit(functools.partial(dense_moe_fc2, implementation=name))
  operands = make_operands(3, 4, 3, 2, 2)
  check_grads(function, operands, order=order, modes=modes, atol=0.03, rtol=0.03, eps=1e-2)


def test_forward_mode_needs_the_reference():
  operands = make_operands(3, 4, 3, 2, 2)
  with pytest.raises(TypeError, match="forward-mode autodiff"):
    jax.jvp(dense_moe_fc2, operands, operands)


def test_what_is_kept_for_the_gradient():
  """The operands, and nothing of their size beside them."""
  h, w2, alpha = map(jnp.asarray, make_operands(10, 4, 6, 8, 2))
  _, pull_back = jax.vjp(dense_moe_fc2, h, w2, alpha)
  kept = sorted(leaf.size for leaf in jax.tree.leaves(pull_back))
  assert kept == sorted(x.size for x in (h, w2, alpha))
