// Statistics of a block of tokens. Each group of lanes adds up the scores of its tokens in a row of
// shared memory of its own, in the order of the tokens; at the end the rows are added up in their
// order. Counts are integers, so that any order will do.

#ifndef JAX_ROUTER_CUDA_STATS_CUH_
#define JAX_ROUTER_CUDA_STATS_CUH_

#include <cstdint>

#include "network.cuh"
#include "options.h"
#include "row.cuh"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {

// ---- which tokens ----

// The blocks of a call, the same on both sides of the launch.
struct TokenBlocks {
  int64_t of_batch;
  int64_t tokens;  // of a block

  explicit TokenBlocks(const RouteForward& call)
      : of_batch(blocks_of_batch(call.tokens_per_batch)),
        tokens(tokens_of_block(call.tokens_per_batch)) {}
  unsigned count(const RouteForward& call) const {
    return static_cast<unsigned>(call.stats.batches * of_batch);
  }
};

struct TokenRange {
  int64_t first;
  int count;
};

// The tokens of this block of threads.
__device__ __forceinline__ TokenRange block_range(const RouteForward& call,
                                                  const TokenBlocks& blocks) {
  const unsigned of_batch = static_cast<unsigned>(blocks.of_batch);
  const int64_t begin = blockIdx.x / of_batch * call.tokens_per_batch;
  const int64_t past = blockIdx.x % of_batch * blocks.tokens;
  return {begin + past, static_cast<int>(min(blocks.tokens, call.tokens_per_batch - past))};
}

// ---- one token ----

inline constexpr float kLog2 = 1.44269504f;  // of e

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// exp(x) for x <= 0 to a few roundings, however small.
__device__ __forceinline__ float accurate_exp(float x) {
  constexpr float kLog2Rest = 1.92596299e-8f;
  const float t = x * kLog2;
  const float rest = fmaf(x, kLog2Rest, fmaf(x, kLog2, -t));
  const float power = exp2_approximate(t);
  return fmaf(power, rest * 0.693147181f, power);
}

// A score where the last bits do not matter.
__device__ __forceinline__ float fast_score(float x, Score score) {
  if (score != Score::kSigmoid) return elementwise_score(larger(x, -kInfinity), score);
  const float bounded = smaller(larger(x, -128.0f), 128.0f);  // exp of less than -128 is 0
  const float e = accurate_exp(-fabsf(bounded));
  return __fdividef(bounded < 0.0f ? e : 1.0f, 1.0f + e);
}

// exp(logit - largest) of the logits of a row, but for a common factor.
struct Exponential {
  float largest;
  float shift;
  bool near;  // to 0, so that `shift` is exact
  bool any;   // whether the row has a number

  __device__ __forceinline__ explicit Exponential(float top)
      : largest(larger(smaller(top, kLargest), -kLargest)),
        shift(rintf(largest * kLog2)),
        near(fabsf(largest) < 16777216.0f),
        any(top > -kInfinity) {}

  // For a near row; NaN stays NaN.
  __device__ __forceinline__ float near_term(float x) const {
    return exp2_approximate(fmaf(x, kLog2, -shift));
  }
  // The same, but NaN counts as -inf.
  __device__ __forceinline__ float near_number(float x) const {
    return near_term(larger(x, -kLargest));
  }
  __device__ __forceinline__ float term(float x) const {
    return near ? near_number(x) : fast_term(x, largest);
  }
  // What a term must be multiplied by.
  __device__ __forceinline__ float scale() const {
    return near ? exp2_approximate(fmaf(-largest, kLog2, shift)) : 1.0f;
  }
};

// Sum over the lanes of a group.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Sums of the scores of each expert that a group of lanes keeps: chunk j of a lane stands at
// `position`.
struct SharedSums {
  float* row;

  __device__ __forceinline__ void add(int, int position, const float (&x)[kChunk], float factor) {
    float4* at = reinterpret_cast<float4*>(row + position);
    const float4 sum = *at;
    *at = {fmaf(x[0], factor, sum.x), fmaf(x[1], factor, sum.y), fmaf(x[2], factor, sum.z),
           fmaf(x[3], factor, sum.w)};
  }
};
// In global memory, for rows that leave no room for their sums.
struct GlobalSums {
  float* row;
  int experts;

  __device__ __forceinline__ void add(int, int position, const float (&x)[kChunk], float factor) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      if (position + c < experts) row[position + c] = fmaf(x[c], factor, row[position + c]);
    }
  }
};
template <int kChunks>
struct RegisterSums {
  float sums[kChunks][kChunk] = {};

  __device__ __forceinline__ void add(int j, int, const float (&x)[kChunk], float factor) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) sums[j][c] = fmaf(x[c], factor, sums[j][c]);
  }
  __device__ __forceinline__ void store(float* row, int columns, int lane) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      const int position = (j * kWarpSize + lane) * kChunk;
      if (position < columns) Four<float>::pack(sums[j]).store(row + position);
    }
  }
};

// The lane's part of a sum of terms.
struct LaneTotal {
  float parts[kChunk] = {};

  template <typename Term>
  __device__ __forceinline__ void add(const float (&x)[kChunk], Term term) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) parts[c] += term(x[c]);
  }
  template <int kLanes>
  __device__ __forceinline__ float of_group() const {
    return group_sum<kLanes>((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
};

// Sum of the terms of a row.
template <int kLanes, typename Row, typename Term>
__device__ __forceinline__ float sum_of_terms(const Row& row, Term term) {
  LaneTotal total;
  row([&](int, int, const float (&x)[kChunk]) { total.add(x, term); });
  return total.of_group<kLanes>();
}

// What a group of lanes knows of the tokens it has added up. kAnyScore: whether the
// scores may be others than softmax.
template <typename Sums, bool kAnyScore>
struct GroupSums {
  static constexpr bool kListed = !kAnyScore;  // whether `add` can use a sum of near terms

  Sums scores;
  float z = 0.0f;
  int tokens = 0;

  // Adds a token; `row(visit)` calls visit(j, position, four logits) for each chunk j of the lane,
  // the first of them at `position`. All lanes of the warp take part. A row of nothing but NaN and
  // -inf has no scores; padding is not counted either. `listed`: the sum of the row's near terms,
  // where it is known.
  template <int kLanes, typename Row>
  __device__ __forceinline__ void add(const RouteForward& call, const RouteOptions& options,
                                      int64_t token, bool real, const Row& row,
                                      const Exponential& exponential, const LaneTotal* listed,
                                      int lane) {
    const bool counted = real && exponential.any && token < call.tokens;
    const auto near_term = [&](float x) { return exponential.near_term(x); };
    const auto any_term = [&](float x) { return exponential.term(x); };
    const bool elementwise = kAnyScore && options.score != Score::kSoftmax;
    if (elementwise) {
      const auto score = [&](float x) { return fast_score(x, options.score); };
      const float divisor = sum_of_terms<kLanes>(row, score) + kEpsilon;
      if (counted) add_shares(row, score, divisor);
    }
    float total = 0.0f;
    bool near = !elementwise && __all_sync(kAllLanes, exponential.near);
    if (near) {
      total = listed != nullptr ? listed->of_group<kLanes>() : sum_of_terms<kLanes>(row, near_term);
      near = __all_sync(kAllLanes, total == total);  // no NaN among the logits
      if (near && counted) add_shares(row, near_term, total);
    }
    if (!near) {
      total = sum_of_terms<kLanes>(row, any_term);
      if (counted && !elementwise) add_shares(row, any_term, total);
    }
    if (lane != 0 || token >= call.tokens) return;
    total *= exponential.scale();
    call.stats.softmax[token] =
        counted ? SavedSoftmax{exponential.largest, total} : SavedSoftmax{0.0f, 0.0f};
    if (real) ++tokens;
    const float logsumexp = exponential.largest + logf(total);
    if (counted) z += logsumexp * logsumexp;
  }

 private:
  // Adds term(x) / total for each logit x of a row.
  template <typename Row, typename Term>
  __device__ __forceinline__ void add_shares(const Row& row, Term term, float total) {
    const float factor = 1.0f / total;
    row([&](int j, int position, const float (&x)[kChunk]) {
      float terms[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) terms[c] = term(x[c]);
      scores.add(j, position, terms, factor);
    });
  }
};

// ---- the block ----

// What a block adds up in shared memory: a row of sums for each group, and the counts.
struct BlockSums {
  float* scores;    // [groups][columns]
  int32_t* counts;  // [experts]
  int groups;
  int columns;  // of a row, a multiple of 4

  __host__ __device__ static int score_bytes(int groups, int columns) {
    return static_cast<int>(sizeof(float)) * groups * columns;
  }
  __host__ __device__ static int count_bytes(const RouteForward& call) {
    return static_cast<int>(sizeof(int32_t)) * static_cast<int>((call.experts + 3) / 4 * 4);
  }

  // By all threads, before the first token.
  __device__ __forceinline__ void clear_counts(int64_t experts) const {
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void clear(int64_t experts) const {
    float4* words = reinterpret_cast<float4*>(scores);
    for (int i = threadIdx.x; i < groups * columns / 4; i += blockDim.x) {
      words[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    clear_counts(experts);
  }

  // Writes the sums of the block, by all threads, after the last token.
  __device__ __forceinline__ void write(const RouteForward& call, float z, int tokens) const {
    __syncthreads();
    const int64_t begin = blockIdx.x * call.experts;
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x) {
      float sum = 0.0f;
#pragma unroll 16
      for (int g = 0; g < groups; ++g) sum += scores[g * columns + e];
      call.stats.block_sums[begin + e] = sum;
      call.stats.block_counts[begin + e] = counts[e];
    }
    write_tokens(call, z, tokens);
  }

  // The same of the z sum and the tokens alone. Lanes that lead no group have z = 0 and no tokens.
  __device__ __forceinline__ static void write_tokens(const RouteForward& call, float z,
                                                      int tokens) {
    __shared__ float warp_z[kWarpSize];
    __shared__ int warp_tokens[kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = warp_index();
    const int warps = blockDim.x / kWarpSize;
    z = warp_sum(z);
    tokens = __reduce_add_sync(kAllLanes, tokens);
    if (lane == 0) {
      warp_z[warp] = z;
      warp_tokens[warp] = tokens;
    }
    __syncthreads();
    if (warp != 0) return;
    z = warp_sum(lane < warps ? warp_z[lane] : 0.0f);
    tokens = __reduce_add_sync(kAllLanes, lane < warps ? warp_tokens[lane] : 0);
    if (lane == 0) {
      call.stats.block_z[blockIdx.x] = z;
      call.stats.block_tokens[blockIdx.x] = tokens;
    }
  }
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_STATS_CUH_
