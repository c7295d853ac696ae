// The kernel of `experts`. A block has a tile of 128 rows of the hidden size and some tokens. One
// warp loads: in a stage, 128 bytes of depth of the weights and of the tokens. Two warpgroups of
// four warps multiply, weights on the side of the rows (M) and tokens on that of the columns (N) of
// their products, 64 rows each. Sums over a block of depth that has one multiplier for each token,
// an expert or 128 columns of one, are scaled by it and added to the totals in registers.
//
// The blocks of a cluster go in step: those of the same tokens load a part of these each, for all
// of them, and those of the same weights likewise. A stage is filled again once every block that is
// sent to has used it.

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

template <bool kMasked>
__device__ __forceinline__ float product(float multiplier, float w_scale) {
  const float x = multiplier * w_scale;
  if (!kMasked) return x;
  if (multiplier == 0.0f) return 0.0f;
  return x == 0.0f ? 1e-45f : x;
}

// The multipliers of a thread, of its tokens from token 16 * kFirst on. Those of 16 tokens lie in
// an order that gives a thread four neighbours, see prepare_kernel.
template <int kFirst, int kGroups>
struct Multipliers {
  float x[4 * kGroups];

  // With `kMasked` a product is 0 where the multiplier is, and only there.
  template <bool kMasked>
  __device__ __forceinline__ void load(const float4* row, float w_scale) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float4 four = row[4 * (kFirst + i)];
      x[4 * i] = product<kMasked>(four.x, w_scale);
      x[4 * i + 1] = product<kMasked>(four.y, w_scale);
      x[4 * i + 2] = product<kMasked>(four.z, w_scale);
      x[4 * i + 3] = product<kMasked>(four.w, w_scale);
    }
  }
  // Adds the sums of a block of depth, times the multipliers of their tokens. With `kMasked` a
  // multiplier of 0 adds nothing, whatever the sum is; else the sums must be finite for that.
  template <bool kMasked, int kSize>
  __device__ __forceinline__ void add(const float (&sums)[kSize], float (&totals)[kSize]) const {
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) {
      const float factor = x[i / 4 * 2 + i % 2];
      const int at = 8 * kFirst + i;
      if (!kMasked || factor != 0.0f) totals[at] = fmaf(factor, sums[at], totals[at]);
    }
  }
};

// The same for the groups from kFirst on, a few at a time: registers are scarce.
template <bool kMasked, int kFirst, int kSize>
__device__ __forceinline__ void add_rest(const float4* row, float w_scale,
                                         const float (&sums)[kSize], float (&totals)[kSize]) {
  if constexpr (8 * kFirst < kSize) {
    Multipliers<kFirst, 1> some;
    some.template load<kMasked>(row, w_scale);
    some.template add<kMasked>(sums, totals);
    add_rest<kMasked, kFirst + 1>(row, w_scale, sums, totals);
  }
}

// Not before what comes before it.
__device__ __forceinline__ float load_constant(const float* p) {
  float x;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(p));
  return x;
}

// Whether all are finite.
template <int kSize>
__device__ __forceinline__ bool all_finite(const float (&x)[kSize]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = fmaf(x[i], 0.0f, sum);
  return sum == 0.0f;
}

template <ExpertsType kType, int kTokens>
__device__ __forceinline__ void multiply_pieces(const ExpertsWork& work, uint8_t* memory,
                                                int cluster, int rank) {
  using Shape = ExpertsShape<kType, kTokens>;
  const uint32_t base = shared_address(memory);
  const int group = warp_index() / 4 - 1;  // of the two warpgroups
  const int lane = threadIdx.x % 32;
  const int hidden_block = rank % work.hidden_blocks;
  const int token_block = rank / work.hidden_blocks;
  // The warpgroup tells each block which has filled a stage that it is free again: a product is
  // done for all warps at once, so any of them can.
  const int senders = work.hidden_blocks + work.token_blocks - 1;
  const int sender = warp_index() % 4 + 4 * lane;
  const int along = sender < work.hidden_blocks ? sender : hidden_block;
  const int across = sender < work.hidden_blocks
                         ? token_block
                         : (token_block + 1 + sender - work.hidden_blocks) % work.token_blocks;
  const bool sends = sender < senders;
  const uint32_t empty =
      address_in_block(base + Shape::kEmptyAt, sends ? along + across * work.hidden_blocks : rank);
  const auto release = [&](uint32_t stage) {
    if (sends) arrive_in_cluster(empty + stage * 8);
  };
  constexpr bool kFloat8 = kType == ExpertsType::kFloat8;
  // So many groups of 16 multipliers are loaded while the products are made, by what registers
  // allow.
  constexpr int kEarly = kTokens <= 128 ? kTokens / 16 : kTokens <= 144 ? 4 : 2;
  // Of bytes from one product along the depth to the next: 16 rows of 128 bytes, or 32 of a row.
  constexpr uint32_t kWeightStep = kFloat8 ? 32 >> 4 : 16 * 128 >> 4;
  constexpr uint32_t kTokenStep = 32 >> 4;
  const uint32_t weights_0 = matrix_at(base + group * (Shape::kWeightBytes / 2));
  const uint32_t tokens_0 = matrix_at(base + Shape::kTokensAt);

  float sums[kTokens / 2], totals[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
  RingStage<Shape::kStages> stage;
  Verdicts verdicts(base + Shape::kVerdictAt, work.hidden_blocks * work.token_blocks);
  bool masked = false;
  uint32_t row_index = 0;
  ExpertsPiece piece;
  for (int i = 0; work.schedule.piece(cluster, i, &piece); i += masked ? 0 : 1) {
    const float* w_scale = nullptr;
    if constexpr (kFloat8) {
      const int hidden_tile = piece.tile / work.token_groups * work.hidden_blocks + hidden_block;
      const int last = static_cast<int>(work.hidden - 1) / kHiddenTile;
      const int64_t scale_row = hidden_tile < last ? hidden_tile : last;
      w_scale = work.w_scale + scale_row * work.schedule.experts * work.blocks;
    }
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) totals[j] = 0.0f;
    ChosenExperts experts(work, piece.begin, piece.end);
    for (int expert; experts.next(&expert);) {
      const float* scale_at = w_scale + expert * work.blocks;
      for (int left = kFloat8 ? work.blocks : 1; left > 0; --left) {
        uint32_t last = 0;
        hold(sums);
        for (int part = 0; part < (kFloat8 ? 1 : work.parts); ++part) {
          wait_barrier(base + Shape::kFullAt + stage.index * 8, stage.parity);
          const uint32_t weights = weights_0 + stage.index * (Shape::kWeightBytes >> 4);
          const uint32_t tokens = tokens_0 + stage.index * (Shape::kTokenBytes >> 4);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            Wgmma<kTokens>::template issue<kType>(
                sums, matrix_descriptor(weights + k * kWeightStep),
                matrix_descriptor(tokens + k * kTokenStep), part > 0 || k > 0);
          }
          wgmma_commit();
          if (part > 0) {
            wgmma_wait<1>();
            release(last);
          }
          last = stage.index;
          stage.advance();
        }
        const float4* const row = reinterpret_cast<const float4*>(memory + Shape::kRowsAt +
                                                                  row_index * Shape::kRowBytes) +
                                  lane % 4;
        row_index = row_index + 1 == Shape::kRows ? 0 : row_index + 1;
        const float scale = kFloat8 ? load_constant(scale_at++) : 1.0f;
        Multipliers<0, kEarly> early;
        if (masked) {
          early.template load<true>(row, scale);
        } else {
          early.template load<false>(row, scale);
        }
        hold(early.x);
        wgmma_wait<0>();
        hold(sums);
        release(last);
        if (masked) {
          early.template add<true>(sums, totals);
          add_rest<true, kEarly>(row, scale, sums, totals);
        } else {
          early.template add<false>(sums, totals);
          add_rest<false, kEarly>(row, scale, sums, totals);
        }
      }
    }
    masked = !masked && verdicts.again(__all_sync(kAllLanes, all_finite(totals)), lane, kWarpSize);
    if (masked) continue;
    work.schedule.piece(cluster, i, &piece);  // again, so that no registers keep it
    const int hidden_tile = piece.tile / work.token_groups * work.hidden_blocks + hidden_block;
    const int token_tile = piece.tile % work.token_groups * work.token_blocks + token_block;
    const int64_t hidden = int64_t{hidden_tile} * kHiddenTile + group * 64 + warp_index() % 4 * 16;
    volatile int* flag = reinterpret_cast<volatile int*>(memory + Shape::kFlagAt);
    if (piece.slot < 0 || join_pieces<kTokens>(work, piece, rank, flag, totals)) {
      store_totals<kTokens>(work, hidden, int64_t{token_tile} * kTokens, totals);
    }
  }
}

template <ExpertsType kType, int kTokens>
__global__ void __launch_bounds__(kExpertsThreads, 1)
    experts_kernel(const __grid_constant__ CUtensorMap weights_map,
                   const __grid_constant__ CUtensorMap tokens_map,
                   const __grid_constant__ ExpertsWork work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shape = ExpertsShape<kType, kTokens>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = shared_address(memory);
  const int rank = static_cast<int>(cluster_rank());
  const int ranks = work.hidden_blocks * work.token_blocks;
  const int cluster = blockIdx.x / ranks;
  if (threadIdx.x == 0) {
#ifdef JAX_ROUTER_WATCHDOG
    if (base % 1024 != 0) __trap();
#endif
    prefetch_map(&weights_map);
    prefetch_map(&tokens_map);
    const uint32_t senders = work.hidden_blocks + work.token_blocks - 1;
    for (int i = 0; i < Shape::kStages; ++i) {
      init_barrier(base + Shape::kFullAt + i * 8, 1);
      init_barrier(base + Shape::kEmptyAt + i * 8, senders * (kMathThreads / 128));
    }
    Verdicts::init(base + Shape::kVerdictAt, ranks);
    fence_barrier_init();
  }
  __syncthreads();
  sync_cluster();
  if (warp_index() < kLoadThreads / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kLoadRegisters));
    if (threadIdx.x == 0) {
      load_pieces<kType, kTokens>(&weights_map, &tokens_map, work, base, cluster, rank);
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMathRegisters));
    multiply_pieces<kType, kTokens>(work, memory, cluster, rank);
  }
  // No block may end while others still send to it.
  sync_cluster();
#endif
}

// A kernel, and the shared memory that it takes.
struct ExpertsKernel {
  const void* function;
  int shared_bytes;
};

template <ExpertsType kType>
ExpertsKernel find_experts_kernel(int tokens) {
  const auto of = [](auto width) {
    constexpr int kTokens = decltype(width)::value;
    return ExpertsKernel{reinterpret_cast<const void*>(&experts_kernel<kType, kTokens>),
                         ExpertsShape<kType, kTokens>::kBytes};
  };
  switch (tokens) {
    case 16:
      return of(std::integral_constant<int, 16>());
    case 32:
      return of(std::integral_constant<int, 32>());
    case 64:
      return of(std::integral_constant<int, 64>());
    case 96:
      return of(std::integral_constant<int, 96>());
    case 112:
      return of(std::integral_constant<int, 112>());
    case 128:
      return of(std::integral_constant<int, 128>());
    case 144:
      return of(std::integral_constant<int, 144>());
    case 160:
      return of(std::integral_constant<int, 160>());
    default:
      // Sums and totals of 16-bit types leave no registers for so many tokens.
      if constexpr (kType == ExpertsType::kFloat8) return of(std::integral_constant<int, 192>());
      return {};
  }
}

// One file for each type.
ExpertsKernel experts_kernel_bfloat16(int tokens);
ExpertsKernel experts_kernel_float16(int tokens);
ExpertsKernel experts_kernel_float8(int tokens);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_CUH_
