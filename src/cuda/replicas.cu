// `assign_replicas` in CUDA. A block assigns the ids of some tokens of a batch row and counts them
// in shared memory where the load fits, then adds its counts to the result. Atomics add integers
// only: no order of additions changes the load.

#include <cstdint>

#include "replicas.h"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // ids that a thread reads before it uses them
constexpr int64_t kFewestPartIds = kThreads * kUnroll;
constexpr int64_t kMostPartIds = 1 << 30;  // 32 bits number the ids of a part
constexpr int64_t kBlocksPerProcessor = 2;

struct Split {
  int64_t parts;  // of a batch row
  int64_t part_tokens;
};

template <bool kShared>
__global__ void __launch_bounds__(kThreads)
    replicas_kernel(const ReplicasCall call, const Split split) {
  extern __shared__ int32_t shared_load[];
  const int bins = static_cast<int>(call.bins);
  const uint32_t slots = static_cast<uint32_t>(call.slots);
  for (int64_t block = blockIdx.x; block < call.batch * split.parts; block += gridDim.x) {
    const int64_t row = block / split.parts;
    const int64_t begin = block % split.parts * split.part_tokens;
    const int64_t left = call.tokens - begin;
    const int64_t tokens = left < 0 ? 0 : left < split.part_tokens ? left : split.part_tokens;
    const uint32_t size = static_cast<uint32_t>(tokens) * slots;
    const int64_t first = row * call.tokens + begin;
    const int32_t* experts = call.experts + first * call.slots;
    const bool* where = call.where == nullptr ? nullptr : call.where + first;
    const int32_t* table = call.table + row * call.num_experts * call.width;
    const int32_t* counts = call.counts + row * call.num_experts;
    const uint32_t offset = __ldg(call.offset + row) + static_cast<uint32_t>(begin);
    int32_t* load = call.load + row * call.bins;
    int32_t* own = kShared ? shared_load : load;
    if constexpr (kShared) {
      for (int i = threadIdx.x; i < bins; i += kThreads) shared_load[i] = 0;
      __syncthreads();
    }
    for (uint32_t start = threadIdx.x; start < size; start += kThreads * kUnroll) {
      int32_t expert[kUnroll];
      uint32_t token[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = start + u * kThreads;
        token[u] = i / slots;
        expert[u] = i < size ? __ldg(experts + i) : -1;
        if (where != nullptr && i < size && !where[token[u]]) expert[u] = -1;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const uint32_t i = start + u * kThreads;
        if (i >= size) break;
        const Replica replica = find_replica(call, table, counts, offset + token[u], expert[u]);
        call.physical[first * call.slots + i] = replica.slot;
        if (replica.bin >= 0) atomicAdd(own + replica.bin, 1);
      }
    }
    if constexpr (kShared) {
      __syncthreads();
      // The next round clears what the same thread has read here, so it need not wait.
      for (int i = threadIdx.x; i < bins; i += kThreads) {
        const int32_t value = shared_load[i];
        if (split.parts == 1) {
          load[i] = value;
        } else if (value != 0) {
          atomicAdd(load + i, value);
        }
      }
    }
  }
}

Split split_work(const ReplicasCall& call, int processors) {
  const int64_t ids = call.tokens * call.slots;
  const int64_t wanted = kBlocksPerProcessor * processors / call.batch;
  // A part goes over its load twice: that must cost no more than its ids.
  const int64_t fewest = call.bins > kFewestPartIds ? call.bins : kFewestPartIds;
  const int64_t possible = ids / fewest;
  const int64_t needed = (ids + kMostPartIds - 1) / kMostPartIds;
  Split split;
  split.parts = wanted < possible ? wanted : possible;
  if (split.parts < needed) split.parts = needed;
  if (split.parts < 1) split.parts = 1;
  split.part_tokens = (call.tokens + split.parts - 1) / split.parts;
  return split;
}

__global__ void __launch_bounds__(kThreads) clear_kernel(int32_t* words, int64_t count) {
  let_next_kernel_start();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    words[i] = 0;
  }
}

}  // namespace

cudaError_t clear_load(const Replicas& replicas, cudaStream_t stream, bool* overlaps) {
  *overlaps = false;
  const int64_t count = replicas.batch * replicas.bins;
  if (count == 0) return cudaSuccess;
  if constexpr (kProgrammaticLaunch) {
    // On a new GPU the module may have been compiled from the PTX of an old one, without waiting.
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, clear_kernel);
    if (status != cudaSuccess) return status;
    *overlaps = attributes.ptxVersion >= 90;
  }
  if (!*overlaps) return cudaMemsetAsync(replicas.load, 0, sizeof(int32_t) * count, stream);
  const int64_t wanted = (count + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  return launch_kernel(clear_kernel, blocks, kThreads, 0, stream, replicas.load, count);
}

cudaError_t launch_replicas(const ReplicasCall& call, cudaStream_t stream) {
  if (call.batch == 0) return cudaSuccess;
  const DeviceLimits limits = device_limits();
  const Split split = split_work(call, limits.processors);
  const int64_t bytes = call.bins * static_cast<int64_t>(sizeof(int32_t));
  const bool shared = bytes <= limits.shared_bytes;
  if (!shared || split.parts > 1) {
    const cudaError_t status =
        cudaMemsetAsync(call.load, 0, static_cast<size_t>(call.batch * bytes), stream);
    if (status != cudaSuccess) return status;
  }
  const int64_t wanted = call.batch * split.parts;
  const unsigned blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  constexpr int kWarps = kThreads / kWarpSize;
  if (shared) {
    return launch_blocks(replicas_kernel<true>, blocks, kWarps, static_cast<int>(bytes), stream,
                         call, split);
  }
  return launch_blocks(replicas_kernel<false>, blocks, kWarps, 0, stream, call, split);
}

}  // namespace jax_router
