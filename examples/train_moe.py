"""Trains a byte-level Mixture-of-Experts language model on the source of Python's standard library.

  python examples/train_moe.py

takes one to two minutes on two CPU cores, downloads nothing, and ends with train_moe.png: the loss
curve and the load of every expert. Where JAX has a GPU, the model is larger. How `jax_router` fits
into a model is in moe_transformer.py. With `--implementation reference` it is plain JAX that
routes: the same training but for rounding, whose differences grow over hundreds of steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from moe_transformer import HEAD_SIZE, LanguageModel, route
from time_routing import RoutingTimes, time_routing

LEARNING_RATE = 2e-3
VALIDATION_BATCHES = 8
BITS_PER_NAT = 1 / math.log(2)
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to train, and how: one field for each option of the command line."""

  steps: int = 600
  batch_size: int = 8
  sequence_length: int = 128
  width: int = 128
  layers: int = 3
  experts: int = 16
  k: int = 2
  seed: int = 0
  expert_dtype: str = "float32"
  implementation: str | None = None
  output: pathlib.Path = pathlib.Path("train_moe.png")
  quiet: bool = False


GPU_SETTINGS = Settings(
  steps=1500,
  batch_size=32,
  sequence_length=256,
  width=256,
  layers=6,
  experts=64,
  k=4,
  expert_dtype="bfloat16",
)


def evaluate(model: LanguageModel, text: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mean cross-entropy of text `[B, T + 1]` in nats, the routers' loss, and the load."""
  logits, loss, load = model(text[:, :-1])
  entropies = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
  return entropies.mean(), loss, load


@nnx.jit
def train_step(model: LanguageModel, optimizer: nnx.Optimizer, text: jax.Array) -> jax.Array:
  """Updates the model; returns the cross-entropy before the update."""

  def objective(model):
    entropy, loss, _ = evaluate(model, text)
    return entropy + loss, entropy

  gradient, entropy = nnx.grad(objective, has_aux=True)(model)
  optimizer.update(model, gradient)
  return entropy


def make_model(settings: Settings) -> LanguageModel:
  """The model, the same for every implementation of the router."""
  return LanguageModel(
    width=settings.width,
    layers=settings.layers,
    experts=settings.experts,
    k=settings.k,
    expert_dtype=settings.expert_dtype,
    implementation=settings.implementation,
    rngs=nnx.Rngs(settings.seed),
  )


def make_optimizer(model: LanguageModel, steps: int) -> nnx.Optimizer:
  """AdamW with clipped gradients; the learning rate warms up, then falls along a cosine."""
  rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(1, steps // 20), steps + 1)
  transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
  return nnx.Optimizer(model, transform, wrt=nnx.Param)


def read_text() -> tuple[np.ndarray, np.ndarray]:
  """The standard library's modules as bytes: for training, and every 20th file for validation."""
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
  texts = [(root / name).read_bytes() for name in names if not SKIPPED_FOLDERS & {*name.parts}]
  if len(texts) < 20:
    raise SystemExit(f"error: the source of Python's standard library is not in {root}")
  validation = b"".join(texts[::20])
  del texts[::20]
  return np.frombuffer(b"".join(texts), np.uint8), np.frombuffer(validation, np.uint8)


def cut(text: np.ndarray, starts: np.ndarray, length: int) -> jax.Array:
  """The pieces of text `[B, length + 1]` int32 at `starts`."""
  return jnp.asarray(text[starts[:, None] + np.arange(length + 1)[None, :]].astype(np.int32))


def unigram_entropy(text: np.ndarray) -> float:
  """Bits per byte for a model that knows how often each byte occurs, and nothing else."""
  frequency = np.bincount(text) / len(text)
  frequency = frequency[frequency > 0]
  return float(-np.sum(frequency * np.log2(frequency)))


class Result(NamedTuple):
  """What a run measured: losses in bits per byte, times of one step in seconds."""

  losses: list[float]
  validation: list[tuple[int, float]]
  unigram: float
  load: np.ndarray
  step_time: float
  routing: RoutingTimes


def validate(
  model: LanguageModel, measure: Callable, texts: Sequence[jax.Array]
) -> tuple[float, np.ndarray]:
  """Bits per byte, and for each layer the fraction of its tokens that each expert gets."""
  results = [measure(model, text) for text in texts]
  load = np.sum([np.asarray(load) for _, _, load in results], axis=0)
  bits = BITS_PER_NAT * statistics.mean(float(entropy) for entropy, _, _ in results)
  return bits, load / load.sum(axis=1, keepdims=True)


def train(settings: Settings) -> Result:
  """Trains a model, validating on the way, and times its routing at the end."""
  training_text, validation_text = read_text()
  length, batch_size, steps = settings.sequence_length, settings.batch_size, settings.steps
  if length >= len(validation_text):
    raise SystemExit(f"error: --sequence-length must be less than {len(validation_text)}")
  spaced = np.linspace(0, len(validation_text) - length - 1, VALIDATION_BATCHES * batch_size)
  batches = np.split(spaced.astype(int), VALIDATION_BATCHES)
  held_out = [cut(validation_text, starts, length) for starts in batches]
  random = np.random.default_rng(settings.seed)
  model = make_model(settings)
  update = nnx.cached_partial(train_step, model, make_optimizer(model, steps))
  measure = nnx.jit(evaluate)
  losses, times, validation = [], [], []
  load = np.zeros((settings.layers, settings.experts))
  with tqdm(total=steps, unit="step", disable=settings.quiet) as progress:
    for step in range(1, steps + 1):
      starts = random.integers(0, len(training_text) - length, batch_size)
      begin = time.perf_counter()
      losses.append(BITS_PER_NAT * float(update(cut(training_text, starts, length))))
      times.append(time.perf_counter() - begin)
      if step == steps or step % math.ceil(steps / 10) == 0:
        bits, load = validate(model, measure, held_out)
        validation.append((step, bits))
      speed = f"{batch_size * length / times[-1]:,.0f}"
      progress.set_postfix({"bits/byte": f"{losses[-1]:.3f}", "tokens/s": speed})
      progress.update()
  shape = (batch_size * length, settings.experts)
  return Result(
    losses=losses,
    validation=validation,
    unigram=unigram_entropy(validation_text),
    load=load,
    # The first step compiles.
    step_time=statistics.median(times[1:] or times),
    routing=time_routing(shape, settings.k, settings.layers, settings.implementation),
  )


def report(result: Result, settings: Settings) -> None:
  """Prints what a run measured."""
  speed = settings.batch_size * settings.sequence_length / result.step_time
  routing, separate, step = (1e3 * seconds for seconds in (*result.routing, result.step_time))
  low, high, even = 100 * result.load.min(), 100 * result.load.max(), 100 / settings.experts
  print(
    f"validation loss: {result.validation[-1][1]:.3f} bits per byte "
    f"(unigram entropy {result.unigram:.3f})",
    f"speed: {speed:,.0f} tokens per second on {jax.default_backend()}",
    f"routing: {routing:.3f} ms of {step:.1f} ms per step; "
    f"as separate operations {separate:.3f} ms",
    f"expert load: {low:.2f} % to {high:.2f} % of a layer's tokens (even: {even:.2f} %)",
    f"plot: {settings.output}",
    sep="\n",
  )


def plot(result: Result, path: pathlib.Path) -> None:
  """Draws the loss curve, and a heat map of the load of each layer's experts."""
  layers, experts = result.load.shape
  figure = Figure(figsize=(12, 4.2), layout="constrained", dpi=150)
  left, right = figure.subplots(1, 2)
  left.axhline(result.unigram, color="gray", linestyle="--", label="unigram entropy")
  steps = range(1, len(result.losses) + 1)
  left.plot(steps, result.losses, color="tab:blue", alpha=0.5, linewidth=1, label="training")
  left.plot(*zip(*result.validation, strict=True), "o-", color="tab:orange", label="validation")
  left.set(title="Loss", xlabel="step", ylabel="bits per byte", ylim=(0, None))
  left.spines[["top", "right"]].set_visible(False)
  left.legend(frameon=False)
  # White is no tokens at all; an even load is the middle of the scale, unless one is beyond it.
  edges = np.arange(experts + 1) - 0.5, np.arange(layers + 1) - 0.5
  scale = {"cmap": "Blues", "vmin": 0, "vmax": 100 * max(2 / experts, result.load.max())}
  image = right.pcolormesh(*edges, 100 * result.load, **scale, edgecolors="white", linewidth=0.5)
  figure.colorbar(image, ax=right, label="% of the layer's tokens")
  right.set(title="Load of the experts", xlabel="expert", ylabel="layer", yticks=range(layers))
  right.spines[:].set_visible(False)
  figure.savefig(path)


def parse_arguments(arguments: Sequence[str] | None = None) -> Settings:
  """Settings from the command line; bad ones end the program with a message before it trains."""
  default = Settings() if jax.default_backend() == "cpu" else GPU_SETTINGS
  sizes = ("steps", "batch_size", "sequence_length", "width", "layers", "experts", "k")
  lowest = {**dict.fromkeys(sizes, 1), "seed": 0}
  choices = ("auto", "cpu", "cuda", "reference")
  formatter = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
  for name in lowest:
    option, value = "--" + name.replace("_", "-"), getattr(default, name)
    parser.add_argument(option, type=int, default=value, help=f"default {value}")
  dtype = default.expert_dtype
  dtypes = ("float32", "bfloat16")
  help_text = f"of the experts' matmuls, default {dtype}"
  parser.add_argument("--expert-dtype", choices=dtypes, default=dtype, help=help_text)
  parser.add_argument("--implementation", choices=choices, default="auto", help="default auto")
  parser.add_argument("--output", type=pathlib.Path, default=default.output, help="PNG to write")
  parser.add_argument("--quiet", action="store_true", help="no progress bar")
  values = vars(parser.parse_args(arguments))
  for name, low in lowest.items():
    if values[name] < low:
      parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {values[name]}")
  if values["implementation"] == "auto":
    values["implementation"] = None
  settings = Settings(**values)
  if settings.width % HEAD_SIZE:
    parser.error(f"--width must be a multiple of {HEAD_SIZE}, got {settings.width}")
  if settings.output.suffix != ".png" or not settings.output.absolute().parent.is_dir():
    parser.error(f"--output must be a .png in a folder that exists, got {settings.output}")
  try:
    # `jax_router` knows best which k and which implementation it can serve.
    logits = jnp.zeros((1, settings.experts))
    route(logits, settings.k, settings.implementation)
  except (ValueError, NotImplementedError) as error:
    parser.error(str(error))
  return settings


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains, plots and reports."""
  settings = parse_arguments(arguments)
  result = train(settings)
  plot(result, settings.output)
  report(result, settings)


if __name__ == "__main__":
  main()
