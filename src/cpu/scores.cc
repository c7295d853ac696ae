// The forward and the backward of `scores` on the CPU. With y the scores of the logits x, for
// softmax its terms exp(x - max x), and g the cotangent of p:
//
//   D = sum y + 1e-20, which is sum y for softmax, since one of its terms is 1
//   p = y / D
//   dx = (g - sum g p) / D * dy/dx for finite x, 0 for others
//
// where dy/dx is y for softmax: what the largest logit adds to it cancels.

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
  float* x;  // logits, NaN has become -inf; padded with -inf
  float* y;
  float* cotangent;  // of the backward alone, 0 where the logit is -inf
  float* slope;      // dy/dx, 0 where the logit is not finite; of the backward alone
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

// dy/dx of a logit x with score y.
inline float slope_of(float x, float y, Score score) {
  float slope = 1.0f;
  if (score == Score::kSoftmax) {
    slope = y;
  } else if (score != Score::kNone) {
    const float e = exp_nonpositive(x < 0.0f ? x : -x);
    const float inverse = 1.0f / (1.0f + e);
    const float sigmoid = (x < 0.0f ? e : 1.0f) * inverse;
    // For sigmoid not y (1 - y), which cancels for large x.
    slope = score == Score::kSigmoid ? e * inverse * inverse : sigmoid / (2.0f * y);
  }
  // A score of 0 has no slope either, but for "none".
  return x > -kInfinity && x < kInfinity && (y > 0.0f || score == Score::kNone) ? slope : 0.0f;
}

// Fills row.y and, where asked for, row.slope. Returns what the scores are to be divided by.
template <Score kScore>
float score_row(const Row& row, bool slopes) {
  const float* __restrict x = row.x;
  float* __restrict y = row.y;
  float* __restrict slope = row.slope;
  const float largest = kScore == Score::kSoftmax ? largest_of(x, row.padded) : 0.0f;
  for (int64_t i = 0; i < row.padded; ++i) {
    y[i] =
        kScore == Score::kSoftmax ? softmax_term(x[i], largest) : elementwise_score(x[i], kScore);
  }
  if (slopes) {
    for (int64_t i = 0; i < row.padded; ++i) slope[i] = slope_of(x[i], y[i], kScore);
  }
  return sum_of(row.padded, [y](int64_t i) { return y[i]; }) + kEpsilon;
}

float score_row(const Row& row, Score score, bool slopes) {
  switch (score) {
    case Score::kSoftmax:
      return score_row<Score::kSoftmax>(row, slopes);
    case Score::kSigmoid:
      return score_row<Score::kSigmoid>(row, slopes);
    case Score::kSqrtSoftplus:
      return score_row<Score::kSqrtSoftplus>(row, slopes);
    default:
      return score_row<Score::kNone>(row, slopes);
  }
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
  const float divisor = score_row(row, call.score, true);
  const float* __restrict y = row.y;
  const float* __restrict g = row.cotangent;
  const float* __restrict slope = row.slope;
  const float mean = sum_of(row.padded, [=](int64_t i) { return g[i] * (y[i] / divisor); });
  for (int64_t e = 0; e < row.experts; ++e) {
    const float value = (g[e] - mean) / divisor * slope[e];
    store_value(gradient, e, slope[e] != 0.0f ? value : 0.0f);
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
