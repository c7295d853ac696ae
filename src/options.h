// Static options of the routing operations, as the kernels see them.

#ifndef JAX_ROUTER_OPTIONS_H_
#define JAX_ROUTER_OPTIONS_H_

#include <cstdint>

#ifdef __CUDACC__
#define JAX_ROUTER_HOST_DEVICE __host__ __device__
#else
#define JAX_ROUTER_HOST_DEVICE
#endif

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

// One call of the forward: `tokens` rows of `experts` logits. Absent operands are null. Token t
// takes row t / tokens_per_bias of the bias.
struct RouteForward {
  const void* logits;
  LogitsType logits_type;
  const float* bias;
  const bool* where;
  const int32_t* given;
  int64_t tokens;
  int64_t experts;
  int64_t tokens_per_bias;
  float* weights;  // [tokens, k]; -0 at slots filled up for want of keys above -inf
  void* indices;   // [tokens, k], index_bytes each
  int index_bytes;
  float* normalizer;  // [tokens]; NaN where the row has no gradient
  // Of `dense` alone, else null.
  void* probs;   // [tokens, experts] of the logits' type, 0 where not chosen
  uint8_t* map;  // [tokens, map_row_bytes()], see MapFormat
  MapFormat map_format;
  // Whether rows of logits allow loads of four elements; for the CUDA kernels, set by their launch.
  bool aligned;

  // A bitmap has the least significant bit first and 0 in the bits past the last expert.
  JAX_ROUTER_HOST_DEVICE int64_t map_row_bytes() const {
    return map_format == MapFormat::kBytemap ? experts : (experts + 7) / 8;
  }
};

// One call of the backward from dense indices, of `route` or of `dense`. `logits` only where the
// gradient is dense.
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
};

}  // namespace jax_router

#endif  // JAX_ROUTER_OPTIONS_H_
