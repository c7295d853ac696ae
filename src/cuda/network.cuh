// Sorting networks over the registers of a group of lanes. All loops unroll; every step is a
// shuffle and a minimum or maximum.

#ifndef JAX_ROUTER_CUDA_NETWORK_CUH_
#define JAX_ROUTER_CUDA_NETWORK_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "scalar.h"
#include "warp.cuh"

namespace jax_router {

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmax2(a, b);
}
__device__ __forceinline__ __nv_bfloat162 smaller(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hmin2(a, b);
}
template <typename T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

__device__ __forceinline__ __nv_bfloat162 bfloat16_pair(uint32_t bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}

// The element of slot ^ mask, for each slot = lane * kSlots + i of this lane.
template <int kSlots, typename T>
__device__ __forceinline__ void fetch(const T (&x)[kSlots], int mask, T (&other)[kSlots]) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    other[i] = __shfl_xor_sync(kAllLanes, x[i ^ (mask % kSlots)], mask / kSlots);
  }
}

// Puts the larger of slots s and s ^ mask into the lower one.
template <int kSlots, typename T>
__device__ __forceinline__ void compare_exchange(T (&x)[kSlots], int mask, int lane) {
  if (mask < kSlots) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int j = i ^ mask;
      if (i > j) continue;
      const T a = x[i];
      x[i] = larger(a, x[j]);
      x[j] = smaller(a, x[j]);
    }
    return;
  }
  int top = mask / kSlots;
#pragma unroll
  for (int below = 1; below < kWarpSize; below *= 2) top &= ~(top >> below);  // its highest bit
  const bool low = (lane & top) == 0;
  T other[kSlots];
  fetch(x, mask, other);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) x[i] = low ? larger(x[i], other[i]) : smaller(x[i], other[i]);
}

// Sorts a bitonic sequence of kSize slots, largest first.
template <int kSize, int kSlots, typename T>
__device__ __forceinline__ void sort_bitonic(T (&x)[kSlots], int lane) {
#pragma unroll
  for (int distance = kSize / 2; distance > 0; distance /= 2) compare_exchange(x, distance, lane);
}

// Sorts every kSize consecutive slots, largest first.
template <int kSize, int kSlots, typename T>
__device__ __forceinline__ void sort_slots(T (&x)[kSlots], int lane) {
  if constexpr (kSize > 1) {
    sort_slots<kSize / 2>(x, lane);
    compare_exchange(x, kSize - 1, lane);  // now both halves are bitonic
    sort_bitonic<kSize / 2>(x, lane);
  }
}

// What is known of a row before its survivors are listed.
struct Bound {
  float bound;      // a lower bound of the k-th largest element
  int32_t top_key;  // an upper bound of every key
};

// From four classes a lane of eight lanes: the 8th largest of the 32, for k <= 8.
__device__ __forceinline__ Bound eighth_of_classes(float (&x)[4], int lane) {
  float other[4];
  sort_slots<8>(x, lane);
  fetch(x, 15, other);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = larger(x[i], other[i]);  // the best 8 of 16
  sort_bitonic<8>(x, lane);
  fetch(x, 31, other);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = larger(x[i], other[i]);  // the best 8 of 32
  const float low = smaller(smaller(x[0], x[1]), smaller(x[2], x[3]));
  const float high = larger(larger(x[0], x[1]), larger(x[2], x[3]));
  return {smaller(low, __shfl_xor_sync(kAllLanes, low, 1)),
          key_from_float(larger(high, __shfl_xor_sync(kAllLanes, high, 1)))};
}

// ---- class maxima in shared memory, as bfloat16 rounded down: 32 * kClasses of them ----

// Where they are, none if kClasses is 0.
template <int kClasses>
struct ClassMaxima {
  uint32_t address;  // of 64 * kClasses bytes

  // Bits of this lane's own.
  __device__ __forceinline__ void load(int lane, uint32_t (&halves)[kClasses]) const {
    if constexpr (kClasses == 1) {
      halves[0] = load_shared_u16(address + 2 * lane);
    } else {
      const uint32_t both = load_shared_u32(address + 4 * lane);
      halves[0] = both & 0xffffu;
      halves[1] = both >> 16;
    }
  }
  __device__ __forceinline__ void store(int lane, const uint32_t (&halves)[kClasses]) const {
    if constexpr (kClasses == 1) {
      store_shared_u16(address + 2 * lane, halves[0]);
    } else {
      store_shared_u32(address + 4 * lane, halves[0] | halves[1] << 16);
    }
  }

  // How many lie above each of this lane's own.
  __device__ __forceinline__ void count_above(const uint32_t (&halves)[kClasses],
                                              int (&above)[kClasses]) const {
    __nv_bfloat162 counts[kClasses];
#pragma unroll
    for (int i = 0; i < kClasses; ++i) counts[i] = bfloat16_pair(0);
#pragma unroll
    for (int j = 0; j < 4 * kClasses; ++j) {
      uint32_t others[4];
      load_shared_four(address + 16 * j, others);
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const __nv_bfloat162 mine = bfloat16_pair(halves[i] | halves[i] << 16);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          counts[i] = __hadd2(counts[i], __hgt2(bfloat16_pair(others[c]), mine));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kClasses; ++i) {
      above[i] = static_cast<int>(__low2float(counts[i]) + __high2float(counts[i]));
    }
  }
};

// Key of the k-th largest class maximum: the smallest that fewer than k lie above.
template <int kClasses>
__device__ __forceinline__ int32_t kth_maximum(const uint32_t (&halves)[kClasses],
                                               const int (&above)[kClasses], int k) {
  int32_t kth = INT32_MAX;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const int32_t key = flip_order(static_cast<int32_t>(halves[i] << 16));
    if (above[i] < k) kth = smaller(kth, key);
  }
  return __reduce_min_sync(kAllLanes, kth);
}

// The k-th largest of 64 values, two a lane: sorts both halves at once, then merges them.
__device__ __forceinline__ float kth_of_pairs(__nv_bfloat162 pair, int k, int lane) {
  __nv_bfloat162 sorted[1] = {pair};
  sort_slots<kWarpSize>(sorted, lane);
  const float a = __low2float(sorted[0]);
  const float b = __shfl_xor_sync(kAllLanes, __high2float(sorted[0]), kWarpSize - 1);
  float half[1] = {k <= kWarpSize ? larger(a, b) : smaller(a, b)};
  sort_bitonic<kWarpSize>(half, lane);
  return __shfl_sync(kAllLanes, half[0], (k - 1) % kWarpSize);
}

// From kClasses classes a lane: the k-th largest of all, rounded down.
template <int kClasses>
__device__ __forceinline__ Bound kth_of_classes(const float (&x)[kClasses], int k,
                                                ClassMaxima<kClasses> maxima, int lane) {
  uint32_t halves[kClasses];
  int32_t top = INT32_MIN;
#pragma unroll
  for (int i = 0; i < kClasses; ++i) {
    const int32_t bits = __float_as_int(x[i]);
    top = larger(top, flip_order(bits));
    halves[i] = static_cast<uint32_t>(bits + ((bits >> 31) & 0xffff)) >> 16;
  }
  __syncwarp();
  maxima.store(lane, halves);
  __syncwarp();
  const int32_t top_key = __reduce_max_sync(kAllLanes, top);
  if constexpr (kClasses == 1) {
    int above[1];
    maxima.count_above(halves, above);
    return {float_from_key(kth_maximum(halves, above, k)), top_key};
  } else {
    return {kth_of_pairs(bfloat16_pair(halves[0] | halves[1] << 16), k, lane), top_key};
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_NETWORK_CUH_
