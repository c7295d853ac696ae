// The backward of `route` and `dense` from dense indices. The formulas are those of
// src/cpu/route_backward.cc.
//
// A warp makes the gradient of a tile, a few neighbouring rows, in shared memory and writes it in
// one piece. Where the gradient is sparse the tile starts as zeros; where it is dense, as the
// logits, which turn into their gradient in place.

#include <cstdint>

#include "bulk.cuh"
#include "route.h"
#include "row.cuh"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kMostWarps = 4;                // of a block
constexpr int kTileBytes = 8 * 1024;         // of several rows
constexpr int64_t kSharedBytes = 48 * 1024;  // of a block with more than one warp
constexpr int64_t kMostSlots = 64;           // of a token

// Geometry of a launch. Slot i of a token lies in lane i mod `lanes` of it.
struct Tiling {
  int rows;   // of a tile
  int lanes;  // of a token, a power of two
  int row_bytes;
  bool aligned;  // tiles can be copied 16 bytes at a time
};

struct Slot {
  int expert;  // -1 without gradient
  float h;     // scale * cotangent
  float p;     // weight / scale
};

template <typename T>
__device__ __forceinline__ Slot load_slot(const RouteBackward& call, const RouteOptions& options,
                                          int64_t token, int i, bool alive) {
  if (!alive || i >= options.k) return {-1, 0.0f, 0.0f};
  const int64_t at = token * options.k + i;
  const int64_t expert = load_index(call.indices, call.index_bytes, at);
  const float weight = call.weights[at];
  const bool filled = __float_as_int(weight) == INT32_MIN;  // -0
  if (filled || expert >= call.experts) return {-1, 0.0f, 0.0f};
  const float cotangent =
      call.dense_cotangent
          ? to_float(static_cast<const T*>(call.cotangent)[token * call.experts + expert])
          : static_cast<const float*>(call.cotangent)[at];
  const float inverse_scale = options.scale != 0.0f ? 1.0f / options.scale : 0.0f;
  return {static_cast<int>(expert), cotangent * options.scale, weight * inverse_scale};
}

// Sum over the lanes of a token.
__device__ __forceinline__ float sum_of_lanes(float value, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    value = add(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Gradient of a slot's logit, where that of the row is sparse.
__device__ __forceinline__ float slot_gradient(const Slot& slot, const RouteOptions& options,
                                               float mean, float normalizer) {
  if (options.score == Score::kSoftmax) return slot.p * (slot.h - mean);
  const float h = options.renormalize ? (slot.h - mean) / normalizer : slot.h;
  return h * score_gradient(slot.p * normalizer, options.score);
}

// The slots of as many tokens as find room side by side in a warp.
template <int kPasses>
struct Group {
  Slot slots[kPasses];
  int row;  // in the tile, of this lane
  float normalizer;
  float mean;  // sum of h p over the slots
};

template <typename T, int kPasses>
__device__ __forceinline__ Group<kPasses> load_group(const RouteBackward& call,
                                                     const RouteOptions& options,
                                                     const Tiling& tiling, int64_t first,
                                                     int row_begin, int tokens, int lane) {
  Group<kPasses> group;
  group.row = row_begin + lane / tiling.lanes;
  const bool there = group.row < tokens;
  const int64_t token = first + (there ? group.row : 0);
  group.normalizer = call.normalizer[token];
  // A row without normalizer is padding, or has no key above -inf.
  const bool alive = there && group.normalizer == group.normalizer;
  group.mean = 0.0f;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int slot = i * tiling.lanes + lane % tiling.lanes;
    group.slots[i] = load_slot<T>(call, options, token, slot, alive);
    group.mean += group.slots[i].h * group.slots[i].p;
  }
  group.mean = sum_of_lanes(group.mean, tiling.lanes);
  return group;
}

__device__ __forceinline__ void store_mark(float* p, int mark) { *p = __int_as_float(mark); }
__device__ __forceinline__ int load_mark(const float* p) { return __float_as_int(*p); }
template <typename T>
__device__ __forceinline__ void store_mark(T* p, int mark) {
  p->bits = static_cast<uint16_t>(mark);
}
template <typename T>
__device__ __forceinline__ int load_mark(const T* p) {
  return p->bits;
}

// Whether two slots of a token have the same expert: each leaves a mark in its place of the tile,
// to be written over later, and looks whose is there.
template <typename T, int kPasses>
__device__ __forceinline__ bool any_twice(const Group<kPasses>& group, T* row, int lane) {
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int expert = group.slots[i].expert;
    if (expert >= 0) store_mark(row + expert, i * kWarpSize + lane);
  }
  __syncwarp();
  bool twice = false;
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int expert = group.slots[i].expert;
    twice = twice || (expert >= 0 && load_mark(row + expert) != i * kWarpSize + lane);
  }
  return __any_sync(kAllLanes, twice);
}

// Where an expert was given twice, its first slot takes the sum of all, in slot order, and the
// others drop out.
template <int kPasses>
__device__ __forceinline__ void merge_equal(Group<kPasses>& group, float (&values)[kPasses],
                                            int lanes, int lane) {
  const int begin = lane / lanes * lanes;
  int experts[kPasses];
  float sums[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    experts[i] = group.slots[i].expert;
    sums[i] = 0.0f;
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    for (int j = 0; j < lanes; ++j) {
      const int other = __shfl_sync(kAllLanes, experts[pass], begin + j);
      const float value = __shfl_sync(kAllLanes, values[pass], begin + j);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        if (other < 0 || other != experts[i]) continue;
        sums[i] += value;
        const bool earlier = pass < i || (pass == i && begin + j < lane);
        if (earlier) group.slots[i].expert = -1;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPasses; ++i) values[i] = sums[i];
}

// A softmax term for the gradient alone, where the last bits do not matter.
__device__ __forceinline__ float fast_term(float x, float largest) {
  return __expf(fminf(fmaxf(x, -kInfinity), kLargest) - largest);
}

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

// Copies a tile between global and shared memory by all lanes.
__device__ __forceinline__ void copy_tile(void* to, const void* from, int64_t bytes, bool aligned,
                                          int lane) {
  if (aligned && bytes % 16 == 0) {
    int4* a = static_cast<int4*>(to);
    const int4* b = static_cast<const int4*>(from);
    for (int64_t i = lane; i < bytes / 16; i += kWarpSize) a[i] = b[i];
  } else {
    uint16_t* a = static_cast<uint16_t*>(to);
    const uint16_t* b = static_cast<const uint16_t*>(from);
    for (int64_t i = lane; i < bytes / 2; i += kWarpSize) a[i] = b[i];
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
  const int warp = threadIdx.x / kWarpSize;
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

// Several rows a tile, where they are small: as many as find room with up to eight lanes each.
Tiling tile_rows(const RouteBackward& call, const RouteOptions& options, int size) {
  Tiling tiling{kWarpSize, 1, static_cast<int>(call.experts * size), false};
  while (tiling.rows > 1 && (tiling.rows * tiling.row_bytes > kTileBytes ||
                             (tiling.lanes < 8 && tiling.lanes < options.k))) {
    tiling.rows /= 2;
    tiling.lanes *= 2;
  }
  // A multiple of 16 bytes, where that takes few more rows.
  while (tiling.rows < 8 && tiling.rows * tiling.row_bytes % 16 != 0) tiling.rows *= 2;
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(call.gradient) | reinterpret_cast<uintptr_t>(call.logits);
  tiling.aligned = addresses % 16 == 0 && tiling.rows * tiling.row_bytes % 16 == 0;
  return tiling;
}

template <typename T, bool kDense, int kPasses>
cudaError_t launch(const RouteBackward& call, const RouteOptions& options, const Tiling& tiling,
                   cudaStream_t stream) {
  const int64_t tile_bytes = (tiling.rows * tiling.row_bytes + 15) / 16 * 16;
  int warps = kMostWarps;
  while (warps > 1 && warps * tile_bytes > kSharedBytes) warps /= 2;
  const auto kernel = route_backward_kernel<T, kDense, kPasses>;
  const int bytes = static_cast<int>(warps * tile_bytes);
  if (bytes > kSharedBytes) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
  }
  const int64_t tiles = (call.tokens + tiling.rows - 1) / tiling.rows;
  const unsigned blocks = static_cast<unsigned>((tiles + warps - 1) / warps);
  kernel<<<blocks, warps * kWarpSize, bytes, stream>>>(call, options, tiling);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_type(const RouteBackward& call, const RouteOptions& options,
                        cudaStream_t stream) {
  const Tiling tiling = tile_rows(call, options, sizeof(T));
  const int64_t passes = (options.k + tiling.lanes - 1) / tiling.lanes;
  return with_bool(options.dense_gradient(), [&](auto dense) {
    if (passes <= 1) return launch<T, dense.value, 1>(call, options, tiling, stream);
    if (passes <= 3) return launch<T, dense.value, 3>(call, options, tiling, stream);
    if (passes <= 5) return launch<T, dense.value, 5>(call, options, tiling, stream);
    return launch<T, dense.value, 8>(call, options, tiling, stream);
  });
}

}  // namespace

cudaError_t launch_route_backward(const RouteBackward& call, const RouteOptions& options,
                                  cudaStream_t stream) {
  if (call.tokens == 0) return cudaSuccess;
  if (options.k > kMostSlots) return launch_route_backward_general(call, options, stream);
  return with_type(call.logits_type, [&](auto* type) {
    return launch_type<std::remove_pointer_t<decltype(type)>>(call, options, stream);
  });
}

}  // namespace jax_router
