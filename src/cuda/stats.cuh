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

// exp(x) for x <= 0 to a few roundings, however small.
__device__ __forceinline__ float accurate_exp(float x) {
  constexpr float kLog2 = 1.44269504f;
  constexpr float kLog2Rest = 1.92596299e-8f;
  const float t = x * kLog2;
  const float rest = fmaf(x, kLog2Rest, fmaf(x, kLog2, -t));
  const float power = exp2f(t);
  return fmaf(power, rest * 0.693147181f, power);
}

// A score where the last bits do not matter.
__device__ __forceinline__ float fast_score(float x, Score score) {
  if (score != Score::kSigmoid) return elementwise_score(larger(x, -kInfinity), score);
  const float bounded = larger(x, -128.0f);  // exp of less is 0
  const float e = accurate_exp(-fabsf(bounded));
  return __fdividef(bounded < 0.0f ? e : 1.0f, 1.0f + e);
}

// What a group of lanes knows of the tokens it has added up.
struct GroupSums {
  float* scores;  // a row in shared memory, its own
  float z = 0.0f;
  int tokens = 0;

  // Counts a token whose row has this softmax.
  __device__ __forceinline__ void count(const RouteForward& call, int64_t token, bool real,
                                        SavedSoftmax softmax, bool leader) {
    if (!leader || token >= call.tokens) return;
    call.stats.softmax[token] = softmax;
    if (!real) return;
    const float logsumexp = softmax.largest + logf(softmax.total);
    if (softmax.total > 0.0f) z += logsumexp * logsumexp;
    ++tokens;
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

// Adds the scores of a row to the sums of its group; `row(visit)` calls visit(position, four
// logits) for each of the lane's chunks, the first of them at `position`. Where it keeps what the
// visit leaves in place of the logits (kKept), scores are not computed twice. All lanes of the warp
// take part. Nothing is added for padding, and for rows of nothing but NaN and -inf.
template <int kLanes, bool kKept, typename Row>
__device__ __forceinline__ SavedSoftmax add_scores(const Row& row, float top, bool real,
                                                   Score score, float* sums) {
  const float largest = larger(smaller(top, kLargest), -kLargest);
  float total = 0.0f;
  float divisor = 0.0f;
  row([&](int, float (&x)[kChunk]) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      const float term = fast_term(x[c], largest);
      total += term;
      if (score == Score::kSoftmax) {
        x[c] = term;
      } else {
        x[c] = fast_score(x[c], score);
        divisor += x[c];
      }
    }
  });
  total = group_sum<kLanes>(total);
  divisor = score == Score::kSoftmax ? total : group_sum<kLanes>(divisor) + kEpsilon;
  if (!real || !(top > -kInfinity)) return {0.0f, 0.0f};
  const float factor = 1.0f / divisor;
  row([&](int position, float (&x)[kChunk]) {
    if constexpr (!kKept) {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        x[c] = score == Score::kSoftmax ? fast_term(x[c], largest) : fast_score(x[c], score);
      }
    }
    float4* at = reinterpret_cast<float4*>(sums + position);
    const float4 sum = *at;
    *at = {fmaf(x[0], factor, sum.x), fmaf(x[1], factor, sum.y), fmaf(x[2], factor, sum.z),
           fmaf(x[3], factor, sum.w)};
  });
  return {largest, total};
}

// ---- the block ----

// Shared memory of a block: a row of sums for each group, then the counts.
struct BlockSums {
  float* scores;    // [groups][columns]
  int32_t* counts;  // [experts]
  int groups;
  int columns;  // of a row, a multiple of 4

  __host__ __device__ static int bytes(int groups, int columns, int64_t experts) {
    return static_cast<int>(sizeof(float)) *
           (groups * columns + static_cast<int>(experts + 3) / 4 * 4);
  }
  __device__ __forceinline__ BlockSums(void* memory, int groups, int columns)
      : scores(static_cast<float*>(memory)),
        counts(reinterpret_cast<int32_t*>(scores + groups * columns)),
        groups(groups),
        columns(columns) {}

  // By all threads, before the first token.
  __device__ __forceinline__ void clear(int64_t experts) const {
    float4* words = reinterpret_cast<float4*>(scores);
    for (int i = threadIdx.x; i < groups * columns / 4; i += blockDim.x) {
      words[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
  }

  // Writes the sums of the block, by all threads, after the last token. Lanes that lead no group
  // have z = 0 and no tokens.
  __device__ __forceinline__ void write(const RouteForward& call, const GroupSums& group) const {
    __shared__ float warp_z[kWarpSize];
    __shared__ int warp_tokens[kWarpSize];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int warps = blockDim.x / kWarpSize;
    const float z = warp_sum(group.z);
    const int tokens = __reduce_add_sync(kAllLanes, group.tokens);
    if (lane == 0) {
      warp_z[warp] = z;
      warp_tokens[warp] = tokens;
    }
    __syncthreads();
    const int64_t begin = blockIdx.x * call.experts;
    for (int e = threadIdx.x; e < call.experts; e += blockDim.x) {
      float sum = 0.0f;
#pragma unroll 8
      for (int g = 0; g < groups; ++g) sum += scores[g * columns + e];
      call.stats.block_sums[begin + e] = sum;
      call.stats.block_counts[begin + e] = counts[e];
    }
    if (warp != 0) return;
    const float sum = warp_sum(lane < warps ? warp_z[lane] : 0.0f);
    const int count = __reduce_add_sync(kAllLanes, lane < warps ? warp_tokens[lane] : 0);
    if (lane == 0) {
      call.stats.block_z[blockIdx.x] = sum;
      call.stats.block_tokens[blockIdx.x] = count;
    }
  }
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_STATS_CUH_
