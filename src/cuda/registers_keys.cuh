// What the elements of rows in registers are compared by.
//
// A sigmoid or a softmax plus a bias is computed here to a few roundings only, which costs a
// quarter of the exact one. That is enough to bound the choice and to drop the groups that are
// clearly worse: whatever lies within the tolerance is listed, and compared by its exact key.

#ifndef JAX_ROUTER_CUDA_REGISTERS_KEYS_CUH_
#define JAX_ROUTER_CUDA_REGISTERS_KEYS_CUH_

#include <cstdint>

#include "groups.cuh"
#include "network.cuh"
#include "options.h"
#include "row.cuh"
#include "scalar.h"
#include "shape.cuh"
#include "stats.cuh"

namespace jax_router {

// Errors of a score here and of the exact one make less than 2**-20, those of the sums with the
// bias less than 2**-23 of these each.
inline constexpr Tolerance kApproximate{0x1p-20f, 0x1p-22f};
inline constexpr Tolerance kExact{0.0f, 0.0f};

__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The bias of kAtOnce chunks of a lane from `first` on, -inf past the end of the row.
template <typename S, int kAtOnce, typename T>
__device__ __forceinline__ void load_bias(const RowValues<T, true>& row, int first, int lane,
                                          float (&bias)[kAtOnce][kChunk]) {
  const int start = (first * S::kLanes + lane) * kChunk;
  constexpr int kStep = S::kLanes * kChunk;
  Four<float> raw[kAtOnce];
  if (row.aligned) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      raw[j] = Four<float>::lowest();
      if (start + j * kStep < row.experts) {
        raw[j] = Four<float>::load(row.bias + start + j * kStep);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int e = start + j * kStep;
      raw[j] = Four<float>::load_some(row.bias + e, row.experts - e);
    }
  }
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) raw[j].unpack(bias[j]);
}

// Four sigmoids with one reciprocal. NaN gives any number.
__device__ __forceinline__ void add_sigmoids(float (&x)[kChunk], const float (&bias)[kChunk]) {
  float a[kChunk];
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    // No product of four overflows; below -20 the sigmoid is less than 2**-28.
    a[c] = 1.0f + exp2_approximate(larger(x[c], -20.0f) * -kLog2);
  }
  const float low = a[0] * a[1];
  const float high = a[2] * a[3];
  const float inverse = reciprocal_approximate(low * high);
  const float inverse_low = inverse * high;
  const float inverse_high = inverse * low;
  x[0] = add_keys(inverse_low * a[1], bias[0]);
  x[1] = add_keys(inverse_low * a[0], bias[1]);
  x[2] = add_keys(inverse_high * a[3], bias[2]);
  x[3] = add_keys(inverse_high * a[2], bias[3]);
}

// kAtOnce chunks a time, whose bias is loaded before the first is used.
template <typename S, int kAtOnce, typename T>
__device__ __forceinline__ void turn_into_sigmoids(const RowValues<T, true>& row,
                                                   float (&x)[S::kChunks][kChunk], int lane) {
#pragma unroll
  for (int first = 0; first < S::kChunks; first += kAtOnce) {
    float bias[kAtOnce][kChunk];
    load_bias<S>(row, first, lane, bias);
    // This sum is NaN if anything in it is. It may be without, from infinities.
    float sums[kChunk] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) sums[c] = fmaf(x[first + j][c], bias[j][c], sums[c]);
    }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (__any_sync(kAllLanes, !(sum == sum))) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
          const float logit = x[first + j][c];
          bias[j][c] = logit == logit ? larger(bias[j][c], -kInfinity) : -kInfinity;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) add_sigmoids(x[first + j], bias[j]);
  }
}

template <typename S>
__device__ __forceinline__ float top_of(const float (&x)[S::kChunks][kChunk]) {
  float top = -kInfinity;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) top = larger(top, x[j][c]);
  }
#pragma unroll
  for (int distance = S::kLanes / 2; distance > 0; distance /= 2) {
    top = larger(top, __shfl_xor_sync(kAllLanes, top, distance));
  }
  return top;
}

// Sum of the softmax terms of a row in the order that the CPU has, too, since keys can depend on
// it: 128 partial sums, element i to sum i mod 128, then pairwise at distance 64, 32 ... 1.
template <typename S>
__device__ __forceinline__ Softmax softmax_of(const float (&x)[S::kChunks][kChunk], float top) {
  constexpr int kParts = kWarpSize / S::kLanes;
  const float largest = larger(smaller(top, kLargest), -kLargest);
  float sums[kParts][kChunk] = {};
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      float& sum = sums[j % kParts][c];
      sum = add(sum, softmax_term(larger(x[j][c], -kInfinity), largest));
    }
  }
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
#pragma unroll
    for (int distance = kParts / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int j = 0; j < distance; ++j) sums[j][c] = add(sums[j][c], sums[j + distance][c]);
    }
#pragma unroll
    for (int distance = S::kLanes / 2; distance > 0; distance /= 2) {
      sums[0][c] = add(sums[0][c], __shfl_xor_sync(kAllLanes, sums[0][c], distance));
    }
  }
  const float total = add(add(sums[0][0], sums[0][2]), add(sums[0][1], sums[0][3]));
  return {largest, total > 0.0f ? total : 1.0f};
}

// Turns each logit into score(logit) + bias; NaN becomes -inf.
template <typename S, typename T, typename ScoreOf>
__device__ __forceinline__ void turn_into_scores(const RowValues<T, true>& row,
                                                 float (&x)[S::kChunks][kChunk], int lane,
                                                 ScoreOf score_of) {
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    float bias[1][kChunk];
    load_bias<S>(row, j, lane, bias);
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      const float key = larger(add_keys(score_of(x[j][c]), bias[0][c]), -kInfinity);
      x[j][c] = x[j][c] == x[j][c] ? key : -kInfinity;
    }
  }
}

// How elements with a bias are compared, whatever the groups.
struct Comparison {
  Tolerance tolerance;  // of what is in the place of logits
  Softmax softmax;      // where the score is one
};

// Puts what elements are compared by in the place of logits, those of a lane in `values`. One score
// for all, known in each case, so that the chains of operations of many elements overlap. Not
// inlined: the kernels run through their instructions once, and should not have to jump over these.
template <typename S, typename T>
__device__ __noinline__ Comparison compare_by_any_score(RowValues<T, true> row, float4* values,
                                                        int lane) {
  float x[S::kChunks][kChunk];
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) Four<float>{values[j]}.unpack(x[j]);
  Tolerance tolerance = kExact;
  if (row.score == Score::kSoftmax) {
    row.softmax = softmax_of<S>(x, top_of<S>(x));
    const float inverse = 1.0f / row.softmax.total;
    turn_into_scores<S>(row, x, lane, [&](float logit) {
      const float difference = smaller(logit, kLargest) - row.softmax.largest;
      return exp2_approximate(difference * kLog2) * inverse;
    });
    tolerance = kApproximate;
  } else if (row.score == Score::kSqrtSoftplus) {
    turn_into_scores<S>(row, x, lane,
                        [](float logit) { return elementwise_score(logit, Score::kSqrtSoftplus); });
  } else {
    // A -inf input stays one: its key, unlike its score, is not 0.
    turn_into_scores<S>(row, x, lane, [](float score) { return score; });
  }
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) values[j] = Four<float>::pack(x[j]).raw;
  return {tolerance, row.softmax};
}

// Loosens the bound of keys so far off that it bounds exact keys, and so do those of all that reach
// the result, the limit of what must be listed.
__device__ __forceinline__ float loosen(Bound& bound, Tolerance tolerance) {
  const float top = float_from_key(bound.top_key);
  bound.top_key = key_from_float(fmaf(1.5f, tolerance.of(fabsf(top)), top));
  const float error = tolerance.of(fabsf(bound.bound));
  const float listed = fmaf(-2.5f, error, bound.bound);
  bound.bound = fmaf(-4.0f, error, bound.bound);
  return listed;
}

// The word of one expert. Not inlined: what it takes for every score is long.
template <typename T>
__device__ __noinline__ uint32_t exact_word(const RowValues<T, true> row, int e) {
  return Words<T, true>::word(row, e);
}

// The words of slots of a list, 0 past the count.
template <typename T>
struct ExactWords {
  const RowValues<T, true>& row;
  uint32_t ids;

  template <int kSlots>
  __device__ __forceinline__ void operator()(int first, int count,
                                             uint32_t (&words)[kSlots]) const {
    if (row.bias != nullptr && row.score == Score::kSigmoid) {
      return sigmoids(first, count, words);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int slot = first + i;
      words[i] = slot < count ? exact_word(row, load_shared_u16(ids + 2 * slot)) : 0;
    }
  }

  // All are loaded before the first is used, and made without a branch.
  template <int kSlots>
  __device__ __forceinline__ void sigmoids(int first, int count, uint32_t (&words)[kSlots]) const {
    int experts[kSlots];
    float x[kSlots];
    float bias[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      experts[i] = first + i < count ? static_cast<int>(load_shared_u16(ids + 2 * (first + i))) : 0;
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      x[i] = to_float(row.logits[experts[i]]);
      bias[i] = __ldg(row.bias + experts[i]);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      // A key that does not count is -inf or NaN.
      const bool counts = x[i] == x[i] && row.kept.holds(experts[i]);
      const float score = elementwise_score(x[i], Score::kSigmoid);
      const float key = add_keys(score, counts ? bias[i] : -kInfinity);
      words[i] = first + i < count ? unsigned_key(key_from_float(key)) : 0;
    }
  }
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_REGISTERS_KEYS_CUH_
