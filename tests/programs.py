"""What compiled programs hold, and comparisons of results, for tests of transformations."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_COLLECTIVES = re.compile(
  r"\b(all-gather|all-to-all|all-reduce|collective-permute|collective-broadcast|reduce-scatter)"
  r"(?:-start)?\("
)


def calls(word: str, function, *args) -> tuple[int, int]:
  """How many forward and backward kernels of a word `function` has when compiled for the CPU."""
  text = jax.jit(function).trace(*args).lower(lowering_platforms=("cpu",)).as_text()
  call = f"custom_call @jax_router_{word}"
  return text.count(f"{call}("), text.count(f"{call}_backward(")


def collectives(function, *args) -> set[str]:
  """Names of the collectives in the compiled program."""
  text = jax.jit(function).lower(*args).compile().as_text()
  assert "ENTRY" in text
  return set(_COLLECTIVES.findall(text))


def put(mesh, x, *spec) -> jax.Array:
  """`x` on the mesh, its dimensions split as `spec` says."""
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def assert_equal(got, want):
  """Equal trees, to the bit."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same(got, want):
  """Equal trees: integers and bools exactly, floats to float32 rounding."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jnp.floating):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    else:
      np.testing.assert_array_equal(a, b)


def loop(function, in_axes, out_axes, *args):
  """What `jax.vmap(function, in_axes, out_axes)(*args)` must be, one call after the other."""
  size = next(x.shape[a] for x, a in zip(args, in_axes, strict=True) if a is not None)
  results = [
    function(
      *(x if a is None else jnp.take(x, i, axis=a) for x, a in zip(args, in_axes, strict=True))
    )
    for i in range(size)
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves, out_axes), *results)
