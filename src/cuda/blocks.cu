// `blocks` in CUDA: a counting sort. Each warp owns a contiguous piece of the entries and counts
// its experts; sums over the warps before it say where its entries go, and those of one load are
// ranked by lane. So the order is that of the entries, and no atomic decides a position.
//
// A row of one chunk takes one launch: several blocks of threads count and sum the same, and each
// writes its part. A longer row takes three: counts of each chunk, their sums over the chunks
// before it, and then each block of threads writes its chunk.

#include <cstdint>

#include "blocks.h"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kUnroll = 4;                  // loads of a warp that are under way together
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

// ---- the entries of a row ----

struct Entries {
  const int32_t* experts;
  const bool* mask;
  int64_t end;  // of the valid tokens
  uint32_t num_experts;

  // The expert of an entry, -1 if it is dropped.
  __device__ __forceinline__ int32_t load(int64_t i) const {
    if (i >= end) return -1;
    const int32_t e = __ldg(experts + i);
    // An unsigned comparison refuses negative experts, too.
    if (static_cast<uint32_t>(e) >= num_experts) return -1;
    return mask == nullptr || mask[e] ? e : -1;
  }
};

__device__ __forceinline__ Entries entries_of(const Blocks& call, int64_t row) {
  return {call.experts + row * call.entries(),
          call.mask == nullptr ? nullptr : call.mask + row * call.num_experts,
          call.valid_tokens(row) * call.k, static_cast<uint32_t>(call.num_experts)};
}

// Calls body(entry, expert, peers) for the entries [begin, end) of a warp, a lane each, in order;
// `peers` are the lanes with the same expert. Past the end the expert is -1.
template <typename Body>
__device__ __forceinline__ void for_each_entry(const Entries& entries, int64_t begin, int64_t end,
                                               Body body) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t base = begin; base < end; base += kUnroll * kWarpSize) {
    int32_t expert[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kWarpSize + lane;
      expert[u] = i < end ? entries.load(i) : -1;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * kWarpSize >= end) break;
      body(base + u * kWarpSize + lane, expert[u], __match_any_sync(kAllLanes, expert[u]));
    }
  }
}

__device__ __forceinline__ bool leads(unsigned peers) {
  return __ffs(peers) - 1 == static_cast<int>(threadIdx.x % kWarpSize);
}

// Sum over the threads before this one; `total` gets that over all of them.
__device__ __forceinline__ int32_t sum_before(int32_t value, int32_t* warp_sums, int32_t* total) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  int32_t inclusive = value;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int32_t before = 0;
  int32_t all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int32_t sum = warp_sums[w];
    before += w < warp ? sum : 0;
    all += sum;
  }
  *total = all;
  return before + inclusive - value;
}

// ---- what a block of threads knows of each expert, in shared memory ----

struct Table {
  int64_t stride;   // experts, rounded up to whole words
  int32_t* start;   // [E + 1] first position of each, then the number of positions in use
  int32_t* known;   // [E] entries of the row; of a row in chunks, those of the chunks before
  uint16_t* local;  // [E] number among the experts of the mask
  uint16_t* ranks;  // [warps, stride] entries of each warp, then of those before it
};

__host__ __device__ inline int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

int64_t table_bytes(int64_t experts, int warps) {
  return (2 * experts + 1) * static_cast<int64_t>(sizeof(int32_t)) +
         (warps + 1) * even(experts) * static_cast<int64_t>(sizeof(uint16_t));
}

__device__ __forceinline__ Table table_of(int32_t* shared, int64_t experts) {
  Table table;
  table.stride = even(experts);
  table.start = shared;
  table.known = table.start + experts + 1;
  table.local = reinterpret_cast<uint16_t*>(table.known + experts);
  table.ranks = table.local + table.stride;
  return table;
}

// The entries that each warp owns of [first, last).
__device__ __forceinline__ int64_t entries_of_warp(int64_t first, int64_t last, int warps) {
  const int64_t each = (last - first + warps - 1) / warps;
  return (each + kWarpSize - 1) / kWarpSize * kWarpSize;
}

// ---- phases; a barrier stands between each and the next ----

__device__ __forceinline__ void count_by_warp(const Entries& entries, const Table& table,
                                              int64_t first, int64_t last, int warps) {
  const int warp = threadIdx.x / kWarpSize;
  uint32_t* words = reinterpret_cast<uint32_t*>(table.ranks);
  for (int64_t i = threadIdx.x; i < warps * table.stride / 2; i += kThreads) words[i] = 0;
  __syncthreads();
  if (warp >= warps) return;
  const int64_t each = entries_of_warp(first, last, warps);
  const int64_t begin = first + warp * each;
  const int64_t valid = last < entries.end ? last : entries.end;
  const int64_t end = begin + each < valid ? begin + each : valid;
  uint16_t* counts = table.ranks + warp * table.stride;
  for_each_entry(entries, begin, end, [&](int64_t, int32_t expert, unsigned peers) {
    if (expert >= 0 && leads(peers)) counts[expert] += static_cast<uint16_t>(__popc(peers));
    __syncwarp();
  });
}

// Fills the rest of the table. `chunk` < 0: the block of threads has counted the whole row.
__device__ __forceinline__ void sum_up(const Blocks& call, const Table& table, int64_t row,
                                       int64_t chunk, int warps, const bool* mask,
                                       int32_t* warp_sums) {
  const int experts = static_cast<int>(call.num_experts);
  const int32_t block_size = static_cast<int32_t>(call.block_size);
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    int32_t own = 0;
#pragma unroll 8
    for (int w = 0; w < warps; ++w) {
      uint16_t* rank = table.ranks + w * table.stride + e;
      const int32_t count = *rank;
      *rank = static_cast<uint16_t>(own);
      own += count;
    }
    int32_t all = own;
    table.known[e] = own;
    if (chunk >= 0) {
      all = call.chunk_counts(row, call.chunks)[e];
      table.known[e] = call.chunk_counts(row, chunk)[e];
    }
    table.start[e] = all / block_size + (all % block_size > 0 ? 1 : 0);
  }
  __syncthreads();
  // Each thread takes neighbours, so that sums over threads are in the order of the experts.
  const int each = (experts + kThreads - 1) / kThreads;
  const int begin = threadIdx.x * each;
  const int end = begin + each < experts ? begin + each : experts;
  int32_t blocks = 0;
  int32_t kept = 0;
  for (int e = begin; e < end; ++e) {
    blocks += table.start[e];
    kept += mask != nullptr && mask[e] ? 1 : 0;
  }
  int32_t total;
  int32_t before = sum_before(blocks, warp_sums, &total);
  for (int e = begin; e < end; ++e) {
    const int32_t own = table.start[e];
    table.start[e] = before * block_size;
    before += own;
  }
  if (threadIdx.x == 0) table.start[experts] = total * block_size;
  if (mask == nullptr) return;
  before = sum_before(kept, warp_sums + kWarps, &total);
  for (int e = begin; e < end; ++e) {
    table.local[e] = static_cast<uint16_t>(before);
    before += mask[e] ? 1 : 0;
  }
}

// Writes the entries of this warp.
__device__ __forceinline__ void scatter(const Blocks& call, const Entries& entries,
                                        const Table& table, int64_t row, bool chunked,
                                        int64_t first, int64_t last, int warps) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t each = entries_of_warp(first, last, warps);
  const int64_t begin = first + warp * each;
  const int64_t end = begin + each < last ? begin + each : last;
  const float* weights = call.weights + row * call.entries();
  int32_t* inverse = call.inverse + row * call.entries();
  int32_t* ids = call.ids + row * call.positions;
  float* sorted_weights = call.sorted_weights + row * call.positions;
  uint16_t* next = table.ranks + warp * table.stride;
  const bool packed = call.layout == BlockLayout::kPacked;
  const uint32_t k = static_cast<uint32_t>(call.k);
  for_each_entry(entries, begin, end, [&](int64_t i, int32_t expert, unsigned peers) {
    int32_t position = -1;
    uint16_t rank = 0;
    if (expert >= 0) {
      rank = next[expert];
      position = table.start[expert] + rank + __popc(peers & lanes_below(lane));
      if (chunked) position += table.known[expert];
    }
    __syncwarp();
    if (expert >= 0 && leads(peers)) next[expert] = static_cast<uint16_t>(rank + __popc(peers));
    __syncwarp();
    if (i >= end) return;
    inverse[i] = position;
    if (position < 0) return;
    const uint32_t entry = static_cast<uint32_t>(i);
    ids[position] = packed ? Blocks::packed_id(entry / k, entry % k) : static_cast<int32_t>(entry);
    sorted_weights[position] = __ldg(weights + i);
  });
}

// Writes what belongs to no entry: one part of `parts` of it.
__device__ __forceinline__ void fill(const Blocks& call, const Table& table, int64_t row,
                                     bool chunked, bool masked, int64_t part, int64_t parts) {
  const int experts = static_cast<int>(call.num_experts);
  const int64_t n = call.valid_tokens(row);
  const int32_t pad = call.pad_id(n);
  int32_t* ids = call.ids + row * call.positions;
  float* weights = call.sorted_weights + row * call.positions;
  const int32_t used = table.start[experts];
  if (part == 0 && threadIdx.x == 0) {
    call.num_padded[row] = used;
    call.num_tokens[row] = static_cast<int32_t>(n);
  }
  const int64_t warp = part * kWarps + threadIdx.x / kWarpSize;
  const int32_t* totals = chunked ? call.chunk_counts(row, call.chunks) : table.known;
  for (int64_t e = warp; e < experts; e += parts * kWarps) {
    const int64_t end = table.start[e + 1];
    for (int64_t i = table.start[e] + totals[e] + threadIdx.x % kWarpSize; i < end;
         i += kWarpSize) {
      ids[i] = pad;
      weights[i] = 0.0f;
    }
  }
  const int64_t thread = part * kThreads + threadIdx.x;
  const int64_t threads = parts * kThreads;
  for (int64_t i = used + thread; i < call.positions; i += threads) {
    ids[i] = pad;
    weights[i] = 0.0f;
  }
  const int64_t blocks = call.positions / call.block_size;
  int32_t* block_experts = call.block_experts + row * blocks;
  for (int64_t block = thread; block < blocks; block += threads) {
    const int64_t position = block * call.block_size;
    int32_t expert = -1;
    if (position < used) {
      // The last expert that starts here or before: those without entries start with the next.
      int low = 0;
      int high = experts;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.start[middle] <= position) {
          low = middle;
        } else {
          high = middle;
        }
      }
      expert = masked ? table.local[low] : low;
    }
    block_experts[block] = expert;
  }
}

// ---- kernels ----

__global__ void __launch_bounds__(kThreads, 1) blocks_kernel(const Blocks call, const Split split) {
  extern __shared__ int32_t shared[];
  __shared__ int32_t warp_sums[2 * kWarps];
  const Table table = table_of(shared, call.num_experts);
  const bool chunked = call.chunks > 1;
  for (int64_t task = blockIdx.x; task < call.batch * split.parts; task += gridDim.x) {
    const int64_t row = task / split.parts;
    const int64_t part = task % split.parts;
    const int64_t first = chunked ? part * call.chunk_entries() : 0;
    const int64_t limit = first + call.chunk_entries();
    const int64_t last = limit < call.entries() ? limit : call.entries();
    const Entries entries = entries_of(call, row);
    count_by_warp(entries, table, first, last, split.warps);
    __syncthreads();
    sum_up(call, table, row, chunked ? part : -1, split.warps, entries.mask, warp_sums);
    __syncthreads();
    const int warp = threadIdx.x / kWarpSize;
    if (warp < split.warps && (chunked || warp % split.parts == part)) {
      scatter(call, entries, table, row, chunked, first, last, split.warps);
    }
    fill(call, table, row, chunked, entries.mask != nullptr, part, split.parts);
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
