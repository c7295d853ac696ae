// What every CUDA kernel shares: reductions over a warp, loads and stores by type, launch sizes.

#ifndef JAX_ROUTER_CUDA_WARP_CUH_
#define JAX_ROUTER_CUDA_WARP_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "scalar.h"

namespace jax_router {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1u; }

// ---- reductions: every lane gets the result, additions have a fixed order ----

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// A sum that carries its rounding error along, so that many equal terms do not drift.
struct CompensatedSum {
  float sum = 0.0f;
  float error = 0.0f;
  __device__ __forceinline__ void add(float term) {
    const float value = __fsub_rn(term, error);
    const float next = __fadd_rn(sum, value);
    error = __fsub_rn(__fsub_rn(next, sum), value);
    sum = next;
  }
};

// ---- types ----

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ int32_t load_bits(const float* p) { return __float_as_int(__ldg(p)); }
__device__ __forceinline__ int32_t load_bits(const Bfloat16* p) {
  return bits_from_bfloat16(__ldg(&p->bits));
}
__device__ __forceinline__ int32_t load_bits(const Float16* p) {
  return bits_from_float16(__ldg(&p->bits));
}

__device__ __forceinline__ void store_value(float* p, float x) { *p = x; }
__device__ __forceinline__ void store_value(Bfloat16* p, float x) {
  p->bits = bfloat16_from_float(x);
}
__device__ __forceinline__ void store_value(Float16* p, float x) {
  p->bits = float16_from_float(x);
}

// An index of any width. Indices are never negative.
__device__ __forceinline__ void store_index(void* indices, int bytes, int64_t i, int32_t value) {
  switch (bytes) {
    case 1:
      static_cast<uint8_t*>(indices)[i] = static_cast<uint8_t>(value);
      break;
    case 2:
      static_cast<uint16_t*>(indices)[i] = static_cast<uint16_t>(value);
      break;
    case 4:
      static_cast<int32_t*>(indices)[i] = value;
      break;
    default:
      static_cast<int64_t*>(indices)[i] = value;
  }
}

__device__ __forceinline__ int64_t load_index(const void* indices, int bytes, int64_t i) {
  switch (bytes) {
    case 1:
      return static_cast<const uint8_t*>(indices)[i];
    case 2:
      return static_cast<const uint16_t*>(indices)[i];
    case 4:
      return static_cast<const uint32_t*>(indices)[i];
    default:
      return static_cast<const int64_t*>(indices)[i];
  }
}

// ---- launches of one warp a row, each warp with its own piece of shared memory ----

inline constexpr int kSharedBytesPerBlock = 48 * 1024;  // of this several warps of a block share
inline constexpr int kMostBlocks = 4096;                // more rows than that are looped over

template <typename Kernel, typename... Args>
cudaError_t launch_rows(Kernel kernel, int64_t rows, int64_t bytes_per_warp, cudaStream_t stream,
                        const Args&... args) {
  if (rows == 0) return cudaSuccess;
  int warps = 8;
  while (warps > 1 && warps * bytes_per_warp > kSharedBytesPerBlock) warps /= 2;
  const int64_t bytes = warps * bytes_per_warp;
  if (bytes > kSharedBytesPerBlock) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
  }
  const int64_t wanted = (rows + warps - 1) / warps;
  const unsigned blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  kernel<<<blocks, warps * kWarpSize, static_cast<size_t>(bytes), stream>>>(args...);
  return cudaGetLastError();
}

// The rows of a warp in such a launch.
struct WarpRows {
  int lane;
  int warp;
  int64_t first;
  int64_t stride;
};

__device__ __forceinline__ WarpRows warp_rows() {
  const int warps = blockDim.x / kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  return {static_cast<int>(threadIdx.x % kWarpSize), warp,
          static_cast<int64_t>(blockIdx.x) * warps + warp, static_cast<int64_t>(gridDim.x) * warps};
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_WARP_CUH_
