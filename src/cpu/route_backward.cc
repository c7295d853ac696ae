// The backward of `route`, `dense` and `stats` on the CPU, from dense indices.
//
// With p = weights / scale and h = scale * cotangent on the slots that carry a gradient:
//
//   softmax, renormalized   dx = p (h - sum h p)                        on the slots
//   softmax over all        dx = y (h - sum h p)                        for every expert
//   others, renormalized    dx = (h - sum h p) / normalizer * dy/dx     on the slots
//   others                  dx = h * dy/dx                              on the slots
//
// Only the second reads the logits. An expert given twice gets the sum of its slots.
//
// The statistics add, with their cotangents s of the score sums and z of the z sum, for every
// expert:
//
//   softmax   dx = y (s - sum s y)                                  y = exp(x - largest) / total
//   others    dx = (s - sum s a) / D * dy/dx                        D = sum y, a = y / D
//   z         dx = 2 z logsumexp(x) exp(x - largest) / total

#include <cmath>
#include <cstring>
#include <type_traits>

#include "route.h"
#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

struct Slots {
  float* sums;      // [experts], zero between rows
  float* logits;    // padded row
  float* value;     // [k]
  int32_t* expert;  // [k], the experts of slots with a gradient, in slot order
  float* p;         // [k]
  int64_t count;
  // Of `stats` alone: padded rows.
  float* terms;
  float* scores;
  float* cotangent;  // of the score sums of `batch`, padded with 0
  int64_t batch;
};

bool has_stats(const RouteBackward& call) { return call.softmax != nullptr; }

Slots take_slots(Arena& arena, const RouteBackward& call, int64_t k) {
  const int64_t experts = call.experts;
  const int64_t padded = round_up(experts, kScoreMultiple);
  Slots slots;
  slots.sums = arena.take<float>(experts);
  slots.logits = arena.take<float>(padded);
  slots.value = arena.take<float>(k);
  slots.expert = arena.take<int32_t>(k);
  slots.p = arena.take<float>(k);
  slots.count = 0;
  const int64_t stats_row = has_stats(call) ? padded : 0;
  slots.terms = arena.take<float>(stats_row);
  slots.scores = arena.take<float>(stats_row);
  slots.cotangent = arena.take<float>(stats_row);
  slots.batch = -1;
  return slots;
}

// The cotangent of a slot: its own, or that of its expert.
template <typename T>
float cotangent_at(const RouteBackward& call, int64_t slot, int64_t token, int64_t expert) {
  if (!call.dense_cotangent) return static_cast<const float*>(call.cotangent)[slot];
  return bits_float(
      load_bits(static_cast<const T*>(call.cotangent), token * call.experts + expert));
}

// Collects the slots with a gradient: value = h, p = weight / scale. Returns sum h p.
template <typename T>
float gather_slots(const RouteBackward& call, const RouteOptions& options, int64_t token,
                   Slots& slots) {
  slots.count = 0;
  if (call.weights == nullptr || !(call.normalizer[token] == call.normalizer[token])) return 0.0f;
  const float* weights = call.weights + token * options.k;
  const float inverse_scale = options.scale != 0.0f ? 1.0f / options.scale : 0.0f;
  float mean = 0.0f;
  with_index(call.index_bytes, [&](auto* type) {
    using Index = typename std::remove_pointer<decltype(type)>::type;
    const Index* indices = static_cast<const Index*>(call.indices) + token * options.k;
    for (int64_t i = 0; i < options.k; ++i) {
      const bool filled = float_bits(weights[i]) == INT32_MIN;  // -0
      if (filled || static_cast<uint64_t>(indices[i]) >= static_cast<uint64_t>(call.experts)) {
        continue;
      }
      const int64_t expert = static_cast<int64_t>(indices[i]);
      const int64_t slot = token * options.k + i;
      const float h = cotangent_at<T>(call, slot, token, expert) * options.scale;
      const float p = weights[i] * inverse_scale;
      slots.expert[slots.count] = static_cast<int32_t>(expert);
      slots.value[slots.count] = h;
      slots.p[slots.count] = p;
      mean += h * p;
      ++slots.count;
    }
  });
  return mean;
}

// Turns h into the gradient of each slot's logit, where the gradient is sparse.
void slot_gradients(const RouteOptions& options, float normalizer, float mean, Slots& slots) {
  for (int64_t i = 0; i < slots.count; ++i) {
    const float p = slots.p[i];
    float h = slots.value[i];
    if (options.score == Score::kSoftmax) {
      slots.value[i] = p * (h - mean);
    } else {
      if (options.renormalize) h = (h - mean) / normalizer;
      slots.value[i] = h * score_gradient(p * normalizer, options.score);
    }
  }
}

template <typename T>
void write_sparse(const Slots& slots, int64_t experts, T* gradient) {
  std::memset(gradient, 0, static_cast<size_t>(experts) * sizeof(T));
  for (int64_t i = 0; i < slots.count; ++i) slots.sums[slots.expert[i]] += slots.value[i];
  for (int64_t i = 0; i < slots.count; ++i) {
    store_value(gradient, slots.expert[i], slots.sums[slots.expert[i]]);
  }
}

// Logits in float32, NaN as -inf, padded with -inf.
template <typename T>
void load_logits(const T* __restrict logits, int64_t experts, float* __restrict x) {
  for (int64_t e = 0; e < experts; ++e) x[e] = float_from_key(key_from_bits(load_bits(logits, e)));
  for (int64_t e = experts; e < round_up(experts, kScoreMultiple); ++e) x[e] = -kInfinity;
}

// The forward's softmax again: the largest logit is exact, the sum of the terms was saved.
template <typename T>
void write_dense(Slots& slots, float mean, float total, int64_t experts, const T* __restrict logits,
                 T* __restrict gradient) {
  for (int64_t i = 0; i < slots.count; ++i) slots.sums[slots.expert[i]] += slots.value[i];
  const int64_t padded = round_up(experts, kScoreMultiple);
  float* __restrict x = slots.logits;
  load_logits(logits, experts, x);
  const float largest = largest_of(x, padded);
  const float* __restrict sums = slots.sums;
  for (int64_t e = 0; e < experts; ++e) {
    store_value(gradient, e, softmax_term(x[e], largest) / total * (sums[e] - mean));
  }
}

// Sum of two padded rows multiplied, in the order of sum_row.
float dot(const float* __restrict a, const float* __restrict b, int64_t padded) {
  alignas(64) float sums[kPartialSums] = {};
  for (int64_t i = 0; i < padded; i += kScoreMultiple) {
    float* __restrict part = sums + i % kPartialSums;
    for (int64_t j = 0; j < kScoreMultiple; ++j) part[j] += a[i + j] * b[i + j];
  }
  return sum_pairwise(sums);
}

// The cotangents of the score sums of a token's batch row.
void load_cotangent(const RouteBackward& call, int64_t token, Slots& slots) {
  const int64_t batch = token / call.tokens_per_batch;
  if (batch == slots.batch) return;
  slots.batch = batch;
  const int64_t padded = round_up(call.experts, kScoreMultiple);
  std::memset(slots.cotangent, 0, static_cast<size_t>(padded) * sizeof(float));
  if (call.score_cotangent == nullptr) return;
  std::memcpy(slots.cotangent, call.score_cotangent + batch * call.experts,
              static_cast<size_t>(call.experts) * sizeof(float));
}

// The gradient of the statistics of one row: what all its elements have in common.
struct RowGradient {
  float scale;   // makes probabilities of the softmax terms
  float offset;  // of the terms, besides the cotangents of their scores; times `scale`
  float mean;    // of the cotangents of scores that are not softmax
  float total;   // of these scores; its inverse might be a denormal
};

inline float softmax_gradient(const RowGradient& row, float term, float cotangent) {
  return term * (cotangent * row.scale + row.offset);
}

inline float elementwise_gradient(const RowGradient& row, float x, float y, float term,
                                  float cotangent, Score score) {
  const float slope = x > -kInfinity ? score_gradient(y, score) : 0.0f;
  return (cotangent - row.mean) / row.total * slope + term * row.offset;
}

// Loads a row of logits, its softmax terms and its scores.
template <typename T>
RowGradient prepare_row(const RouteBackward& call, const RouteOptions& options, int64_t token,
                        float mean, Slots& slots) {
  const SavedSoftmax saved = call.softmax[token];
  const int64_t padded = round_up(call.experts, kScoreMultiple);
  load_logits(static_cast<const T*>(call.logits) + token * call.experts, call.experts,
              slots.logits);
  load_cotangent(call, token, slots);
  for (int64_t e = 0; e < padded; ++e) {
    slots.terms[e] = softmax_term(slots.logits[e], saved.largest);
  }
  RowGradient row{1.0f / saved.total, options.dense_gradient() ? -mean : 0.0f, 0.0f, 0.0f};
  if (call.z_cotangent != nullptr) {
    const float logsumexp = saved.largest + std::log(saved.total);
    row.offset += 2.0f * call.z_cotangent[slots.batch] * logsumexp;
  }
  if (options.score == Score::kSoftmax) {
    row.offset -= dot(slots.cotangent, slots.terms, padded) * row.scale;
  } else {
    score_row(slots.logits, padded, options.score, slots.scores);
    row.total = sum_row(slots.scores, padded) + kEpsilon;
    row.mean = dot(slots.cotangent, slots.scores, padded) / row.total;
  }
  row.offset *= row.scale;
  return row;
}

template <typename T>
void write_statistics(const RowGradient& row, const Slots& slots, Score score, int64_t experts,
                      T* __restrict gradient) {
  const float* __restrict terms = slots.terms;
  const float* __restrict cotangent = slots.cotangent;
  if (score == Score::kSoftmax) {
    for (int64_t e = 0; e < experts; ++e) {
      store_value(gradient, e, softmax_gradient(row, terms[e], cotangent[e]));
    }
    return;
  }
  const float* __restrict x = slots.logits;
  const float* __restrict y = slots.scores;
  for (int64_t e = 0; e < experts; ++e) {
    store_value(gradient, e, elementwise_gradient(row, x[e], y[e], terms[e], cotangent[e], score));
  }
}

// The gradient of weights and statistics together.
template <typename T>
void write_joint(const RouteBackward& call, const RouteOptions& options, int64_t token, float mean,
                 Slots& slots, T* gradient) {
  if (!(call.softmax[token].total > 0.0f)) {
    write_sparse(slots, call.experts, gradient);
    return;
  }
  const RowGradient row = prepare_row<T>(call, options, token, mean, slots);
  write_statistics(row, slots, options.score, call.experts, gradient);
  for (int64_t i = 0; i < slots.count; ++i) slots.sums[slots.expert[i]] += slots.value[i];
  for (int64_t i = 0; i < slots.count; ++i) {
    const int64_t e = slots.expert[i];
    const float cotangent = slots.cotangent[e];
    const float of_statistics =
        options.score == Score::kSoftmax
            ? softmax_gradient(row, slots.terms[e], cotangent)
            : elementwise_gradient(row, slots.logits[e], slots.scores[e], slots.terms[e], cotangent,
                                   options.score);
    const float own = options.dense_gradient() ? slots.terms[e] * row.scale : 1.0f;
    store_value(gradient, e, slots.sums[e] * own + of_statistics);
  }
}

template <typename T>
void backward_row(const RouteBackward& call, const RouteOptions& options, int64_t token,
                  Slots& slots) {
  T* gradient = static_cast<T*>(call.gradient) + token * call.experts;
  const float normalizer = call.normalizer == nullptr ? 1.0f : call.normalizer[token];
  const float mean = gather_slots<T>(call, options, token, slots);
  if (has_stats(call)) {
    if (!options.dense_gradient()) slot_gradients(options, normalizer, mean, slots);
    write_joint(call, options, token, mean, slots, gradient);
  } else if (options.dense_gradient() && normalizer == normalizer) {
    const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
    write_dense(slots, mean, normalizer, call.experts, logits, gradient);
  } else {
    slot_gradients(options, normalizer, mean, slots);
    write_sparse(slots, call.experts, gradient);
  }
  for (int64_t i = 0; i < slots.count; ++i) slots.sums[slots.expert[i]] = 0.0f;
}

void backward(const RouteBackward& call, const RouteOptions& options, int64_t begin, int64_t end,
              void* scratch) {
  Arena arena(scratch);
  Slots slots = take_slots(arena, call, options.k);
  std::memset(slots.sums, 0, static_cast<size_t>(call.experts) * sizeof(float));
  with_type(call.logits_type, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    for (int64_t token = begin; token < end; ++token) backward_row<T>(call, options, token, slots);
  });
}

size_t backward_scratch(const RouteBackward& call, const RouteOptions& options) {
  Arena arena(nullptr);
  take_slots(arena, call, options.k);
  return arena.used();
}

}  // namespace

RouteBackwardKernel route_backward_kernel() { return {backward_scratch, backward}; }

}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router
