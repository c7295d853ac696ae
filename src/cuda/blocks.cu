// `blocks` in CUDA: a counting sort. Each warp owns a contiguous piece of the entries and counts
// its experts; sums over the warps before it say where its entries go, and those of one load are
// ranked by lane. So the order is that of the entries, and no atomic decides a position.
//
// A row of one chunk takes one launch: several blocks of threads count and sum the same, and each
// writes its part. A longer row takes three: counts of each chunk, their sums over the chunks
// before it, and then each block of threads writes its chunk.

#include <cstdint>

#include "blocks.cuh"
#include "blocks.h"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int64_t kMostOfChunk = 65535;     // entries that 16 bits count
constexpr int64_t kPositionsOfPart = 4096;  // that a block of threads fills in one launch
constexpr int kScanThreads = 128;
constexpr int kScanUnroll = 8;
constexpr int64_t kMostLaunched = 1 << 20;  // blocks of threads; more tasks are looped over
constexpr int kReservedBytes = 1024;        // of shared memory, for what is not dynamic

struct Split {
  int warps;  // that own entries
  int parts;  // blocks of threads of a row
};

// ---- kernels ----

__global__ void __launch_bounds__(kThreads, 1) blocks_kernel(const Blocks call, const Split split) {
  extern __shared__ int32_t shared[];
  for (int64_t task = blockIdx.x; task < call.batch * split.parts; task += gridDim.x) {
    write_blocks<kWarps>(call, task / split.parts, task % split.parts, split.parts, split.warps,
                         shared);
    __syncthreads();
  }
}

// Counts the entries of each chunk.
__global__ void __launch_bounds__(kThreads) count_chunks_kernel(const Blocks call) {
  extern __shared__ int32_t shared[];
  const int experts = static_cast<int>(call.num_experts);
  const int warp = threadIdx.x / kWarpSize;
  for (int64_t task = blockIdx.x; task < call.batch * call.chunks; task += gridDim.x) {
    const int64_t row = task / call.chunks;
    const int64_t chunk = task % call.chunks;
    for (int e = threadIdx.x; e < experts; e += kThreads) shared[e] = 0;
    __syncthreads();
    const Entries entries = entries_of(call, row);
    const int64_t first = chunk * call.chunk_entries();
    const int64_t limit = first + call.chunk_entries();
    const int64_t last = limit < entries.end ? limit : entries.end;
    const int64_t each = entries_of_warp(first, limit, kWarps);
    const int64_t begin = first + warp * each;
    for_each_entry(entries, begin, begin + each < last ? begin + each : last,
                   [&](int64_t, int32_t expert, unsigned peers) {
                     // Once for all peers: a single expert must not serialise the lanes.
                     if (expert >= 0 && leads(peers)) atomicAdd(shared + expert, __popc(peers));
                   });
    __syncthreads();
    int32_t* counts = call.chunk_counts(row, chunk);
    // The next round clears what the same thread has read here, so it need not wait.
    for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = shared[e];
  }
}

// Turns the counts of each expert into sums over the chunks before, and writes those over all.
__global__ void __launch_bounds__(kScanThreads) sum_chunks_kernel(const Blocks call) {
  const int64_t tiles = (call.num_experts + kScanThreads - 1) / kScanThreads;
  for (int64_t task = blockIdx.x; task < call.batch * tiles; task += gridDim.x) {
    const int64_t row = task / tiles;
    const int64_t e = task % tiles * kScanThreads + threadIdx.x;
    if (e >= call.num_experts) continue;
    int32_t* counts = call.chunk_counts(row, 0) + e;
    int32_t before = 0;
    for (int64_t base = 0; base < call.chunks; base += kScanUnroll) {
      int32_t own[kScanUnroll];
#pragma unroll
      for (int u = 0; u < kScanUnroll; ++u) {
        own[u] = base + u < call.chunks ? counts[(base + u) * call.num_experts] : 0;
      }
#pragma unroll
      for (int u = 0; u < kScanUnroll; ++u) {
        if (base + u < call.chunks) counts[(base + u) * call.num_experts] = before;
        before += own[u];
      }
    }
    counts[call.chunks * call.num_experts] = before;
  }
}

unsigned launched(int64_t tasks) {
  return static_cast<unsigned>(tasks < kMostLaunched ? tasks : kMostLaunched);
}

Split split_work(const Blocks& call, const DeviceLimits& limits) {
  Split split;
  split.warps = kWarps;
  const int64_t entries = call.chunk_entries();
  while (split.warps > 1 &&
         (split.warps / 2 * kWarpSize >= entries ||
          table_bytes(call.num_experts, split.warps) > limits.shared_bytes - kReservedBytes)) {
    split.warps /= 2;
  }
  int64_t parts = call.chunks;
  if (call.chunks == 1) {
    // Each part counts all entries again: only as many as fill the device.
    const int64_t wanted = call.positions / kPositionsOfPart;
    const int64_t room = limits.processors / call.batch;
    parts = wanted < room ? wanted : room;
  }
  split.parts = static_cast<int>(parts > 1 ? parts : 1);
  return split;
}

}  // namespace

cudaError_t launch_blocks_plan(const Blocks& call, cudaStream_t stream) {
  if (call.batch == 0) return cudaSuccess;
  if (call.chunk_entries() > kMostOfChunk) return cudaErrorInvalidValue;
  const DeviceLimits limits = device_limits();
  const Split split = split_work(call, limits);
  const int64_t bytes = table_bytes(call.num_experts, split.warps);
  if (bytes > limits.shared_bytes - kReservedBytes) return cudaErrorInvalidValue;
  if (call.chunks > 1) {
    const int counts_bytes = static_cast<int>(call.num_experts * sizeof(int32_t));
    cudaError_t status = launch_blocks(count_chunks_kernel, launched(call.batch * call.chunks),
                                       kWarps, counts_bytes, stream, call);
    if (status != cudaSuccess) return status;
    const int64_t tiles = (call.num_experts + kScanThreads - 1) / kScanThreads;
    status = launch_blocks(sum_chunks_kernel, launched(call.batch * tiles),
                           kScanThreads / kWarpSize, 0, stream, call);
    if (status != cudaSuccess) return status;
  }
  return launch_blocks(blocks_kernel, launched(call.batch * split.parts), kWarps,
                       static_cast<int>(bytes), stream, call, split);
}

}  // namespace jax_router
