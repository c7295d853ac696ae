// One call of `quantile_histogram`, and the arithmetic of its bins that the CPU and the CUDA kernel
// share: integers must be the same on both.

#ifndef JAX_ROUTER_HISTOGRAM_H_
#define JAX_ROUTER_HISTOGRAM_H_

#include <cstdint>

#include "options.h"
#include "scalar.h"

namespace jax_router {

inline constexpr int64_t kMostBins = 1 << 24;  // float32 numbers them exactly

// `batch` times `tokens` rows of `experts` logits. Where is null if absent. A token with cutoff
// -inf, or where == false, is not counted.
struct QuantileHistogram {
  const void* logits;  // [batch, tokens, experts]
  LogitsType logits_type;
  Score score;          // every one but softmax
  const float* cutoff;  // [batch, tokens]
  const bool* where;    // [batch, tokens]
  const float* bounds;  // [batch, 2]
  int64_t batch;
  int64_t tokens;
  int64_t experts;
  int64_t bins;
  int32_t* counts;  // [batch, experts, bins]
};

struct Bins {
  bool valid;  // finite bounds, the lower one below the upper one
  float low;
  float scale;  // bins per unit
  float last;
};

JAX_ROUTER_FN bool is_finite(float x) { return (float_bits(x) & 0x7f800000) != 0x7f800000; }

JAX_ROUTER_FN Bins make_bins(const float* bounds, int64_t count) {
  const float width = add_keys(bounds[1], -bounds[0]);
  const bool valid = is_finite(bounds[0]) && is_finite(bounds[1]) && width > 0.0f;
  return {valid, bounds[0], flushed(divide(static_cast<float>(count), width)),
          static_cast<float>(count - 1)};
}

// clamp(floor((cutoff - score - low) * scale), 0, last); 0 for NaN.
JAX_ROUTER_FN int32_t find_bin(const Bins& bins, float cutoff, float score) {
  const float required = add_keys(cutoff, -score);
  const float position = multiply(add_keys(required, -bins.low), bins.scale);
  const float positive = position > 0.0f ? position : 0.0f;
  return static_cast<int32_t>(positive < bins.last ? positive : bins.last);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_HISTOGRAM_H_
