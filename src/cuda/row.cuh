// A row of logits and what its experts are compared by.

#ifndef JAX_ROUTER_CUDA_ROW_CUH_
#define JAX_ROUTER_CUDA_ROW_CUH_

#include <cstdint>

#include "options.h"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kChunk = 4;  // elements that a lane reads at once

struct Softmax {
  float largest;
  float total;
};

__device__ __forceinline__ uint32_t unsigned_key(int32_t key) {
  return static_cast<uint32_t>(key) ^ 0x80000000u;
}

// Score of one logit; the row's softmax must be there for softmax.
__device__ __forceinline__ float score_of(float x, Score score, const Softmax& softmax) {
  if (score != Score::kSoftmax) return elementwise_score(x, score);
  return divide(softmax_term(x, softmax.largest), softmax.total);
}

// A softmax term where the last bits do not matter. NaN counts as -inf.
__device__ __forceinline__ float fast_term(float x, float largest) {
  return __expf(fminf(fmaxf(x, -kInfinity), kLargest) - largest);
}

// The groups of a row that stay, a bit for each; without groups all bits.
struct KeptGroups {
  uint64_t mask;
  int chunks;        // of a group; 0 where there are no groups
  uint32_t inverse;  // 2**16 / chunks, rounded up: exact for up to 256 chunks

  __device__ __forceinline__ uint32_t group_of(uint32_t chunk) const {
    return chunk * inverse >> 16;
  }
  __device__ __forceinline__ bool holds(int e) const {
    return (mask >> group_of(static_cast<uint32_t>(e) / kChunk) & 1) != 0;
  }
};

// A row and what its elements are compared by: the logit itself, or (kBiased) its score plus a bias
// where there is one, and -inf in groups that do not stay.
template <typename T, bool kBiased>
struct RowValues {
  static constexpr bool kLong = kBiased;  // a score is long: not to be unrolled

  const T* logits;  // in global or shared memory
  const float* bias;
  int experts;
  bool aligned;  // four elements can be loaded at once
  Score score;
  Softmax softmax;
  KeptGroups kept;

  // Whatever the groups. NaN has become -inf; without kBiased it is left to the comparisons.
  __device__ __forceinline__ float value(float x, int e) const {
    if constexpr (!kBiased) return x;
    if (!(x == x)) return -kInfinity;
    if (bias == nullptr) return x;
    // Under "none" a -inf input stays one: its key, unlike its score, is not 0.
    const float y = score == Score::kNone ? x : score_of(x, score, softmax);
    return add_keys(y, __ldg(bias + e));
  }
  __device__ __forceinline__ float kept_value(float x, int e) const {
    const float y = value(x, e);
    if constexpr (!kBiased) return y;
    return kept.holds(e) ? y : -kInfinity;
  }
  __device__ __forceinline__ int32_t key(int e) const {
    return key_from_float(kept_value(to_float(logits[e]), e));
  }
  // Values e .. e + 3; NaN past the end.
  __device__ __forceinline__ void values(int e, float (&x)[kChunk]) const {
    if (aligned && e < experts) {
      Four<T>::load(logits + e).unpack(x);
    } else {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        x[c] = e + c < experts ? to_float(logits[e + c]) : __int_as_float(0x7fffffff);
      }
    }
    if constexpr (kBiased) {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (e + c < experts) x[c] = kept_value(x[c], e + c);
      }
    }
  }
};

// A survivor in one integer that orders like its key. Logits of 16 bits leave room for the index,
// so that no two are equal: of equal keys the lower index is the larger. 0 is below every word.
template <typename T, bool kBiased>
struct Words {
  static constexpr bool kUnique = !kBiased && sizeof(T) == 2;

  __device__ __forceinline__ static uint32_t word(const RowValues<T, kBiased>& row, int e) {
    if constexpr (kUnique) {
      const uint32_t bits = row.logits[e].bits;
      const bool nan = (bits & 0x7fffu) > (T::kLowest & 0x7fffu);
      const uint32_t ordered = (bits & 0x8000u) != 0 ? bits ^ 0xffffu : bits | 0x8000u;
      return (nan ? T::kLowest ^ 0xffffu : ordered) << 16 | (0xffffu - e);
    } else {
      return unsigned_key(row.key(e));
    }
  }
  // The logit, NaN as -inf; where there is a bias, the biased score.
  __device__ __forceinline__ static float value(uint32_t word) {
    if constexpr (kUnique) {
      const uint32_t ordered = word >> 16;
      const uint32_t bits = (ordered & 0x8000u) != 0 ? ordered ^ 0x8000u : ordered ^ 0xffffu;
      return to_float(T{static_cast<uint16_t>(bits)});
    } else {
      return float_from_key(static_cast<int32_t>(word ^ 0x80000000u));
    }
  }
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_ROW_CUH_
