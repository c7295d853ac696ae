// A token routed by a warp from the keys of its row in shared memory, for every option and size.

#ifndef JAX_ROUTER_CUDA_KEYS_TOKEN_CUH_
#define JAX_ROUTER_CUDA_KEYS_TOKEN_CUH_

#include <cstdint>

#include "assign.cuh"
#include "dense.cuh"
#include "keys_row.cuh"
#include "options.h"
#include "row.cuh"
#include "scalar.h"
#include "select.cuh"
#include "stats.cuh"
#include "warp.cuh"
#include "write.cuh"

namespace jax_router {

// ---- slots ----

enum class Outcome { kChosen, kUniform, kPadding };

struct KeySlot {
  int32_t expert;  // E where the slot is invalid
  float logit;
  bool valid;
  bool active;  // its key lies above -inf
};

// Slot i of a token: chosen by this warp, or given.
template <typename T>
__device__ __forceinline__ KeySlot slot_at(const RouteForward& call, const RouteOptions& options,
                                           int64_t token, int i, const T* logits, Outcome outcome,
                                           const KeysRow& row) {
  if (outcome == Outcome::kPadding) return {row.experts, 0.0f, false, false};
  KeySlot slot{i, 0.0f, true, false};
  if (call.given != nullptr) {
    const int32_t given = call.given[token * options.k + i];
    slot.valid = given >= 0 && given < row.experts;
    slot.expert = slot.valid ? given : row.experts;
    if (!slot.valid) return slot;
  } else if (outcome == Outcome::kChosen) {
    slot.expert = packed_index(row.pairs[i]);
  }
  const int32_t key = key_from_bits(load_bits(logits + slot.expert));
  slot.logit = float_from_key(key);
  slot.active = call.given != nullptr ? key > kLowestKey : packed_key(row.pairs[i]) > kLowestKey;
  return slot;
}

// The weight of a slot before it is divided by the sum of all.
__device__ __forceinline__ float unnormalized(const KeySlot& slot, const RouteOptions& options,
                                              float largest) {
  if (!slot.active) return 0.0f;
  if (options.score != Score::kSoftmax) return elementwise_score(slot.logit, options.score);
  return softmax_term(slot.logit, largest);
}

// Sum of the terms of k slots. Up to 128 in the order that the kernels have which list survivors,
// so that a choice replayed has the same weights: pairwise at distance 1, 2, 4 ...
template <typename Term>
__device__ __forceinline__ float sum_over_slots(Term term, int k, int lane) {
  if (k > 4 * kWarpSize) {
    CompensatedSum sum;
    for (int i = lane; i < k; i += kWarpSize) sum.add(term(i));
    return warp_sum(sum.sum);
  }
  float sums[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    const int i = b * kWarpSize + lane;
    const float x[1] = {i < k ? term(i) : 0.0f};
    sums[b] = sum_of_slots<kWarpSize>(x);
  }
  return add(add(sums[0], sums[1]), add(sums[2], sums[3]));
}

// Writes slot i into the dense results. Where the experts were given, one may come twice: its first
// slot writes the sum of all.
template <typename T>
__device__ __forceinline__ void store_slot(const RouteForward& call, const RouteOptions& options,
                                           int64_t token, int i, int expert, const KeysRow& row) {
  const float* weights = call.weights + token * options.k;
  float sum = weights[i];
  if (call.given != nullptr) {
    const int32_t* given = call.given + token * options.k;
    for (int j = 0; j < i; ++j) {
      if (given[j] == expert) return;
    }
    for (int j = i + 1; j < options.k; ++j) {
      if (given[j] == expert) sum = add(sum, weights[j]);
    }
  }
  store_dense<T>(call, token, expert, sum, row.bits);
}

// Writes the probabilities and the map of a token whose weights are written.
template <typename T>
__device__ __forceinline__ void write_dense(const RouteForward& call, const RouteOptions& options,
                                            int64_t token, const T* logits, Outcome outcome,
                                            const KeysRow& row) {
  const int words = bitmap_words(call);
  clear_bitmap(row.bits, words, row.lane);
  clear_dense<T>(call, token, 1, row.lane);
  __syncwarp();
  for (int i = row.lane; i < options.k; i += kWarpSize) {
    const KeySlot s = slot_at(call, options, token, i, logits, outcome, row);
    if (s.valid) store_slot<T>(call, options, token, i, s.expert, row);
  }
  __syncwarp();
  if (words > 0) write_bitmap(call, token, 1, row.bits, words, row.lane);
}

// Writes the weights, experts and normalizer of a token.
template <typename T>
__device__ __forceinline__ void write_token(const RouteForward& call, const RouteOptions& options,
                                            int64_t token, const T* logits, Outcome outcome,
                                            const KeysRow& row) {
  const int k = static_cast<int>(options.k);
  const auto slot = [&](int i) { return slot_at(call, options, token, i, logits, outcome, row); };
  float largest = -kLargest;
  bool any_valid = false;
  bool any_active = false;
  for (int i = row.lane; i < k; i += kWarpSize) {
    const KeySlot s = slot(i);
    any_valid |= s.valid;
    any_active |= s.active;
    if (s.active) largest = fmaxf(largest, bounded(s.logit));
  }
  any_valid = __any_sync(kAllLanes, any_valid);
  any_active = __any_sync(kAllLanes, any_active);
  if (call.given != nullptr && any_valid && !any_active) outcome = Outcome::kUniform;
  largest = warp_max(largest);

  float divisor = 1.0f;
  float normalizer = 1.0f;
  if (options.dense_gradient()) {
    largest = row.softmax.largest;
    divisor = row.softmax.total;
    normalizer = divisor;
  } else if (options.renormalize) {
    const float total =
        sum_over_slots([&](int i) { return unnormalized(slot(i), options, largest); }, k, row.lane);
    const bool softmax = options.score == Score::kSoftmax;
    divisor = softmax ? (total > 0.0f ? total : 1.0f) : total + kEpsilon;
    normalizer = softmax ? 1.0f : divisor;
  }

  for (int i = row.lane; i < k; i += kWarpSize) {
    const KeySlot s = slot(i);
    // Adding 0 turns an honest -0 into +0: -0 marks a slot without gradient.
    float weight = unnormalized(s, options, largest) / divisor * options.scale + 0.0f;
    if (!s.active) weight = -0.0f;
    if (outcome == Outcome::kUniform) weight = 1.0f / static_cast<float>(k);
    call.weights[token * k + i] = s.valid ? weight : 0.0f;
    store_index(call.indices, call.index_bytes, token * k + i, s.expert);
    if (row.counts != nullptr && s.valid) atomicAdd(row.counts + s.expert, 1);
    if (call.replicas.load != nullptr) {
      const int expert[1] = {s.expert};
      assign_slots(call, token, i, k, expert);
    }
  }
  if (row.lane == 0) {
    const float nan = __int_as_float(0x7fc00000);
    call.normalizer[token] = outcome == Outcome::kChosen ? normalizer : nan;
  }
  if (call.probs != nullptr) {
    __syncwarp();
    write_dense(call, options, token, logits, outcome, row);
  }
}

// ---- the token ----

// Whether keys or weights need the softmax of the whole row.
__device__ __forceinline__ bool needs_softmax(const RouteForward& call,
                                              const RouteOptions& options) {
  if (options.score != Score::kSoftmax) return false;
  return !options.renormalize || (call.bias != nullptr && call.given == nullptr);
}

// Adds a token to the statistics, from the keys of its logits.
template <typename Sums>
__device__ __forceinline__ void add_keys_row(const RouteForward& call, const RouteOptions& options,
                                             int64_t token, int padded, const KeysRow& keys,
                                             Sums& sums) {
  const auto row = [&](auto visit) {
    for (int i = kChunk * keys.lane; i < padded; i += kRowMultiple) {
      float x[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) x[c] = logit_of(keys.keys[i + c]);
      visit(0, i, x);
    }
  };
  float top = -kInfinity;
  row([&](int, int, const float (&x)[kChunk]) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) top = fmaxf(top, x[c]);
  });
  sums.template add<kWarpSize>(call, options, token, true, row, Exponential(warp_max(top)), nullptr,
                               keys.lane);
}

// Routes a token by a warp. `sums`: of the warp, where there are statistics, else null.
template <typename T, typename Sums>
__device__ __forceinline__ void route_keys(const RouteForward& call, const RouteOptions& options,
                                           int64_t token, const KeysLayout& layout, KeysRow& row,
                                           Sums* sums) {
  const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
  if (call.where != nullptr && !call.where[token]) {
    if (sums != nullptr && row.lane == 0) call.stats.softmax[token] = {0.0f, 0.0f};
    write_token(call, options, token, logits, Outcome::kPadding, row);
    return;
  }
  const bool softmax = needs_softmax(call, options);
  const bool final_keys = call.bias == nullptr && options.group_count == 0;
  if (call.given == nullptr || softmax || sums != nullptr) {
    load_keys(logits, final_keys ? kLowestKey : kNanKey, layout.padded, row);
  }
  if (softmax) row.softmax = softmax_of(row, layout.padded);
  if (sums != nullptr) {
    add_keys_row(call, options, token, layout.padded, row, *sums);
    __syncwarp();
  }
  Outcome outcome = Outcome::kChosen;
  if (call.given == nullptr) {
    const float* bias =
        call.bias == nullptr ? nullptr : call.bias + token / call.tokens_per_batch * call.experts;
    const bool enough = final_keys || finish_keys(options, bias, row);
    select(row.keys, row.experts, static_cast<int>(options.k), row.pairs, row.padded_k, row.lane);
    if (!enough || packed_key(row.pairs[0]) <= kLowestKey) outcome = Outcome::kUniform;
  }
  write_token(call, options, token, logits, outcome, row);
  __syncwarp();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_KEYS_TOKEN_CUH_
