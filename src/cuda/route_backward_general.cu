// The backward for every k: one warp a token. The formulas are those of src/cpu/route_backward.cc.
//
// The gradient of a row is built in shared memory, which is all zero between rows, and written
// once. An expert given twice gets the sum of its slots in slot order.

#include <cstdint>

#include "joint.cuh"
#include "route.h"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {
namespace {

struct Slot {
  int expert;  // -1 without gradient
  float h;     // scale * cotangent
  float p;     // weight / scale
};

template <typename T>
__device__ __forceinline__ Slot slot_at(const RouteBackward& call, const RouteOptions& options,
                                        int64_t token, int i) {
  if (i >= options.k) return {-1, 0.0f, 0.0f};
  const int64_t at = token * options.k + i;
  const int64_t expert = load_index(call.indices, call.index_bytes, at);
  const float weight = call.weights[at];
  const bool filled = __float_as_int(weight) == INT32_MIN;  // -0
  if (filled || expert >= call.experts) return {-1, 0.0f, 0.0f};
  const float inverse_scale = options.scale != 0.0f ? 1.0f / options.scale : 0.0f;
  const float cotangent =
      call.dense_cotangent
          ? to_float(static_cast<const T*>(call.cotangent)[token * call.experts + expert])
          : static_cast<const float*>(call.cotangent)[at];
  return {static_cast<int>(expert), cotangent * options.scale, weight * inverse_scale};
}

// Adds the lanes' values up into the row. Lanes with the same expert are added in lane order by the
// first of them, so no two lanes touch the same place.
__device__ __forceinline__ void accumulate(float* row, int expert, float value, int lane) {
  const unsigned same = __match_any_sync(kAllLanes, expert);
  float sum = 0.0f;
  for (int other = 0; other < kWarpSize; ++other) {
    const float theirs = __shfl_sync(kAllLanes, value, other);
    if (same & (1u << other)) sum += theirs;
  }
  if (expert >= 0 && (same & lanes_below(lane)) == 0) row[expert] += sum;
  __syncwarp();
}

// As above where no expert comes twice.
__device__ __forceinline__ void accumulate_distinct(float* row, int expert, float value, int lane) {
  const unsigned same = __match_any_sync(kAllLanes, expert);
  const bool twice = expert >= 0 && __popc(same) > 1;
  if (__any_sync(kAllLanes, twice)) {
    accumulate(row, expert, value, lane);
    return;
  }
  if (expert >= 0) row[expert] += value;
  __syncwarp();
}

template <typename T>
__device__ void write_row(const float* row, int experts, T* gradient, int lane) {
  for (int e = lane; e < experts; e += kWarpSize) store_value(gradient + e, row[e]);
}

// The forward's softmax again: the largest logit is exact, the sum of the terms was saved.
template <typename T>
__device__ void write_dense(const float* row, const T* logits, float mean, float total, int experts,
                            T* gradient, int lane) {
  float largest = -kLargest;
  for (int e = lane; e < experts; e += kWarpSize) {
    largest = fmaxf(largest, float_from_key(key_from_bits(load_bits(logits + e))));
  }
  largest = fminf(warp_max(largest), kLargest);
  for (int e = lane; e < experts; e += kWarpSize) {
    const float x = float_from_key(key_from_bits(load_bits(logits + e)));
    store_value(gradient + e, softmax_term(x, largest) / total * (row[e] - mean));
  }
}

// The gradient of the weights, in the row so far, and of the statistics.
template <bool kElementwise, typename T>
__device__ void write_joint(const RouteBackward& call, const RouteOptions& options, int64_t token,
                            const float* row, float mean, T* gradient, int lane) {
  const int experts = static_cast<int>(call.experts);
  const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
  const float* cotangent = score_cotangents(call, token);
  const auto cotangent_at = [&](int e) { return cotangent == nullptr ? 0.0f : cotangent[e]; };
  const auto each = [&](auto visit) {
    for (int e = lane; e < experts; e += kWarpSize) visit(to_float(logits[e]), cotangent_at(e));
  };
  const JointRow joint = joint_row<kElementwise>(
      call, options, call.softmax[token], z_cotangent_of(call, token), mean, cotangent, each);
  for (int e = lane; e < experts; e += kWarpSize) {
    const float x = to_float(logits[e]);
    const float own = options.dense_gradient() ? row[e] * joint.probability(x) : row[e];
    store_value(gradient + e, joint.alive()
                                  ? own + joint.template gradient<kElementwise>(x, cotangent_at(e))
                                  : own);
  }
}

template <typename T>
__device__ void backward_token(const RouteBackward& call, const RouteOptions& options,
                               int64_t token, float* row, int lane) {
  const int experts = static_cast<int>(call.experts);
  T* gradient = static_cast<T*>(call.gradient) + token * call.experts;
  const bool joint = call.softmax != nullptr;
  const float normalizer = call.weights == nullptr ? 1.0f : call.normalizer[token];
  if (normalizer != normalizer && !joint) {  // padding, or no key above -inf
    write_row(row, experts, gradient, lane);
    return;
  }
  const bool weighed = call.weights != nullptr && normalizer == normalizer;
  const int k = weighed ? static_cast<int>(options.k) : 0;
  float mean = 0.0f;
  for (int i = lane; i < k; i += kWarpSize) {
    const Slot slot = slot_at<T>(call, options, token, i);
    mean += slot.h * slot.p;
  }
  mean = warp_sum(mean);
  const bool dense = options.dense_gradient();
  for (int begin = 0; begin < k; begin += kWarpSize) {
    const Slot slot = slot_at<T>(call, options, token, begin + lane);
    float value = slot.h;
    if (!dense && options.score == Score::kSoftmax) {
      value = slot.p * (slot.h - mean);
    } else if (!dense) {
      if (options.renormalize) value = (value - mean) / normalizer;
      value *= score_gradient(slot.p * normalizer, options.score);
    }
    accumulate_distinct(row, slot.expert, value, lane);
  }
  if (joint) {
    __syncwarp();
    if (options.score == Score::kSoftmax) {
      write_joint<false>(call, options, token, row, mean, gradient, lane);
    } else {
      write_joint<true>(call, options, token, row, mean, gradient, lane);
    }
  } else if (dense) {
    const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
    write_dense(row, logits, mean, normalizer, experts, gradient, lane);
  } else {
    write_row(row, experts, gradient, lane);
  }
  __syncwarp();
  for (int i = lane; i < k; i += kWarpSize) {
    const Slot slot = slot_at<T>(call, options, token, i);
    if (slot.expert >= 0) row[slot.expert] = 0.0f;
  }
  __syncwarp();
}

template <typename T>
__global__ void __launch_bounds__(8 * kWarpSize, 4)
    route_backward_general_kernel(const __grid_constant__ RouteBackward call,
                                  const __grid_constant__ RouteOptions options) {
  extern __shared__ float rows_of_block[];
  const WarpRows rows = warp_rows();
  const int experts = static_cast<int>(call.experts);
  float* row = rows_of_block + static_cast<int64_t>(rows.warp) * experts;
  for (int e = rows.lane; e < experts; e += kWarpSize) row[e] = 0.0f;
  __syncwarp();
  for (int64_t token = rows.first; token < call.tokens; token += rows.stride) {
    backward_token<T>(call, options, token, row, rows.lane);
  }
}

}  // namespace

cudaError_t launch_route_backward_general(const RouteBackward& call, const RouteOptions& options,
                                          cudaStream_t stream) {
  const int64_t bytes = call.experts * static_cast<int64_t>(sizeof(float));
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_rows(route_backward_general_kernel<T>, call.tokens, bytes, stream, call, options);
  });
}

}  // namespace jax_router
