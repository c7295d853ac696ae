// `plan` in one launch for batch rows of some ten thousand entries: a cluster of blocks of threads
// sorts a row, each block a stretch of it. Entries stay in registers from their count to their
// place, and the blocks read each other's counts in shared memory.

#include <cooperative_groups.h>

#include <cstdint>

#include "plan.h"
#include "route.h"
#include "sums.cuh"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kClusterBlocks = 16;  // more than eight are allowed on Hopper, if asked for
constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kOwned = 4;                // entries of a thread
constexpr int64_t kMostEntries = 32768;  // more are placed faster by all processors
static_assert(kMostEntries <= kClusterBlocks * kThreads * kOwned);
constexpr int64_t kStaticBytes = 256;

int64_t shared_bytes(int64_t experts) {
  const int64_t columns = experts + 1;
  return 4 * 2 * columns + 2 * kWarps * (columns + columns % 2);
}

__global__ void __launch_bounds__(kThreads, 1)
    plan_cluster_kernel(const __grid_constant__ PlanCall call, const int share) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ int32_t
      totals[];  // [columns], offsets [columns], 16-bit counts [warps, stride]
  __shared__ int32_t warp_sums[kWarps];
  namespace cg = cooperative_groups;
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(blockIdx.x);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_index();
  const int64_t row = blockIdx.y;
  const uint32_t experts = static_cast<uint32_t>(call.experts);
  const int columns = static_cast<int>(experts) + 1;
  const int stride = columns + (columns & 1);
  const int bits = bits_of(experts + 1);
  int32_t* const offsets = totals + columns;
  uint32_t* const words = reinterpret_cast<uint32_t*>(offsets + columns);
  uint16_t* const seen = reinterpret_cast<uint16_t*>(words) + warp * stride;
  // Of this warp; a warp's entries are neighbours.
  const int own = share / kWarps;
  const int first = rank * share + warp * own;
  const int end = min(first + own, static_cast<int>(call.entries));
  const int32_t* const ids = call.ids + row * call.entries;

  uint32_t group[kOwned];
#pragma unroll
  for (int u = 0; u < kOwned; ++u) {
    const int i = first + u * kWarpSize + lane;
    group[u] = u * kWarpSize < own && i < end ? group_of(__ldg(ids + i), experts) : UINT32_MAX;
  }
  for (int i = threadIdx.x; i < kWarps * stride / 2; i += kThreads) words[i] = 0;
  __syncthreads();
  // The number of each entry among those of its group in this warp.
  int numbers[kOwned];
#pragma unroll
  for (int u = 0; u < kOwned; ++u) {
    numbers[u] = 0;
    if (u * kWarpSize >= own) break;
    const unsigned peers = equal_lanes(group[u], bits);
    const bool inside = group[u] != UINT32_MAX;
    const int before = inside ? seen[group[u]] : 0;
    const unsigned below = peers & lanes_below(lane);
    numbers[u] = before + __popc(below);
    __syncwarp();
    if (inside && below == 0) seen[group[u]] = static_cast<uint16_t>(before + __popc(peers));
    __syncwarp();
  }
  __syncthreads();
  uint16_t* const counts = reinterpret_cast<uint16_t*>(words);
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    totals[c] = sum_over(counts + c, stride, kWarps, 0);
  }
  cluster.sync();
  // Entries of a group in the blocks before, and in all.
  const int each = (columns + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * each, columns);
  const int past = min(begin + each, columns);
  int32_t sum = 0;
  for (int c = begin; c < past; ++c) {
    int32_t before = 0;
    int32_t all = 0;
#pragma unroll
    for (int b = 0; b < kClusterBlocks; ++b) {
      const int32_t count = cluster.map_shared_rank(totals, b)[c];
      before += b < rank ? count : 0;
      all += count;
    }
    if (rank == 0 && c < static_cast<int>(experts)) call.group_sizes[row * experts + c] = all;
    offsets[c] = sum + before;
    sum += all;
  }
  // All counts are read: no block goes before the others have passed here.
  cluster.barrier_arrive();
  const int32_t inclusive = inclusive_sum(sum, lane);
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  const int32_t of_warps = __reduce_add_sync(kAllLanes, lane < warp ? warp_sums[lane] : 0);
  for (int c = begin; c < past; ++c) offsets[c] += of_warps + inclusive - sum;
  __syncthreads();
  int32_t* const order = call.order + row * call.entries;
  int32_t* const inverse = call.inverse + row * call.entries;
#pragma unroll
  for (int u = 0; u < kOwned; ++u) {
    if (group[u] == UINT32_MAX) continue;
    const int i = first + u * kWarpSize + lane;
    const int32_t position = offsets[group[u]] + seen[group[u]] + numbers[u];
    inverse[i] = position;
    order[position] = i;
  }
  cluster.barrier_wait();
#endif
}

}  // namespace

bool plan_cluster_fits(const PlanCall& call) {
  const DeviceLimits limits = device_limits();
  return limits.is_hopper && call.entries <= kMostEntries && call.batch <= kMostGridRows &&
         shared_bytes(call.experts) + kStaticBytes <= limits.shared_bytes;
}

cudaError_t launch_plan_cluster(const PlanCall& call, cudaStream_t stream) {
  const int bytes = static_cast<int>(shared_bytes(call.experts));
  cudaError_t status =
      cudaFuncSetAttribute(plan_cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  status =
      cudaFuncSetAttribute(plan_cluster_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status != cudaSuccess) return status;
  // Whole turns of every warp.
  constexpr int64_t kTurns = kClusterBlocks * kThreads;
  const int share = static_cast<int>((call.entries + kTurns - 1) / kTurns) * kThreads;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kClusterBlocks, static_cast<unsigned>(call.batch));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  status = cudaLaunchKernelEx(&config, plan_cluster_kernel, call, share);
  return status == cudaSuccess ? cudaGetLastError() : status;
}

}  // namespace jax_router
