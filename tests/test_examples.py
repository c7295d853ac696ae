"""The examples at a tiny size: they learn, report and plot, and refuse bad arguments."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
TINY = {
  "steps": 30,
  "batch_size": 4,
  "sequence_length": 48,
  "width": 64,
  "layers": 2,
  "experts": 4,
  "quiet": True,
}


def load_example(name: str, *needs: str):
  """Imports an example as Python would run it: with its own folder on the path."""
  for package in needs:
    pytest.importorskip(package, reason=f"examples/{name}.py needs {package}")
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    # Dataclasses look their module up by its name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
  return module


def optax_promotion():
  """Optax's Adam relies on JAX's implicit dtype promotion, which the other tests forbid."""
  return jax.numpy_dtype_promotion("standard")


def train(train_moe, **options):
  with optax_promotion():
    return train_moe.train(train_moe.Settings(**{**TINY, **options}))


@pytest.fixture(scope="module")
def train_moe():
  return load_example("train_moe", "flax", "optax", "matplotlib", "tqdm")


@pytest.fixture(scope="module")
def moe_transformer():
  return load_example("moe_transformer", "flax")


@pytest.fixture(scope="module")
def time_routing():
  return load_example("time_routing", "flax")


@pytest.fixture(scope="module")
def equinox_moe():
  return load_example("equinox_moe", "equinox", "optax")


@pytest.fixture(scope="module")
def result(train_moe):
  return train(train_moe)


def test_language_model_learns(result):
  assert len(result.losses) == TINY["steps"]
  assert np.mean(result.losses[-5:]) < result.losses[0] - 2
  assert result.validation[-1][0] == TINY["steps"]
  assert result.validation[-1][1] < result.validation[0][1]
  assert 4 < result.unigram < 6


def test_every_expert_gets_tokens(result):
  assert result.load.shape == (TINY["layers"], TINY["experts"])
  np.testing.assert_allclose(result.load.sum(axis=1), 1, rtol=1e-6)
  assert result.load.min() > 0


def test_routing_is_timed(result):
  assert 0 < result.routing.together < result.step_time
  assert 0 < result.routing.separate < result.step_time


def test_reference_trains_the_same_model(train_moe, result):
  reference = train(train_moe, implementation="reference")
  np.testing.assert_allclose(reference.losses, result.losses, rtol=1e-3)


def test_model_promotes_no_dtypes(train_moe):
  from flax import nnx

  settings = train_moe.Settings(**TINY)
  text = jnp.zeros((2, 9), jnp.int32)
  entropy, loss, load = nnx.eval_shape(
    lambda: train_moe.evaluate(train_moe.make_model(settings), text)
  )
  assert (entropy.shape, entropy.dtype) == ((), np.float32)
  assert (loss.shape, loss.dtype) == ((), np.float32)
  assert (load.shape, load.dtype) == ((TINY["layers"], TINY["experts"]), np.int32)


def test_main_reports_and_plots(train_moe, tmp_path, capsys):
  output = tmp_path / "plot.png"
  options = {**TINY, "steps": 3, "layers": 1, "output": output}
  del options["quiet"]
  words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
  with optax_promotion():
    train_moe.main([*words, "--quiet"])
  lines = capsys.readouterr().out.splitlines()
  starts = ["validation loss:", "speed:", "routing:", "expert load:", f"plot: {output}"]
  assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
  from matplotlib.image import imread

  image = imread(output)
  assert image.shape[0] > 300
  assert image.shape[1] > 600
  assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--steps", "0"], "--steps must be at least 1, got 0"),
    (["--seed", "-1"], "--seed must be at least 0, got -1"),
    (["--width", "100"], "--width must be a multiple of 64, got 100"),
    (["--experts", "4", "--k", "5"], "k must be between 1 and num_experts = 4, got 5"),
    (["--batch-size", "many"], "invalid int value: 'many'"),
    (["--implementation", "fast"], "invalid choice: 'fast'"),
    (["--output", "no_such_folder/a.png"], "--output must be a .png in a folder that exists"),
    (["--output", "plot.jpg"], "--output must be a .png in a folder that exists"),
  ],
)
def test_bad_arguments(train_moe, capsys, arguments, message):
  with pytest.raises(SystemExit) as error:
    train_moe.main(arguments)
  assert error.value.code == 2
  assert message in capsys.readouterr().err


def test_sequence_longer_than_the_text(train_moe):
  with pytest.raises(SystemExit, match="--sequence-length must be less than"):
    train_moe.train(train_moe.Settings(sequence_length=10**9))


@pytest.mark.parametrize("load", ["random", "two experts"])
def test_expert_mlps(moe_transformer, load):
  """Blocks compute what every expert on every token does, however uneven the load."""
  tokens, width, hidden, num_experts, k = 151, 8, 16, 5, 2
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(keys[0], (tokens, width))
  weights = jax.random.uniform(keys[1], (tokens, k))
  up = jax.random.normal(keys[2], (num_experts, width, hidden))
  down = jax.random.normal(keys[3], (num_experts, hidden, width))
  if load == "random":
    experts = jax.lax.top_k(jax.random.normal(keys[4], (tokens, num_experts)), k)[1]
  else:
    experts = jnp.broadcast_to(jnp.array([[3, 1]], jnp.int32), (tokens, k))

  def dense(x, weights, experts, up, down):
    outputs = jnp.einsum("enf,efd->end", jax.nn.relu(jnp.einsum("nd,edf->enf", x, up)) ** 2, down)
    chosen = jax.nn.one_hot(experts, num_experts) * weights[..., None]
    return jnp.einsum("nke,end->nd", chosen, outputs)

  def value_and_gradients(function):
    def loss(x, weights, up, down):
      y = function(x, weights, experts, up, down)
      return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, weights, up, down)

  with jax.default_matmul_precision("highest"):
    actual, expected = value_and_gradients(moe_transformer.expert_mlps), value_and_gradients(dense)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    scale = np.abs(b).max()
    np.testing.assert_allclose(a / scale, b / scale, atol=1e-4)


def test_router_loss(moe_transformer):
  """An even load costs 1 times its coefficient, a load on one expert E times."""
  tokens, num_experts = 16, 4
  logits = jnp.zeros((tokens, num_experts)).at[jnp.arange(tokens), jnp.arange(tokens) % 4].set(30)
  _, even, load = moe_transformer.route(logits, 1, None)
  z = moe_transformer.Z_COEFFICIENT * 30**2
  assert even == pytest.approx(moe_transformer.BALANCE_COEFFICIENT + z)
  assert load.tolist() == [4, 4, 4, 4]
  logits = jnp.zeros((tokens, num_experts)).at[:, 2].set(100)
  _, uneven, load = moe_transformer.route(logits, 1, None)
  z = moe_transformer.Z_COEFFICIENT * 100**2
  assert uneven == pytest.approx(num_experts * moe_transformer.BALANCE_COEFFICIENT + z)
  assert load.tolist() == [0, 0, tokens, 0]


@pytest.mark.parametrize("k", [1, 3])
def test_separate_operations_compute_the_same(time_routing, k):
  """What is timed for comparison: the same choice, load, losses and gradient."""
  keys = jax.random.split(jax.random.key(k), 2)
  logits = 2 * jax.random.normal(keys[0], (203, 16))
  cotangent = jax.random.normal(keys[1], (203, k))

  def compute(route):
    def objective(logits):
      routing, loss, load = route(logits, k, None)
      return jnp.vdot(routing.weights, cotangent) + 100 * loss, (routing, loss, load)

    return jax.jit(jax.grad(objective, has_aux=True))(logits)

  gradient, (routing, loss, load) = compute(time_routing.route)
  expected, (routing_expected, loss_expected, load_expected) = compute(
    time_routing.route_separately
  )
  np.testing.assert_array_equal(routing.experts, routing_expected.experts)
  np.testing.assert_array_equal(routing.weights, routing_expected.weights)
  np.testing.assert_array_equal(load, load_expected)
  np.testing.assert_allclose(loss, loss_expected, rtol=2e-6)
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-7)


def test_equinox_learns(equinox_moe, capsys):
  with optax_promotion():
    equinox_moe.main(["--steps", "40"])
  words = capsys.readouterr().out.split()
  first, last = float(words[1]), float(words[5])
  assert last < first / 4


def test_equinox_bad_arguments(equinox_moe, capsys):
  with pytest.raises(SystemExit):
    equinox_moe.main(["--steps", "0"])
  assert "--steps must be at least 1, got 0" in capsys.readouterr().err


def test_readme_example():
  """The block of Python in the README runs, and its comments hold."""
  text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
  (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names = {}
  exec(compile(block, "README.md", "exec"), names)
  for name, dtype in (("weights", np.float32), ("chosen", np.int32)):
    assert (names[name].shape, names[name].dtype) == ((512, 4), dtype)
  np.testing.assert_array_equal(names["routing_map"].sum(axis=1), 4)
  np.testing.assert_array_equal(names["probs"] > 0, names["routing_map"])
  assert names["gradient"].shape == names["router"].shape
  assert np.abs(names["gradient"]).max() > 0
