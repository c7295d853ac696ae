// Sums over what comes before.

#ifndef JAX_ROUTER_CUDA_SUMS_CUH_
#define JAX_ROUTER_CUDA_SUMS_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "warp.cuh"

namespace jax_router {

__device__ __forceinline__ int32_t inclusive_sum(int32_t value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Replaces each of `size` counts by the sum of `running` and those before it; gives the whole sum.
inline constexpr int kSumLoads = 4;  // that are under way together

template <typename T>
__device__ __forceinline__ int32_t sum_over(T* counts, int64_t stride, int64_t size,
                                            int32_t running) {
  for (int64_t start = 0; start < size; start += kSumLoads) {
    int32_t count[kSumLoads];
#pragma unroll
    for (int u = 0; u < kSumLoads; ++u) {
      count[u] = start + u < size ? counts[(start + u) * stride] : 0;
    }
#pragma unroll
    for (int u = 0; u < kSumLoads; ++u) {
      if (start + u < size) counts[(start + u) * stride] = static_cast<T>(running);
      running += count[u];
    }
  }
  return running;
}

// Counts of `chunks` chunks of each of `batch` rows, `columns` each, `row_stride` from row to row.
struct ChunkCounts {
  int32_t* counts;
  int64_t batch;
  int64_t chunks;
  int64_t columns;
  int64_t row_stride;
  int32_t* totals;  // of the first `total_columns`, `total_stride` from row to row
  int64_t total_columns;
  int64_t total_stride;
};

// Replaces the counts of each chunk by those of the chunks before it, and writes those of all.
cudaError_t launch_sum_chunks(const ChunkCounts& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_SUMS_CUH_
