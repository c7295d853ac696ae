// What the forward and the backward of `scores` share.
//
// Logits are read once and results written once: a row lies in registers, kPart elements a thread,
// of as many lanes of a warp as it needs or, beyond 512 experts, of the threads of a block. Rows of
// more than kMostInRegisters experts are read again for every step.
//
// No choice depends on these scores, so they are right to a few ulp, not to the bit like those of
// scalar.h: approximate instructions, each within 2 ulp.

#ifndef JAX_ROUTER_CUDA_SCORES_CUH_
#define JAX_ROUTER_CUDA_SCORES_CUH_

#include <cstdint>
#include <type_traits>

#include "options.h"
#include "scalar.h"
#include "scores_call.h"
#include "warp.cuh"

namespace jax_router {

// ---- arithmetic ----

// exp(x) for x <= 0, 0 below -87 as in scalar.h, and for NaN.
__device__ __forceinline__ float fast_exp(float x) {
  constexpr float kLog2E = 1.44269502f;
  constexpr float kLog2ERest = 1.92596299e-8f;
  const float clamped = fmaxf(x, -87.0f);
  const float exponent = clamped * kLog2E;
  // What the product has lost: without it the error would grow with -x.
  const float lost = __fmaf_rn(clamped, kLog2ERest, __fmaf_rn(clamped, kLog2E, -exponent));
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  const float y = __fmaf_rn(power, lost * 0.693147182f, power);
  return x >= -87.0f ? y : 0.0f;
}

// As log1p_unit of scalar.h.
__device__ __forceinline__ float fast_log1p_unit(float u) {
  const float twice = __fdividef(u + u, 2.0f + u);
  const float s = 0.5f * twice;
  const float z = s * s;
  float p = 1.0f / 15.0f;
  p = __fmaf_rn(p, z, 1.0f / 13.0f);
  p = __fmaf_rn(p, z, 1.0f / 11.0f);
  p = __fmaf_rn(p, z, 1.0f / 9.0f);
  p = __fmaf_rn(p, z, 1.0f / 7.0f);
  p = __fmaf_rn(p, z, 1.0f / 5.0f);
  p = __fmaf_rn(p, z, 1.0f / 3.0f);
  return __fmaf_rn(twice * z, p, twice);
}

// The logit with NaN as -inf.
__device__ __forceinline__ float without_nan(float x) { return fmaxf(x, -kInfinity); }

// For softmax the term exp(x - largest), else the score, and its derivative: 0 unless x is finite.
struct Scored {
  float y;
  float slope;
};

// Of one logit, which is no NaN. `largest` is the row's, for softmax alone.
template <Score kScore>
__device__ __forceinline__ Scored score_of_logit(float x, float largest) {
  const float bounded = fminf(x, kLargest);
  const bool finite = fabsf(x) <= kLargest;
  if constexpr (kScore == Score::kSoftmax) {
    const float y = fast_exp(bounded - largest);
    return {y, finite ? y : 0.0f};
  } else if constexpr (kScore == Score::kNone) {
    return {x > -kInfinity ? bounded : 0.0f, finite ? 1.0f : 0.0f};
  } else {
    const float e = fast_exp(-fabsf(bounded));
    const float inverse = __fdividef(1.0f, 1.0f + e);
    const float sigmoid = x < 0.0f ? e * inverse : inverse;
    // Not y (1 - y), which cancels for large x. Infinities have e = 0.
    if constexpr (kScore == Score::kSigmoid) return {sigmoid, e * inverse * inverse};
    const float softplus = fmaxf(bounded, 0.0f) + fast_log1p_unit(e);
    const float inverse_root = softplus > 0.0f ? rsqrtf(softplus) : 0.0f;
    return {softplus * inverse_root, finite ? 0.5f * sigmoid * inverse_root : 0.0f};
  }
}

// The cotangent of a logit, ignored where the logit has no score.
__device__ __forceinline__ float cotangent_of(float cotangent, float x) {
  return x > -kInfinity ? cotangent : 0.0f;
}

// ---- reductions over the threads of a row ----

inline constexpr int kMostWarps = 16;  // of a block that works on one row

// Every thread of the row gets the same bits. Without kBlock a row has `threads` lanes of a warp, a
// power of two; with it all threads of a block. `partial` is shared memory of kMostWarps numbers
// that no other reduction uses.
template <bool kBlock, typename Combine>
__device__ __forceinline__ float reduce(float value, int threads, float* partial, float neutral,
                                        Combine combine) {
  const auto reduce_lanes = [&](int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
  };
  if constexpr (!kBlock) {
    reduce_lanes(threads);
  } else {
    reduce_lanes(kWarpSize);
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    const int warp = threadIdx.x % kMostWarps;
    value = warp < threads / kWarpSize ? partial[warp] : neutral;
    reduce_lanes(kMostWarps);
  }
  return value;
}

template <bool kBlock>
__device__ __forceinline__ float reduce_max(float value, int threads, float* partial) {
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  return reduce<kBlock>(value, threads, partial, -kInfinity, larger);
}

template <bool kBlock>
__device__ __forceinline__ float reduce_sum(float value, int threads, float* partial) {
  const auto sum = [](float a, float b) { return __fadd_rn(a, b); };
  return reduce<kBlock>(value, threads, partial, 0.0f, sum);
}

// ---- rows in registers ----

inline constexpr int kPart = 16;          // elements of a thread
inline constexpr int kFewestLanes = 4;    // of a row
inline constexpr int kWarpThreads = 128;  // of a block whose warps work on rows of their own
inline constexpr int kMostThreads = kMostWarps * kWarpSize;
inline constexpr int64_t kMostInRegisters = kPart * kMostThreads;

// How a launch cuts rows into parts.
struct Slicing {
  int threads;   // of a row
  bool aligned;  // four elements can be loaded and stored at once
};

// The part of a row that a thread works on.
struct Part {
  int64_t token;
  int64_t begin;  // of the row
  int experts;
  int thread;  // in the row
  Slicing slicing;
  bool there;  // false beyond the last row
  bool alive;  // there, and no padding
};

template <bool kBlock>
__device__ __forceinline__ Part part_of_thread(const ScoresRows& call, const Slicing& slicing) {
  Part part;
  part.thread = static_cast<int>(threadIdx.x);
  part.token = blockIdx.x;
  if constexpr (!kBlock) {
    const int shift = 31 - __clz(slicing.threads);  // a power of two
    part.token = part.token * (kWarpThreads >> shift) + (part.thread >> shift);
    part.thread &= slicing.threads - 1;
  }
  part.begin = part.token * call.experts;
  part.experts = static_cast<int>(call.experts);
  part.slicing = slicing;
  part.there = part.token < call.tokens;
  part.alive = part.there && (call.where == nullptr || call.where[part.token]);
  return part;
}

// Loads a thread's part; -inf past the end and in rows of padding.
template <typename T>
__device__ __forceinline__ void load_part(const T* values, const Part& part, float (&x)[kPart]) {
  const T* row = values + part.begin;
  const int experts = part.alive ? part.experts : 0;
  if (part.slicing.aligned) {
    Four<T> raw[kPart / 4];
#pragma unroll
    for (int j = 0; j < kPart / 4; ++j) {
      const int e = 4 * (j * part.slicing.threads + part.thread);
      raw[j] = Four<T>::lowest();
      if (e < experts) raw[j] = Four<T>::load(row + e);
    }
#pragma unroll
    for (int j = 0; j < kPart / 4; ++j) {
      float four[4];
      raw[j].unpack(four);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[4 * j + c] = four[c];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const int e = i * part.slicing.threads + part.thread;
      x[i] = e < experts ? to_float(row[e]) : -kInfinity;
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_part(T* values, const Part& part, const float (&x)[kPart]) {
  if (!part.there) return;
  T* row = values + part.begin;
  if (part.slicing.aligned) {
#pragma unroll
    for (int j = 0; j < kPart / 4; ++j) {
      const int e = 4 * (j * part.slicing.threads + part.thread);
      const float four[4] = {x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]};
      if (e < part.experts) Four<T>::pack(four).store(row + e);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      const int e = i * part.slicing.threads + part.thread;
      if (e < part.experts) store_value(row + e, x[i]);
    }
  }
}

__device__ __forceinline__ float sum_of_part(const float (&x)[kPart]) {
  float sums[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
  for (int i = 4; i < kPart; ++i) sums[i % 4] += x[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The largest logit of a row, at most the largest float and no -inf; 0 where no score needs it.
template <Score kScore, bool kBlock>
__device__ __forceinline__ float largest_of_row(const float (&x)[kPart], int threads,
                                                float* partial) {
  if constexpr (kScore != Score::kSoftmax) return 0.0f;
  float largest = -kLargest;
#pragma unroll
  for (int i = 0; i < kPart; ++i) largest = fmaxf(largest, x[i]);
  return fminf(reduce_max<kBlock>(largest, threads, partial), kLargest);
}

// ---- rows in memory ----

// A row that a block of kMostThreads threads reads again for every step.
template <typename T, Score kScore>
struct LongRow {
  const T* logits;
  int64_t experts;
  float largest;
  float inverse;  // of what the scores are divided by

  __device__ __forceinline__ float logit(int64_t e) const {
    return without_nan(to_float(logits[e]));
  }
  __device__ __forceinline__ Scored scored(int64_t e) const {
    return score_of_logit<kScore>(logit(e), largest);
  }
  __device__ __forceinline__ float cotangent(const float* cotangents, int64_t e) const {
    return cotangent_of(cotangents[e], logit(e));
  }

  // Sum of the scores of this thread's elements, or, where there are cotangents, of these times the
  // normalized scores. In parts, so that the rounding errors of long rows do not add up.
  template <bool kCotangents>
  __device__ __forceinline__ float sum(const float* cotangents) const {
    float total = 0.0f;
    for (int64_t begin = threadIdx.x; begin < experts; begin += kMostInRegisters) {
      const int64_t past = begin + kMostInRegisters;
      const int64_t end = past < experts ? past : experts;
      float part = 0.0f;
      for (int64_t e = begin; e < end; e += kMostThreads) {
        const float y = scored(e).y;
        part += kCotangents ? cotangent(cotangents, e) * (y * inverse) : y;
      }
      total += part;
    }
    return total;
  }
};

template <typename T, Score kScore>
__device__ __forceinline__ LongRow<T, kScore> read_row(const ScoresRows& call, int64_t token,
                                                       float (*partials)[kMostWarps]) {
  const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
  LongRow<T, kScore> row{logits, call.experts, 0.0f, 0.0f};
  if constexpr (kScore == Score::kSoftmax) {
    float largest = -kLargest;
    for (int64_t e = threadIdx.x; e < row.experts; e += kMostThreads) {
      largest = fmaxf(largest, row.logit(e));
    }
    row.largest = fminf(reduce_max<true>(largest, kMostThreads, partials[0]), kLargest);
  }
  const float sum = reduce_sum<true>(row.template sum<false>(nullptr), kMostThreads, partials[1]);
  row.inverse = 1.0f / (sum + kEpsilon);
  return row;
}

// ---- launches ----

template <typename F>
auto with_score(Score score, F f) {
  switch (score) {
    case Score::kSoftmax:
      return f(std::integral_constant<Score, Score::kSoftmax>());
    case Score::kSigmoid:
      return f(std::integral_constant<Score, Score::kSigmoid>());
    case Score::kSqrtSoftplus:
      return f(std::integral_constant<Score, Score::kSqrtSoftplus>());
    default:
      return f(std::integral_constant<Score, Score::kNone>());
  }
}

// Whether rows of `experts` elements of `size` bytes allow loads of four.
inline bool allows_fours(const void* values, int64_t experts, size_t size) {
  return experts % 4 == 0 && reinterpret_cast<uintptr_t>(values) % (4 * size) == 0;
}

// Launches the kernel for rows in lanes of a warp, in a block, or in memory. The choice depends on
// the number of experts alone, so that a row gets the same bits whatever it is batched with.
template <typename Call, typename WarpKernel, typename BlockKernel, typename LoopKernel>
cudaError_t launch_scores_rows(const Call& call, bool aligned, WarpKernel warp_kernel,
                               BlockKernel block_kernel, LoopKernel loop_kernel,
                               cudaStream_t stream) {
  if (call.tokens == 0) return cudaSuccess;
  const auto rows = static_cast<unsigned>(call.tokens);
  if (call.experts > kMostInRegisters) {
    loop_kernel<<<rows, kMostThreads, 0, stream>>>(call);
  } else if (call.experts > kPart * kWarpSize) {
    const int threads =
        static_cast<int>((call.experts + kPart * kWarpSize - 1) / (kPart * kWarpSize) * kWarpSize);
    block_kernel<<<rows, threads, 0, stream>>>(call, Slicing{threads, aligned});
  } else {
    int lanes = kFewestLanes;
    while (lanes * kPart < call.experts) lanes *= 2;
    const int64_t rows_of_block = kWarpThreads / lanes;
    const int64_t blocks = (call.tokens + rows_of_block - 1) / rows_of_block;
    warp_kernel<<<static_cast<unsigned>(blocks), kWarpThreads, 0, stream>>>(
        call, Slicing{lanes, aligned});
  }
  return cudaGetLastError();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_SCORES_CUH_
