// The gradient of the statistics of one row. The formulas are those of src/cpu/route_backward.cc.

#ifndef JAX_ROUTER_CUDA_JOINT_CUH_
#define JAX_ROUTER_CUDA_JOINT_CUH_

#include <cstdint>

#include "options.h"
#include "row.cuh"
#include "scalar.h"
#include "stats.cuh"
#include "warp.cuh"

namespace jax_router {

// What every element of a row has in common.
struct JointRow {
  const float* cotangent;  // of the score sums, of the row's experts, or null
  Score score;
  Exponential exponential;
  float factor;   // makes a probability of a term, 0 where the row has no statistics
  float offset;   // what a probability is multiplied by, besides the cotangent of its score
  float inverse;  // 1 / sum of the scores, where these are not softmax
  float mean;     // of the cotangents over these scores

  __device__ __forceinline__ bool alive() const { return factor > 0.0f; }

  __device__ __forceinline__ float probability(float x) const {
    return exponential.term(x) * factor;
  }

  // Gradient of a logit whose score has cotangent s.
  template <bool kElementwise>
  __device__ __forceinline__ float gradient(float x, float s) const {
    if constexpr (!kElementwise) return probability(x) * (s + offset);
    float result = offset != 0.0f ? probability(x) * offset : 0.0f;
    if (cotangent != nullptr && x > -kInfinity) {
      result += (s - mean) * inverse * score_gradient(fast_score(x, score), score);
    }
    return result;
  }
};

// Prepares a row for a whole warp; kElementwise: the scores are not softmax; `each(visit)` calls
// visit(logit, cotangent) for the elements of the lane. `mean`: sum of h p over the slots, see
// route_backward.
template <bool kElementwise, typename Each>
__device__ __forceinline__ JointRow joint_row(const RouteBackward& call,
                                              const RouteOptions& options, SavedSoftmax softmax,
                                              float z_cotangent, float mean, const float* cotangent,
                                              Each each) {
  const bool alive = softmax.total > 0.0f;
  JointRow row{cotangent, options.score, Exponential(softmax.largest), 0.0f, 0.0f, 0.0f, 0.0f};
  if (!alive) return row;
  row.factor = row.exponential.scale() / softmax.total;
  if (options.dense_gradient()) row.offset = -mean;
  if (call.z_cotangent != nullptr) {
    const float logsumexp = softmax.largest + logf(softmax.total);
    row.offset += 2.0f * z_cotangent * logsumexp;
  }
  if (cotangent == nullptr) return row;
  float product = 0.0f;
  if constexpr (!kElementwise) {
    if (row.exponential.near) {
      each([&](float x, float s) { product = fmaf(row.exponential.near_number(x), s, product); });
    } else {
      each([&](float x, float s) { product = fmaf(row.exponential.term(x), s, product); });
    }
    row.offset -= warp_sum(product) * row.factor;
  } else {
    float total = 0.0f;
    each([&](float x, float s) {
      const float y = fast_score(x, options.score);
      total += y;
      product = fmaf(y, s, product);
    });
    row.inverse = 1.0f / (warp_sum(total) + kEpsilon);
    row.mean = warp_sum(product) * row.inverse;
  }
  return row;
}

// The batch row of a token. A division of 64 bits takes a hundred instructions.
__device__ __forceinline__ int64_t batch_of(const RouteBackward& call, int64_t token) {
  return call.tokens == call.tokens_per_batch ? 0 : token / call.tokens_per_batch;
}

__device__ __forceinline__ float z_cotangent_of(const RouteBackward& call, int64_t token) {
  return call.z_cotangent == nullptr ? 0.0f : call.z_cotangent[batch_of(call, token)];
}

// The cotangents of the score sums that a token's experts have, null where there are none.
__device__ __forceinline__ const float* score_cotangents(const RouteBackward& call, int64_t token) {
  if (call.score_cotangent == nullptr) return nullptr;
  return call.score_cotangent + batch_of(call, token) * call.experts;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_JOINT_CUH_
