// The backward of `scores`. The formulas are those of src/cpu/scores.cc.

#include <type_traits>

#include "scores.cuh"
#include "scores.h"
#include "warp.cuh"

namespace jax_router {
namespace {

// The gradient of a logit. The slope is 0 where there must be none, whatever the other factors.
__device__ __forceinline__ float gradient_of(float cotangent, float mean, float inverse,
                                             float slope) {
  return slope != 0.0f ? (cotangent - mean) * inverse * slope : 0.0f;
}

template <typename T, Score kScore, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kWarpThreads)
    scores_backward_kernel(const __grid_constant__ ScoresBackward call,
                           const __grid_constant__ Slicing slicing) {
  __shared__ float partials[3][kMostWarps];
  const Part part = part_of_thread<kBlock>(call, slicing);
  float slope[kPart];  // first the logits
  float g[kPart];
  load_part(static_cast<const T*>(call.logits), part, slope);
  load_part(call.cotangent, part, g);
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    slope[i] = without_nan(slope[i]);
    g[i] = cotangent_of(g[i], slope[i]);
  }
  const float largest = largest_of_row<kScore, kBlock>(slope, slicing.threads, partials[0]);
  float y[kPart];
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const Scored scored = score_of_logit<kScore>(slope[i], largest);
    y[i] = scored.y;
    slope[i] = scored.slope;
  }
  const float sum = reduce_sum<kBlock>(sum_of_part(y), slicing.threads, partials[1]);
  const float inverse = 1.0f / (sum + kEpsilon);
#pragma unroll
  for (int i = 0; i < kPart; ++i) y[i] = g[i] * (y[i] * inverse);
  const float mean = reduce_sum<kBlock>(sum_of_part(y), slicing.threads, partials[2]);
#pragma unroll
  for (int i = 0; i < kPart; ++i) y[i] = gradient_of(g[i], mean, inverse, slope[i]);
  store_part(static_cast<T*>(call.gradient), part, y);
}

template <typename T, Score kScore>
__global__ void __launch_bounds__(kMostThreads)
    scores_backward_loop_kernel(const __grid_constant__ ScoresBackward call) {
  __shared__ float partials[3][kMostWarps];
  const int64_t token = blockIdx.x;
  const int64_t begin = token * call.experts;
  const float* cotangent = call.cotangent + begin;
  T* gradient = static_cast<T*>(call.gradient) + begin;
  if (call.where != nullptr && !call.where[token]) {
    for (int64_t e = threadIdx.x; e < call.experts; e += kMostThreads) {
      store_value(gradient + e, 0.0f);
    }
    return;
  }
  const auto row = read_row<T, kScore>(call, token, partials);
  const float part = row.template sum<true>(cotangent);
  const float mean = reduce_sum<true>(part, kMostThreads, partials[2]);
  for (int64_t e = threadIdx.x; e < call.experts; e += kMostThreads) {
    const float g = row.cotangent(cotangent, e);
    store_value(gradient + e, gradient_of(g, mean, row.inverse, row.scored(e).slope));
  }
}

}  // namespace

cudaError_t launch_scores_backward(const ScoresBackward& call, cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = allows_fours(call.logits, call.experts, sizeof(T)) &&
                         allows_fours(call.cotangent, call.experts, sizeof(float)) &&
                         allows_fours(call.gradient, call.experts, sizeof(T));
    return with_score(call.score, [&](auto score) {
      return launch_scores_rows(call, aligned, scores_backward_kernel<T, score.value, false>,
                                scores_backward_kernel<T, score.value, true>,
                                scores_backward_loop_kernel<T, score.value>, stream);
    });
  });
}

}  // namespace jax_router
