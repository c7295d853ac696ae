"""Every bad argument of `route` is refused while tracing, by name and with its value."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_router
from jax_router import Groups

LOGITS = jax.ShapeDtypeStruct((5, 12), jnp.float32)


def array(shape, dtype=np.float32):
  return np.ones(shape, dtype)


# (arguments, exception, texts that the message must contain)
BAD_STATIC = (
  ({"k": 0}, ValueError, ("k", "0", "12")),
  ({"k": -1}, ValueError, ("k", "-1")),
  ({"k": 13}, ValueError, ("k", "13", "12")),
  ({"k": 2.0}, TypeError, ("k", "float")),
  ({"k": True}, TypeError, ("k", "True")),
  ({"k": np.bool_(True)}, TypeError, ("k", "np.True_")),
  ({"k": "2"}, TypeError, ("k", "str")),
  ({"k": None}, TypeError, ("k", "None")),
  ({"score": "softmin"}, ValueError, ("score", "'softmin'", "sqrtsoftplus")),
  ({"score": "Softmax"}, ValueError, ("score", "'Softmax'")),
  ({"score": 1}, ValueError, ("score", "1")),
  ({"score": None}, ValueError, ("score", "None")),
  ({"renormalize": 1}, TypeError, ("renormalize", "int")),
  ({"renormalize": None}, TypeError, ("renormalize", "None")),
  ({"scale": float("nan")}, ValueError, ("scale", "nan")),
  ({"scale": float("inf")}, ValueError, ("scale", "inf")),
  ({"scale": 1e39}, ValueError, ("scale", "1e+39")),
  ({"scale": -1e-39}, ValueError, ("scale", "-1e-39")),
  ({"scale": None}, TypeError, ("scale", "None")),
  ({"scale": True}, TypeError, ("scale", "bool")),
  ({"scale": "1"}, TypeError, ("scale", "str")),
  ({"scale": 1j}, TypeError, ("scale", "complex")),
  ({"groups": (4, 2)}, TypeError, ("groups", "tuple")),
  ({"groups": 4}, TypeError, ("groups", "int")),
  ({"groups": Groups(5, 2)}, ValueError, ("groups.count", "5", "12")),
  ({"groups": Groups(0, 1)}, ValueError, ("groups.count", "0")),
  ({"groups": Groups(24, 1)}, ValueError, ("groups.count", "24", "12")),
  ({"groups": Groups(4.0, 2)}, TypeError, ("groups.count", "float")),
  ({"groups": Groups(4, 5)}, ValueError, ("groups.keep", "5", "4")),
  ({"groups": Groups(4, 0)}, ValueError, ("groups.keep", "0")),
  ({"groups": Groups(4, True)}, TypeError, ("groups.keep", "True")),
  ({"groups": Groups(4, 2, "mean")}, ValueError, ("groups.score", "'mean'", "top2")),
  ({"groups": Groups(4, 2, None)}, ValueError, ("groups.score", "None")),
  ({"k": 4, "groups": Groups(4, 1)}, ValueError, ("k", "4", "groups.keep", "3")),
  ({"k": 2, "groups": Groups(4, 3, "sum")}, ValueError, ("k", "2", "groups.keep", "3")),
  ({"index_dtype": jnp.float32}, TypeError, ("index_dtype", "float32")),
  ({"index_dtype": jnp.bfloat16}, TypeError, ("index_dtype", "bfloat16")),
  ({"index_dtype": bool}, TypeError, ("index_dtype", "bool")),
  ({"index_dtype": jnp.int64}, ValueError, ("index_dtype", "int64", "jax_enable_x64")),
  ({"weight_dtype": jnp.int32}, TypeError, ("weight_dtype", "int32")),
  ({"weight_dtype": jnp.float64}, ValueError, ("weight_dtype", "float64", "jax_enable_x64")),
  ({"implementation": "tpu"}, ValueError, ("implementation", "'tpu'", "reference")),
  ({"implementation": 1}, ValueError, ("implementation", "1")),
)

BAD_OPERANDS = (
  ({"bias": array(11)}, ValueError, ("bias", "(11,)", "(12,)")),
  ({"bias": array((5, 12))}, ValueError, ("bias", "(5, 12)", "(12,)")),
  ({"bias": array((1, 12))}, ValueError, ("bias", "(1, 12)")),
  ({"bias": array(12, np.int32)}, TypeError, ("bias", "int32")),
  ({"bias": [0.0] * 12}, TypeError, ("bias", "list")),
  ({"bias": 1.0}, TypeError, ("bias", "float")),
  ({"where": array(4, bool)}, ValueError, ("where", "(4,)", "(5,)")),
  ({"where": array((5, 1), bool)}, ValueError, ("where", "(5, 1)")),
  ({"where": array(5, np.int32)}, TypeError, ("where", "int32")),
  ({"where": array(5)}, TypeError, ("where", "float32")),
  ({"where": [True] * 5}, TypeError, ("where", "list")),
  ({"where": True}, TypeError, ("where", "bool")),
  ({"experts": array((5, 2), np.int32)}, ValueError, ("experts", "(5, 2)", "(5, 3)")),
  ({"experts": array(3, np.int32)}, ValueError, ("experts", "(3,)", "(5, 3)")),
  ({"experts": array((5, 3))}, TypeError, ("experts", "float32")),
  ({"experts": array((5, 3), bool)}, TypeError, ("experts", "bool")),
  ({"experts": [[0, 1, 2]] * 5}, TypeError, ("experts", "list")),
)

BAD_LOGITS = (
  (jax.ShapeDtypeStruct((5, 12), jnp.int32), TypeError, ("logits", "int32", "bfloat16")),
  (jax.ShapeDtypeStruct((5, 12), jnp.bool_), TypeError, ("logits", "bool")),
  (jax.ShapeDtypeStruct((5, 12), jnp.float8_e4m3fn), TypeError, ("logits", "float8_e4m3fn")),
  (jax.ShapeDtypeStruct((5, 12), jnp.complex64), TypeError, ("logits", "complex64")),
  (jax.ShapeDtypeStruct((), jnp.float32), ValueError, ("logits", "scalar")),
  (jax.ShapeDtypeStruct((5, 0), jnp.float32), ValueError, ("logits", "(5, 0)")),
)


def check_raises(exception, texts, function, *args):
  with pytest.raises(exception) as caught:
    function(*args)
  assert type(caught.value) is exception
  message = str(caught.value)
  for text in texts:
    assert re.search(rf"(?<![\w.]){re.escape(text)}", message), (text, message)


def case_name(value):
  if isinstance(value, dict):
    return "-".join(f"{k}={type(v).__name__}" for k, v in value.items())
  return value.__name__ if isinstance(value, type) else "-".join(value[1:])


@pytest.mark.parametrize("arguments, exception, texts", BAD_STATIC + BAD_OPERANDS, ids=case_name)
def test_bad_arguments_are_refused_while_tracing(arguments, exception, texts):
  function = functools.partial(jax_router.route, **{"k": 3} | arguments)
  check_raises(exception, texts, jax.eval_shape, function, LOGITS)
  check_raises(exception, texts, jax.jit(function).trace, LOGITS)
  check_raises(exception, texts, function, np.zeros((5, 12), np.float32))


@pytest.mark.parametrize("logits, exception, texts", BAD_LOGITS)
def test_bad_logits_are_refused_while_tracing(logits, exception, texts):
  function = functools.partial(jax_router.route, k=1)
  check_raises(exception, texts, jax.eval_shape, function, logits)
  check_raises(exception, texts, function, jnp.zeros(logits.shape, logits.dtype))


@pytest.mark.parametrize("logits", ([[1.0, 2.0]], 1.0, None, "logits"))
def test_logits_must_be_an_array(logits):
  texts = ("logits", type(logits).__name__)
  check_raises(TypeError, texts, jax_router.route, logits, 1)


def test_float64_logits_are_refused():
  with jax.enable_x64(True):
    logits = np.zeros((5, 12), np.float64)
    check_raises(TypeError, ("logits", "float64"), jax_router.route, logits, 3)


def test_index_dtype_must_hold_the_number_of_experts():
  """Padding tokens get index E, so a dtype that holds only E - 1 is too small."""
  for dtype, fits in ((jnp.int8, 127), (jnp.uint8, 255), (jnp.int16, 32767)):
    route = functools.partial(jax_router.route, k=2, index_dtype=dtype)
    good = jax.ShapeDtypeStruct((1, fits), jnp.float32)
    assert jax.eval_shape(route, good).experts.dtype == dtype
    bad = jax.ShapeDtypeStruct((1, fits + 1), jnp.float32)
    texts = ("index_dtype", np.dtype(dtype).name, str(fits + 1))
    check_raises(ValueError, texts, jax.eval_shape, route, bad)


def test_traced_options_are_refused():
  logits = np.zeros((5, 12), np.float32)
  route = functools.partial(jax_router.route, logits)
  for name, value in (("k", 2), ("scale", 2.0), ("renormalize", True)):

    @jax.jit
    def call(value, name=name):
      return route(**{"k": 3} | {name: value})

    check_raises(TypeError, (name, "static"), call, value)


def test_options_may_be_numpy_numbers():
  logits = np.zeros((5, 12), np.float32)
  options = {
    "scale": np.float32(2),
    "renormalize": np.bool_(True),
    "groups": Groups(np.int64(4), 2),
  }
  got = jax_router.route(logits, np.int32(3), **options)
  want = jax_router.route(logits, 3, scale=2, groups=Groups(4, 2))
  np.testing.assert_array_equal(got.weights, want.weights)


def test_cuda_without_a_cuda_device_is_refused(cuda_device):
  if cuda_device is not None:
    pytest.skip("this machine has a CUDA device")
  function = functools.partial(jax_router.route, k=3, implementation="cuda")
  check_raises(ValueError, ("implementation", "'cuda'"), jax.eval_shape, function, LOGITS)


def test_options_after_k_are_keyword_only():
  with pytest.raises(TypeError, match="positional"):
    jax_router.route(np.zeros((5, 12), np.float32), 3, "softmax")
