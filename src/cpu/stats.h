// The statistics of `stats` on the CPU: rows are added up in their block, blocks in their order.

#ifndef JAX_ROUTER_CPU_STATS_H_
#define JAX_ROUTER_CPU_STATS_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#include "options.h"
#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

inline bool has_stats(const RouteForward& call) { return call.stats.expert_counts != nullptr; }

// The sums of a block, or of a batch row.
struct Sums {
  int32_t* counts;  // [experts]
  float* scores;    // [experts]
  float* z;
  int32_t* tokens;
};

inline Sums block_sums(const RouteForward& call, int64_t block) {
  const RouteStats& stats = call.stats;
  return {stats.block_counts + block * call.experts, stats.block_sums + block * call.experts,
          stats.block_z + block, stats.block_tokens + block};
}

inline Sums batch_sums(const RouteForward& call, int64_t batch) {
  const RouteStats& stats = call.stats;
  return {stats.expert_counts + batch * call.experts, stats.score_sums + batch * call.experts,
          stats.z_sum + batch, stats.num_tokens + batch};
}

inline void clear(const Sums& sums, int64_t experts) {
  std::memset(sums.counts, 0, static_cast<size_t>(experts) * sizeof(int32_t));
  std::memset(sums.scores, 0, static_cast<size_t>(experts) * sizeof(float));
  *sums.z = 0.0f;
  *sums.tokens = 0;
}

// Adds softmax terms, each times `factor`.
inline void add_probabilities(const float* __restrict terms, float factor, int64_t experts,
                              float* __restrict sums) {
  for (int64_t e = 0; e < experts; ++e) sums[e] += terms[e] * factor;
}

// Adds scores over their sum, whose inverse might be a denormal.
inline void add_shares(const float* __restrict scores, float total, int64_t experts,
                       float* __restrict sums) {
  for (int64_t e = 0; e < experts; ++e) sums[e] += scores[e] / total;
}

// What the backward needs of a real token, which is added but for its scores.
inline SavedSoftmax add_token(float largest, float total, const Sums& sums) {
  *sums.tokens += 1;
  if (!(total > 0.0f)) return {0.0f, 0.0f};
  const float logsumexp = largest + std::log(total);
  *sums.z += logsumexp * logsumexp;
  return {largest, total};
}

// Adds the blocks of a batch row up.
inline void add_blocks(const RouteForward& call, int64_t batch) {
  const Sums total = batch_sums(call, batch);
  clear(total, call.experts);
  const int64_t blocks = blocks_of_batch(call.tokens_per_batch);
  for (int64_t block = batch * blocks; block < (batch + 1) * blocks; ++block) {
    const Sums part = block_sums(call, block);
    for (int64_t e = 0; e < call.experts; ++e) total.counts[e] += part.counts[e];
    for (int64_t e = 0; e < call.experts; ++e) total.scores[e] += part.scores[e];
    *total.z += *part.z;
    *total.tokens += *part.tokens;
  }
}

}  // namespace
}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_STATS_H_
