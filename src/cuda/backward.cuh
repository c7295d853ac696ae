// Tiles of a backward: a warp makes the gradient of a few neighbouring rows in shared memory.

#ifndef JAX_ROUTER_CUDA_BACKWARD_CUH_
#define JAX_ROUTER_CUDA_BACKWARD_CUH_

#include <cstdint>
#include <type_traits>

#include "bulk.cuh"
#include "options.h"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kMostWarps = 4;                // of a block
inline constexpr int kTileBytes = 8 * 1024;         // of several rows
inline constexpr int64_t kSharedBytes = 48 * 1024;  // of a block with more than one warp
inline constexpr int64_t kMostSlots = 64;           // of a token

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
  group.normalizer = call.weights == nullptr ? 1.0f : call.normalizer[token];
  // A row without normalizer is padding, or has no key above -inf.
  const bool alive = there && call.weights != nullptr && group.normalizer == group.normalizer;
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

// ---- the launch ----

// Several rows a tile, where they are small: as many as find room with up to eight lanes each.
inline Tiling tile_rows(const RouteBackward& call, const RouteOptions& options, int size) {
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

// Calls f with a constant of at least as many passes as the slots of a token take.
template <typename F>
auto with_passes(const RouteOptions& options, const Tiling& tiling, F f) {
  const int64_t passes = (options.k + tiling.lanes - 1) / tiling.lanes;
  if (passes <= 1) return f(std::integral_constant<int, 1>());
  if (passes <= 3) return f(std::integral_constant<int, 3>());
  if (passes <= 5) return f(std::integral_constant<int, 5>());
  return f(std::integral_constant<int, 8>());
}

template <typename Kernel>
cudaError_t launch_tiles(Kernel kernel, const RouteBackward& call, const RouteOptions& options,
                         const Tiling& tiling, cudaStream_t stream) {
  const int64_t tile_bytes = (tiling.rows * tiling.row_bytes + 15) / 16 * 16;
  int warps = kMostWarps;
  while (warps > 1 && warps * tile_bytes > kSharedBytes) warps /= 2;
  const int64_t tiles = (call.tokens + tiling.rows - 1) / tiling.rows;
  const unsigned blocks = static_cast<unsigned>((tiles + warps - 1) / warps);
  return launch_blocks(kernel, blocks, warps, static_cast<int>(warps * tile_bytes), stream, call,
                       options, tiling);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_BACKWARD_CUH_
