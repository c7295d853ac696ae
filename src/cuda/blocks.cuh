// The plan of a row in blocks, made by a block of threads: what `blocks` and
// `route_and_plan_blocks` share.

#ifndef JAX_ROUTER_CUDA_BLOCKS_CUH_
#define JAX_ROUTER_CUDA_BLOCKS_CUH_

#include <cstdint>

#include "blocks_call.h"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kUnroll = 4;  // loads of a warp that are under way together
inline constexpr int kTurn = kUnroll * kWarpSize;

// ---- the entries of a row ----

struct Entries {
  const int32_t* experts;
  const bool* mask;
  int64_t end;  // of the valid tokens
  uint32_t num_experts;

  // The expert of an entry, -1 if it is dropped. The experts may have been written by this launch.
  __device__ __forceinline__ int32_t load(int64_t i) const {
    if (i >= end) return -1;
    const int32_t e = __ldcg(experts + i);
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

__device__ __forceinline__ bool leads(unsigned peers) {
  return __ffs(peers) - 1 == static_cast<int>(threadIdx.x % kWarpSize);
}

// A warp's turn: entries begin + u * 32 + lane, and the number of each among those of its expert
// that the warp has seen.
struct Turn {
  int32_t expert[kUnroll];
  int32_t rank[kUnroll];

  __device__ __forceinline__ void load(const Entries& entries, int64_t begin, int64_t end) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = begin + u * kWarpSize + threadIdx.x % kWarpSize;
      expert[u] = i < end ? entries.load(i) : -1;
    }
  }
  // `seen`: how many entries of each expert the warp has seen, brought up to date.
  __device__ __forceinline__ void number(uint16_t* seen, int64_t count, int bits) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u * kWarpSize >= count) break;
      const unsigned peers = equal_lanes(static_cast<uint32_t>(expert[u]), bits);
      const bool kept = expert[u] >= 0;
      const int before = kept ? seen[expert[u]] : 0;
      rank[u] = before + __popc(peers & lanes_below(lane));
      __syncwarp();
      if (kept && leads(peers)) seen[expert[u]] = static_cast<uint16_t>(before + __popc(peers));
      __syncwarp();
    }
  }
};

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
  const int32_t sum = lane < kWarps ? warp_sums[lane] : 0;
  *total = __reduce_add_sync(kAllLanes, sum);
  return __reduce_add_sync(kAllLanes, lane < warp ? sum : 0) + inclusive - value;
}

// ---- what a block of threads knows of each expert, in shared memory ----

struct Table {
  int stride;       // experts, rounded up to whole words
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
  table.stride = static_cast<int>(even(experts));
  table.start = shared;
  table.known = table.start + experts + 1;
  table.local = reinterpret_cast<uint16_t*>(table.known + experts);
  table.ranks = table.local + table.stride;
  return table;
}

// What a block of threads works on: the entries [first, last) of a row, at most `most`, by `warps`
// of its warps, `each` of them each.
struct Piece {
  int64_t first;
  int64_t last;
  int each;

  __device__ __forceinline__ Piece(int64_t first, int64_t last, int most, int warps)
      : first(first), last(last) {
    each = ((most + warps - 1) / warps + kWarpSize - 1) / kWarpSize * kWarpSize;
  }
  __device__ __forceinline__ int64_t begin() const {
    return first + static_cast<int64_t>(warp_index()) * each;
  }
  __device__ __forceinline__ int64_t end() const { return min(begin() + each, last); }
};

// ---- phases; a barrier stands between each and the next ----

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
  const int end = min(begin + each, experts);
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

// Where the entries of a row go.
struct Places {
  int32_t* ids;
  float* sorted_weights;
  int32_t* inverse;
  const float* weights;
  uint32_t k;
  bool packed;

  __device__ __forceinline__ Places(const Blocks& call, int64_t row)
      : ids(call.ids + row * call.positions),
        sorted_weights(call.sorted_weights + row * call.positions),
        inverse(call.inverse + row * call.entries()),
        weights(call.weights + row * call.entries()),
        k(static_cast<uint32_t>(call.k)),
        packed(call.layout == BlockLayout::kPacked) {}

  __device__ __forceinline__ void write(int64_t i, int32_t position) const {
    inverse[i] = position;
    if (position < 0) return;
    const uint32_t entry = static_cast<uint32_t>(i);
    ids[position] = packed ? Blocks::packed_id(entry / k, entry % k) : static_cast<int32_t>(entry);
    sorted_weights[position] = __ldcg(weights + i);
  }
  // The entries of a turn; `add(expert)` is what their ranks lack.
  template <typename Add>
  __device__ __forceinline__ void write(const Turn& turn, int64_t begin, int64_t end,
                                        Add add) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = begin + u * kWarpSize + threadIdx.x % kWarpSize;
      if (i >= end) break;
      const int32_t expert = turn.expert[u];
      write(i, expert < 0 ? -1 : turn.rank[u] + add(expert));
    }
  }
};

// Writes what belongs to no entry: one part of `parts` of it.
template <int kWarps>
__device__ __forceinline__ void fill(const Blocks& call, const Table& table, int64_t row,
                                     bool masked, int part, int parts) {
  constexpr int kThreads = kWarps * kWarpSize;
  const int experts = static_cast<int>(call.num_experts);
  const int block_size = static_cast<int>(call.block_size);
  const int positions = static_cast<int>(call.positions);
  const int blocks = positions / block_size;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t n = call.valid_tokens(row);
  const int32_t pad = call.pad_id(n);
  int32_t* ids = call.ids + row * call.positions;
  float* weights = call.sorted_weights + row * call.positions;
  int32_t* block_experts = call.block_experts + row * blocks;
  const int32_t used = table.start[experts];
  if (part == 0 && threadIdx.x == 0) {
    call.num_padded[row] = used;
    call.num_tokens[row] = static_cast<int32_t>(n);
  }
  const int32_t* totals = call.chunks > 1 ? call.chunk_counts(row, call.chunks) : table.known;
  const int warp = part * kWarps + static_cast<int>(threadIdx.x / kWarpSize);
  for (int e = warp; e < experts; e += parts * kWarps) {
    const int begin = table.start[e];
    const int end = table.start[e + 1];
    if (begin == end) continue;
    for (int i = begin + totals[e] + lane; i < end; i += kWarpSize) {
      ids[i] = pad;
      weights[i] = 0.0f;
    }
    const int32_t expert = masked ? table.local[e] : e;
    for (int b = begin / block_size + lane; b < end / block_size; b += kWarpSize) {
      block_experts[b] = expert;
    }
  }
  const int thread = part * kThreads + static_cast<int>(threadIdx.x);
  for (int64_t i = int64_t{used} + thread; i < positions; i += parts * kThreads) {
    ids[i] = pad;
    weights[i] = 0.0f;
  }
  for (int b = used / block_size + thread; b < blocks; b += parts * kThreads) {
    block_experts[b] = -1;
  }
}

// Writes a part of the plan of a row, by all threads of a block. `warps` of them own entries. A row
// of one chunk is counted by every part; else each part has its own chunk of `chunk_entries`.
template <int kWarps>
__device__ __forceinline__ void write_blocks(const Blocks& call, int64_t row, int part, int parts,
                                             int chunk_entries, int warps, int32_t* shared) {
  constexpr int kThreads = kWarps * kWarpSize;
  __shared__ int32_t warp_sums[2 * kWarps];
  const Table table = table_of(shared, call.num_experts);
  const bool chunked = call.chunks > 1;
  const Entries entries = entries_of(call, row);
  const int64_t first = chunked ? static_cast<int64_t>(part) * chunk_entries : 0;
  const Piece piece(first, min(first + chunk_entries, call.entries()), chunk_entries, warps);
  const int warp = warp_index();
  const int bits = bits_of(static_cast<uint32_t>(call.num_experts));
  uint16_t* seen = table.ranks + warp * table.stride;
  uint32_t* words = reinterpret_cast<uint32_t*>(table.ranks);
  const bool owns = warp < warps;
  // Most often the entries of a warp are one turn, which stays in registers.
  const bool single = piece.each <= kTurn;
  Turn turn;
  if (owns) turn.load(entries, piece.begin(), piece.end());
  for (int i = threadIdx.x; i < warps * table.stride / 2; i += kThreads) words[i] = 0;
  __syncthreads();
  if (owns) {
    for (int64_t begin = piece.begin(); begin < piece.end(); begin += kTurn) {
      if (begin > piece.begin()) turn.load(entries, begin, piece.end());
      turn.number(seen, piece.end() - begin, bits);
    }
  }
  __syncthreads();
  sum_up<kWarps>(call, table, row, chunked ? part : -1, warps, entries.mask, warp_sums);
  __syncthreads();
  if (owns && (chunked || warp % parts == part)) {
    const Places places(call, row);
    for (int64_t begin = piece.begin(); begin < piece.end(); begin += kTurn) {
      if (!single) {
        turn.load(entries, begin, piece.end());
        turn.number(seen, piece.end() - begin, bits);
      }
      places.write(turn, begin, piece.end(), [&](int32_t expert) {
        return table.start[expert] + (chunked ? table.known[expert] : 0) +
               (single ? seen[expert] : 0);
      });
    }
  }
  fill<kWarps>(call, table, row, entries.mask != nullptr, part, parts);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_BLOCKS_CUH_
