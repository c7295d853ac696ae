// The result of a tile of `experts`: pieces added up, and totals written.

#ifndef JAX_ROUTER_CUDA_EXPERTS_RESULT_CUH_
#define JAX_ROUTER_CUDA_EXPERTS_RESULT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "experts_work.cuh"
#include "pipeline.cuh"

namespace jax_router {

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

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_RESULT_CUH_
