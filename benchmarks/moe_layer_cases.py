"""The MoE layer that moe_layer.py times, part by part: with this package and in plain JAX."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import cases
import jax_router

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from expert_matmul import available as available
from expert_matmul import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Layer:
  """Sizes of a layer of SwiGLU experts."""

  tokens: int
  width: int
  hidden: int
  experts: int
  k: int
  dtype: str

  @property
  def matmul_flops(self) -> int:
    """Of the forward; the backward has twice as many."""
    return 6 * self.tokens * self.k * self.width * self.hidden

  def __str__(self) -> str:
    return (
      f"T {self.tokens}, d {self.width}, expert width {self.hidden}, E {self.experts}, "
      f"k {self.k}, {self.dtype}"
    )


GPU_LAYERS = (
  Layer(8192, 2048, 768, 128, 8, "bfloat16"),
  Layer(8192, 4096, 1536, 64, 6, "bfloat16"),
)
CPU_LAYERS = (Layer(1024, 128, 96, 16, 2, "float32"), Layer(512, 256, 128, 32, 4, "float32"))


class Words(NamedTuple):
  """The four operations around the expert matmuls, with the arguments of this package's."""

  route: Callable[..., Any]
  plan: Callable[..., jax_router.Plan]
  permute: Callable[..., jax.Array]
  combine: Callable[..., jax.Array]


def _plain_plan(experts: jax.Array, num_experts: int) -> jax_router.Plan:
  ids = experts.reshape(-1)
  order = jnp.argsort(ids, stable=True)
  sizes = jnp.bincount(ids, length=num_experts)
  return jax_router.Plan(order, jnp.argsort(order), sizes)


def _plain_permute(x: jax.Array, plan: jax_router.Plan) -> jax.Array:
  return x[plan.order // (len(plan.order) // len(x))]


def _plain_combine(y: jax.Array, weights: jax.Array, plan: jax_router.Plan) -> jax.Array:
  rows = y[plan.inverse].reshape(*weights.shape, -1).astype(jnp.float32)
  return jnp.sum(rows * weights[..., None], axis=1).astype(y.dtype)


OURS = Words(jax_router.route, jax_router.plan, jax_router.permute, jax_router.combine)
PLAIN = Words(cases.xla_route, _plain_plan, _plain_permute, _plain_combine)


# ---- parts ----


class Part(NamedTuple):
  """`function(differentiated, constants)` gives a value, if it has a gradient, and the rest."""

  function: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, Any]]
  differentiated: tuple[Any, ...]
  constants: tuple[Any, ...] = ()

  @property
  def arguments(self) -> tuple[Any, Any]:
    """Those of `forward`."""
    return self.differentiated, self.constants

  def value_shape(self) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the value and its cotangent."""
    return jax.eval_shape(self.function, *self.arguments)[0]

  def forward(self, differentiated: tuple[Any, ...], constants: tuple[Any, ...]) -> Any:
    return self.function(differentiated, constants)

  def both(
    self, differentiated: tuple[Any, ...], constants: tuple[Any, ...], cotangent: jax.Array
  ) -> Any:
    """Value, the rest and the gradients."""
    value, pull_back, rest = jax.vjp(
      lambda *args: self.function(args, constants), *differentiated, has_aux=True
    )
    return value, rest, pull_back(cotangent)


def expert_mlps(
  rows: jax.Array, gate_up: jax.Array, down: jax.Array, sizes: jax.Array, implementation: str
) -> jax.Array:
  """`silu(rows @ gate) * (rows @ up) @ down` of each row's expert."""
  gate, up = jnp.split(grouped_matmul(rows, gate_up, sizes, implementation), 2, axis=-1)
  return grouped_matmul(jax.nn.silu(gate) * up, down, sizes, implementation)


def moe_layer(
  words: Words,
  k: int,
  implementation: str,
  x: jax.Array,
  router: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
) -> jax.Array:
  """The whole layer, for tokens `[T, d]`."""
  logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
  weights, experts = words.route(logits, k)
  plan = words.plan(experts, len(gate_up))
  outputs = expert_mlps(words.permute(x, plan), gate_up, down, plan.group_sizes, implementation)
  return words.combine(outputs, weights, plan)


def parts(layer: Layer, words: Words, inputs: Inputs) -> dict[str, Part]:
  """The parts that differ between this package and plain JAX, and the whole layer."""

  def route(args, _):
    weights, experts = words.route(*args, layer.k)
    return weights, experts

  def plan(args, constants):
    return None, words.plan(*constants, layer.experts)

  def permute(args, constants):
    return words.permute(*args, *constants), None

  def combine(args, constants):
    return words.combine(*args, *constants), None

  return {
    "route": Part(route, (inputs.logits,)),
    "plan": Part(plan, (), (inputs.experts,)),
    "permute": Part(permute, (inputs.x,), (inputs.plan,)),
    "combine": Part(combine, (inputs.outputs, inputs.weights), (inputs.plan,)),
  }


def matmul_part(implementation: str, inputs: Inputs) -> Part:
  """The expert matmuls."""
  args = (inputs.rows, inputs.gate_up, inputs.down)

  def matmuls(args, constants):
    rows, gate_up, down = args
    return expert_mlps(rows, gate_up, down, constants[0], implementation), None

  return Part(matmuls, args, (inputs.plan.group_sizes,))


def layer_part(layer: Layer, words: Words, implementation: str, inputs: Inputs) -> Part:
  """The whole layer."""
  whole = functools.partial(moe_layer, words, layer.k, implementation)
  args = (inputs.x, inputs.router, inputs.gate_up, inputs.down)
  return Part(lambda args, _: (whole(*args), None), args)


# ---- inputs and checks ----


class Inputs(NamedTuple):
  """Arguments of the parts, made in plain JAX."""

  x: jax.Array  # [T, d]
  router: jax.Array  # [d, E]
  gate_up: jax.Array  # [E, d, 2 * hidden]
  down: jax.Array  # [E, hidden, d]
  logits: jax.Array  # [T, E] float32
  weights: jax.Array  # [T, k] float32
  experts: jax.Array  # [T, k]
  plan: jax_router.Plan
  rows: jax.Array  # [T * k, d]
  outputs: jax.Array  # [T * k, d], random


def make_inputs(layer: Layer, seed: jax.Array) -> Inputs:
  """Everything that depends on a seed. The parameters do not."""
  dtype = jnp.dtype(layer.dtype)
  keys = jax.random.split(jax.random.key(0), 3)
  width, hidden = layer.width, layer.hidden
  gate_up = jax.random.normal(keys[0], (layer.experts, width, 2 * hidden), dtype)
  down = jax.random.normal(keys[1], (layer.experts, hidden, width), dtype)
  router = jax.random.normal(keys[2], (width, layer.experts), dtype)
  x_key, outputs_key = jax.random.split(jax.random.key(seed))
  x = jax.random.normal(x_key, (layer.tokens, width), dtype)
  router, gate_up, down = router / width**0.5, gate_up / width**0.5, down / hidden**0.5
  logits = jnp.dot(x, router, preferred_element_type=jnp.float32)
  weights, experts = PLAIN.route(logits, layer.k)
  plan = PLAIN.plan(experts, layer.experts)
  outputs = jax.random.normal(outputs_key, (layer.tokens * layer.k, width), dtype)
  rows = PLAIN.permute(x, plan)
  return Inputs(x, router, gate_up, down, logits, weights, experts, plan, rows, outputs)


@jax.jit
def distances(actual: Any, expected: Any) -> list[jax.Array]:
  """Of each array the norm of the difference over the norm of what is expected.

  Integers must be equal: for them it is 0 or infinite.
  """

  def distance(a, b):
    if jnp.issubdtype(b.dtype, jnp.integer):
      return jnp.where(jnp.array_equal(a, b), 0, jnp.inf)
    a, b = (x.astype(jnp.float32).reshape(-1) for x in (a, b))
    return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)

  return [
    distance(*x) for x in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  ]


def check_distances(layer: Layer, actual: Any, expected: Any) -> None:
  """Raises if a pair of arrays differs by more than rounding explains, or holds a NaN."""
  limit = 2e-2 if layer.dtype == "bfloat16" else 1e-4
  found = [float(x) for x in distances(actual, expected)]
  if not all(x <= limit for x in found):
    raise ValueError(f"results differ by {', '.join(f'{x:.1e}' for x in found)}; limit {limit:.0e}")


def rows_of(layer: Layer, sizes: jax.Array, expert: int, x: jax.Array) -> jax.Array:
  """The rows of one expert among sorted ones, then zeros, in float32; the shape is static."""
  most = min(4 * layer.tokens * layer.k // layer.experts, layer.tokens)
  position = jnp.arange(most, dtype=jnp.int32)
  begin = jnp.cumsum(sizes)[expert] - sizes[expert]
  place = jnp.where(position < sizes[expert], begin + position, len(x))
  rows = x.at[place].get(mode="fill", fill_value=0).astype(jnp.float32)
  # An expert with more rows fails its check.
  return jnp.where(sizes[expert] <= most, rows, jnp.nan)


def one_expert(layer: Layer, inputs: Inputs, expert: int, cotangent: jax.Array) -> Any:
  """What the matmuls of one expert give, and the gradients of its rows and matrices."""

  def mlp(rows, gate_up, down):
    gate, up = jnp.split(rows @ gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ down

  cut = functools.partial(rows_of, layer, inputs.plan.group_sizes, expert)
  with jax.default_matmul_precision("highest"):
    gate_up, down = (x[expert].astype(jnp.float32) for x in (inputs.gate_up, inputs.down))
    value, pull_back = jax.vjp(mlp, cut(inputs.rows), gate_up, down)
    return value, *pull_back(cut(cotangent))


def one_expert_of(layer: Layer, inputs: Inputs, expert: int, results: Any) -> Any:
  """The same of results `(value, rest[, gradients])` for all experts."""
  cut = functools.partial(rows_of, layer, inputs.plan.group_sizes, expert)
  value, _, *gradients = results
  if not gradients:
    return (cut(value),)
  of_rows, of_gate_up, of_down = gradients[0]
  return cut(value), cut(of_rows), of_gate_up[expert], of_down[expert]
