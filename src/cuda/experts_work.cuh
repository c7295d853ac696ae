// What the warps of the kernel of `experts` share: the call, the layout of shared memory, and the
// tokens that have chosen each expert.

#ifndef JAX_ROUTER_CUDA_EXPERTS_WORK_CUH_
#define JAX_ROUTER_CUDA_EXPERTS_WORK_CUH_

#include <cstdint>

#include "experts.h"
#include "experts_schedule.h"
#include "pipeline.cuh"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kLoadThreads = 128;  // a warp for weights, one for tokens, two for records
inline constexpr int kRecordWarps = 2;
inline constexpr int kMostItemTokens = 128;  // that an expert is multiplied by at once
inline constexpr int kRecords = 4;           // of the ring
inline constexpr int kMostStages = 8;
inline constexpr int kExpertsShared = 227 * 1024;
inline constexpr int kSpareRows = 4;   // of totals, for slots without a token
inline constexpr int kDealBytes = 48;  // of an ExpertsDeal

// What is multiplied next: the tokens of an item, and their multipliers for one block of depth.
struct ExpertsRecord {
  int tokens[kMostItemTokens];  // of the tile
  float multipliers[kMostItemTokens];
  int count;      // 0: the piece is done
  int unused[3];  // records start at multiples of 16 bytes
};

// Shared memory of a block: the ring of stages, that of records, the sums of the tile, barriers.
struct ExpertsLayout {
  int stages_bytes;  // of all stages
  int records_at;
  int totals_at;
  int barriers_at;  // of stages: full, then empty; of records: full, then empty
  int flag_at;
  int bytes;  // the last ones are those of an ExpertsDeal

  ExpertsLayout() = default;
  ExpertsLayout(int hidden_tile, int tile_tokens) {
    const int records = kRecords * static_cast<int>(sizeof(ExpertsRecord));
    const int totals = (tile_tokens + kSpareRows) * totals_stride(hidden_tile) * 4;
    const int barriers = (2 * kMostStages + 2 * kRecords) * 8 + 16 + kDealBytes;
    stages_bytes = (kExpertsShared - records - totals - barriers) / 1024 * 1024;
    records_at = stages_bytes;
    totals_at = records_at + records;
    barriers_at = totals_at + totals;
    flag_at = barriers_at + (2 * kMostStages + 2 * kRecords) * 8;
    bytes = barriers_at + barriers;
  }

  // Sums of different tokens, at the same rows, should lie in different banks.
  JAX_ROUTER_HOST_DEVICE static constexpr int totals_stride(int hidden_tile) {
    return hidden_tile + 8;
  }
};

// What the kernel needs to know of a call.
struct ExpertsWork {
  ExpertsLayout layout;
  const char* h;             // [tokens, experts * depth]
  const float* multipliers;  // [token tiles, experts * blocks, tile_tokens]
  const int32_t* chosen;     // [token tiles, experts, tile_tokens]
  const int32_t* counts;     // [token tiles, experts]
  const float* w_scale;
  float* partials;   // [slots, tile_tokens, hidden tile]
  int32_t* tickets;  // [tiles]
  void* result;
  LogitsType result_type;
  int64_t tokens;
  int64_t hidden;
  int most_stages;
  int experts;
  int tiles;  // of the result
  int tile_tokens;
  int token_tiles;
  int blocks;  // of depth of an expert, with a multiplier each
  int parts;   // stages of such a block
};

// The tile of a piece: its first row of the hidden size, and its first token.
template <int kHiddenTile>
struct TilePlace {
  int token_tile;
  int hidden;
  int64_t token;

  __device__ __forceinline__ TilePlace(const ExpertsWork& work, int tile)
      : token_tile(tile % work.token_tiles),
        hidden(tile / work.token_tiles * kHiddenTile),
        token(int64_t{token_tile} * work.tile_tokens) {}
};

// A stage of a ring, and the parity of its barriers.
struct RingStage {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The barriers of a ring: that stage i is full, and that it is empty.
struct RingBarriers {
  uint32_t full_at;
  uint32_t empty_at;

  __device__ __forceinline__ uint32_t full(const RingStage& stage) const {
    return full_at + stage.index * 8;
  }
  __device__ __forceinline__ uint32_t empty(const RingStage& stage) const {
    return empty_at + stage.index * 8;
  }
};

__device__ __forceinline__ RingBarriers stage_barriers(const ExpertsWork& work, uint32_t memory) {
  const uint32_t at = memory + work.layout.barriers_at;
  return {at, at + kMostStages * 8};
}
__device__ __forceinline__ RingBarriers record_barriers(const ExpertsWork& work, uint32_t memory) {
  const uint32_t at = memory + work.layout.barriers_at + 2 * kMostStages * 8;
  return {at, at + kRecords * 8};
}

// What all warps of all blocks know before they start.
struct ExpertsDeal {
  ExpertsSchedule schedule;
  int item_tokens;  // that are multiplied by an expert at once, at most
  int stages;
  int stage_bytes;
};
static_assert(sizeof(ExpertsDeal) <= kDealBytes);

// Visits the experts of a piece that any token has chosen, in ascending order, by a whole warp:
// `visit(expert, first, count)`, so many of its tokens from `first` on, at most deal.item_tokens.
template <typename Visit>
__device__ __forceinline__ void visit_items(const ExpertsWork& work, const ExpertsDeal& deal,
                                            int token_tile, const ExpertsPiece& piece,
                                            Visit visit) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t* counts = work.counts + int64_t{token_tile} * work.experts;
  for (int begin = piece.begin; begin < piece.end; begin += kWarpSize) {
    const int mine = begin + lane < piece.end ? __ldg(counts + begin + lane) : 0;
    for (unsigned rest = __ballot_sync(kAllLanes, mine > 0); rest != 0; rest &= rest - 1) {
      const int i = __ffs(static_cast<int>(rest)) - 1;
      const int count = __shfl_sync(kAllLanes, mine, i);
      for (int first = 0; first < count; first += deal.item_tokens) {
        visit(begin + i, first, min(count - first, deal.item_tokens));
      }
    }
  }
}

// Deals the experts out, by a warp. More tokens at once leave fewer stages, fewer at once read the
// weights of an expert that more have chosen again: as few as make that rare.
__device__ __forceinline__ ExpertsDeal deal_experts(const ExpertsWork& work, int hidden_tile,
                                                    int blocks) {
  const int lane = threadIdx.x % kWarpSize;
  int chosen = 0;
  int items[3] = {};  // of 16, 32 and 64 tokens
  const int lists = work.experts * work.token_tiles;
#pragma unroll 4
  for (int begin = 0; begin < lists; begin += kWarpSize) {
    const int count = begin + lane < lists ? __ldg(work.counts + begin + lane) : 0;
    chosen += count > 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) items[i] += (count + (16 << i) - 1) >> (4 + i);
  }
  chosen = __reduce_add_sync(kAllLanes, chosen);
  ExpertsDeal deal;
  deal.schedule = ExpertsSchedule::make(work.tiles, work.experts, blocks);
  const auto stages = [&](int item_tokens) {
    return work.layout.stages_bytes / ((hidden_tile + item_tokens) * 128);
  };
  deal.item_tokens = stages(32) >= work.most_stages ? 32 : 16;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int all = __reduce_add_sync(kAllLanes, items[i]);
    if (4 * all > 5 * chosen && deal.item_tokens == 16 << i) deal.item_tokens = 32 << i;
  }
  deal.stage_bytes = (hidden_tile + deal.item_tokens) * 128;
  deal.stages = min(stages(deal.item_tokens), work.most_stages);
  return deal;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_WORK_CUH_
