"""Operations with an order over all tokens, lowered where the tokens may be sharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_router import _primitive
from programs import collectives, put

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
UNKNOWN = r"reversal .* over \d devices it cannot tell .* jax\.shard_map, .* leading dimension"


def _reversed(x):
  return [jnp.flip(x, -1)]


# No platform has a kernel of this name, so the reference is lowered.
_bind = _primitive.make_primitive(
  _primitive.Operation(
    name="reversal",
    batch_ndim=lambda shapes: len(shapes[0]) - 1,
    results=lambda shapes: [_primitive.Result(shapes[0][-1:], np.dtype(np.int32))],
    attributes=lambda: {},
    reference=_reversed,
    tangents=lambda *_: [None],
    whole_tokens=True,
  )
)


def reverse(x):
  return _bind(x, implementation=None)[0]


@pytest.fixture
def x(rng):
  return rng.integers(0, 100, (8, 16)).astype(np.int32)


def test_one_device_among_many(x):
  assert len(jax.devices("cpu")) == 8
  np.testing.assert_array_equal(reverse(x[0]), x[0, ::-1])
  np.testing.assert_array_equal(jax.jit(reverse)(x[0]), x[0, ::-1])
  last = jax.device_put(x[0], jax.devices()[-1])
  np.testing.assert_array_equal(jax.jit(reverse)(last), x[0, ::-1])


@pytest.mark.parametrize("known", (True, False), ids=("set_mesh", "arrays alone"))
@pytest.mark.parametrize("spec", ("d", None))
def test_automatic_axes_hide_the_tokens(make_mesh, x, known, spec):
  mesh = make_mesh(AUTO)
  tokens = put(mesh, x[0], spec)
  rows = put(mesh, x, "d", None)
  for function in (reverse, jax.jit(reverse), jax.jit(lambda x: jax.lax.map(reverse, x[None]))):
    with pytest.raises(ValueError, match=UNKNOWN):
      if known:
        with jax.set_mesh(mesh):
          function(tokens)
      else:
        function(tokens)
  np.testing.assert_array_equal(jax.jit(reverse)(rows), x[:, ::-1])
  np.testing.assert_array_equal(jax.jit(jax.vmap(reverse))(rows), x[:, ::-1])
  assert collectives(jax.vmap(reverse), rows) == set()


def test_explicit_axes_do_not(make_mesh, x):
  mesh = make_mesh(EXPLICIT)
  with jax.set_mesh(mesh):
    whole = put(mesh, x[0], None)
    np.testing.assert_array_equal(jax.jit(reverse)(whole), x[0, ::-1])
    sharded = put(mesh, x[0], "d")
    with pytest.raises(ValueError, match=r"x must not be sharded .* reverse .* jax\.shard_map"):
      _primitive.check_whole_tokens("reverse", "x", sharded, 0)
    _primitive.check_whole_tokens("reverse", "x", put(mesh, x, "d", None), 1)


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("kind", (AUTO, EXPLICIT), ids=("auto", "explicit"))
def test_shard_map(make_mesh, x, kind, check_vma):
  mesh = make_mesh(kind)
  mapped = jax.shard_map(reverse, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=check_vma)
  tokens = put(mesh, x.reshape(-1), "d")
  np.testing.assert_array_equal(jax.jit(mapped)(tokens), x[:, ::-1].reshape(-1))


def test_shard_map_over_one_of_two_axes(make_mesh, x):
  def mapped(kind, function):
    mesh = make_mesh(kind, (4, 2))
    sharded = jax.shard_map(
      function, mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
    )
    with jax.set_mesh(mesh):
      return jax.jit(sharded)(put(mesh, x.reshape(-1), "d"))

  want = x.reshape(4, -1)[:, ::-1].reshape(-1)
  np.testing.assert_array_equal(mapped(EXPLICIT, reverse), want)
  np.testing.assert_array_equal(mapped(AUTO, lambda x: reverse(x[None])[0]), want)
  with pytest.raises(ValueError, match=UNKNOWN):
    mapped(AUTO, reverse)
