// Rows of logits on the CPU: scratch, loads and stores by type, scores.
//
// Included by kernels that are compiled once per instruction set, with JAX_ROUTER_ISA naming their
// namespace. Such a file must not instantiate templates of the standard library over common types:
// the linker keeps one copy of such a function and could pick one that an older processor cannot
// run.

#ifndef JAX_ROUTER_CPU_ROWS_H_
#define JAX_ROUTER_CPU_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "scalar.h"

#ifdef __clang__
#define JAX_ROUTER_UNROLL _Pragma("clang loop unroll(full)")
#define JAX_ROUTER_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define JAX_ROUTER_UNROLL _Pragma("GCC unroll 16")
#define JAX_ROUTER_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

constexpr int64_t kRowMultiple = 128;   // rows of keys are padded to this
constexpr int64_t kScoreMultiple = 32;  // rows of logits and scores
constexpr int64_t kPartialSums = 128;   // of a row

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Hands out aligned pieces of a buffer; with a null buffer it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// ---- loads and stores ----

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int32_t load_bits(const float* row, int64_t i) { return float_bits(row[i]); }
inline int32_t load_bits(const Bfloat16* row, int64_t i) { return bits_from_bfloat16(row[i].bits); }
inline int32_t load_bits(const Float16* row, int64_t i) { return bits_from_float16(row[i].bits); }

inline void store_value(float* row, int64_t i, float x) { row[i] = x; }
inline void store_value(Bfloat16* row, int64_t i, float x) { row[i].bits = bfloat16_from_float(x); }
inline void store_value(Float16* row, int64_t i, float x) { row[i].bits = float16_from_float(x); }

// Calls `body` with a null pointer of the logits' type.
template <typename Body>
inline void with_type(LogitsType type, Body body) {
  switch (type) {
    case LogitsType::kFloat32:
      return body(static_cast<float*>(nullptr));
    case LogitsType::kBfloat16:
      return body(static_cast<Bfloat16*>(nullptr));
    case LogitsType::kFloat16:
      return body(static_cast<Float16*>(nullptr));
  }
}

// Calls `body` with a null pointer of the unsigned type of an index's size. Indices are never
// negative.
template <typename Body>
inline void with_index(int index_bytes, Body body) {
  switch (index_bytes) {
    case 1:
      return body(static_cast<uint8_t*>(nullptr));
    case 2:
      return body(static_cast<uint16_t*>(nullptr));
    case 4:
      return body(static_cast<uint32_t*>(nullptr));
    default:
      return body(static_cast<uint64_t*>(nullptr));
  }
}

// ---- scores ----

// The largest of a padded row, at most the largest float and no -inf.
inline float largest_of(const float* x, int64_t padded) {
  alignas(64) float maxima[32];
  for (int j = 0; j < 32; ++j) maxima[j] = -kLargest;
  for (int64_t i = 0; i < padded; i += 32) {
    for (int j = 0; j < 32; ++j) maxima[j] = x[i + j] > maxima[j] ? x[i + j] : maxima[j];
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    for (int j = 0; j < distance; ++j) {
      maxima[j] = maxima[j + distance] > maxima[j] ? maxima[j + distance] : maxima[j];
    }
  }
  return maxima[0] < kLargest ? maxima[0] : kLargest;
}

// Sum of the partial sums of a row, pairwise at distance 64, 32 ... 1; destroys them.
inline float sum_pairwise(float* sums) {
  for (int64_t distance = kPartialSums / 2; distance > 0; distance /= 2) {
    for (int64_t j = 0; j < distance; ++j) sums[j] += sums[j + distance];
  }
  return sums[0];
}

// Softmax terms of a padded row, and their sum: 0 if all logits are -inf. The order of additions is
// part of the definition, since keys can depend on it: 128 partial sums, element i to sum i mod
// 128, then pairwise at distance 64, 32 ... 1.
inline float softmax_terms(const float* __restrict x, int64_t padded, float largest,
                           float* __restrict terms) {
  alignas(64) float sums[kPartialSums] = {};
  for (int64_t i = 0; i < padded; i += kScoreMultiple) {
    float* __restrict part = sums + i % kPartialSums;
    for (int64_t j = 0; j < kScoreMultiple; ++j) {
      const float term = softmax_term(x[i + j], largest);
      terms[i + j] = term;
      part[j] += term;
    }
  }
  return sum_pairwise(sums);
}

// Sum of a padded row whose padding is 0, in the same order.
inline float sum_row(const float* __restrict x, int64_t padded) {
  alignas(64) float sums[kPartialSums] = {};
  for (int64_t i = 0; i < padded; i += kScoreMultiple) {
    float* __restrict part = sums + i % kPartialSums;
    for (int64_t j = 0; j < kScoreMultiple; ++j) part[j] += x[i + j];
  }
  return sum_pairwise(sums);
}

// Sum of few values, padded to a multiple of 8 with zeros. Each of 8 partial sums carries its
// rounding error along, so that k equal values add up as exactly as k different ones.
inline float sum_slots(const float* values, int64_t padded) {
  alignas(32) float sums[8] = {};
  alignas(32) float errors[8] = {};
  for (int64_t i = 0; i < padded; i += 8) {
    for (int j = 0; j < 8; ++j) {
      const float value = values[i + j] - errors[j];
      const float sum = sums[j] + value;
      errors[j] = (sum - sums[j]) - value;
      sums[j] = sum;
    }
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <Score kScore>
inline void elementwise_scores(const float* x, int64_t padded, float* y) {
  JAX_ROUTER_INDEPENDENT
  for (int64_t i = 0; i < padded; ++i) y[i] = elementwise_score(x[i], kScore);
}

// Scores of a padded row (`x` and `y` may be the same but for softmax); returns the sum of
// the softmax terms, 0 if all logits are -inf; 1 for another score.
inline float score_row(const float* x, int64_t padded, Score score, float* y) {
  switch (score) {
    case Score::kSoftmax: {
      const float sum = softmax_terms(x, padded, largest_of(x, padded), y);
      const float total = sum > 0.0f ? sum : 1.0f;
      for (int64_t i = 0; i < padded; ++i) y[i] /= total;
      return sum;
    }
    case Score::kSigmoid:
      elementwise_scores<Score::kSigmoid>(x, padded, y);
      return 1.0f;
    case Score::kSqrtSoftplus:
      elementwise_scores<Score::kSqrtSoftplus>(x, padded, y);
      return 1.0f;
    case Score::kNone:
      elementwise_scores<Score::kNone>(x, padded, y);
      return 1.0f;
  }
  return 1.0f;
}

}  // namespace
}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_ROWS_H_
