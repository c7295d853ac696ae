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
#include "sums.cuh"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int64_t kMostOfChunk = 65535;     // entries that 16 bits count
constexpr int64_t kPositionsOfPart = 4096;  // that a block of threads fills in one launch
constexpr int kReservedBytes = 1024;        // of shared memory, for what is not dynamic

struct Split {
  int warps;  // that own entries
  int parts;  // blocks of threads of a row
  int chunk_entries;
};

// ---- kernels ----

__global__ void __launch_bounds__(kThreads, 1) blocks_kernel(const Blocks call, const Split split) {
  extern __shared__ int32_t shared[];
  for (int64_t row = blockIdx.y; row < call.batch; row += gridDim.y) {
    write_blocks<kWarps>(call, row, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x),
                         split.chunk_entries, split.warps, shared);
    __syncthreads();
  }
}

// Counts the entries of each chunk.
__global__ void __launch_bounds__(kThreads)
    count_chunks_kernel(const Blocks call, const int chunk_entries) {
  extern __shared__ int32_t shared[];
  const int experts = static_cast<int>(call.num_experts);
  const int bits = bits_of(static_cast<uint32_t>(experts));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk_entries;
  for (int64_t row = blockIdx.y; row < call.batch; row += gridDim.y) {
    for (int e = threadIdx.x; e < experts; e += kThreads) shared[e] = 0;
    __syncthreads();
    const Entries entries = entries_of(call, row);
    const Piece piece(first, min(first + chunk_entries, entries.end), chunk_entries, kWarps);
    Turn turn;
    for (int64_t begin = piece.begin(); begin < piece.end(); begin += kTurn) {
      turn.load(entries, begin, piece.end());
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        // Once for all peers: a single expert must not serialise the lanes.
        const int32_t expert = turn.expert[u];
        const unsigned peers = equal_lanes(static_cast<uint32_t>(expert), bits);
        if (expert >= 0 && leads(peers)) atomicAdd(shared + expert, __popc(peers));
      }
    }
    __syncthreads();
    int32_t* counts = call.chunk_counts(row, blockIdx.x);
    // The next round clears what the same thread has read here, so it need not wait.
    for (int e = threadIdx.x; e < experts; e += kThreads) counts[e] = shared[e];
  }
}

Split split_work(const Blocks& call, const DeviceLimits& limits) {
  Split split;
  split.warps = kWarps;
  const int64_t entries = call.chunk_entries();
  split.chunk_entries = static_cast<int>(entries);
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
  const unsigned rows =
      static_cast<unsigned>(call.batch < kMostGridRows ? call.batch : kMostGridRows);
  if (call.chunks > 1) {
    const int64_t experts = call.num_experts;
    const dim3 grid(static_cast<unsigned>(call.chunks), rows);
    cudaError_t status =
        launch_blocks(count_chunks_kernel, grid, kWarps,
                      static_cast<int>(experts * static_cast<int64_t>(sizeof(int32_t))), stream,
                      call, split.chunk_entries);
    if (status != cudaSuccess) return status;
    const int64_t stride = (call.chunks + 1) * experts;
    status = launch_sum_chunks({call.scratch, call.batch, call.chunks, experts, stride,
                                call.chunk_counts(0, call.chunks), experts, stride},
                               stream);
    if (status != cudaSuccess) return status;
  }
  return launch_blocks(blocks_kernel, dim3(static_cast<unsigned>(split.parts), rows), kWarps,
                       static_cast<int>(bytes), stream, call, split);
}

}  // namespace jax_router
