// The joint backward of `stats` where a warp holds its row in registers: all loads of a token are
// under way before the first is used, and the gradient is stored from registers.

#include <cstdint>
#include <type_traits>

#include "backward.cuh"
#include "joint.cuh"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kMostChunks = 18;            // of a lane
constexpr int kMostElementwiseChunks = 8;  // where scores are not softmax: their code is long

// Whether two slots of the token have the same expert.
template <int kPasses>
__device__ __forceinline__ bool any_equal(const Group<kPasses>& group) {
  bool twice = false;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int expert = group.slots[i].expert;
    const unsigned equal = __match_any_sync(kAllLanes, expert);
    twice = twice || (expert >= 0 && (equal & (equal - 1)) != 0);
#pragma unroll
    for (int before = 0; before < i; ++before) {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int other = __shfl_sync(kAllLanes, group.slots[before].expert, lane);
        twice = twice || (other >= 0 && other == expert);
      }
    }
  }
  return __any_sync(kAllLanes, twice);
}

// The lane's part of a row of logits, and where it goes.
template <typename T, int kChunks>
struct WarpRow {
  Four<T> raw[kChunks];
  const float* cotangent;
  T* gradient;
  int experts;
  int lane;

  __device__ __forceinline__ int position(int j) const { return 4 * (j * kWarpSize + lane); }

  __device__ __forceinline__ void load(const T* logits) {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      raw[j] = position(j) < experts ? Four<T>::load(logits + position(j)) : Four<T>::lowest();
    }
  }
  __device__ __forceinline__ void cotangents(int j, float (&s)[4]) const {
    if (cotangent != nullptr && position(j) < experts) {
      Four<float>::load(cotangent + position(j)).unpack(s);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[c] = 0.0f;
    }
  }
  template <typename Visit>
  __device__ __forceinline__ void visit(Visit visit) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float x[4];
      float s[4];
      raw[j].unpack(x);
      cotangents(j, s);
#pragma unroll
      for (int c = 0; c < 4; ++c) visit(x[c], s[c]);
    }
  }
  // Stores `function(logit, cotangent)` of every logit.
  template <typename Function>
  __device__ __forceinline__ void store(Function function) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      float x[4];
      float s[4];
      raw[j].unpack(x);
      cotangents(j, s);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = function(x[c], s[c]);
      if (position(j) < experts) Four<T>::pack(x).store(gradient + position(j));
    }
  }
};

// Blocks that a processor must have room for: as many as leave a thread the registers it needs.
constexpr int least_blocks(int chunks, int passes, bool wide) {
  if (chunks <= 4) return 7;
  if (chunks <= 8) return 5;
  return wide && passes > 1 ? 3 : 4;
}

template <typename T, int kChunks, int kPasses, bool kElementwise>
__global__ void __launch_bounds__(kMostWarps* kWarpSize,
                                  least_blocks(kChunks, kPasses, sizeof(T) == 4))
    route_stats_backward_warp_kernel(const __grid_constant__ RouteBackward call,
                                     const __grid_constant__ RouteOptions options) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kMostWarps + warp_index();
  if (token >= call.tokens) return;
  const T* const logits = static_cast<const T*>(call.logits) + token * call.experts;
  const float* const cotangent = score_cotangents(call, token);
  T* const gradient = static_cast<T*>(call.gradient) + token * call.experts;
  WarpRow<T, kChunks> row{{}, cotangent, gradient, static_cast<int>(call.experts), lane};
  row.load(logits);
  const SavedSoftmax softmax = call.softmax[token];
  const float z_cotangent = z_cotangent_of(call, token);
  constexpr Tiling kOneRow{1, kWarpSize, 0, true};
  auto group = load_group<T, kPasses>(call, options, kOneRow, token, 0, 1, lane);
  float chosen[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int expert = group.slots[i].expert;
    chosen[i] = expert < 0 ? 0.0f : to_float(logits[expert]);
  }
  const JointRow joint = joint_row<kElementwise>(call, options, softmax, z_cotangent, group.mean,
                                                 cotangent, [&](auto visit) { row.visit(visit); });
  if (!joint.alive()) {
    row.store([](float, float) { return 0.0f; });
  } else if (!kElementwise && joint.exponential.near) {
    const float offset = joint.offset * joint.factor;
    row.store([&](float x, float s) {
      return joint.exponential.near_number(x) * fmaf(s, joint.factor, offset);
    });
  } else {
    row.store([&](float x, float s) { return joint.template gradient<kElementwise>(x, s); });
  }
  if (call.weights == nullptr) return;
  float values[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const Slot& slot = group.slots[i];
    values[i] = options.dense_gradient()
                    ? slot.h * joint.probability(chosen[i])
                    : slot_gradient(slot, options, group.mean, group.normalizer);
  }
  if (any_equal(group)) merge_equal(group, values, kWarpSize, lane);
  __syncwarp();  // the chosen experts are stored after the row
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int expert = group.slots[i].expert;
    if (expert < 0) continue;
    const float s = cotangent != nullptr ? __ldg(cotangent + expert) : 0.0f;
    store_value(gradient + expert, values[i] + joint.template gradient<kElementwise>(chosen[i], s));
  }
}

template <typename T, int kChunks, bool kElementwise>
cudaError_t launch(const RouteBackward& call, const RouteOptions& options, cudaStream_t stream) {
  const auto kernel = options.k <= kWarpSize
                          ? route_stats_backward_warp_kernel<T, kChunks, 1, kElementwise>
                          : route_stats_backward_warp_kernel<T, kChunks, 2, kElementwise>;
  const unsigned blocks = static_cast<unsigned>((call.tokens + kMostWarps - 1) / kMostWarps);
  return launch_blocks(kernel, blocks, kMostWarps, 0, stream, call, options);
}

}  // namespace

bool stats_backward_warp_fits(const RouteBackward& call, const RouteOptions& options) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(call.gradient) |
                              reinterpret_cast<uintptr_t>(call.logits) |
                              reinterpret_cast<uintptr_t>(call.score_cotangent);
  const int chunks = options.score == Score::kSoftmax ? kMostChunks : kMostElementwiseChunks;
  return options.k <= 2 * kWarpSize && addresses % 16 == 0 && call.experts % 4 == 0 &&
         call.experts <= chunks * 4 * kWarpSize;
}

cudaError_t launch_stats_backward_warp(const RouteBackward& call, const RouteOptions& options,
                                       cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_bool(options.score != Score::kSoftmax, [&](auto elementwise) {
      constexpr bool kElementwise = decltype(elementwise)::value;
      if (call.experts <= 512) return launch<T, 4, kElementwise>(call, options, stream);
      if (kElementwise || call.experts <= 1024) {
        return launch<T, 8, kElementwise>(call, options, stream);
      }
      return launch<T, kElementwise ? 8 : kMostChunks, kElementwise>(call, options, stream);
    });
  });
}

}  // namespace jax_router
