"""`route` in a program of two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np

STEP = """
  import jax, jax.numpy as jnp, numpy as np
  import jax_router

  def make_arrays():
    rng = np.random.default_rng(7)
    shapes = ((32, 16), (16, 24), (24,))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]

  def step(x, matrix, bias):
    def loss(matrix):
      weights, experts = jax_router.route(x @ matrix, 3, score="sigmoid", bias=bias)
      return jnp.mean(jnp.sin(3 * weights) * experts.astype(jnp.float32))

    value, gradient = jax.value_and_grad(loss)(matrix)
    return value, matrix - 0.5 * gradient
"""

WORKER = """
  import sys
  from jax.sharding import NamedSharding, PartitionSpec as P

  port, process = sys.argv[1], int(sys.argv[2])
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
  assert jax.process_count() == 2 and jax.device_count() == 4
  x, matrix, bias = make_arrays()
  mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,))
  split, whole = NamedSharding(mesh, P("d", None)), NamedSharding(mesh, P())
  x = jax.make_array_from_process_local_data(split, x[16 * process : 16 * process + 16])
  matrix = jax.make_array_from_process_local_data(whole, matrix)
  bias = jax.make_array_from_process_local_data(whole, bias)
  compiled = jax.jit(step, out_shardings=(whole, whole)).lower(x, matrix, bias).compile()
  assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()
  value, matrix = compiled(x, matrix, bias)
  print("RESULT", np.asarray(value).tobytes().hex(), np.asarray(matrix).tobytes().hex())
  jax.distributed.shutdown()
"""


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def test_two_processes_train_one_step_alike():
  script = textwrap.dedent(STEP) + textwrap.dedent(WORKER)
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  command = [sys.executable, "-P", "-c", script, str(free_port())]
  workers = [
    subprocess.Popen(
      [*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for i in range(2)
  ]
  try:
    outputs = [worker.communicate(timeout=60) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  for worker, (_, errors) in zip(workers, outputs, strict=True):
    assert worker.returncode == 0, errors[-3000:]
  lines = [
    next(line for line in out.splitlines() if line.startswith("RESULT")) for out, _ in outputs
  ]
  assert lines[0] == lines[1]
  value, matrix = (np.frombuffer(bytes.fromhex(h), np.float32) for h in lines[0].split()[1:])

  alone: dict = {}
  exec(textwrap.dedent(STEP), alone)
  want_value, want_matrix = jax.jit(alone["step"])(*alone["make_arrays"]())
  np.testing.assert_allclose(value[0], want_value, rtol=1e-6)
  np.testing.assert_allclose(matrix.reshape(16, 24), want_matrix, rtol=1e-6, atol=1e-7)
