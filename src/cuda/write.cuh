// The results of one token, from its sorted survivors.

#ifndef JAX_ROUTER_CUDA_WRITE_CUH_
#define JAX_ROUTER_CUDA_WRITE_CUH_

#include <cstdint>

#include "assign.cuh"
#include "dense.cuh"
#include "options.h"
#include "rank.cuh"
#include "row.cuh"
#include "scalar.h"
#include "warp.cuh"

namespace jax_router {

// Sum over the slots of a group of lanes, in an order that depends on the slots alone: pairwise at
// distance 1, 2, 4 ...
template <int kLanes, int kSlots>
__device__ __forceinline__ float sum_of_slots(const float (&x)[kSlots]) {
  float sums[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) sums[i] = x[i];
#pragma unroll
  for (int distance = 1; distance < kSlots; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kSlots; i += 2 * distance) sums[i] = add(sums[i], sums[i + distance]);
  }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    sums[0] = add(sums[0], __shfl_xor_sync(kAllLanes, sums[0], distance));
  }
  return sums[0];
}

template <int kLanes, int kSlots>
__device__ __forceinline__ float largest_of_slots(const float (&x)[kSlots]) {
  float largest = x[0];
#pragma unroll
  for (int i = 1; i < kSlots; ++i) largest = larger(largest, x[i]);
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  return largest;
}

// What a kernel makes of a token besides its weights and experts.
enum class Extra { kNone, kDense, kStats };

// What the survivors of a token are sorted and weighed with.
struct TokenContext {
  int64_t token;
  bool real;      // not padding
  int count;      // survivors
  uint32_t base;  // no word of theirs is below
  uint32_t top;   // none is above
  Softmax softmax;
  uint32_t ids;     // shared address of the survivors' indices
  uint32_t* bits;   // the token's row of a bitmap, clear, where one is asked for
  int32_t* counts;  // of the block's tokens at each expert, where there are statistics
};

// Writes the first k slots of a token. `values` are what the slots were compared by, `logits` their
// logits, both with NaN as -inf.
template <typename T, bool kBiased, Extra kExtra, int kLanes, int kSlots>
__device__ __forceinline__ void write_slots(const RouteForward& call, const RouteOptions& options,
                                            const TokenContext& context,
                                            const int (&experts)[kSlots],
                                            const float (&values)[kSlots],
                                            const float (&logits)[kSlots], int lane) {
  const int k = static_cast<int>(options.k);
  const int64_t token = context.token;
  const bool real = context.real;
  const Softmax& softmax = context.softmax;
  const float best = __shfl_sync(kAllLanes, values[0], 0, kLanes);
  const bool uniform = !(best > -kInfinity);
  float weights[kSlots];
  bool active[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    active[i] = lane * kSlots + i < k && values[i] > -kInfinity;
    weights[i] = active[i] ? smaller(logits[i], kLargest) : -kInfinity;
  }
  float divisor = 1.0f;
  float normalizer = 1.0f;
  if (options.score == Score::kSoftmax) {
    float largest = softmax.largest;
    if (options.renormalize) {
      largest = kBiased ? largest_of_slots<kLanes>(weights) : smaller(best, kLargest);
      largest = larger(largest, -kLargest);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) weights[i] = exp_nonpositive(add(weights[i], -largest));
    divisor = softmax.total;
    normalizer = softmax.total;
    if (options.renormalize) {
      const float total = sum_of_slots<kLanes>(weights);
      divisor = total > 0.0f ? total : 1.0f;
      normalizer = 1.0f;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      weights[i] = active[i] ? elementwise_score(weights[i], options.score) : 0.0f;
    }
    if (options.renormalize) {
      divisor = sum_of_slots<kLanes>(weights) + kEpsilon;
      normalizer = divisor;
    }
  }
  if (token >= call.tokens) return;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int slot = lane * kSlots + i;
    if (slot >= k) continue;
    // Adding 0 turns an honest -0 into +0: -0 marks a slot without gradient.
    float weight = weights[i] / divisor * options.scale + 0.0f;
    if (!active[i]) weight = -0.0f;
    if (uniform) weight = 1.0f / static_cast<float>(k);
    if (!real) weight = 0.0f;
    const int expert = real ? experts[i] : static_cast<int>(call.experts);
    call.weights[token * k + slot] = weight;
    store_index(call.indices, call.index_bytes, token * k + slot, expert);
    if constexpr (kExtra == Extra::kDense) {
      if (real) store_dense<T>(call, token, expert, weight, context.bits);
    } else if constexpr (kExtra == Extra::kStats) {
      if (real) atomicAdd(context.counts + expert, 1);
    }
  }
  if (lane == 0) {
    call.normalizer[token] = uniform || !real ? __int_as_float(0x7fc00000) : normalizer;
  }
  if constexpr (kExtra == Extra::kNone) {
    if (call.replicas.load == nullptr) return;
    int written[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) written[i] = real ? experts[i] : -1;
    assign_slots(call, token, lane * kSlots, k, written);
  }
}

// Shared memory of a warp for ranking: keys as they are listed, then keys and indices by rank.
struct alignas(16) RankScratch {
  uint32_t words[128];
  uint2 sorted[2 * kWarpSize];
};

// The logit of a chosen expert from what it was compared by.
template <typename T, bool kBiased>
__device__ __forceinline__ float chosen_logit(const RowValues<T, kBiased>& row, int expert,
                                              float value) {
  return kBiased ? larger(to_float(row.logits[expert]), -kInfinity) : value;
}

// Writes what a group of lanes finds sorted, up to kLanes * kSlots of it.
template <Extra kExtra, int kLanes, int kSlots, typename T, bool kBiased>
__device__ __forceinline__ void write_sorted(const RouteForward& call, const RouteOptions& options,
                                             const TokenContext& context,
                                             const RowValues<T, kBiased>& row, const uint2* sorted,
                                             int lane) {
  int experts[kSlots];
  float values[kSlots];
  float logits[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int slot = lane * kSlots + i;
    const uint2 mine = slot < options.k ? sorted[slot] : make_uint2(0, 0);
    experts[i] = static_cast<int>(mine.y);
    values[i] = Words<T, kBiased>::value(mine.x);
    logits[i] = chosen_logit(row, experts[i], values[i]);
  }
  write_slots<T, kBiased, kExtra, kLanes>(call, options, context, experts, values, logits, lane);
}

// Sorts the survivors of a token by ranking, up to kLanes * kSlots of them. `words_of` makes the
// words of slots of the list, `group` is the token's number in the warp.
template <int kLanes, int kSlots, bool kUnique, typename WordsOf>
__device__ __forceinline__ void rank_survivors(const TokenContext& context, int k,
                                               RankScratch& scratch, WordsOf words_of, int group,
                                               int lane) {
  uint32_t words[kSlots];
  words_of(lane * kSlots, context.count, words);
  int ranks[kSlots];
  const uint32_t shared = shared_address(scratch.words + group * kLanes * kSlots);
  rank_words<kLanes, kSlots, kUnique>(words, context.count, shared, context.ids, lane, ranks);
  uint2* sorted = scratch.sorted + group * kLanes;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int slot = lane * kSlots + i;
    if (slot >= context.count || ranks[i] >= k) continue;
    sorted[ranks[i]] = {words[i], load_shared_u16(context.ids + 2 * slot)};
  }
}

// The same for more survivors, by a sorting network; one token a warp.
template <int kSlots, bool kUnique, typename WordsOf>
__device__ __forceinline__ void sort_survivors(const TokenContext& context, int k,
                                               RankScratch& scratch, WordsOf words_of, int lane) {
  uint32_t words[kSlots];
  words_of(lane * kSlots, context.count, words);
  Chosen sorted[kSlots];
  sort_words<kSlots, kUnique>(words, context.count, context.base, context.top, context.ids, lane,
                              sorted);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int slot = lane * kSlots + i;
    if (slot >= k) continue;
    scratch.sorted[slot] = {sorted[i].word, static_cast<uint32_t>(sorted[i].expert)};
  }
}

// Any number of survivors up to 128, one token a warp.
template <Extra kExtra, typename T, bool kBiased, typename WordsOf>
__device__ __forceinline__ void finish_token(const RouteForward& call, const RouteOptions& options,
                                             const TokenContext& context,
                                             const RowValues<T, kBiased>& row, RankScratch& scratch,
                                             WordsOf words_of, int lane) {
  constexpr bool kUnique = Words<T, kBiased>::kUnique;
  const int k = static_cast<int>(options.k);
  if (context.count <= kWarpSize) {
    rank_survivors<kWarpSize, 1, kUnique>(context, k, scratch, words_of, 0, lane);
  } else if (context.count <= 2 * kWarpSize) {
    sort_survivors<2, kUnique>(context, k, scratch, words_of, lane);
  } else {
    sort_survivors<4, kUnique>(context, k, scratch, words_of, lane);
  }
  __syncwarp();
  if (k <= kWarpSize) {
    write_sorted<kExtra, kWarpSize, 1>(call, options, context, row, scratch.sorted, lane);
  } else {
    write_sorted<kExtra, kWarpSize, 2>(call, options, context, row, scratch.sorted, lane);
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_WRITE_CUH_
