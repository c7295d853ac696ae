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

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "experts.h"
#include "experts_schedule.h"
#include "pipeline.cuh"
#include "warp.cuh"
#include "wgmma.cuh"

namespace jax_router {

// What the kernel needs to know of a call.
struct ExpertsWork {
  ExpertsSchedule schedule;
  const float* multipliers;  // [experts * blocks, padded_tokens]
  const uint32_t* chosen;    // [token_chunks, words]
  const float* w_scale;
  float* partials;   // [slots, blocks of a cluster, width / 8, 256 threads, 4]
  int32_t* tickets;  // [tiles, blocks of a cluster]
  void* result;
  LogitsType result_type;
  int64_t tokens;
  int64_t padded_tokens;
  int64_t hidden;
  int token_groups;  // tiles of a cluster along the tokens
  int hidden_blocks;
  int token_blocks;
  int blocks;  // of depth of an expert, with a multiplier each
  int parts;   // stages of such a block
  int words;   // of a row of the mask
  int token_chunks;
};

inline constexpr int kLoadThreads = 128;
inline constexpr int kMathThreads = 256;
inline constexpr int kExpertsThreads = kLoadThreads + kMathThreads;
inline constexpr int kExpertsShared = 227 * 1024;

// Shared memory of a block. Multipliers have a ring of their own with one row more than there are
// stages: one is read until its sums are scaled, after their stage was given back.
template <ExpertsType kType, int kTokens>
struct ExpertsShape {
  static constexpr int kDepth = kType == ExpertsType::kFloat8 ? 128 : 64;  // of a stage: 128 bytes
  static constexpr int kWeightBytes = kHiddenTile * 128;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kRowBytes = kTokens * 4;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes + kRowBytes + 16;
  static constexpr int kFit = (kExpertsShared - kRowBytes - 16) / kStageBytes;
  static constexpr int kStages = kFit < 10 ? kFit : 10;
  static constexpr int kRows = kStages + 1;
  static constexpr int kTokensAt = kStages * kWeightBytes;
  static constexpr int kRowsAt = kTokensAt + kStages * kTokenBytes;
  static constexpr int kFullAt = kRowsAt + kRows * kRowBytes;
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static constexpr int kFlagAt = kEmptyAt + kStages * 8;
  static constexpr int kBytes = kFlagAt + 16;
  static_assert(kBytes <= kExpertsShared);
};

// ---- experts that are not left out ----

class ChosenExperts {
 public:
  __device__ __forceinline__ ChosenExperts(const ExpertsWork& work, int begin, int end)
      : work_(work), next_(begin), end_(end) {
    if (next_ < end_) load();
  }

  // The next expert in ascending order.
  __device__ __forceinline__ bool next(int* expert) {
    while (next_ < end_) {
      if (word_ != 0) {
        *expert = (next_ & ~31) + __ffs(static_cast<int>(word_)) - 1;
        word_ &= word_ - 1;
        return *expert < end_;
      }
      next_ = (next_ | 31) + 1;
      if (next_ < end_) load();
    }
    return false;
  }

 private:
  __device__ __forceinline__ void load() {
    word_ = 0;
#pragma unroll 1
    for (int i = 0; i < work_.token_chunks; ++i) {
      word_ |= __ldg(work_.chosen + static_cast<int64_t>(i) * work_.words + next_ / 32);
    }
    word_ &= ~0u << (next_ & 31);
  }

  const ExpertsWork& work_;
  int next_;
  int end_;
  uint32_t word_ = 0;
};

// A stage of the ring, and the parity of its barriers.
template <int kStages>
struct RingStage {
  uint32_t index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// ---- the warp that loads ----

// Half of the weights of a stage: 64 rows of the hidden size, which is innermost but in float8.
template <ExpertsType kType, bool kMulticast>
__device__ __forceinline__ void load_weights(uint32_t shared, const CUtensorMap* map, int hidden,
                                             int depth, int half, uint32_t barrier, uint32_t blocks,
                                             uint64_t policy) {
  shared += half * (64 * 128);
  hidden += half * 64;
  if constexpr (kType == ExpertsType::kFloat8) {
    load_box<kMulticast>(shared, map, depth, hidden, barrier, blocks, policy);
  } else {
    load_box<kMulticast>(shared, map, hidden, depth, barrier, blocks, policy);
  }
}

template <ExpertsType kType, int kTokens>
__device__ __forceinline__ void load_pieces(const CUtensorMap* weights_map,
                                            const CUtensorMap* tokens_map, const ExpertsWork& work,
                                            uint32_t memory, int cluster, int rank) {
  using Shape = ExpertsShape<kType, kTokens>;
  const int hidden_block = rank % work.hidden_blocks;
  const int token_block = rank / work.hidden_blocks;
  const uint32_t same_tokens = ((1u << work.hidden_blocks) - 1) << token_block * work.hidden_blocks;
  uint32_t same_weights = 0;
  for (int i = 0; i < work.token_blocks; ++i) {
    same_weights |= 1u << (hidden_block + i * work.hidden_blocks);
  }
  const int share = hidden_block * (kTokens / work.hidden_blocks);  // of the tokens, from here on
  const uint64_t weights_policy = evict_first_policy();
  const uint64_t tokens_policy = evict_last_policy();
  RingStage<Shape::kStages> stage;
  uint32_t row = 0;
  ExpertsPiece piece;
  for (int i = 0; work.schedule.piece(cluster, i, &piece); ++i) {
    const int hidden =
        (piece.tile / work.token_groups * work.hidden_blocks + hidden_block) * kHiddenTile;
    const int token = (piece.tile % work.token_groups * work.token_blocks + token_block) * kTokens;
    ChosenExperts experts(work, piece.begin, piece.end);
    for (int expert; experts.next(&expert);) {
      const int stages = work.blocks * work.parts;
#pragma unroll 1
      for (int at = expert * stages, left = stages; left > 0; ++at, --left) {
        const uint32_t full = memory + Shape::kFullAt + stage.index * 8;
        wait_barrier(full + Shape::kEmptyAt - Shape::kFullAt, stage.parity ^ 1);
        // Multipliers come with the first stage of a block.
        const bool first = kType == ExpertsType::kFloat8 || left == stages;
        arrive_expecting(full,
                         Shape::kWeightBytes + Shape::kTokenBytes + (first ? Shape::kRowBytes : 0));
        const int depth = at * Shape::kDepth;
        // Two boxes of 64 rows of the hidden size; where two blocks have the same, one each.
        const uint32_t weights = memory + stage.index * Shape::kWeightBytes;
        if (work.token_blocks > 1) {
          load_weights<kType, true>(weights, weights_map, hidden, depth, token_block, full,
                                    same_weights, weights_policy);
        } else {
          load_weights<kType, false>(weights, weights_map, hidden, depth, 0, full, 0,
                                     weights_policy);
          load_weights<kType, false>(weights, weights_map, hidden, depth, 1, full, 0,
                                     weights_policy);
        }
        const uint32_t tokens =
            memory + Shape::kTokensAt + stage.index * Shape::kTokenBytes + share * 128;
        if (work.hidden_blocks > 1) {
          load_box<true>(tokens, tokens_map, depth, token + share, full, same_tokens,
                         tokens_policy);
        } else {
          load_box<false>(tokens, tokens_map, depth, token + share, full, 0, tokens_policy);
        }
        if (first) {
          const int block = kType == ExpertsType::kFloat8 ? at : expert;
          load_row(memory + Shape::kRowsAt + row * Shape::kRowBytes,
                   work.multipliers + block * work.padded_tokens + token, Shape::kRowBytes, full);
          row = row + 1 == Shape::kRows ? 0 : row + 1;
        }
        stage.advance();
      }
    }
  }
}

// ---- the warps that multiply ----

// Adds the sums of a block of depth, times the multipliers of their tokens. A multiplier of 0 adds
// nothing, whatever the sum is. `row` is where those of this thread begin.
template <ExpertsType kType, int kTokens>
__device__ __forceinline__ void add_scaled(const float2* row, float w_scale,
                                           const float (&sums)[kTokens / 2],
                                           float (&totals)[kTokens / 2]) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const float2 multiplier = row[4 * j];
    float x = multiplier.x, y = multiplier.y;
    if constexpr (kType == ExpertsType::kFloat8) {
      x *= w_scale;
      y *= w_scale;
    }
    const bool has_x = multiplier.x != 0.0f, has_y = multiplier.y != 0.0f;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const int i = 4 * j + k;
      totals[i] = has_x ? fmaf(x, sums[i], totals[i]) : totals[i];
      totals[i + 1] = has_y ? fmaf(y, sums[i + 1], totals[i + 1]) : totals[i + 1];
    }
  }
}

// Transposes a matrix of 8 x 8 elements of 16 bits: of lane l, two neighbours of row l / 4.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same<T, __half>::value) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Writes totals; `hidden` is the first of the 16 rows of this warp, `token` the first of the tile.
// Sectors of 32 bytes are written whole.
template <typename T, int kTokens>
__device__ __forceinline__ void store_halves(const ExpertsWork& work, int64_t hidden, int64_t token,
                                             const float (&totals)[kTokens / 2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const uint32_t low = transpose(pack<T>(totals[4 * j], totals[4 * j + 1]));
    const uint32_t high = transpose(pack<T>(totals[4 * j + 2], totals[4 * j + 3]));
    const int64_t t = token + 8 * j + lane / 4;
    if (t >= work.tokens) continue;
    T* place = static_cast<T*>(work.result) + t * work.hidden + hidden + 2 * (lane % 4);
    if (hidden < work.hidden) *reinterpret_cast<uint32_t*>(place) = low;
    if (hidden + 8 < work.hidden) *reinterpret_cast<uint32_t*>(place + 8) = high;
  }
}

template <int kTokens>
__device__ __forceinline__ void store_floats(const ExpertsWork& work, int64_t hidden, int64_t token,
                                             const float (&totals)[kTokens / 2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    const int64_t t = token + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    const int64_t n = hidden + lane / 4 + 8 * (i / 2 % 2);
    if (t < work.tokens && n < work.hidden) {
      static_cast<float*>(work.result)[t * work.hidden + n] = totals[i];
    }
  }
}

template <int kTokens>
__device__ __forceinline__ void store_totals(const ExpertsWork& work, int64_t hidden, int64_t token,
                                             const float (&totals)[kTokens / 2]) {
  if (work.result_type == LogitsType::kFloat32) {
    store_floats<kTokens>(work, hidden, token, totals);
  } else if (work.result_type == LogitsType::kFloat16) {
    store_halves<__half, kTokens>(work, hidden, token, totals);
  } else {
    store_halves<__nv_bfloat16, kTokens>(work, hidden, token, totals);
  }
}

// The partial sums of a slot, four of a thread together.
template <int kTokens>
__device__ __forceinline__ float4* partials_of(const ExpertsWork& work, int slot, int rank) {
  const int64_t ranks = work.hidden_blocks * work.token_blocks;
  return reinterpret_cast<float4*>(work.partials) +
         (slot * ranks + rank) * (kTokens / 8) * kMathThreads + threadIdx.x - kLoadThreads;
}

// Leaves the sums of a piece for others. The last block to arrive at a tile gets true, and in
// `totals` the sum of all pieces in the order of their experts.
template <int kTokens>
__device__ __forceinline__ bool join_pieces(const ExpertsWork& work, const ExpertsPiece& piece,
                                            int rank, volatile int* flag,
                                            float (&totals)[kTokens / 2]) {
  float4* mine = partials_of<kTokens>(work, piece.slot, rank);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    __stcg(mine + j * kMathThreads,
           make_float4(totals[4 * j], totals[4 * j + 1], totals[4 * j + 2], totals[4 * j + 3]));
  }
  const ExpertsPieces pieces = work.schedule.pieces(piece.tile);
  __threadfence();
  sync_threads<1, kMathThreads>();
  if (threadIdx.x == kLoadThreads) {
    const int64_t ranks = work.hidden_blocks * work.token_blocks;
    *flag = atomicAdd(work.tickets + int64_t{piece.tile} * ranks + rank, 1) ==
            pieces.own + pieces.rest - 1;
  }
  sync_threads<1, kMathThreads>();
  if (*flag == 0) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) totals[i] = 0.0f;
  for (int i = 0; i < pieces.own + pieces.rest; ++i) {
    const int slot = i < pieces.own ? pieces.own_first + i : pieces.rest_first + i - pieces.own;
    const float4* partial = partials_of<kTokens>(work, slot, rank);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float4 sum = __ldcg(partial + j * kMathThreads);
      totals[4 * j] += sum.x;
      totals[4 * j + 1] += sum.y;
      totals[4 * j + 2] += sum.z;
      totals[4 * j + 3] += sum.w;
    }
  }
  return true;
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
  // Lanes that tell the blocks which have filled a stage that it is free again.
  const int senders = work.hidden_blocks + work.token_blocks - 1;
  const int along = lane < work.hidden_blocks ? lane : hidden_block;
  const int across = lane < work.hidden_blocks
                         ? token_block
                         : (token_block + 1 + lane - work.hidden_blocks) % work.token_blocks;
  const uint32_t empty = address_in_block(
      base + Shape::kEmptyAt, lane < senders ? along + across * work.hidden_blocks : rank);
  const auto release = [&](uint32_t stage) {
    if (lane < senders) arrive_in_cluster(empty + stage * 8);
  };
  // Of bytes from one product along the depth to the next: 16 rows of 128 bytes, or 32 of a row.
  constexpr uint64_t kWeightStep = kType == ExpertsType::kFloat8 ? 32 >> 4 : 16 * 128 >> 4;
  constexpr uint64_t kTokenStep = 32 >> 4;
  const uint64_t weights_0 = matrix_descriptor(base + group * (Shape::kWeightBytes / 2));
  const uint64_t tokens_0 = matrix_descriptor(base + Shape::kTokensAt);

  float sums[kTokens / 2], totals[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0.0f;
  RingStage<Shape::kStages> stage;
  uint32_t row = 0;
  ExpertsPiece piece;
  for (int i = 0; work.schedule.piece(cluster, i, &piece); ++i) {
    const int hidden_tile = piece.tile / work.token_groups * work.hidden_blocks + hidden_block;
    const int token_tile = piece.tile % work.token_groups * work.token_blocks + token_block;
    const float* w_scale = nullptr;
    if constexpr (kType == ExpertsType::kFloat8) {
      const int last = static_cast<int>(work.hidden - 1) / kHiddenTile;
      const int64_t scale_row = hidden_tile < last ? hidden_tile : last;
      w_scale = work.w_scale + scale_row * work.schedule.experts * work.blocks;
    }
#pragma unroll
    for (int j = 0; j < kTokens / 2; ++j) totals[j] = 0.0f;
    ChosenExperts experts(work, piece.begin, piece.end);
    for (int expert; experts.next(&expert);) {
      for (int block = 0; block < work.blocks; ++block) {
        float scale = 1.0f;
        if constexpr (kType == ExpertsType::kFloat8) {
          scale = __ldg(w_scale + expert * work.blocks + block);
        }
        uint32_t last = 0;
        hold(sums);
        for (int part = 0; part < work.parts; ++part) {
          wait_barrier(base + Shape::kFullAt + stage.index * 8, stage.parity);
          const uint64_t weights = weights_0 + stage.index * (Shape::kWeightBytes >> 4);
          const uint64_t tokens = tokens_0 + stage.index * (Shape::kTokenBytes >> 4);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            Wgmma<kTokens>::template issue<kType>(sums, weights + k * kWeightStep,
                                                  tokens + k * kTokenStep, part > 0 || k > 0);
          }
          wgmma_commit();
          if (part > 0) {
            wgmma_wait<1>();
            release(last);
          }
          last = stage.index;
          stage.advance();
        }
        wgmma_wait<0>();
        hold(sums);
        release(last);
        const float2* multipliers =
            reinterpret_cast<const float2*>(memory + Shape::kRowsAt + row * Shape::kRowBytes);
        row = row + 1 == Shape::kRows ? 0 : row + 1;
        add_scaled<kType, kTokens>(multipliers + lane % 4, scale, sums, totals);
      }
    }
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
      init_barrier(base + Shape::kEmptyAt + i * 8, senders * (kMathThreads / 32));
    }
    fence_barrier_init();
  }
  __syncthreads();
  sync_cluster();
  if (warp_index() < kLoadThreads / 32) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (threadIdx.x == 0) {
      load_pieces<kType, kTokens>(&weights_map, &tokens_map, work, base, cluster, rank);
    }
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
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
      return of(std::integral_constant<int, 192>());
  }
}

// One file for each type.
ExpertsKernel experts_kernel_bfloat16(int tokens);
ExpertsKernel experts_kernel_float16(int tokens);
ExpertsKernel experts_kernel_float8(int tokens);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_CUH_
