// The order of a token's survivors: by counting who comes before where they are few, by a sorting
// network where they are more.

#ifndef JAX_ROUTER_CUDA_RANK_CUH_
#define JAX_ROUTER_CUDA_RANK_CUH_

#include <cstdint>

#include "network.cuh"
#include "warp.cuh"

namespace jax_router {

// Whether the `count` values of each group of lanes all differ; values < 32.
template <int kLanes, int kSlots>
__device__ __forceinline__ bool all_differ(const int (&values)[kSlots], int first, int count,
                                           int lane) {
  uint32_t seen = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (first + i < count) seen |= 1u << values[i];
  }
  if constexpr (kLanes == kWarpSize) {
    return __popc(__reduce_or_sync(kAllLanes, seen)) == count;
  }
  bool same = true;
#pragma unroll
  for (int group = 0; group < kWarpSize / kLanes; ++group) {
    const bool mine = group == lane / kLanes;
    const uint32_t all = __reduce_or_sync(kAllLanes, mine ? seen : 0);
    if (mine) same = __popc(all) == count;
  }
  return same;
}

// Takes 1 from `count` if other > word: a subtraction and the borrow it leaves.
__device__ __forceinline__ void count_above(uint32_t word, uint32_t other, int& count) {
  asm("{\n"
      ".reg .u32 difference;\n"
      "sub.cc.u32 difference, %1, %2;\n"
      "subc.u32 %0, %0, 0;\n"
      "}\n"
      : "+r"(count)
      : "r"(word), "r"(other));
}

// Ranks of up to kLanes * kSlots survivors of a group, lane * kSlots + i of them in each lane: how
// many come before, by word and then by index. `shared` is the group's, four bytes a survivor,
// `ids` its list. Words past the count are 0.
template <int kLanes, int kSlots, bool kUnique>
__device__ __forceinline__ void rank_words(const uint32_t (&words)[kSlots], int count,
                                           uint32_t shared, uint32_t ids, int lane,
                                           int (&ranks)[kSlots]) {
  const int first = lane * kSlots;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    store_shared_u32(shared + 4 * (first + i), words[i]);
    ranks[i] = 0;
  }
  __syncwarp();
  int most = count;
  if constexpr (kLanes < kWarpSize) most = __reduce_max_sync(kAllLanes, count);
  for (int j = 0; j < most; j += 4) {
    uint32_t others[4];
    load_shared_four(shared + 4 * j, others);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i) count_above(words[i], others[c], ranks[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kSlots; ++i) ranks[i] = -ranks[i];
  if constexpr (!kUnique) {
    if (__all_sync(kAllLanes, all_differ<kLanes>(ranks, first, count, threadIdx.x % kWarpSize)))
      return;
    for (int j = 0; j < kLanes * kSlots; ++j) {
      const uint32_t other = load_shared_u32(shared + 4 * j);
      const uint32_t id = load_shared_u16(ids + 2 * j);
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const uint32_t mine = load_shared_u16(ids + 2 * (first + i));
        ranks[i] += j < count && other == words[i] && id < mine;
      }
    }
  }
}

// One sorted survivor.
struct Chosen {
  uint32_t word;
  int expert;
};

// Sorts kSlots survivors a lane of a warp, lane * kSlots + i in the list, by word and then by
// index. No word is below `base` or above `top`. Words past the count are 0 and come last.
template <int kSlots, bool kUnique>
__device__ __forceinline__ void sort_words(uint32_t (&words)[kSlots], int count, uint32_t base,
                                           uint32_t top, uint32_t ids, int lane,
                                           Chosen (&sorted)[kSlots]) {
  constexpr uint32_t kSize = kWarpSize * kSlots;
  if constexpr (kUnique) {
    sort_slots<kSize>(words, lane);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      sorted[i] = {words[i], static_cast<int>(0xffffu - (words[i] & 0xffffu))};
    }
    return;
  }
  bool packs = top - base < UINT32_MAX / kSize;
  if (packs) {
    // Word and slot in one integer.
    uint32_t packed[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t slot = lane * kSlots + i;
      packed[i] = slot < count ? (words[i] - base + 1) * kSize + slot : 0;
    }
    sort_slots<kSize>(packed, lane);
    bool tied = false;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t offset = packed[i] / kSize;
      const uint32_t after =
          i + 1 < kSlots ? packed[i + 1] : __shfl_down_sync(kAllLanes, packed[0], 1);
      tied = tied || (offset == after / kSize && lane * kSlots + i + 1 < count);
      const int expert = static_cast<int>(load_shared_u16(ids + 2 * (packed[i] % kSize)));
      sorted[i] = {offset + base - 1, expert};
    }
    packs = !__any_sync(kAllLanes, tied);
  }
  if (packs) return;
  uint64_t pairs[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int slot = lane * kSlots + i;
    const uint32_t id = load_shared_u16(ids + 2 * slot);
    pairs[i] = slot < count ? uint64_t{words[i]} << 32 | (0xffffu - id) : 0;
  }
  sort_slots<kSize>(pairs, lane);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    sorted[i] = {static_cast<uint32_t>(pairs[i] >> 32),
                 static_cast<int>(0xffffu - (static_cast<uint32_t>(pairs[i]) & 0xffffu))};
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_RANK_CUH_
