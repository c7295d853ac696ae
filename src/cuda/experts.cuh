// The kernel of `experts`. A block has a tile of 64 or 128 rows of the hidden size and up to 512
// tokens, whose sums it keeps in shared memory. It goes over the experts, and multiplies the
// weights of one by those tokens alone that have chosen it: most have not.
//
// One warp loads weights and one the rows of these tokens: in a stage, 128 bytes of depth of both.
// Two more make records of who the tokens are, and of their multipliers. A warpgroup for each 64
// rows multiplies, weights on the side of the rows (M) and tokens on that of the columns (N) of its
// products. Sums over a block of depth that has one multiplier for each token, an expert or 128
// columns of one, are scaled by it and added to those of the tile.

#ifndef JAX_ROUTER_CUDA_EXPERTS_CUH_
#define JAX_ROUTER_CUDA_EXPERTS_CUH_

#include <cstdint>
#include <type_traits>

#include "experts.h"
#include "experts_load.cuh"
#include "experts_result.cuh"
#include "experts_work.cuh"
#include "pipeline.cuh"
#include "warp.cuh"
#include "wgmma.cuh"

namespace jax_router {

// ---- the warps that multiply ----

// What a warp that multiplies works with.
struct ExpertsMath {
  uint32_t weights;  // of the warpgroup in the first stage, as described to its products
  uint32_t tokens;
  RingBarriers barriers;
  float* totals;  // of this lane's first row
  RingStage stage;
};

// Adds sums, times the multipliers of their tokens, to the totals of these; those of kTokens slots
// from `first` on. Everything is read before anything is written, so that one thing need not wait
// for another.
template <int kHiddenTile, int kTokens>
__device__ __forceinline__ void add_to_totals(float* totals, const ExpertsRecord& record, int first,
                                              const float* sums) {
  constexpr int kStride = ExpertsLayout::totals_stride(kHiddenTile);
  float* at[kTokens / 4];
  float factors[kTokens / 4];
  float before[kTokens / 2];
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int slot = first + 8 * j + 2 * (threadIdx.x % 4);
    const int2 tokens = *reinterpret_cast<const int2*>(record.tokens + slot);
    const float2 pair = *reinterpret_cast<const float2*>(record.multipliers + slot);
    at[2 * j] = totals + tokens.x * kStride;
    at[2 * j + 1] = totals + tokens.y * kStride;
    factors[2 * j] = pair.x;
    factors[2 * j + 1] = pair.y;
  }
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
    before[2 * i] = at[i][0];
    before[2 * i + 1] = at[i][8];
  }
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
    const int sum = i / 2 * 4 + i % 2;
    at[i][0] = fmaf(factors[i], sums[sum], before[2 * i]);
    at[i][8] = fmaf(factors[i], sums[sum + 2], before[2 * i + 1]);
  }
}

// Multiplies a block of depth by up to kTokens tokens, and adds it to the totals of these.
template <ExpertsType kType, int kHiddenTile, int kTokens>
__device__ __forceinline__ void multiply_block(const ExpertsWork& work, const ExpertsDeal& deal,
                                               ExpertsMath& math, const ExpertsRecord& record) {
  constexpr bool kFloat8 = kType == ExpertsType::kFloat8;
  // Of 16 bytes from one product along the depth to the next: 16 rows of 128 bytes, or 32 of a row.
  constexpr uint32_t kWeightStep = kFloat8 ? 32 >> 4 : 16 * 128 >> 4;
  constexpr uint32_t kTokenStep = 32 >> 4;
  const bool releases = threadIdx.x % 128 == 0;
  float sums[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
  hold(sums);
  uint32_t last = 0;
#pragma unroll 1
  for (int part = 0; part < (kFloat8 ? 1 : work.parts); ++part) {
    wait_barrier(math.barriers.full(math.stage), math.stage.parity);
    fence_copies();
    const uint32_t offset = math.stage.index * deal.stage_bytes >> 4;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Wgmma<kTokens>::template issue<kType>(
          sums, matrix_descriptor(math.weights + offset + k * kWeightStep),
          matrix_descriptor(math.tokens + offset + k * kTokenStep), part > 0 || k > 0);
    }
    wgmma_commit();
    // A product is done for the four warps at once, so any of them can give its stage back.
    if (part > 0) {
      wgmma_wait<1>();
      if (releases) arrive_in_block(last);
    }
    last = math.barriers.empty(math.stage);
    math.stage.advance(deal.stages);
  }
  wgmma_wait<0>();
  hold(sums);
  if (releases) arrive_in_block(last);
  constexpr int kAtOnce = kTokens < 32 ? kTokens : 32;
#pragma unroll
  for (int first = 0; first < kTokens; first += kAtOnce) {
    add_to_totals<kHiddenTile, kAtOnce>(math.totals, record, first, sums + first / 2);
  }
}

template <ExpertsType kType, int kHiddenTile>
__device__ __forceinline__ void multiply_pieces(const ExpertsWork& work, const ExpertsDeal& deal,
                                                uint8_t* memory) {
  constexpr int kStride = ExpertsLayout::totals_stride(kHiddenTile);
  const uint32_t base = shared_address(memory);
  const int group = warp_index() / 4 - 1;  // the warpgroup
  const int lane = threadIdx.x % kWarpSize;
  float* const totals = reinterpret_cast<float*>(memory + work.layout.totals_at);
  ExpertsMath math{matrix_at(base + group * (64 * 128)),
                   matrix_at(base + kHiddenTile * 128),
                   stage_barriers(work, base),
                   totals + group * 64 + warp_index() % 4 * 16 + lane / 4,
                   {}};
  const RingBarriers barriers = record_barriers(work, base);
  const auto* records = reinterpret_cast<const ExpertsRecord*>(memory + work.layout.records_at);
  auto* const flag = reinterpret_cast<volatile int*>(memory + work.layout.flag_at);
  RingStage ring;
  ExpertsPiece piece;
  for (int i = 0; deal.schedule.piece(blockIdx.x, i, &piece); ++i) {
    visit_totals<kHiddenTile>(work.tile_tokens, [&](int token, int column) {
      *reinterpret_cast<float4*>(totals + token * kStride + column) = make_float4(0, 0, 0, 0);
    });
    sync_threads<1, 2 * kHiddenTile>();
    for (bool more = true; more;) {
      wait_barrier(barriers.full(ring), ring.parity);
      const ExpertsRecord& record = records[ring.index];
      const int count = record.count;
      if (count == 0) {
        more = false;
      } else if (count <= 8) {
        multiply_block<kType, kHiddenTile, 8>(work, deal, math, record);
      } else if (count <= 16) {
        multiply_block<kType, kHiddenTile, 16>(work, deal, math, record);
      } else if (count <= 32) {
        multiply_block<kType, kHiddenTile, 32>(work, deal, math, record);
      } else if (count <= 64) {
        multiply_block<kType, kHiddenTile, 64>(work, deal, math, record);
      } else {
        multiply_block<kType, kHiddenTile, 128>(work, deal, math, record);
      }
      // The totals of a token are next in the hands of another lane, always of this warp.
      __syncwarp();
      arrive_in_block(barriers.empty(ring));
      ring.advance(kRecords);
    }
    sync_threads<1, 2 * kHiddenTile>();
    finish_piece<kHiddenTile>(work, deal.schedule, piece, totals, flag);
    sync_threads<1, 2 * kHiddenTile>();
  }
}

template <ExpertsType kType, int kHiddenTile>
__global__ void __launch_bounds__(kLoadThreads + 2 * kHiddenTile, 1)
    experts_kernel(const __grid_constant__ CUtensorMap weights_map,
                   const __grid_constant__ ExpertsWork work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = shared_address(memory);
  if (threadIdx.x == 0) {
    prefetch_map(&weights_map);
    const RingBarriers stages = stage_barriers(work, base);
    for (int i = 0; i < kMostStages; ++i) {
      init_barrier(stages.full_at + i * 8, 1 + kWarpSize);  // weights, and each lane for tokens
      init_barrier(stages.empty_at + i * 8, kHiddenTile / 64);
    }
    const RingBarriers records = record_barriers(work, base);
    for (int i = 0; i < kRecords; ++i) {
      init_barrier(records.full_at + i * 8, kWarpSize);
      init_barrier(records.empty_at + i * 8, 2 * kHiddenTile);
    }
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_kernel();
  const int warp = warp_index();
  ExpertsDeal* const dealt =
      reinterpret_cast<ExpertsDeal*>(memory + work.layout.bytes - kDealBytes);
  if (warp == 0) {
    const ExpertsDeal deal = deal_experts(work, kHiddenTile, gridDim.x);
    if (threadIdx.x == 0) *dealt = deal;
  }
  __syncthreads();
  const ExpertsDeal deal = *dealt;
  if (warp == 0) {
    load_weights<kType, kHiddenTile>(&weights_map, work, deal, base);
  } else if (warp == 1) {
    load_tokens<kType, kHiddenTile>(work, deal, base);
  } else if (warp < kLoadThreads / kWarpSize) {
    load_records<kType, kHiddenTile>(work, deal, memory, warp - 2);
  } else {
    multiply_pieces<kType, kHiddenTile>(work, deal, memory);
  }
#endif
}

// The kernels for tiles of 64 and 128 rows. One file for each type.
struct ExpertsKernels {
  const void* narrow;
  const void* wide;
};

template <ExpertsType kType>
ExpertsKernels experts_kernels() {
  return {reinterpret_cast<const void*>(&experts_kernel<kType, 64>),
          reinterpret_cast<const void*>(&experts_kernel<kType, 128>)};
}

ExpertsKernels experts_kernels_bfloat16();
ExpertsKernels experts_kernels_float16();
ExpertsKernels experts_kernels_float8();

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_CUH_
