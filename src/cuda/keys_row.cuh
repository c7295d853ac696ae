// A row of selection keys in the shared memory of a warp, for every option and size.

#ifndef JAX_ROUTER_CUDA_KEYS_ROW_CUH_
#define JAX_ROUTER_CUDA_KEYS_ROW_CUH_

#include <cstdint>

#include "dense.cuh"
#include "options.h"
#include "row.cuh"
#include "scalar.h"
#include "select.cuh"
#include "warp.cuh"

namespace jax_router {

// Marks a NaN until the keys are final: under a bias a -inf logit can be chosen, a NaN cannot.
inline constexpr int32_t kNanKey = kLowestKey - 1;
inline constexpr int kRowMultiple = 128;  // rows of keys are padded to this with kNoKey

// Sizes of a warp's shared memory, the same on both sides of the launch.
struct KeysLayout {
  int padded;         // experts, rounded up
  int padded_k;       // k, rounded up to a power of two
  int group_padded;   // groups, rounded up to a multiple of 4
  int bitmap_padded;  // words of a row of a bitmap, rounded up to a multiple of 4

  JAX_ROUTER_HOST_DEVICE KeysLayout(const RouteForward& call, const RouteOptions& options) {
    const int experts = static_cast<int>(call.experts);
    padded = (experts + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
    padded_k = 1;
    while (padded_k < options.k) padded_k *= 2;
    group_padded = (static_cast<int>(options.group_count) + 3) / 4 * 4;
    bitmap_padded = (bitmap_words(call) + 3) / 4 * 4;
  }
  JAX_ROUTER_HOST_DEVICE int64_t bytes() const {
    return int64_t{4} * (padded + bitmap_padded) + int64_t{8} * (padded_k + padded_k % 2) +
           int64_t{8} * group_padded;
  }
};

struct KeysRow {
  int32_t* keys;        // [padded]
  int64_t* pairs;       // [padded_k], the chosen
  int32_t* group_keys;  // [groups]
  int32_t* group_kept;  // [groups]
  uint32_t* bits;       // of a bitmap
  int32_t* counts;      // of the block's tokens at each expert, null without statistics
  int experts;
  int lane;
  int padded_k;
  Softmax softmax;

  // In the memory of a warp.
  __device__ __forceinline__ KeysRow(char* memory, const KeysLayout& layout, int experts,
                                     int32_t* counts)
      : keys(reinterpret_cast<int32_t*>(memory)),
        pairs(reinterpret_cast<int64_t*>(keys + layout.padded)),
        group_keys(reinterpret_cast<int32_t*>(pairs + layout.padded_k + layout.padded_k % 2)),
        group_kept(group_keys + layout.group_padded),
        bits(reinterpret_cast<uint32_t*>(group_kept + layout.group_padded)),
        counts(counts),
        experts(experts),
        lane(threadIdx.x % kWarpSize),
        padded_k(layout.padded_k),
        softmax{0.0f, 1.0f} {}
};

// ---- scores ----

__device__ __forceinline__ float logit_of(int32_t key) {
  return float_from_key(key < kLowestKey ? kLowestKey : key);  // NaN and padding become -inf
}

__device__ __forceinline__ float bounded(float x) { return x < kLargest ? x : kLargest; }

// Largest logit and sum of the softmax terms of the row. The order of additions is that of the CPU,
// since keys can depend on it: 128 partial sums, element i to sum i mod 128, four of them to a
// lane, then pairwise at distance 64, 32 ... 1.
__device__ __forceinline__ Softmax softmax_of(const KeysRow& row, int padded) {
  float largest = -kLargest;
  for (int i = row.lane; i < padded; i += kWarpSize) {
    const float x = bounded(logit_of(row.keys[i]));
    largest = x > largest ? x : largest;
  }
  largest = warp_max(largest);
  float sums[4] = {};
  for (int i = 4 * row.lane; i < padded; i += kRowMultiple) {
    const int4 keys = *reinterpret_cast<const int4*>(row.keys + i);
    const int32_t each[4] = {keys.x, keys.y, keys.z, keys.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[j] = add(sums[j], softmax_term(logit_of(each[j]), largest));
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[j] = warp_sum(sums[j]);
  const float total = add(add(sums[0], sums[2]), add(sums[1], sums[3]));
  return {largest, total > 0.0f ? total : 1.0f};
}

// ---- keys ----

template <typename T>
__device__ __forceinline__ void load_keys(const T* logits, int32_t nan_key, int padded,
                                          KeysRow& row) {
  for (int e = row.lane; e < row.experts; e += kWarpSize) {
    const int32_t bits = load_bits(logits + e);
    row.keys[e] = (bits & 0x7fffffff) > 0x7f800000 ? nan_key : flip_order(bits);
  }
  for (int e = row.experts + row.lane; e < padded; e += kWarpSize) row.keys[e] = kNoKey;
  __syncwarp();
}

// Key of a score (plus bias) from the marked key of its logit.
__device__ __forceinline__ int32_t scored_key(int32_t key, const float* bias, int e, Score score,
                                              const Softmax& softmax) {
  if (key == kNanKey) return kLowestKey;
  const float x = logit_of(key);
  // Under "none" a -inf input stays one: its key, unlike its score, is not 0.
  const float y = score == Score::kNone ? x : score_of(x, score, softmax);
  return key_from_float(bias == nullptr ? y : add_keys(y, bias[e]));
}

// Sum of the `terms` largest of the keys that `key_at` gives for [0, size), in descending order.
template <typename KeyAt>
__device__ __forceinline__ float sum_of_largest(KeyAt key_at, int size, int terms) {
  if (terms > size) return -kInfinity;
  int64_t last = INT64_MAX;
  float sum = 0.0f;
  for (int term = 0; term < terms; ++term) {
    int64_t best = INT64_MIN;
    for (int i = 0; i < size; ++i) {
      const int64_t pair = pack(key_at(i), i);
      if (pair < last && pair > best) best = pair;
    }
    const float value = float_from_key(packed_key(best));
    sum = term == 0 ? value : add_keys(sum, value);
    last = best;
  }
  return sum;
}

// Final selection keys. False if fewer than `group_keep` group scores lie above -inf.
__device__ __forceinline__ bool finish_keys(const RouteOptions& options, const float* bias,
                                            KeysRow& row) {
  if (bias != nullptr) {
    for (int e = row.lane; e < row.experts; e += kWarpSize) {
      row.keys[e] = scored_key(row.keys[e], bias, e, options.score, row.softmax);
    }
    __syncwarp();
  }
  const int count = static_cast<int>(options.group_count);
  if (count == 0) return true;
  const int size = row.experts / count;
  const bool by_key = bias != nullptr || options.score == Score::kNone ||
                      (options.score == Score::kSoftmax && options.renormalize) ||
                      options.group_terms() == 1;
  for (int g = row.lane; g < count; g += kWarpSize) {
    const int32_t* keys = row.keys + g * size;
    const auto key_at = [&](int i) {
      if (!by_key) return scored_key(keys[i], nullptr, 0, options.score, row.softmax);
      return keys[i] < kLowestKey ? kLowestKey : keys[i];
    };
    const int terms = static_cast<int>(options.group_terms());
    row.group_keys[g] = key_from_float(sum_of_largest(key_at, size, terms));
  }
  __syncwarp();
  int above = 0;
  for (int g = row.lane; g < count; g += kWarpSize) {
    const int32_t mine = row.group_keys[g];
    int beaten = 0;
    for (int other = 0; other < count; ++other) {
      const int32_t key = row.group_keys[other];
      beaten += key > mine || (key == mine && other < g);
    }
    row.group_kept[g] = beaten < options.group_keep;
    above += mine > kLowestKey;
  }
  __syncwarp();
  for (int e = row.lane; e < row.experts; e += kWarpSize) {
    const bool excluded = row.keys[e] < kLowestKey || !row.group_kept[e / size];
    if (excluded) row.keys[e] = kLowestKey;
  }
  __syncwarp();
  return __reduce_add_sync(kAllLanes, above) >= options.group_keep;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_KEYS_ROW_CUH_
