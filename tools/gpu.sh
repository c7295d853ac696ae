#!/usr/bin/env bash
# Builds jax_router from the tree on a machine with a GPU, runs the GPU tests and the benchmarks, and
# leaves the logs and the JSON in OUT_DIR. Downloads nothing: it uses the Python packages that are there
# (jax, nanobind, pytest, and pytest-xdist if it is there) with nvcc, CMake and Ninja.
#
#   [STEPS="tests benchmarks"] tools/gpu.sh OUT_DIR [architecture, default 90a-real]
#
# A third step, sanitize, runs every kernel under compute-sanitizer. SELECT="gpu and not slow" leaves the
# larger grids out.
set -euo pipefail
out=$(mkdir -p "${1:?usage: tools/gpu.sh OUT_DIR [architecture]}" && cd "$1" && pwd)
architecture=${2:-90a-real}
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# The headers of the JAX that is here: these modules are for this machine alone.
include=$("$python" -c 'import jax.ffi; print(jax.ffi.include_dir())')
{
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  nvcc --version | tail -2
  time (
    cmake -S . -B "$site/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
      -DJAX_ROUTER_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
      -DJAX_ROUTER_XLA_FFI_INCLUDE_DIR="$include" &&
      cmake --build "$site/build" &&
      cmake --install "$site/build" --prefix "$site"
  )
} >"$out/build.log" 2>&1 || {
  tail -40 "$out/build.log"
  exit 1
}
cp -r jax_router/*.py jax_router/compat "$site/jax_router/"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" XLA_PYTHON_CLIENT_PREALLOCATE=false

status=0

# Safe path: the tree has a folder jax_router without the modules just built.
run_tests() {
  local parallel=()
  if "$python" -c 'import xdist' 2>/dev/null; then
    # Under xdist pytest-benchmark warns that it is disabled, and warnings are errors.
    parallel=(-n 8 -p no:benchmark)
  fi
  PYTHONSAFEPATH=1 "$python" -m pytest -m "${SELECT:-gpu}" -q "${parallel[@]}" 2>&1 | tee "$out/tests.log" || status=$?
}

run_benchmarks() {
  for benchmark in route stats plan permute decode moe_layer balance experts; do
    "$python" "benchmarks/$benchmark.py" --output "$out" >"$out/$benchmark.log" 2>&1 || {
      status=$?
      tail -20 "$out/$benchmark.log"
    }
  done
}

# Every buffer an allocation of its own, for memcheck to see where it ends, and kernels launched one by
# one. XLA probes for things that may fail, so only our kernels are checked and no calls of the driver.
run_sanitize() {
  for tool in memcheck racecheck; do
    PYTHONSAFEPATH=1 XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer= \
      compute-sanitizer --tool "$tool" --kernel-name kns=jax_router --report-api-errors no --error-exitcode 9 \
      "$python" -m pytest -q -p no:benchmark tests/test_cuda.py tests/test_stats_cuda.py \
      tests/test_scores_cuda.py tests/test_plan_cuda.py tests/test_permute_cuda.py tests/test_replicas_cuda.py \
      tests/test_experts_cuda.py -k test_grid >"$out/$tool.log" 2>&1 ||
      status=$?
    tail -5 "$out/$tool.log"
  done
}

for step in ${STEPS:-tests benchmarks}; do
  "run_$step"
done
exit "$status"
