// The forward of `route` on NVIDIA GPUs: one warp a token, one round a slot.

#include <cstdint>

#include "route.h"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kWarpsPerBlock = 8;

// Key and index in one integer: of equal keys the lower index is the larger.
__device__ __forceinline__ int64_t pack(int32_t key, int32_t expert) {
  return (static_cast<int64_t>(key) << 32) | (0xffffffffu - static_cast<uint32_t>(expert));
}
__device__ __forceinline__ int32_t packed_key(int64_t pair) {
  return static_cast<int32_t>(pair >> 32);
}
__device__ __forceinline__ int32_t packed_expert(int64_t pair) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(pair));
}

// The best pair of a row below `limit`.
__device__ int64_t best_below(const float* logits, int experts, int64_t limit, int lane) {
  int64_t best = INT64_MIN;
  for (int e = lane; e < experts; e += kWarpSize) {
    const int64_t pair = pack(key_from_float(logits[e]), e);
    if (pair < limit && pair > best) best = pair;
  }
  return warp_max(best);
}

struct Softmax {
  float largest;
  float total;
};

// Largest logit and sum of the softmax terms of a whole row.
__device__ Softmax softmax_of(const float* logits, int experts, int lane) {
  float largest = -kLargest;
  for (int e = lane; e < experts; e += kWarpSize) {
    const float x = float_from_key(key_from_float(logits[e]));
    largest = fmaxf(largest, fminf(x, kLargest));
  }
  largest = warp_max(largest);
  float total = 0.0f;
  for (int e = lane; e < experts; e += kWarpSize) {
    const float x = float_from_key(key_from_float(logits[e]));
    total += exp_nonpositive(fminf(x, kLargest) - largest);
  }
  total = warp_sum(total);
  return {largest, total > 0.0f ? total : 1.0f};
}

// Unscaled weight of a chosen logit before it is divided by the sum of all.
__device__ __forceinline__ float unnormalized(float x, float largest, Score score) {
  if (score != Score::kSoftmax) return elementwise_score(x, score);
  return exp_nonpositive(fminf(x, kLargest) - largest);
}

template <typename Index>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    route_kernel(RouteForward call, RouteOptions options) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (token >= call.tokens) return;
  const int lane = threadIdx.x % kWarpSize;
  const int experts = static_cast<int>(call.experts);
  const int k = static_cast<int>(options.k);
  const float* logits = static_cast<const float*>(call.logits) + token * call.experts;
  Index* indices = static_cast<Index*>(call.indices) + token * k;
  float* weights = call.weights + token * k;

  // Rounds: the chosen experts and, in the place of the weights, their logits.
  int64_t last = INT64_MAX;
  float largest = -kLargest;
  bool degenerate = false;
  for (int slot = 0; slot < k; ++slot) {
    last = best_below(logits, experts, last, lane);
    const float x = float_from_key(packed_key(last));
    if (slot == 0) {
      degenerate = packed_key(last) <= kLowestKey;
      largest = fmaxf(fminf(x, kLargest), -kLargest);
    }
    if (slot % kWarpSize == lane) {
      indices[slot] = static_cast<Index>(packed_expert(last));
      weights[slot] = x;
    }
  }

  float total = 1.0f;
  float normalizer = 1.0f;
  if (options.dense_gradient()) {
    const Softmax softmax = softmax_of(logits, experts, lane);
    total = softmax.total;
    normalizer = softmax.largest + logf(softmax.total);
  } else if (options.renormalize) {
    float sum = 0.0f;
    for (int slot = lane; slot < k; slot += kWarpSize) {
      sum += unnormalized(weights[slot], largest, options.score);
    }
    sum = warp_sum(sum);
    total = options.score == Score::kSoftmax ? fmaxf(sum, kEpsilon) : sum + kEpsilon;
    normalizer = options.score == Score::kSoftmax ? 1.0f : total;
  }

  for (int slot = lane; slot < k; slot += kWarpSize) {
    const float x = weights[slot];
    // Adding 0 turns an honest -0 into +0: -0 marks a slot without gradient.
    const float weight = unnormalized(x, largest, options.score) / total * options.scale + 0.0f;
    weights[slot] = degenerate ? 1.0f / static_cast<float>(k) : x > -kInfinity ? weight : -0.0f;
  }
  if (lane == 0) call.normalizer[token] = degenerate ? __int_as_float(0x7fc00000) : normalizer;
}

template <typename Index>
cudaError_t launch(const RouteForward& call, const RouteOptions& options, cudaStream_t stream) {
  const int64_t blocks = (call.tokens + kWarpsPerBlock - 1) / kWarpsPerBlock;
  route_kernel<Index>
      <<<static_cast<unsigned>(blocks), kWarpsPerBlock * kWarpSize, 0, stream>>>(call, options);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_route(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream) {
  if (call.tokens == 0) return cudaSuccess;
  switch (call.index_bytes) {
    case 1:
      return launch<uint8_t>(call, options, stream);
    case 2:
      return launch<uint16_t>(call, options, stream);
    case 4:
      return launch<uint32_t>(call, options, stream);
    default:
      return launch<uint64_t>(call, options, stream);
  }
}

}  // namespace jax_router
