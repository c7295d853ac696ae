// `plan` in CUDA: a counting sort. A batch row of few entries is one block's work. Otherwise one
// launch counts the groups of every block of entries, one turns the counts into how many entries of
// a group lie in the blocks before, and one places the entries. Within a block each warp owns a
// stretch of entries and counters of its own, and lanes of one group find each other by ballots: no
// atomic decides a position, and many entries of one group cost no more.

#include <cstdint>

#include "plan.h"
#include "route.h"
#include "sums.cuh"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kWholeThreads = 1024;
constexpr int kBlockThreads = 512;
constexpr int kUnroll = 4;              // ids that a thread reads before it uses them
constexpr int64_t kStaticBytes = 256;   // at most, of shared memory
constexpr int64_t kMostOfBlock = 2048;  // entries that one block sorts as fast as a cluster

// ---- entries of a warp ----

// Calls f(i, group, peers, inside) for i = lane, lane + 32 ... while any lane has i < size. `peers`
// are the lanes whose entry is of the same group; the lanes that have none have a group of their
// own.
template <typename F>
__device__ __forceinline__ void for_groups(const int32_t* ids, int size, uint32_t experts, int lane,
                                           F f) {
  const int bits = bits_of(experts + 1);  // all of them: the group past the end
  for (int start = 0; start < size; start += kUnroll * kWarpSize) {
    uint32_t group[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = start + u * kWarpSize + lane;
      group[u] = i < size ? group_of(__ldg(ids + i), experts) : UINT32_MAX;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = start + u * kWarpSize + lane;
      if (i - lane >= size) break;
      f(i, group[u], equal_lanes(group[u], bits), i < size);
    }
  }
}

__device__ __forceinline__ bool is_first(unsigned peers, int lane) {
  return (peers & lanes_below(lane)) == 0;
}

// ---- sums ----

// Replaces each value by the sum of those before it. The whole block takes part; it must wait
// before and after.
template <int kThreads>
__device__ __forceinline__ void exclusive_sums(int32_t* values, int size, int32_t* warp_sums) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int share = (size + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * share, size);
  const int end = min(begin + share, size);
  int32_t sum = 0;
  for (int i = begin; i < end; ++i) sum += values[i];
  const int32_t inclusive = inclusive_sum(sum, lane);
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int32_t running = inclusive - sum;
  for (int w = 0; w < warp; ++w) running += warp_sums[w];
  for (int i = begin; i < end; ++i) {
    const int32_t value = values[i];
    values[i] = running;
    running += value;
  }
}

// ---- kernels ----

// How many entries a block has from `begin` on; the last blocks may have none.
__device__ __forceinline__ int block_size(const PlanCall& call, int64_t begin,
                                          int64_t block_entries) {
  const int64_t left = call.entries - begin;
  return static_cast<int>(left < 0 ? 0 : left < block_entries ? left : block_entries);
}

// The groups of each block of entries.
__global__ void __launch_bounds__(kBlockThreads)
    plan_count_kernel(const PlanCall call, const int64_t block_entries) {
  extern __shared__ int32_t counts[];  // [columns]
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int columns = static_cast<int>(call.experts) + 1;
  for (int64_t block = blockIdx.x; block < call.batch * call.blocks; block += gridDim.x) {
    const int64_t row = block / call.blocks;
    const int64_t begin = block % call.blocks * block_entries;
    const int size = block_size(call, begin, block_entries);
    for (int c = threadIdx.x; c < columns; c += kBlockThreads) counts[c] = 0;
    __syncthreads();
    // Warps take turns of as many ids as a warp reads at once.
    constexpr int kTurn = kUnroll * kWarpSize;
    for (int i = warp * kTurn; i < size; i += kBlockThreads * kUnroll) {
      for_groups(call.ids + row * call.entries + begin + i, min(size - i, kTurn),
                 static_cast<uint32_t>(call.experts), lane,
                 [&](int, uint32_t group, unsigned peers, bool inside) {
                   if (inside && is_first(peers, lane)) atomicAdd(counts + group, __popc(peers));
                 });
    }
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += kBlockThreads) {
      call.counts[block * columns + c] = counts[c];
    }
    __syncthreads();
  }
}

// Places the entries of a whole batch row, or of a block of one after the other kernels. Of the
// warps, `counting` have counters.
template <bool kWhole, int kThreads>
__global__ void __launch_bounds__(kThreads)
    plan_place_kernel(const PlanCall call, const int64_t block_entries, const int counting) {
  extern __shared__ int32_t offsets[];  // [columns], then 16-bit counts [counting, stride]
  __shared__ int32_t warp_sums[kThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const uint32_t experts = static_cast<uint32_t>(call.experts);
  const int columns = static_cast<int>(call.experts) + 1;
  const int stride = columns + (columns & 1);
  uint32_t* words = reinterpret_cast<uint32_t*>(offsets + columns);
  uint16_t* counts = reinterpret_cast<uint16_t*>(words);
  uint16_t* own = counts + warp * stride;
  const int64_t blocks = kWhole ? 1 : call.blocks;
  for (int64_t block = blockIdx.x; block < call.batch * blocks; block += gridDim.x) {
    const int64_t row = block / blocks;
    const int64_t begin = block % blocks * block_entries;
    const int size = block_size(call, begin, block_entries);
    const int32_t* ids = call.ids + row * call.entries + begin;
    int32_t* inverse = call.inverse + row * call.entries + begin;
    int32_t* order = call.order + row * call.entries;
    int32_t* group_sizes = call.group_sizes + row * call.experts;

    for (int i = threadIdx.x; i < counting * stride / 2; i += kThreads) words[i] = 0;
    __syncthreads();
    const int turns = (size + kWarpSize - 1) / kWarpSize;
    const int stretch = (turns + counting - 1) / counting * kWarpSize;
    const int first = warp * stretch;
    const int entries = warp < counting ? min(size - first, stretch) : 0;
    for_groups(ids + first, entries, experts, lane,
               [&](int, uint32_t group, unsigned peers, bool inside) {
                 if (inside && is_first(peers, lane)) {
                   own[group] = static_cast<uint16_t>(own[group] + __popc(peers));
                 }
                 __syncwarp();
               });
    __syncthreads();
    for (int c = threadIdx.x; c < columns; c += kThreads) {
      const int32_t total = sum_over(counts + c, stride, counting, 0);
      if constexpr (kWhole) {
        offsets[c] = total;
        if (c < call.experts) group_sizes[c] = total;
      } else {
        offsets[c] = c < call.experts ? group_sizes[c] : 0;
      }
    }
    __syncthreads();
    exclusive_sums<kThreads>(offsets, columns, warp_sums);
    __syncthreads();
    if constexpr (!kWhole) {
      const int32_t* before = call.counts + block * columns;
      for (int c = threadIdx.x; c < columns; c += kThreads) offsets[c] += before[c];
      __syncthreads();
    }
    for_groups(ids + first, entries, experts, lane,
               [&](int i, uint32_t group, unsigned peers, bool inside) {
                 int32_t position = 0;
                 if (inside) {
                   position = offsets[group] + own[group] + __popc(peers & lanes_below(lane));
                 }
                 __syncwarp();
                 if (inside && is_first(peers, lane)) {
                   own[group] = static_cast<uint16_t>(own[group] + __popc(peers));
                 }
                 __syncwarp();
                 if (inside) {
                   inverse[first + i] = position;
                   order[position] = static_cast<int32_t>(begin + first + i);
                 }
               });
    __syncthreads();
  }
}

// ---- launches ----

unsigned grid_of(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

// Bytes of shared memory of the placing kernel.
int64_t place_bytes(int64_t experts, int counting) {
  const int64_t columns = experts + 1;
  return 4 * columns + 2 * counting * (columns + columns % 2);
}

template <bool kWhole, int kThreads>
cudaError_t launch_place(const PlanCall& call, int64_t block_entries, cudaStream_t stream) {
  const int64_t budget = device_limits().shared_bytes - kStaticBytes;
  if (place_bytes(call.experts, 1) > budget) return cudaErrorInvalidValue;
  int counting = 1;
  while (2 * counting <= kThreads / kWarpSize && counting * kWarpSize < block_entries &&
         place_bytes(call.experts, 2 * counting) <= budget) {
    counting *= 2;
  }
  const int64_t blocks = call.batch * (kWhole ? 1 : call.blocks);
  const int bytes = static_cast<int>(place_bytes(call.experts, counting));
  return launch_blocks(plan_place_kernel<kWhole, kThreads>, grid_of(blocks), kThreads / kWarpSize,
                       bytes, stream, call, block_entries, counting);
}

}  // namespace

cudaError_t launch_plan(const PlanCall& call, cudaStream_t stream) {
  if (call.batch == 0) return cudaSuccess;
  if (call.entries > kMostOfBlock && plan_cluster_fits(call)) {
    return launch_plan_cluster(call, stream);
  }
  if (call.whole()) return launch_place<true, kWholeThreads>(call, call.entries, stream);
  const int64_t block_entries = (call.entries + call.blocks - 1) / call.blocks;
  const int64_t columns = call.experts + 1;
  cudaError_t status =
      launch_blocks(plan_count_kernel, grid_of(call.batch * call.blocks), kBlockThreads / kWarpSize,
                    static_cast<int>(columns * static_cast<int64_t>(sizeof(int32_t))), stream, call,
                    block_entries);
  if (status != cudaSuccess) return status;
  status = launch_sum_chunks({call.counts, call.batch, call.blocks, columns, call.blocks * columns,
                              call.group_sizes, call.experts, call.experts},
                             stream);
  if (status != cudaSuccess) return status;
  return launch_place<false, kBlockThreads>(call, block_entries, stream);
}

}  // namespace jax_router
