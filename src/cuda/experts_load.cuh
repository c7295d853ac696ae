// The warps of `experts` that load.

#ifndef JAX_ROUTER_CUDA_EXPERTS_LOAD_CUH_
#define JAX_ROUTER_CUDA_EXPERTS_LOAD_CUH_

#include <cstdint>

#include "experts_work.cuh"
#include "pipeline.cuh"

namespace jax_router {

// Fills stages with weights, 64 rows of the hidden size at a time. These are innermost but in
// float8.
template <ExpertsType kType, int kHiddenTile>
__device__ __forceinline__ void load_weights(const CUtensorMap* map, const ExpertsWork& work,
                                             const ExpertsDeal& deal, uint32_t memory) {
  constexpr bool kFloat8 = kType == ExpertsType::kFloat8;
  const int lane = threadIdx.x % kWarpSize;
  const RingBarriers barriers = stage_barriers(work, memory);
  // Weights are read once, or soon again for other tokens.
  const uint64_t policy = work.token_tiles > 1 ? evict_normal_policy() : evict_first_policy();
  RingStage stage;
  ExpertsPiece piece;
  for (int i = 0; deal.schedule.piece(blockIdx.x, i, &piece); ++i) {
    const TilePlace<kHiddenTile> tile(work, piece.tile);
    visit_items(work, deal, tile.token_tile, piece, [&](int expert, int, int) {
      const int stages = work.blocks * work.parts;
      for (int at = expert * stages; at < (expert + 1) * stages; ++at) {
        if (lane == 0) {
          const uint32_t full = barriers.full(stage);
          const uint32_t shared = memory + stage.index * deal.stage_bytes;
          const int depth = at * (kFloat8 ? 128 : 64);
          wait_barrier(barriers.empty(stage), stage.parity ^ 1);
          arrive_expecting(full, kHiddenTile * 128);
#pragma unroll
          for (int row = 0; row < kHiddenTile; row += 64) {
            const int hidden = tile.hidden + row;
            load_box(shared + row * 128, map, kFloat8 ? depth : hidden, kFloat8 ? hidden : depth,
                     full, policy);
          }
        }
        stage.advance(deal.stages);
      }
      __syncwarp();
    });
  }
}

// Fills stages with the rows of tokens, 16 bytes a lane, swizzled like the boxes of a map: rows of
// any tokens would take a bulk copy each.
template <ExpertsType kType, int kHiddenTile>
__device__ __forceinline__ void load_tokens(const ExpertsWork& work, const ExpertsDeal& deal,
                                            uint32_t memory) {
  constexpr int kRows = 4;  // of 128 bytes that a warp copies at once
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / 8;
  const RingBarriers barriers = stage_barriers(work, memory);
  // Rows 0 and 4 of every eight swap columns alike but for the highest bit.
  const uint32_t even = kHiddenTile * 128 + row * 128 + (lane % 8 ^ row) * 16;
  const uint32_t odd = kHiddenTile * 128 + (row + kRows) * 128 + (lane % 8 ^ (row + kRows)) * 16;
  const int stages = work.blocks * work.parts;
  const int64_t row_bytes = int64_t{work.experts} * stages * 128;
  RingStage stage;
  ExpertsPiece piece;
  for (int i = 0; deal.schedule.piece(blockIdx.x, i, &piece); ++i) {
    const TilePlace<kHiddenTile> tile(work, piece.tile);
    visit_items(work, deal, tile.token_tile, piece, [&](int expert, int first, int count) {
      const int64_t list = int64_t{tile.token_tile} * work.experts + expert;
      const int32_t* chosen = work.chosen + list * work.tile_tokens + first;
      int tokens[kMostItemTokens / kWarpSize];
#pragma unroll
      for (int j = 0; j < kMostItemTokens / kWarpSize; ++j) {
        const int slot = lane + kWarpSize * j;
        tokens[j] = slot < count ? __ldg(chosen + slot) : 0;
      }
      const char* const expert_at =
          work.h + tile.token * row_bytes + int64_t{expert} * (stages * 128) + lane % 8 * 16;
      const auto row_of = [&](int j, int r) {
        return expert_at + __shfl_sync(kAllLanes, tokens[j], row + kRows * r) * row_bytes;
      };
      constexpr int kSteps = kWarpSize / kRows;
      const char* first_rows[kSteps];  // most often those of all
#pragma unroll
      for (int r = 0; r < kSteps; ++r) first_rows[r] = row_of(0, r);
      for (int part = 0; part < stages; ++part) {
        const uint32_t shared = memory + stage.index * deal.stage_bytes;
        wait_barrier(barriers.empty(stage), stage.parity ^ 1);
#pragma unroll
        for (int j = 0; j < kMostItemTokens / kWarpSize; ++j) {
#pragma unroll
          for (int r = 0; r < kSteps; ++r) {
            const int before = kWarpSize * j + kRows * r;
            if (before >= count) break;
            const char* const from = j == 0 ? first_rows[r] : row_of(j, r);
            const uint32_t to = shared + (r % 2 == 0 ? even : odd) + (4 * j + r / 2) * 1024;
            if (before + row < count) copy_sixteen(to, from + part * 128);
          }
        }
        arrive_after_copies(barriers.full(stage));
        stage.advance(deal.stages);
      }
    });
  }
}

// A multiplier and a scale of the weights, in float8: not 0, so that an infinite sum stays one.
__device__ __forceinline__ float product(float multiplier, float scale) {
  const float x = multiplier * scale;
  return x == 0.0f ? copysignf(1e-45f, x) : x;
}

// Fills records. Each of the warps has every kRecordWarps-th of them.
template <ExpertsType kType, int kHiddenTile>
__device__ __forceinline__ void load_records(const ExpertsWork& work, const ExpertsDeal& deal,
                                             uint8_t* memory, int warp) {
  constexpr bool kFloat8 = kType == ExpertsType::kFloat8;
  const int lane = threadIdx.x % kWarpSize;
  const RingBarriers barriers = record_barriers(work, shared_address(memory));
  ExpertsRecord* const records = reinterpret_cast<ExpertsRecord*>(memory + work.layout.records_at);
  RingStage ring;
  int turn = 0;
  // Hands a record over once `fill` has made it.
  const auto hand_over = [&](auto fill) {
    if (turn == warp) {
      wait_barrier(barriers.empty(ring), ring.parity ^ 1);
      fill(records[ring.index]);
      arrive_in_block(barriers.full(ring));
    }
    turn = turn + 1 == kRecordWarps ? 0 : turn + 1;
    ring.advance(kRecords);
  };
  ExpertsPiece piece;
  for (int i = 0; deal.schedule.piece(blockIdx.x, i, &piece); ++i) {
    const TilePlace<kHiddenTile> tile(work, piece.tile);
    const int64_t columns = int64_t{work.experts} * work.blocks;
    const int last = static_cast<int>(work.hidden - 1) / kScaleBlock;
    const float* w_scale =
        kFloat8 ? work.w_scale + min(tile.hidden / kScaleBlock, last) * columns : nullptr;
    visit_items(work, deal, tile.token_tile, piece, [&](int expert, int first, int count) {
      const int64_t list = int64_t{tile.token_tile} * work.experts + expert;
      const int32_t* chosen = work.chosen + list * work.tile_tokens + first;
      for (int b = 0; b < work.blocks; ++b) {
        const float* multipliers =
            work.multipliers + (list * work.blocks + b) * work.tile_tokens + first;
        const float scale = kFloat8 ? __ldg(w_scale + expert * work.blocks + b) : 1.0f;
        // Slots without a token add nothing that matters to rows of their own.
        int tokens[kMostItemTokens / kWarpSize];
        float x[kMostItemTokens / kWarpSize];
#pragma unroll
        for (int j = 0; j < kMostItemTokens / kWarpSize; ++j) {
          const int slot = lane + kWarpSize * j;
          tokens[j] = work.tile_tokens + lane % 8 / 2;
          x[j] = 0.0f;
          if (turn != warp || slot >= count) continue;
          tokens[j] = __ldg(chosen + slot);
          x[j] = __ldg(multipliers + slot);
          if (kFloat8) x[j] = product(x[j], scale);
        }
        // All slots of the product that there is for so many.
        const int filled = count <= kWarpSize ? 1 : count <= 2 * kWarpSize ? 2 : 4;
        hand_over([&](ExpertsRecord& record) {
#pragma unroll
          for (int j = 0; j < kMostItemTokens / kWarpSize; ++j) {
            if (j >= filled) break;
            record.tokens[lane + kWarpSize * j] = tokens[j];
            record.multipliers[lane + kWarpSize * j] = x[j];
          }
          if (lane == 0) record.count = count;
        });
      }
    });
    hand_over([&](ExpertsRecord& record) {
      if (lane == 0) record.count = 0;
    });
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_LOAD_CUH_
