// The forward for every option and size: one warp a token, the keys of its row in shared memory.

#include <cstdint>

#include "dense.cuh"
#include "route.h"
#include "row.cuh"
#include "scalar.h"
#include "select.cuh"
#include "warp.cuh"
#include "write.cuh"

namespace jax_router {
namespace {

// Marks a NaN until the keys are final: under a bias a -inf logit can be chosen, a NaN cannot.
constexpr int32_t kNanKey = kLowestKey - 1;
constexpr int kRowMultiple = 128;  // rows of keys are padded to this with kNoKey

// Sizes of a warp's shared memory, the same on both sides of the launch.
struct Layout {
  int padded;        // experts, rounded up
  int padded_k;      // k, rounded up to a power of two
  int group_padded;  // groups, rounded up to a multiple of 4

  int bitmap_padded;  // words of a row of a bitmap, rounded up to a multiple of 4

  JAX_ROUTER_HOST_DEVICE Layout(const RouteForward& call, const RouteOptions& options) {
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

struct Row {
  int32_t* keys;        // [padded]
  int64_t* pairs;       // [padded_k], the chosen
  int32_t* group_keys;  // [groups]
  int32_t* group_kept;  // [groups]
  uint32_t* bits;       // of a bitmap
  int experts;
  int lane;
  int padded_k;
  Softmax softmax;
};

// ---- scores ----

__device__ __forceinline__ float logit_of(int32_t key) {
  return float_from_key(key < kLowestKey ? kLowestKey : key);  // NaN and padding become -inf
}

__device__ __forceinline__ float bounded(float x) { return x < kLargest ? x : kLargest; }

// Largest logit and sum of the softmax terms of the row. The order of additions is that of the CPU,
// since keys can depend on it: 128 partial sums, element i to sum i mod 128, four of them to a
// lane, then pairwise at distance 64, 32 ... 1.
__device__ __forceinline__ Softmax softmax_of(const Row& row, int padded) {
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
__device__ __forceinline__ void load_keys(const T* logits, int32_t nan_key, int padded, Row& row) {
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
                                            Row& row) {
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

// ---- slots ----

enum class Outcome { kChosen, kUniform, kPadding };

struct Slot {
  int32_t expert;  // E where the slot is invalid
  float logit;
  bool valid;
  bool active;  // its key lies above -inf
};

// Slot i of a token: chosen by this warp, or given.
template <typename T>
__device__ __forceinline__ Slot slot_at(const RouteForward& call, const RouteOptions& options,
                                        int64_t token, int i, const T* logits, Outcome outcome,
                                        const Row& row) {
  if (outcome == Outcome::kPadding) return {row.experts, 0.0f, false, false};
  Slot slot{i, 0.0f, true, false};
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
__device__ __forceinline__ float unnormalized(const Slot& slot, const RouteOptions& options,
                                              float largest) {
  if (!slot.active) return 0.0f;
  if (options.score != Score::kSoftmax) return elementwise_score(slot.logit, options.score);
  return softmax_term(slot.logit, largest);
}

// Sum of the terms of k slots. Up to 128 in the order that the kernels have which list survivors,
// so that a choice replayed has the same weights: pairwise at distance 1, 2, 4 ...
template <typename Term>
__device__ __forceinline__ float sum_of_terms(Term term, int k, int lane) {
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
                                           int64_t token, int i, int expert, const Row& row) {
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
                                            const Row& row) {
  const int words = bitmap_words(call);
  clear_bitmap(row.bits, words, row.lane);
  clear_dense<T>(call, token, 1, row.lane);
  __syncwarp();
  for (int i = row.lane; i < options.k; i += kWarpSize) {
    const Slot s = slot_at(call, options, token, i, logits, outcome, row);
    if (s.valid) store_slot<T>(call, options, token, i, s.expert, row);
  }
  __syncwarp();
  if (words > 0) write_bitmap(call, token, 1, row.bits, words, row.lane);
}

// Writes the weights, experts and normalizer of a token.
template <typename T>
__device__ __forceinline__ void write_token(const RouteForward& call, const RouteOptions& options,
                                            int64_t token, const T* logits, Outcome outcome,
                                            const Row& row) {
  const int k = static_cast<int>(options.k);
  const auto slot = [&](int i) { return slot_at(call, options, token, i, logits, outcome, row); };
  float largest = -kLargest;
  bool any_valid = false;
  bool any_active = false;
  for (int i = row.lane; i < k; i += kWarpSize) {
    const Slot s = slot(i);
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
        sum_of_terms([&](int i) { return unnormalized(slot(i), options, largest); }, k, row.lane);
    const bool softmax = options.score == Score::kSoftmax;
    divisor = softmax ? (total > 0.0f ? total : 1.0f) : total + kEpsilon;
    normalizer = softmax ? 1.0f : divisor;
  }

  for (int i = row.lane; i < k; i += kWarpSize) {
    const Slot s = slot(i);
    // Adding 0 turns an honest -0 into +0: -0 marks a slot without gradient.
    float weight = unnormalized(s, options, largest) / divisor * options.scale + 0.0f;
    if (!s.active) weight = -0.0f;
    if (outcome == Outcome::kUniform) weight = 1.0f / static_cast<float>(k);
    call.weights[token * k + i] = s.valid ? weight : 0.0f;
    store_index(call.indices, call.index_bytes, token * k + i, s.expert);
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

// ---- the kernel ----

// Whether keys or weights need the softmax of the whole row.
__device__ __forceinline__ bool needs_softmax(const RouteForward& call,
                                              const RouteOptions& options) {
  if (options.score != Score::kSoftmax) return false;
  return !options.renormalize || (call.bias != nullptr && call.given == nullptr);
}

template <typename T>
__device__ __forceinline__ void route_token(const RouteForward& call, const RouteOptions& options,
                                            int64_t token, const Layout& layout, Row& row) {
  const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
  if (call.where != nullptr && !call.where[token]) {
    write_token(call, options, token, logits, Outcome::kPadding, row);
    return;
  }
  const bool softmax = needs_softmax(call, options);
  const bool final_keys = call.bias == nullptr && options.group_count == 0;
  if (call.given == nullptr || softmax) {
    load_keys(logits, final_keys ? kLowestKey : kNanKey, layout.padded, row);
  }
  if (softmax) row.softmax = softmax_of(row, layout.padded);
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

template <typename T>
__global__ void __launch_bounds__(8 * kWarpSize, 4)
    route_general_kernel(const __grid_constant__ RouteForward call,
                         const __grid_constant__ RouteOptions options) {
  extern __shared__ int4 shared[];
  const WarpRows rows = warp_rows();
  const Layout layout(call, options);
  char* memory = reinterpret_cast<char*>(shared) + rows.warp * layout.bytes();
  Row row;
  row.keys = reinterpret_cast<int32_t*>(memory);
  row.pairs = reinterpret_cast<int64_t*>(row.keys + layout.padded);
  row.group_keys = reinterpret_cast<int32_t*>(row.pairs + layout.padded_k + layout.padded_k % 2);
  row.group_kept = row.group_keys + layout.group_padded;
  row.bits = reinterpret_cast<uint32_t*>(row.group_kept + layout.group_padded);
  row.experts = static_cast<int>(call.experts);
  row.lane = rows.lane;
  row.padded_k = layout.padded_k;
  row.softmax = {0.0f, 1.0f};
  for (int64_t token = rows.first; token < call.tokens; token += rows.stride) {
    route_token<T>(call, options, token, layout, row);
  }
}

}  // namespace

cudaError_t launch_route_general(const RouteForward& call, const RouteOptions& options,
                                 cudaStream_t stream) {
  const int64_t bytes = Layout(call, options).bytes();
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_rows(route_general_kernel<T>, call.tokens, bytes, stream, call, options);
  });
}

}  // namespace jax_router
