// The joint backward of `stats` for rows that do not find room in registers, or are not aligned:
// one pass over the logits, which turn into their gradient in place, in tiles like those of
// route_backward.cu.

#include <cstdint>

#include "backward.cuh"
#include "bulk.cuh"
#include "joint.cuh"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

// A row of a tile, and the cotangents of its scores.
template <typename T>
struct TileRow {
  T* logits;
  const float* cotangent;
  int experts;
  bool in_fours;
  int lane;

  __device__ __forceinline__ void load_four(int e, float (&x)[4], float (&s)[4]) const {
    Four<T>::load(logits + e).unpack(x);
    if (cotangent != nullptr) {
      Four<float>::load(cotangent + e).unpack(s);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[c] = 0.0f;
    }
  }
  __device__ __forceinline__ float cotangent_at(int e) const {
    return cotangent != nullptr ? __ldg(cotangent + e) : 0.0f;
  }

  template <typename Visit>
  __device__ __forceinline__ void visit(Visit visit) const {
    const int whole = in_fours ? experts : 0;
#pragma unroll 2
    for (int e = 4 * lane; e < whole; e += 4 * kWarpSize) {
      float x[4];
      float s[4];
      load_four(e, x, s);
#pragma unroll
      for (int c = 0; c < 4; ++c) visit(x[c], s[c]);
    }
    for (int e = whole + lane; e < experts; e += kWarpSize) {
      visit(to_float(logits[e]), cotangent_at(e));
    }
  }

  // Puts `gradient(logit, cotangent)` in place of every logit.
  template <typename Gradient>
  __device__ __forceinline__ void transform(Gradient gradient) const {
    const int whole = in_fours ? experts : 0;
#pragma unroll 2
    for (int e = 4 * lane; e < whole; e += 4 * kWarpSize) {
      float x[4];
      float s[4];
      load_four(e, x, s);
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = gradient(x[c], s[c]);
      Four<T>::pack(x).store(logits + e);
    }
    for (int e = whole + lane; e < experts; e += kWarpSize) {
      store_value(logits + e, gradient(to_float(logits[e]), cotangent_at(e)));
    }
  }
};

// Turns a row of logits into the gradient of the statistics, in place.
template <bool kElementwise, typename T>
__device__ __forceinline__ JointRow transform_row(const RouteBackward& call,
                                                  const RouteOptions& options, int64_t token,
                                                  float mean, T* logits, int lane) {
  const float* cotangent = score_cotangents(call, token);
  const int experts = static_cast<int>(call.experts);
  const bool in_fours = experts % 4 == 0 && reinterpret_cast<uintptr_t>(cotangent) % 16 == 0;
  const TileRow<T> row{logits, cotangent, experts, in_fours, lane};
  const JointRow joint =
      joint_row<kElementwise>(call, options, call.softmax[token], z_cotangent_of(call, token), mean,
                              cotangent, [&](auto visit) { row.visit(visit); });
  if (!joint.alive()) {
    row.transform([](float, float) { return 0.0f; });
  } else if (!kElementwise && joint.exponential.near) {
    const float offset = joint.offset * joint.factor;
    row.transform([&](float x, float s) {
      return joint.exponential.near_number(x) * fmaf(s, joint.factor, offset);
    });
  } else {
    row.transform([&](float x, float s) { return joint.template gradient<kElementwise>(x, s); });
  }
  return joint;
}

constexpr int kPasses = kMostSlots / kWarpSize;  // a token has all lanes

// Makes the gradient of a row of logits, in place.
template <bool kElementwise, typename T>
__device__ __forceinline__ void apply_row(const RouteBackward& call, const RouteOptions& options,
                                          int64_t token, Group<kPasses>& group, T* row, int lane) {
  float values[kPasses];
  float logits[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const Slot& slot = group.slots[i];
    values[i] = options.dense_gradient()
                    ? slot.h
                    : slot_gradient(slot, options, group.mean, group.normalizer);
    logits[i] = slot.expert < 0 ? 0.0f : to_float(row[slot.expert]);
  }
  __syncwarp();
  const JointRow joint = transform_row<kElementwise>(call, options, token, group.mean, row, lane);
  __syncwarp();
  if (call.weights == nullptr) return;
  if (any_twice(group, row, lane)) merge_equal(group, values, kWarpSize, lane);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int expert = group.slots[i].expert;
    if (expert < 0) continue;
    const float s = joint.cotangent != nullptr ? __ldg(joint.cotangent + expert) : 0.0f;
    const float own =
        options.dense_gradient() ? values[i] * joint.probability(logits[i]) : values[i];
    store_value(row + expert, own + joint.template gradient<kElementwise>(logits[i], s));
  }
}

template <typename T, bool kElementwise>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, kElementwise ? 5 : 6)
    route_stats_backward_kernel(const __grid_constant__ RouteBackward call,
                                const __grid_constant__ RouteOptions options,
                                const __grid_constant__ Tiling tiling) {
  extern __shared__ int4 shared_memory[];
  __shared__ CopyBarrier barriers[kMostWarps];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_index();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + warp;
  const int64_t first = index * tiling.rows;
  if (first >= call.tokens) return;
  const int tokens = static_cast<int>(min(int64_t{tiling.rows}, call.tokens - first));
  const int tile_bytes = (tiling.rows * tiling.row_bytes + 15) / 16 * 16;
  T* const tile = reinterpret_cast<T*>(reinterpret_cast<char*>(shared_memory) + warp * tile_bytes);
  const int bytes = tokens * tiling.row_bytes;
  const bool bulk = kHasBulkCopy && tiling.aligned && bytes % 16 == 0;
  const T* const logits = static_cast<const T*>(call.logits) + first * call.experts;
  if (bulk) {
    if (lane == 0) {
      barriers[warp].init();
      barriers[warp].load(tile, logits, bytes);
    }
  } else {
    copy_tile(tile, logits, bytes, tiling.aligned, lane);
  }
  auto group = load_group<T, kPasses>(call, options, tiling, first, 0, tokens, lane);
  __syncwarp();
  if (bulk) barriers[warp].wait(0);
  __syncwarp();
  for (int r = 0; r < tokens; ++r) {
    if (r > 0) group = load_group<T, kPasses>(call, options, tiling, first, r, tokens, lane);
    apply_row<kElementwise>(call, options, first + r, group, tile + r * call.experts, lane);
  }
  T* const gradient = static_cast<T*>(call.gradient) + first * call.experts;
  if (bulk) {
    fence_for_store();
    __syncwarp();
    if (lane == 0) {
      start_store(gradient, tile, bytes);
      wait_for_stores<0>();
    }
  } else {
    __syncwarp();
    copy_tile(gradient, tile, bytes, tiling.aligned, lane);
  }
}

}  // namespace

cudaError_t launch_stats_backward(const RouteBackward& call, const RouteOptions& options,
                                  cudaStream_t stream) {
  if (options.k > kMostSlots) return launch_route_backward_general(call, options, stream);
  if (stats_backward_warp_fits(call, options)) {
    return launch_stats_backward_warp(call, options, stream);
  }
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Tiling tiling = tile_rows(call, options, sizeof(T));
    tiling.lanes = kWarpSize;
    const auto kernel = options.score == Score::kSoftmax ? route_stats_backward_kernel<T, false>
                                                         : route_stats_backward_kernel<T, true>;
    return launch_tiles(kernel, call, options, tiling, stream);
  });
}

}  // namespace jax_router
