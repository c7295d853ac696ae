// Static options of the routing operations, as the kernels see them.

#ifndef JAX_ROUTER_OPTIONS_H_
#define JAX_ROUTER_OPTIONS_H_

#include <cstdint>

#include "host_device.h"
#include "replicas_call.h"

namespace jax_router {

// The order of each enumeration is the order of the names in jax_router/_options.py.
enum class Score : int { kSoftmax, kSigmoid, kSqrtSoftplus, kNone };
enum class GroupScore : int { kTop2, kMax, kSum };
enum class LogitsType : int { kFloat32, kBfloat16, kFloat16 };
enum class MapFormat : int { kBytemap, kBitmap };

struct RouteOptions {
  int64_t k;
  Score score;
  bool renormalize;
  float scale;
  int64_t group_count;  // 0: no groups
  int64_t group_keep;
  GroupScore group_score;

  // The gradient of a softmax over all experts reaches every one of them.
  JAX_ROUTER_HOST_DEVICE bool dense_gradient() const {
    return score == Score::kSoftmax && !renormalize;
  }

  // How many keys the score of a group adds up.
  JAX_ROUTER_HOST_DEVICE int64_t group_terms() const {
    if (group_score == GroupScore::kMax) return 1;
    return group_score == GroupScore::kTop2 ? 2 : k / group_keep;
  }
};

// Blocks of tokens whose statistics are summed on their own first, and then block by block. They
// depend on the number of tokens of a batch row alone, so that no sum depends on threads or grids.
inline constexpr int64_t kMostTokenBlocks = 128;  // of a batch row
inline constexpr int64_t kFewestTokens = 16;      // of a block

JAX_ROUTER_HOST_DEVICE inline int64_t tokens_of_block(int64_t tokens) {
  const int64_t even = (tokens + kMostTokenBlocks - 1) / kMostTokenBlocks;
  return even > kFewestTokens ? even : kFewestTokens;
}

JAX_ROUTER_HOST_DEVICE inline int64_t blocks_of_batch(int64_t tokens) {
  return (tokens + tokens_of_block(tokens) - 1) / tokens_of_block(tokens);
}

// What the backward needs of the softmax of a row. The sum is 0 where the row has no statistics:
// padding, and rows of nothing but NaN and -inf.
struct SavedSoftmax {
  float largest;  // logit, at most the largest float
  float total;    // sum of exp(logit - largest)
};

// The statistics of each batch row: results of `stats` alone, else null.
struct RouteStats {
  int64_t batches;
  SavedSoftmax* softmax;   // [tokens]
  int32_t* expert_counts;  // [batches, experts]
  float* score_sums;       // [batches, experts]
  float* z_sum;            // [batches]
  int32_t* num_tokens;     // [batches]
  // The same of each block, [batches * blocks_of_batch(tokens_per_batch)] rows: scratch.
  int32_t* block_counts;
  float* block_sums;
  float* block_z;
  int32_t* block_tokens;
};

// One call of the forward: `tokens` rows of `experts` logits, `tokens_per_batch` to a batch row,
// each with its row of the bias. Absent operands are null.
struct RouteForward {
  const void* logits;
  LogitsType logits_type;
  const float* bias;
  const bool* where;
  const int32_t* given;
  int64_t tokens;
  int64_t experts;
  int64_t tokens_per_batch;  // where there is a bias, or statistics, or replicas
  float* weights;            // [tokens, k]; -0 at slots filled up for want of keys above -inf
  void* indices;             // [tokens, k], index_bytes each
  int index_bytes;
  float* normalizer;  // [tokens]; NaN where the row has no gradient
  // Of `dense` alone, else null.
  void* probs;   // [tokens, experts] of the logits' type, 0 where not chosen
  uint8_t* map;  // [tokens, map_row_bytes()], see MapFormat
  MapFormat map_format;
  RouteStats stats;
  Replicas replicas;  // of `route_and_assign_replicas` alone, else null
  // Whether rows of logits allow loads of four elements; for the CUDA kernels, set by their launch.
  bool aligned;
  // For them, too, where groups are whole chunks of four experts: how many chunks a group has, and
  // 2**16 divided by that, rounded up.
  int group_chunks;
  uint32_t group_inverse;
  bool overlaps;  // and whether the kernel starts while its load is still being cleared

  // A bitmap has the least significant bit first and 0 in the bits past the last expert.
  JAX_ROUTER_HOST_DEVICE int64_t map_row_bytes() const {
    return map_format == MapFormat::kBytemap ? experts : (experts + 7) / 8;
  }
};

// One call of the backward from dense indices, of `route`, `dense` or `stats`. `logits` only where
// the gradient is dense. Of `stats` alone: `softmax`, and the cotangents of the statistics, null
// where they have none; then `cotangent` and what the forward made for it may be null, too.
struct RouteBackward {
  // [tokens, k] float32, or [tokens, experts] of the gradient's type, read at the chosen experts
  const void* cotangent;
  bool dense_cotangent;
  const float* weights;  // [tokens, k]
  const void* indices;   // [tokens, k]
  int index_bytes;
  const float* normalizer;  // [tokens]
  const void* logits;       // [tokens, experts] or null
  int64_t tokens;
  int64_t experts;
  void* gradient;  // [tokens, experts]
  LogitsType logits_type;
  const SavedSoftmax* softmax;   // [tokens]
  const float* score_cotangent;  // [batches, experts]
  const float* z_cotangent;      // [batches]
  int64_t tokens_per_batch;
};

}  // namespace jax_router

#endif  // JAX_ROUTER_OPTIONS_H_
