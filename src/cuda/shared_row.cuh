// Rows in shared memory, filled by bulk copies where the device has them.

#ifndef JAX_ROUTER_CUDA_SHARED_ROW_CUH_
#define JAX_ROUTER_CUDA_SHARED_ROW_CUH_

#include <cstdint>

#include "bulk.cuh"
#include "network.cuh"
#include "options.h"
#include "row.cuh"
#include "scalar.h"
#include "survivors.cuh"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kPadding = kChunk * kWarpSize;

// A row in shared memory, read by one warp, and padded with -inf to a multiple of 128.
template <typename T>
struct SharedRow {
  const T* logits;
  int chunks;  // a lane
  int lane;

  __device__ __forceinline__ void load(int j, float (&x)[kChunk]) const {
    Four<T>::load(logits + (j * kWarpSize + lane) * kChunk).unpack(x);
  }

  // Calls visit(position, four logits) for each of the lane's chunks.
  template <typename Visit>
  __device__ __forceinline__ void operator()(Visit visit) const {
#pragma unroll 4
    for (int j = 0; j < chunks; ++j) {
      float x[kChunk];
      load(j, x);
      visit((j * kWarpSize + lane) * kChunk, x);
    }
  }

  template <int kClasses>
  __device__ __forceinline__ Bound bound(int k, ClassMaxima<kClasses> maxima) const {
    float classes[kClasses];
#pragma unroll
    for (int i = 0; i < kClasses; ++i) classes[i] = -kInfinity;
#pragma unroll 4
    for (int j = 0; j < chunks; ++j) {
      float x[kChunk];
      load(j, x);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        classes[c % kClasses] = larger(classes[c % kClasses], x[c]);
      }
    }
    return kth_of_classes(classes, k, maxima, lane);
  }

  template <typename List>
  __device__ __forceinline__ void list(float bound, List& survivors) const {
    for (int first = 0; first < chunks; first += kMaskChunks) {
      uint32_t mask = 0;
#pragma unroll
      for (int j = 0; j < kMaskChunks; ++j) {
        if (first + j >= chunks) break;
        float x[kChunk];
        load(first + j, x);
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
          if (x[c] >= bound) mask |= 1u << (kChunk * j + c);
        }
      }
      survivors.append(mask, first * kChunk * kWarpSize);
    }
  }

  // In the order of additions that the CPU has: 128 partial sums, then pairwise.
  __device__ __forceinline__ Softmax softmax(float top) const {
    const float largest = larger(smaller(top, kLargest), -kLargest);
    float sums[kChunk] = {};
    for (int j = 0; j < chunks; ++j) {
      float x[kChunk];
      load(j, x);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        sums[c] = add(sums[c], softmax_term(larger(x[c], -kInfinity), largest));
      }
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) sums[c] = warp_sum(sums[c]);
    const float total = add(add(sums[0], sums[2]), add(sums[1], sums[3]));
    return {largest, total > 0.0f ? total : 1.0f};
  }
};

// Starts to fill a row of shared memory, or fills it where rows are not aligned.
template <typename T>
__device__ __forceinline__ void fill_row(const RouteForward& call, int64_t token, T* row,
                                         CopyBarrier& barrier, int lane) {
  const int experts = static_cast<int>(call.experts);
  const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
  if (kHasBulkCopy && call.aligned) {
    if (lane == 0) barrier.load(row, logits, experts * static_cast<uint32_t>(sizeof(T)));
    return;
  }
  for (int e = lane; e < experts; e += kWarpSize) row[e] = logits[e];
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_SHARED_ROW_CUH_
