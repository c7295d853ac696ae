// The plan of a row in blocks, made by a block of threads: what `blocks` and
// `route_and_plan_blocks` share.

#ifndef JAX_ROUTER_CUDA_BLOCKS_CUH_
#define JAX_ROUTER_CUDA_BLOCKS_CUH_

#include <cstdint>

#include "blocks_call.h"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kUnroll = 4;  // loads of a warp that are under way together

// ---- the entries of a row ----

struct Entries {
  const int32_t* experts;
  const bool* mask;
  int64_t end;  // of the valid tokens
  uint32_t num_experts;

  // The expert of an entry, -1 if it is dropped.
  __device__ __forceinline__ int32_t load(int64_t i) const {
    if (i >= end) return -1;
    const int32_t e = __ldcg(experts + i);  // may be of this launch
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
template <int kWarps>
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

inline int64_t table_bytes(int64_t experts, int warps) {
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

template <int kWarps>
__device__ __forceinline__ void count_by_warp(const Entries& entries, const Table& table,
                                              int64_t first, int64_t last, int warps) {
  constexpr int kThreads = kWarps * kWarpSize;
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
template <int kWarps>
__device__ __forceinline__ void sum_up(const Blocks& call, const Table& table, int64_t row,
                                       int64_t chunk, int warps, const bool* mask,
                                       int32_t* warp_sums) {
  constexpr int kThreads = kWarps * kWarpSize;
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
  int32_t before = sum_before<kWarps>(blocks, warp_sums, &total);
  for (int e = begin; e < end; ++e) {
    const int32_t own = table.start[e];
    table.start[e] = before * block_size;
    before += own;
  }
  if (threadIdx.x == 0) table.start[experts] = total * block_size;
  if (mask == nullptr) return;
  before = sum_before<kWarps>(kept, warp_sums + kWarps, &total);
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
    sorted_weights[position] = __ldcg(weights + i);
  });
}

// Writes what belongs to no entry: one part of `parts` of it.
template <int kWarps>
__device__ __forceinline__ void fill(const Blocks& call, const Table& table, int64_t row,
                                     bool chunked, bool masked, int64_t part, int64_t parts) {
  constexpr int kThreads = kWarps * kWarpSize;
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

// Writes a part of the plan of a row, by all threads of a block. `warps` of them own entries; where
// there is one chunk, each part counts all entries, else its own chunk of them.
template <int kWarps>
__device__ __forceinline__ void write_blocks(const Blocks& call, int64_t row, int64_t part,
                                             int64_t parts, int warps, int32_t* shared) {
  __shared__ int32_t warp_sums[2 * kWarps];
  const Table table = table_of(shared, call.num_experts);
  const bool chunked = call.chunks > 1;
  const int64_t first = chunked ? part * call.chunk_entries() : 0;
  const int64_t limit = first + call.chunk_entries();
  const int64_t last = limit < call.entries() ? limit : call.entries();
  const Entries entries = entries_of(call, row);
  count_by_warp<kWarps>(entries, table, first, last, warps);
  __syncthreads();
  sum_up<kWarps>(call, table, row, chunked ? part : -1, warps, entries.mask, warp_sums);
  __syncthreads();
  const int warp = threadIdx.x / kWarpSize;
  if (warp < warps && (chunked || warp % parts == part)) {
    scatter(call, entries, table, row, chunked, first, last, warps);
  }
  fill<kWarps>(call, table, row, chunked, entries.mask != nullptr, part, parts);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_BLOCKS_CUH_
