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
  float largest;
  float factor;   // 1 / sum of the softmax terms, 0 where the row has no statistics
  float offset;   // what a probability is multiplied by, besides the cotangent of its score
  float inverse;  // 1 / sum of the scores, where these are not softmax
  float mean;     // of the cotangents over these scores

  __device__ __forceinline__ bool alive() const { return factor > 0.0f; }

  __device__ __forceinline__ float probability(float x) const {
    return fast_term(x, largest) * factor;
  }

  // Gradient of a logit whose score has cotangent s.
  __device__ __forceinline__ float gradient(float x, float s) const {
    if (score == Score::kSoftmax) return probability(x) * (s + offset);
    float result = offset != 0.0f ? probability(x) * offset : 0.0f;
    if (cotangent != nullptr && x > -kInfinity) {
      result += (s - mean) * inverse * score_gradient(fast_score(x, score), score);
    }
    return result;
  }
};

// Prepares a row for a whole warp; `each(visit)` calls visit(logit, cotangent) for the elements of
// the lane. `mean`: sum of h p over the slots, see route_backward.
template <typename Each>
__device__ __forceinline__ JointRow joint_row(const RouteBackward& call,
                                              const RouteOptions& options, int64_t token,
                                              float mean, const float* cotangent, Each each) {
  const SavedSoftmax softmax = call.softmax[token];
  const bool alive = softmax.total > 0.0f;
  JointRow row{cotangent, options.score, softmax.largest, alive ? 1.0f / softmax.total : 0.0f, 0.0f,
               0.0f,      0.0f};
  if (!alive) return row;
  if (options.dense_gradient()) row.offset = -mean;
  if (call.z_cotangent != nullptr) {
    const float logsumexp = softmax.largest + logf(softmax.total);
    row.offset += 2.0f * call.z_cotangent[token / call.tokens_per_batch] * logsumexp;
  }
  if (cotangent == nullptr) return row;
  float product = 0.0f;
  if (options.score == Score::kSoftmax) {
    each([&](float x, float s) { product = fmaf(fast_term(x, row.largest), s, product); });
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

// The cotangents of the score sums that a token's experts have, null where there are none.
__device__ __forceinline__ const float* score_cotangents(const RouteBackward& call, int64_t token) {
  if (call.score_cotangent == nullptr) return nullptr;
  return call.score_cotangent + token / call.tokens_per_batch * call.experts;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_JOINT_CUH_
