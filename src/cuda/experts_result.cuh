// The result of a tile of `experts`: sums of its pieces added up, and written.

#ifndef JAX_ROUTER_CUDA_EXPERTS_RESULT_CUH_
#define JAX_ROUTER_CUDA_EXPERTS_RESULT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "experts_work.cuh"
#include "pipeline.cuh"

namespace jax_router {

// Calls visit(token, column) for columns of four rows of the hidden size, of as many tokens as the
// threads that multiply have at once. Visits in between may overlap.
template <int kHiddenTile, typename Visit>
__device__ __forceinline__ void visit_totals(int tokens, Visit visit) {
  constexpr int kColumns = kHiddenTile / 4;
  constexpr int kAtOnce = 2 * kHiddenTile / kColumns;
  const int thread = threadIdx.x - kLoadThreads;
#pragma unroll 4
  for (int token = thread / kColumns; token < tokens; token += kAtOnce) {
    visit(token, thread % kColumns * 4);
  }
}

// Writes four neighbours: all or none are inside, the hidden size is a multiple of 8.
__device__ __forceinline__ void store_result(const ExpertsWork& work, int64_t at, float4 x) {
  if (work.result_type == LogitsType::kFloat32) {
    *reinterpret_cast<float4*>(static_cast<float*>(work.result) + at) = x;
    return;
  }
  uint2 pairs;
  if (work.result_type == LogitsType::kFloat16) {
    const __half2 low = __floats2half2_rn(x.x, x.y);
    const __half2 high = __floats2half2_rn(x.z, x.w);
    pairs = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
  } else {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y);
    const __nv_bfloat162 high = __floats2bfloat162_rn(x.z, x.w);
    pairs = {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(work.result) + at) = pairs;
}

// Writes a piece that is a whole tile; else leaves its sums for others, and the last block to
// arrive at a tile writes the sum of all pieces in the order of their experts. By all threads that
// multiply, which see all totals of the block.
template <int kHiddenTile>
__device__ __forceinline__ void finish_piece(const ExpertsWork& work,
                                             const ExpertsSchedule& schedule,
                                             const ExpertsPiece& piece, const float* totals,
                                             volatile int* flag) {
  constexpr int kStride = ExpertsLayout::totals_stride(kHiddenTile);
  const TilePlace<kHiddenTile> tile(work, piece.tile);
  const int64_t left = work.tokens - tile.token;
  const int tokens = left < work.tile_tokens ? static_cast<int>(left) : work.tile_tokens;
  const auto partial = [&](int slot, int token, int column) {
    const int64_t row = int64_t{slot} * work.tile_tokens + token;
    return reinterpret_cast<float4*>(work.partials + row * kHiddenTile + column);
  };
  const auto store = [&](int token, int column, const float4& sum) {
    const int64_t hidden = tile.hidden + column;
    if (hidden < work.hidden) store_result(work, (tile.token + token) * work.hidden + hidden, sum);
  };
  const auto total = [&](int token, int column) {
    return *reinterpret_cast<const float4*>(totals + token * kStride + column);
  };
  if (piece.slot < 0) {
    visit_totals<kHiddenTile>(
        tokens, [&](int token, int column) { store(token, column, total(token, column)); });
    return;
  }
  visit_totals<kHiddenTile>(tokens, [&](int token, int column) {
    __stcg(partial(piece.slot, token, column), total(token, column));
  });
  const ExpertsSlots slots = schedule.slots(piece.tile);
  __threadfence();
  sync_threads<1, 2 * kHiddenTile>();
  if (threadIdx.x == kLoadThreads) {
    *flag = atomicAdd(work.tickets + piece.tile, 1) == slots.count - 1;
  }
  sync_threads<1, 2 * kHiddenTile>();
  if (*flag == 0) return;
  __threadfence();
  // Many sums are on their way at once: nothing else is left to do.
  constexpr int kColumns = kHiddenTile / 4;
  constexpr int kAtOnce = 2 * kHiddenTile / kColumns;
  constexpr int kTokens = 8;
  const int thread = threadIdx.x - kLoadThreads;
  const int column = thread % kColumns * 4;
  for (int first = thread / kColumns; first < tokens; first += kTokens * kAtOnce) {
    float4 sums[kTokens] = {};
#pragma unroll 2
    for (int i = 0; i < slots.count; ++i) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        const float4 x =
            __ldcg(partial(slots.first + i, min(first + j * kAtOnce, tokens - 1), column));
        sums[j] = {sums[j].x + x.x, sums[j].y + x.y, sums[j].z + x.z, sums[j].w + x.w};
      }
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      if (first + j * kAtOnce < tokens) store(first + j * kAtOnce, column, sums[j]);
    }
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_RESULT_CUH_
