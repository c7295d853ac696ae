// Exact top-k of a row of integer keys by one warp: any number of keys, any k.
//
// A search over the bits of the k-th largest key, a pass that collects what reaches it in ascending
// order of index, and a bitonic sort. The cost hardly depends on the input.

#ifndef JAX_ROUTER_CUDA_SELECT_CUH_
#define JAX_ROUTER_CUDA_SELECT_CUH_

#include <cstdint>

#include "row.cuh"
#include "warp.cuh"

namespace jax_router {

// Key and index in one integer: of equal keys the lower index is the larger.
__device__ __forceinline__ int64_t pack(int32_t key, int32_t index) {
  return (static_cast<int64_t>(key) << 32) | ~static_cast<uint32_t>(index);
}
__device__ __forceinline__ int32_t packed_key(int64_t pair) {
  return static_cast<int32_t>(pair >> 32);
}
__device__ __forceinline__ int32_t packed_index(int64_t pair) {
  return static_cast<int32_t>(~static_cast<uint32_t>(pair));
}

// How many of `count` keys are at least `limit`.
__device__ __forceinline__ int count_at_least(const int32_t* keys, int count, uint32_t limit,
                                              int lane) {
  int reached = 0;
  for (int i = lane; i < count; i += kWarpSize) reached += unsigned_key(keys[i]) >= limit;
  return __reduce_add_sync(kAllLanes, reached);
}

// The k-th largest of `count` keys. Bits above the first one in which any two keys differ are
// known.
__device__ __forceinline__ uint32_t kth_largest(const int32_t* keys, int count, int k, int lane) {
  uint32_t largest = 0;
  uint32_t smallest = 0xffffffffu;
  for (int i = lane; i < count; i += kWarpSize) {
    const uint32_t key = unsigned_key(keys[i]);
    largest = key > largest ? key : largest;
    smallest = key < smallest ? key : smallest;
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  smallest = __reduce_min_sync(kAllLanes, smallest);
  const int differing = 32 - __clz(static_cast<int>(largest ^ smallest));
  uint32_t threshold =
      differing == 32 ? 0u : largest & ~((1u << differing) - 1u);  // the common prefix
  for (int bit = differing - 1; bit >= 0; --bit) {
    const uint32_t candidate = threshold | (1u << bit);
    if (count_at_least(keys, count, candidate, lane) >= k) threshold = candidate;
  }
  return threshold;
}

__device__ __forceinline__ void sort_descending(int64_t* pairs, int padded, int lane) {
  for (int size = 2; size <= padded; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      for (int i = lane; i < padded / 2; i += kWarpSize) {
        const int low = 2 * i - (i & (distance - 1));
        const int high = low + distance;
        const int64_t a = pairs[low];
        const int64_t b = pairs[high];
        if ((a < b) == ((low & size) == 0)) {
          pairs[low] = b;
          pairs[high] = a;
        }
      }
      __syncwarp();
    }
  }
}

// Leaves the k best of `count` keys in pairs[0 .. k), best first. `padded` is k rounded up to a
// power of two, the size of `pairs`.
__device__ __forceinline__ void select(const int32_t* keys, int count, int k, int64_t* pairs,
                                       int padded, int lane) {
  const uint32_t threshold = kth_largest(keys, count, k, lane);
  const int above =
      threshold == 0xffffffffu ? 0 : count_at_least(keys, count, threshold + 1u, lane);
  int taken = 0;
  int ties_left = k - above;
  for (int begin = 0; begin < count && taken < k; begin += kWarpSize) {
    const int i = begin + lane;
    const uint32_t key = i < count ? unsigned_key(keys[i]) : 0u;
    const bool tied = i < count && key == threshold;
    const unsigned ties = __ballot_sync(kAllLanes, tied);
    const bool take =
        (i < count && key > threshold) || (tied && __popc(ties & lanes_below(lane)) < ties_left);
    const unsigned takes = __ballot_sync(kAllLanes, take);
    if (take) pairs[taken + __popc(takes & lanes_below(lane))] = pack(keys[i], i);
    taken += __popc(takes);
    ties_left -= __popc(ties);
  }
  for (int i = k + lane; i < padded; i += kWarpSize) pairs[i] = INT64_MIN;
  __syncwarp();
  sort_descending(pairs, padded, lane);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_SELECT_CUH_
