// The forward of `scores`.

#include <type_traits>

#include "scores.cuh"
#include "scores.h"
#include "warp.cuh"

namespace jax_router {
namespace {

template <typename T, Score kScore, bool kBlock>
__global__ void __launch_bounds__(kBlock ? kMostThreads : kWarpThreads)
    scores_kernel(const __grid_constant__ ScoresForward call,
                  const __grid_constant__ Slicing slicing) {
  __shared__ float partials[2][kMostWarps];
  const Part part = part_of_thread<kBlock>(call, slicing);
  float y[kPart];
  load_part(static_cast<const T*>(call.logits), part, y);
#pragma unroll
  for (int i = 0; i < kPart; ++i) y[i] = without_nan(y[i]);
  const float largest = largest_of_row<kScore, kBlock>(y, slicing.threads, partials[0]);
#pragma unroll
  for (int i = 0; i < kPart; ++i) y[i] = score_of_logit<kScore>(y[i], largest).y;
  const float sum = reduce_sum<kBlock>(sum_of_part(y), slicing.threads, partials[1]);
  const float inverse = 1.0f / (sum + kEpsilon);
#pragma unroll
  for (int i = 0; i < kPart; ++i) y[i] *= inverse;
  store_part(call.scores, part, y);
}

template <typename T, Score kScore>
__global__ void __launch_bounds__(kMostThreads)
    scores_loop_kernel(const __grid_constant__ ScoresForward call) {
  __shared__ float partials[2][kMostWarps];
  const int64_t token = blockIdx.x;
  float* scores = call.scores + token * call.experts;
  if (call.where != nullptr && !call.where[token]) {
    for (int64_t e = threadIdx.x; e < call.experts; e += kMostThreads) scores[e] = 0.0f;
    return;
  }
  const auto row = read_row<T, kScore>(call, token, partials);
  for (int64_t e = threadIdx.x; e < call.experts; e += kMostThreads) {
    scores[e] = row.scored(e).y * row.inverse;
  }
}

}  // namespace

cudaError_t launch_scores(const ScoresForward& call, cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool aligned = allows_fours(call.logits, call.experts, sizeof(T)) &&
                         allows_fours(call.scores, call.experts, sizeof(float));
    return with_score(call.score, [&](auto score) {
      return launch_scores_rows(call, aligned, scores_kernel<T, score.value, false>,
                                scores_kernel<T, score.value, true>,
                                scores_loop_kernel<T, score.value>, stream);
    });
  });
}

}  // namespace jax_router
