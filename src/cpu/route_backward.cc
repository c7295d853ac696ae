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
  float* softmax;
  float* scores;
  float* products;
};

bool has_stats(const RouteBackward& call) { return call.softmax != nullptr; }

Slots take_slots(Arena& arena, const RouteBackward& call, int64_t k) {
  const int64_t experts = call.experts;
  const int64_t padded = round_up(experts, kRowMultiple);
  Slots slots;
  slots.sums = arena.take<float>(experts);
  slots.logits = arena.take<float>(padded);
  slots.value = arena.take<float>(k);
  slots.expert = arena.take<int32_t>(k);
  slots.p = arena.take<float>(k);
  slots.count = 0;
  const int64_t stats_row = has_stats(call) ? padded : 0;
  slots.softmax = arena.take<float>(stats_row);
  slots.scores = arena.take<float>(stats_row);
  slots.products = arena.take<float>(stats_row);
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
  for (int64_t e = experts; e < round_up(experts, kRowMultiple); ++e) x[e] = -kInfinity;
}

// The forward's softmax again: the largest logit is exact, the sum of the terms was saved.
template <typename T>
void write_dense(Slots& slots, float mean, float total, int64_t experts, const T* __restrict logits,
                 T* __restrict gradient) {
  for (int64_t i = 0; i < slots.count; ++i) slots.sums[slots.expert[i]] += slots.value[i];
  const int64_t padded = round_up(experts, kRowMultiple);
  float* __restrict x = slots.logits;
  load_logits(logits, experts, x);
  const float largest = largest_of(x, padded);
  const float* __restrict sums = slots.sums;
  for (int64_t e = 0; e < experts; ++e) {
    store_value(gradient, e, softmax_term(x[e], largest) / total * (sums[e] - mean));
  }
}

// Sum of two rows multiplied; the second is padded with zeros.
float dot(const float* __restrict a, const float* __restrict b, int64_t experts, int64_t padded,
          float* __restrict products) {
  for (int64_t e = 0; e < experts; ++e) products[e] = a[e] * b[e];
  for (int64_t e = experts; e < padded; ++e) products[e] = 0.0f;
  return sum_row(products, padded);
}

// Adds the gradient of the score sums to a row, where the scores are not softmax.
void add_score_gradient(const Slots& slots, const float* __restrict cotangent, Score score,
                        int64_t experts, int64_t padded, float* __restrict gradient) {
  float* __restrict y = slots.scores;
  score_row(slots.logits, padded, score, y);
  const float divisor = sum_row(y, padded) + kEpsilon;
  const float mean = dot(cotangent, y, experts, padded, slots.products) / divisor;
  for (int64_t e = 0; e < experts; ++e) {
    const float slope = slots.logits[e] > -kInfinity ? score_gradient(y[e], score) : 0.0f;
    gradient[e] += (cotangent[e] - mean) / divisor * slope;
  }
}

// Adds softmax(x) (s + offset) to a row, each term of the softmax times what multiplies it.
void add_softmax_gradient(const RouteBackward& call, const RouteOptions& options, int64_t token,
                          float mean, const Slots& slots, const float* __restrict cotangent,
                          float* __restrict gradient) {
  const SavedSoftmax saved = call.softmax[token];
  const int64_t experts = call.experts;
  const int64_t padded = round_up(experts, kRowMultiple);
  float* __restrict y = slots.softmax;
  for (int64_t e = 0; e < padded; ++e) {
    y[e] = softmax_term(slots.logits[e], saved.largest) / saved.total;
  }
  float offset = options.dense_gradient() ? -mean : 0.0f;
  if (call.z_cotangent != nullptr) {
    const float logsumexp = saved.largest + std::log(saved.total);
    offset += 2.0f * call.z_cotangent[token / call.tokens_per_batch] * logsumexp;
  }
  if (cotangent != nullptr) {
    offset -= dot(cotangent, y, experts, padded, slots.products);
    for (int64_t e = 0; e < experts; ++e) gradient[e] += y[e] * (cotangent[e] + offset);
  } else {
    for (int64_t e = 0; e < experts; ++e) gradient[e] += y[e] * offset;
  }
  if (!options.dense_gradient()) return;
  for (int64_t i = 0; i < slots.count; ++i) {
    gradient[slots.expert[i]] += y[slots.expert[i]] * slots.value[i];
  }
}

// The gradient of weights and statistics together.
template <typename T>
void write_joint(const RouteBackward& call, const RouteOptions& options, int64_t token, float mean,
                 Slots& slots, T* out) {
  const int64_t experts = call.experts;
  float* gradient = slots.sums;
  if (!options.dense_gradient()) {
    for (int64_t i = 0; i < slots.count; ++i) gradient[slots.expert[i]] += slots.value[i];
  }
  if (call.softmax[token].total > 0.0f) {
    load_logits(static_cast<const T*>(call.logits) + token * experts, experts, slots.logits);
    const float* cotangent = call.score_cotangent;
    if (cotangent != nullptr) cotangent += token / call.tokens_per_batch * experts;
    const bool elementwise = options.score != Score::kSoftmax;
    if (elementwise && cotangent != nullptr) {
      const int64_t padded = round_up(experts, kRowMultiple);
      add_score_gradient(slots, cotangent, options.score, experts, padded, gradient);
    }
    if (!elementwise || call.z_cotangent != nullptr) {
      add_softmax_gradient(call, options, token, mean, slots, elementwise ? nullptr : cotangent,
                           gradient);
    }
  }
  for (int64_t e = 0; e < experts; ++e) store_value(out, e, gradient[e]);
  std::memset(gradient, 0, static_cast<size_t>(experts) * sizeof(float));
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
    return;
  }
  if (options.dense_gradient() && normalizer == normalizer) {
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
