// The backward of `route` and `dense` from dense indices. The formulas are those of
// src/cpu/route_backward.cc.
//
// A warp makes the gradient of a tile, a few neighbouring rows, in shared memory and writes it in
// one piece. Where the gradient is sparse the tile starts as zeros; where it is dense, as the
// logits, which turn into their gradient in place.

#include <cstdint>

#include "backward.cuh"
#include "bulk.cuh"
#include "route.h"
#include "row.cuh"
#include "warp.cuh"

namespace jax_router {
namespace {

// Turns a row of logits in shared memory into its softmax times -mean, in place. Returns the
// largest logit: the forward's, exactly; the sum of the terms was saved.
template <typename T>
__device__ __forceinline__ float transform_row(T* row, int experts, float mean, float total,
                                               int lane) {
  const bool alive = total == total;
  const float factor = alive ? (0.0f - mean) / total : 0.0f;
  const int whole = experts % 4 == 0 ? experts : 0;  // in fours, which then are aligned
  float largest = -kLargest;
  for (int e = 4 * lane; e < whole; e += 4 * kWarpSize) {
    float x[4];
    Four<T>::load(row + e).unpack(x);
    largest = fmaxf(largest, fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
  }
  for (int e = whole + lane; e < experts; e += kWarpSize)
    largest = fmaxf(largest, to_float(row[e]));
  largest = fminf(warp_max(largest), kLargest);
  for (int e = 4 * lane; e < whole; e += 4 * kWarpSize) {
    float x[4];
    Four<T>::load(row + e).unpack(x);
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = alive ? fast_term(x[c], largest) * factor : 0.0f;
    Four<T>::pack(x).store(row + e);
  }
  for (int e = whole + lane; e < experts; e += kWarpSize) {
    const float x = fast_term(to_float(row[e]), largest) * factor;
    store_value(row + e, alive ? x : 0.0f);
  }
  return largest;
}

// Makes the gradient of the rows of a group, in a tile of zeros or of logits.
template <typename T, bool kDense, int kPasses>
__device__ __forceinline__ void apply_group(const RouteOptions& options, const Tiling& tiling,
                                            Group<kPasses>& group, int experts, int tokens, T* tile,
                                            int lane) {
  T* const row = tile + group.row * experts;
  float values[kPasses];
  float logits[kPasses];
  float largest = 0.0f;
  if constexpr (kDense) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      values[i] = group.slots[i].h;
      logits[i] = group.slots[i].expert < 0 ? 0.0f : to_float(row[group.slots[i].expert]);
    }
    __syncwarp();
    for (int g = 0; g < kWarpSize / tiling.lanes; ++g) {
      const int source = g * tiling.lanes;
      const int r = __shfl_sync(kAllLanes, group.row, source);
      if (r >= tokens) break;
      const float mean = __shfl_sync(kAllLanes, group.mean, source);
      const float total = __shfl_sync(kAllLanes, group.normalizer, source);
      const float found = transform_row(tile + r * experts, experts, mean, total, lane);
      if (r == group.row) largest = found;
    }
    __syncwarp();
  } else {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      values[i] = slot_gradient(group.slots[i], options, group.mean, group.normalizer);
    }
  }
  if (any_twice(group, row, lane)) merge_equal(group, values, tiling.lanes, lane);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    if (group.slots[i].expert < 0) continue;
    if constexpr (kDense) {
      const float y = fast_term(logits[i], largest) / group.normalizer;
      values[i] = y * (values[i] - group.mean);
    }
    store_value(row + group.slots[i].expert, values[i]);
  }
}

template <typename T, bool kDense, int kPasses>
__global__ void __launch_bounds__(kMostWarps* kWarpSize,
                                  kPasses == 1 ? (kDense ? 9 : 12) : (kPasses < 8 ? 8 : 6))
    route_backward_kernel(const __grid_constant__ RouteBackward call,
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
  const int64_t begin = first * call.experts;
  if constexpr (kDense) {
    const T* logits = static_cast<const T*>(call.logits) + begin;
    if (bulk) {
      if (lane == 0) {
        barriers[warp].init();
        barriers[warp].load(tile, logits, bytes);
      }
    } else {
      copy_tile(tile, logits, bytes, tiling.aligned, lane);
    }
  }
  auto group = load_group<T, kPasses>(call, options, tiling, first, 0, tokens, lane);
  if constexpr (kDense) {
    __syncwarp();
    if (bulk) barriers[warp].wait(0);
  } else {
    int4* words = reinterpret_cast<int4*>(tile);
    for (int i = lane; i < tile_bytes / 16; i += kWarpSize) words[i] = make_int4(0, 0, 0, 0);
  }
  __syncwarp();
  const int experts = static_cast<int>(call.experts);
  const int together = kWarpSize / tiling.lanes;
  for (int r = 0; r < tokens; r += together) {
    if (r > 0) group = load_group<T, kPasses>(call, options, tiling, first, r, tokens, lane);
    apply_group<T, kDense>(options, tiling, group, experts, tokens, tile, lane);
  }
  T* const gradient = static_cast<T*>(call.gradient) + begin;
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

template <typename T, bool kDense, int kPasses>
cudaError_t launch(const RouteBackward& call, const RouteOptions& options, const Tiling& tiling,
                   cudaStream_t stream) {
  return launch_tiles(route_backward_kernel<T, kDense, kPasses>, call, options, tiling, stream);
}

template <typename T>
cudaError_t launch_type(const RouteBackward& call, const RouteOptions& options,
                        cudaStream_t stream) {
  const Tiling tiling = tile_rows(call, options, sizeof(T));
  return with_bool(options.dense_gradient(), [&](auto dense) {
    return with_passes(options, tiling, [&](auto passes) {
      return launch<T, dense.value, passes.value>(call, options, tiling, stream);
    });
  });
}

}  // namespace

cudaError_t launch_route_backward(const RouteBackward& call, const RouteOptions& options,
                                  cudaStream_t stream) {
  if (call.tokens == 0) return cudaSuccess;
  if (call.softmax != nullptr) return launch_stats_backward(call, options, stream);
  if (options.k > kMostSlots) return launch_route_backward_general(call, options, stream);
  return with_type(call.logits_type, [&](auto* type) {
    return launch_type<std::remove_pointer_t<decltype(type)>>(call, options, stream);
  });
}

}  // namespace jax_router
