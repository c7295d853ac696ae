// The forward and the backward of `scores` on the CPU. With y the score of a logit, or its softmax
// term, D = sum y (+ 1e-20 but for softmax), p = y / D and g the cotangent of p:
//
//   softmax   dx = p (g - sum g p)
//   others    dx = (g - sum g p) / D * dy/dx
//
// for the finite logits, 0 for all others.

#include "scores.h"

#include <cstring>
#include <type_traits>

#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

constexpr int64_t kLanes = 32;       // rows in scratch are padded to a multiple of this
constexpr int64_t kBlock = 16 * 32;  // elements that are added up before they join the total

struct Row {
  int64_t experts;
  int64_t padded;
  float* x;          // logits, NaN has become -inf; padded with -inf
  float* y;          // scores, then normalized scores
  float* cotangent;  // of the backward alone, 0 where the logit is -inf
  float* slope;      // dy/dx, of the backward of every score but softmax
};

Row take_row(Arena& arena, const ScoresRows& call, bool backward) {
  Row row;
  row.experts = call.experts;
  row.padded = round_up(call.experts, kLanes);
  row.x = arena.take<float>(row.padded);
  row.y = arena.take<float>(row.padded);
  row.cotangent = arena.take<float>(backward ? row.padded : 0);
  row.slope = arena.take<float>(backward ? row.padded : 0);
  return row;
}

template <typename T>
void load_row(const T* __restrict logits, const Row& row) {
  float* __restrict x = row.x;
  for (int64_t e = 0; e < row.experts; ++e) {
    x[e] = float_from_key(key_from_bits(load_bits(logits, e)));
  }
  for (int64_t e = row.experts; e < row.padded; ++e) x[e] = -kInfinity;
}

void load_cotangent(const float* __restrict cotangent, const Row& row) {
  for (int64_t e = 0; e < row.experts; ++e) {
    row.cotangent[e] = row.x[e] > -kInfinity ? cotangent[e] : 0.0f;
  }
  for (int64_t e = row.experts; e < row.padded; ++e) row.cotangent[e] = 0.0f;
}

// Sum of value(i) over a padded row, in blocks, so that the rounding errors of long rows do not add
// up.
template <typename Value>
inline float sum_of(int64_t padded, Value value) {
  alignas(64) float total[kLanes] = {};
  for (int64_t begin = 0; begin < padded; begin += kBlock) {
    const int64_t end = begin + kBlock < padded ? begin + kBlock : padded;
    alignas(64) float sums[kLanes] = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) sums[j] += value(i + j);
    }
    for (int64_t j = 0; j < kLanes; ++j) total[j] += sums[j];
  }
  for (int64_t distance = kLanes / 2; distance > 0; distance /= 2) {
    for (int64_t j = 0; j < distance; ++j) total[j] += total[j + distance];
  }
  return total[0];
}

// dy/dx of a finite logit x with score y.
inline float slope_at(float x, float y, Score score) {
  if (score == Score::kNone) return 1.0f;
  const float e = exp_nonpositive(x < 0.0f ? x : -x);
  const float inverse = 1.0f / (1.0f + e);
  // Not y (1 - y), which cancels for large x.
  if (score == Score::kSigmoid) return e * inverse * inverse;
  const float sigmoid = (x < 0.0f ? e : 1.0f) * inverse;
  return y > 0.0f ? sigmoid / (2.0f * (y > 0.0f ? y : 1.0f)) : 0.0f;
}

template <Score kScore>
void elementwise_row(const Row& row, bool slopes) {
  const float* __restrict x = row.x;
  float* __restrict y = row.y;
  float* __restrict slope = row.slope;
  if (slopes) {
    for (int64_t i = 0; i < row.padded; ++i) {
      y[i] = elementwise_score(x[i], kScore);
      slope[i] = slope_at(x[i], y[i], kScore);
    }
  } else {
    for (int64_t i = 0; i < row.padded; ++i) y[i] = elementwise_score(x[i], kScore);
  }
}

// Fills row.y with scores, still to be divided by the result, and row.slope where asked for.
float score_row(const Row& row, Score score, bool slopes) {
  const float* y = row.y;
  const auto sum = [&] { return sum_of(row.padded, [y](int64_t i) { return y[i]; }); };
  switch (score) {
    case Score::kSoftmax: {
      const float largest = largest_of(row.x, row.padded);
      for (int64_t i = 0; i < row.padded; ++i) row.y[i] = softmax_term(row.x[i], largest);
      const float total = sum();
      return total > 0.0f ? total : 1.0f;
    }
    case Score::kSigmoid:
      elementwise_row<Score::kSigmoid>(row, slopes);
      break;
    case Score::kSqrtSoftplus:
      elementwise_row<Score::kSqrtSoftplus>(row, slopes);
      break;
    case Score::kNone:
      elementwise_row<Score::kNone>(row, slopes);
      break;
  }
  return sum() + kEpsilon;
}

inline bool is_padding(const ScoresRows& call, int64_t token) {
  return call.where != nullptr && !call.where[token];
}

template <typename T>
void forward_row(const ScoresForward& call, int64_t token, const Row& row) {
  float* __restrict scores = call.scores + token * call.experts;
  if (is_padding(call, token)) {
    std::memset(scores, 0, static_cast<size_t>(call.experts) * sizeof(float));
    return;
  }
  load_row(static_cast<const T*>(call.logits) + token * call.experts, row);
  const float divisor = score_row(row, call.score, false);
  const float* __restrict y = row.y;
  for (int64_t e = 0; e < row.experts; ++e) scores[e] = y[e] / divisor;
}

template <typename T>
void backward_row(const ScoresBackward& call, int64_t token, const Row& row) {
  T* __restrict gradient = static_cast<T*>(call.gradient) + token * call.experts;
  if (is_padding(call, token)) {
    std::memset(gradient, 0, static_cast<size_t>(call.experts) * sizeof(T));
    return;
  }
  load_row(static_cast<const T*>(call.logits) + token * call.experts, row);
  load_cotangent(call.cotangent + token * call.experts, row);
  const bool softmax = call.score == Score::kSoftmax;
  const float divisor = score_row(row, call.score, !softmax);
  const float* __restrict x = row.x;
  float* __restrict p = row.y;
  const float* __restrict g = row.cotangent;
  const float* __restrict slope = row.slope;
  for (int64_t i = 0; i < row.padded; ++i) p[i] /= divisor;
  const float mean = sum_of(row.padded, [g, p](int64_t i) { return g[i] * p[i]; });
  const auto store = [&](int64_t e, float value) {
    const bool finite = x[e] > -kInfinity && x[e] < kInfinity;
    store_value(gradient, e, finite ? value : 0.0f);
  };
  if (softmax) {
    for (int64_t e = 0; e < row.experts; ++e) store(e, p[e] * (g[e] - mean));
  } else {
    for (int64_t e = 0; e < row.experts; ++e) store(e, (g[e] - mean) / divisor * slope[e]);
  }
}

void forward(const ScoresForward& call, int64_t begin, int64_t end, void* scratch) {
  Arena arena(scratch);
  const Row row = take_row(arena, call, false);
  with_type(call.logits_type, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    for (int64_t token = begin; token < end; ++token) forward_row<T>(call, token, row);
  });
}

void backward(const ScoresBackward& call, int64_t begin, int64_t end, void* scratch) {
  Arena arena(scratch);
  const Row row = take_row(arena, call, true);
  with_type(call.logits_type, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    for (int64_t token = begin; token < end; ++token) backward_row<T>(call, token, row);
  });
}

size_t forward_scratch(const ScoresForward& call) {
  Arena arena(nullptr);
  take_row(arena, call, false);
  return arena.used();
}

size_t backward_scratch(const ScoresBackward& call) {
  Arena arena(nullptr);
  take_row(arena, call, true);
  return arena.used();
}

}  // namespace

ScoresKernel<ScoresForward> scores_kernel() { return {forward_scratch, forward}; }

ScoresKernel<ScoresBackward> scores_backward_kernel() { return {backward_scratch, backward}; }

}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router
