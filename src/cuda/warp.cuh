// Reductions over a warp. Every lane gets the result, and the order of additions is fixed.

#ifndef JAX_ROUTER_CUDA_WARP_CUH_
#define JAX_ROUTER_CUDA_WARP_CUH_

#include <cstdint>

namespace jax_router {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

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

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_WARP_CUH_
