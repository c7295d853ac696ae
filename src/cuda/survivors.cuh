// Exact top-k of a row by a bound.
//
// The row is read as classes: each lane owns a few, and an element belongs to a class by its
// position alone. The k-th largest of the class maxima is a lower bound of the k-th largest
// element, so only elements that reach it can be chosen: on random rows about k and a few. These
// survivors are listed, in no order, to be ranked. Where they are too many for the list (ties, or
// rows made to defeat the classes) the bound is raised until they fit.

#ifndef JAX_ROUTER_CUDA_SURVIVORS_CUH_
#define JAX_ROUTER_CUDA_SURVIVORS_CUH_

#include <cstdint>

#include "network.cuh"
#include "row.cuh"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {

// ---- lists of survivors ----

inline constexpr int kMaskChunks = 8;  // chunks whose elements one 32-bit mask covers

// A list of up to kSize indices for each group of kLanes lanes, in shared memory. There is room for
// one more, where indices go that do not fit.
template <int kLanes, int kSize>
struct Survivors {
  uint32_t ids;  // shared address of 16-bit indices, the group's own
  int lane;      // in the group
  int count;     // the same in every lane of the group

  __device__ __forceinline__ bool overflow() const { return count > kSize; }

  // Appends what is set in `mask`: bit 4 j + c is element (j * kLanes + lane) * 4 + c past `first`.
  __device__ __forceinline__ void append(uint32_t mask, int first) {
    const int mine = __popc(mask);
    int before = mine;
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, distance, kLanes);
      if (lane >= distance) before += other;
    }
    uint32_t slot = count + before - mine;
    const uint32_t base = first + lane * kChunk;
    while (mask != 0) {
      const uint32_t bit = 31 - __clz(static_cast<int>(mask));
      mask ^= 1u << bit;
      const uint32_t element = base + bit + (bit & ~3u) * (kLanes - 1);
      store_shared_u16(ids + 2 * smaller(slot, uint32_t{kSize}), element);
      ++slot;
    }
    count += __shfl_sync(kAllLanes, before, kLanes - 1, kLanes);
  }
};

// ---- rows with too many survivors, by a whole warp ----

// How many values of the row are at least each of the limits.
template <typename Row, int kLimits>
__device__ __forceinline__ void count_at_least(const Row& row, const float (&limits)[kLimits],
                                               int (&reached)[kLimits], int lane) {
#pragma unroll
  for (int i = 0; i < kLimits; ++i) reached[i] = 0;
#pragma unroll(Row::kLong ? 1 : 2)
  for (int e = lane * kChunk; e < row.experts; e += kWarpSize * kChunk) {
    float x[kChunk];
    row.values(e, x);
#pragma unroll
    for (int i = 0; i < kLimits; ++i) {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) reached[i] += x[c] >= limits[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kLimits; ++i) reached[i] = __reduce_add_sync(kAllLanes, reached[i]);
}

// Between two keys: half way in value or, every other time, in the number of floats, so that
// neither a wide range nor a narrow one takes long.
__device__ __forceinline__ int64_t between(int64_t low, int64_t high, bool by_value) {
  if (by_value) {
    const float a = float_from_key(static_cast<int32_t>(low));
    const float b = float_from_key(static_cast<int32_t>(high - 1));
    const int32_t next = key_from_float(0.5f * a + 0.5f * b);
    if (next > low && next < high) return next;
  }
  return (low + high) / 2;
}

// Lists the values of at least `limit`.
template <typename Row, int kSize>
__device__ __forceinline__ void append_at_least(const Row& row, float limit,
                                                Survivors<kWarpSize, kSize>& survivors) {
  for (int first = 0; first < row.experts; first += kMaskChunks * kChunk * kWarpSize) {
    uint32_t mask = 0;
#pragma unroll(Row::kLong ? 1 : kMaskChunks)
    for (int j = 0; j < kMaskChunks; ++j) {
      float x[kChunk];
      row.values(first + (j * kWarpSize + survivors.lane) * kChunk, x);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (x[c] >= limit) mask |= 1u << (kChunk * j + c);
      }
    }
    survivors.append(mask, first);
  }
}

// Lists the k largest keys, of which the last ones equal `kth`: everything above it, fewer than k,
// and of the ties the lowest indices.
template <typename Row>
__device__ __forceinline__ void list_with_ties(const Row& row, int32_t kth, int k, uint32_t ids,
                                               int lane) {
  int above = 0;
  for (int e = lane; e < row.experts; e += kWarpSize) above += row.key(e) > kth;
  above = __reduce_add_sync(kAllLanes, above);
  int taken = 0;
  int ties_left = k - above;
  for (int begin = 0; begin < row.experts && taken < k; begin += kWarpSize) {
    const int e = begin + lane;
    const int32_t key = e < row.experts ? row.key(e) : kNoKey;
    const unsigned ties = __ballot_sync(kAllLanes, key == kth);
    const bool take = key > kth || (key == kth && __popc(ties & lanes_below(lane)) < ties_left);
    const unsigned takes = __ballot_sync(kAllLanes, take);
    if (take) store_shared_u16(ids + 2 * (taken + __popc(takes & lanes_below(lane))), e);
    taken += __popc(takes);
    ties_left -= __popc(ties);
  }
}

// Limits between which the k-th largest of a row lies: at least k values reach `low`, fewer than k
// reach `high`. As floats the two zeros are equal, so that either stands for both.
template <typename Row>
struct Bracket {
  const Row& row;
  int k;
  int lane;
  int64_t low;
  int64_t high;
  int reaching;  // `low`; INT32_MAX before that is known

  __device__ __forceinline__ bool open() const { return high - low > 1; }

  // Moves one of the limits to `next`, if it lies between them, of which `count` values reach
  // `next`. True if at least k do.
  __device__ __forceinline__ bool move(int64_t next, int count) {
    if (count < k) {
      high = next < high ? next : high;
      return false;
    }
    if (next > low) {
      low = next;
      reaching = count;
    }
    return true;
  }
  __device__ __forceinline__ bool move(int64_t next) {
    const float limits[1] = {float_from_key(static_cast<int32_t>(next))};
    int reached[1];
    count_at_least(row, limits, reached, lane);
    return move(next, reached[0]);
  }

  // Tries larger class maxima, three at a time. Few are in the way if many of the large values fell
  // into few classes.
  template <int kClasses>
  __device__ __forceinline__ void narrow_by_classes(ClassMaxima<kClasses> maxima, int size) {
    uint32_t halves[kClasses];
    int above[kClasses];
    maxima.load(lane, halves);
    maxima.count_above(halves, above);
    int few = 0;   // fewer than k values reach the few-th largest maximum
    int many = k;  // more than `size` reach the many-th
    while (reaching > size && many - few > 1) {
      const int gap = many - few;
      const int ranks[3] = {few + larger(1, gap / 4), few + larger(1, gap / 2),
                            few + larger(1, gap * 3 / 4)};
      int32_t keys[3];
      float limits[3];
      int reached[3];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        keys[i] = kth_maximum(halves, above, ranks[i]);
        limits[i] = float_from_key(keys[i]);
      }
      count_at_least(row, limits, reached, lane);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (ranks[i] >= many) continue;
        (move(keys[i], reached[i]) ? many : few) = ranks[i];
      }
    }
  }

  __device__ __forceinline__ void narrow(int size) {
    bool by_value = true;
    while (reaching > size && open()) {
      move(between(low, high, by_value));
      by_value = !by_value;
    }
  }
};

// What relist has listed: so many survivors, none with a key below the bound.
struct Relisted {
  int count;
  int32_t bound_key;
};

// Raises the bound of a row until at most kSize values reach it, or until it is the k-th largest
// itself, and lists what is left.
template <int kSize, int kClasses, typename Row>
__device__ __noinline__ Relisted relist(const Row row, int32_t bound, int32_t top, int k,
                                        ClassMaxima<kClasses> maxima, uint32_t ids, int lane) {
  Bracket<Row> bracket{row, k, lane, bound, int64_t{top} + 1, INT32_MAX};
  // If it cannot be raised at all, the bound is the k-th largest, with ties.
  const bool raised = bracket.open() && bracket.move(bracket.low + 1);
  if constexpr (kClasses > 0) {
    if (raised) bracket.narrow_by_classes(maxima, kSize);
  }
  if (raised) bracket.narrow(kSize);
  int32_t low = static_cast<int32_t>(bracket.low);
  if (bracket.reaching <= kSize) {
    Survivors<kWarpSize, kSize> survivors{ids, lane, 0};
    append_at_least(row, float_from_key(low), survivors);
    return {survivors.count, low};
  }
  if (low == key_from_float(0.0f)) {
    int reached = 0;
    for (int e = lane; e < row.experts; e += kWarpSize) reached += row.key(e) >= low;
    if (__reduce_add_sync(kAllLanes, reached) < k) --low;  // -0
  }
  list_with_ties(row, low, k, ids, lane);
  return {k, low};
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_SURVIVORS_CUH_
