// Adds the statistics of the blocks up, after the kernel that made them.

#include <cstdint>

#include "options.h"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kColumns = 32;  // of a block of threads
constexpr int kParts = 8;     // the blocks of tokens are summed in, each by one thread a column

// Sums `blocks` values `stride` apart, every kParts-th from `part` on.
template <typename V>
__device__ __forceinline__ V sum_of_part(const V* values, int64_t stride, int blocks, int part) {
  V sum = 0;
#pragma unroll 4
  for (int block = part; block < blocks; block += kParts) sum += values[block * stride];
  return sum;
}

// Sums the parts of each column, in their order.
template <typename V>
__device__ __forceinline__ V sum_of_parts(V mine, V (&parts)[kParts][kColumns]) {
  parts[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  V sum = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) sum += parts[part][threadIdx.x];
  return sum;
}

// The last column, past the experts, holds the z sum and the number of tokens.
__global__ void __launch_bounds__(kColumns* kParts)
    route_stats_sum_kernel(const __grid_constant__ RouteStats stats, int experts, int blocks) {
  __shared__ int32_t counts[kParts][kColumns];
  __shared__ float sums[kParts][kColumns];
  const int column = blockIdx.x * kColumns + threadIdx.x;
  const int64_t batch = blockIdx.y;
  const int64_t first = batch * blocks;
  const int part = threadIdx.y;
  int32_t count = 0;
  float sum = 0.0f;
  if (column < experts) {
    const int64_t at = first * experts + column;
    count = sum_of_part(stats.block_counts + at, experts, blocks, part);
    sum = sum_of_part(stats.block_sums + at, experts, blocks, part);
  } else if (column == experts) {
    count = sum_of_part(stats.block_tokens + first, 1, blocks, part);
    sum = sum_of_part(stats.block_z + first, 1, blocks, part);
  }
  count = sum_of_parts(count, counts);
  sum = sum_of_parts(sum, sums);
  if (part != 0) return;
  if (column < experts) {
    stats.expert_counts[batch * experts + column] = count;
    stats.score_sums[batch * experts + column] = sum;
  } else if (column == experts) {
    stats.num_tokens[batch] = count;
    stats.z_sum[batch] = sum;
  }
}

}  // namespace

cudaError_t launch_stats(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream) {
  if (call.stats.batches == 0) return cudaSuccess;
  const cudaError_t status = launch_route(call, options, stream);
  if (status != cudaSuccess) return status;
  const int experts = static_cast<int>(call.experts);
  const int blocks = static_cast<int>(blocks_of_batch(call.tokens_per_batch));
  const dim3 threads(kColumns, kParts);
  // As many batch rows at once as a grid may have.
  constexpr int64_t kMostRows = 65535;
  RouteStats stats = call.stats;
  for (int64_t done = 0; done < call.stats.batches; done += kMostRows) {
    const int64_t left = call.stats.batches - done;
    const dim3 grid(experts / kColumns + 1,
                    static_cast<unsigned>(left < kMostRows ? left : kMostRows));
    route_stats_sum_kernel<<<grid, threads, 0, stream>>>(stats, experts, blocks);
    stats.expert_counts += kMostRows * experts;
    stats.score_sums += kMostRows * experts;
    stats.z_sum += kMostRows;
    stats.num_tokens += kMostRows;
    stats.block_counts += kMostRows * blocks * experts;
    stats.block_sums += kMostRows * blocks * experts;
    stats.block_z += kMostRows * blocks;
    stats.block_tokens += kMostRows * blocks;
  }
  return cudaGetLastError();
}

}  // namespace jax_router
