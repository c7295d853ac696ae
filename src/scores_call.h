// Calls of `scores`, as the kernels see them.

#ifndef JAX_ROUTER_SCORES_CALL_H_
#define JAX_ROUTER_SCORES_CALL_H_

#include <cstdint>

#include "options.h"

namespace jax_router {

// `tokens` rows of `experts` logits.
struct ScoresRows {
  Score score;
  const void* logits;
  LogitsType logits_type;
  const bool* where;  // [tokens], false marks padding; or null
  int64_t tokens;
  int64_t experts;
};

struct ScoresForward : ScoresRows {
  float* scores;  // [tokens, experts]
};

struct ScoresBackward : ScoresRows {
  const float* cotangent;  // [tokens, experts]
  void* gradient;          // [tokens, experts] of the logits' type
};

}  // namespace jax_router

#endif  // JAX_ROUTER_SCORES_CALL_H_
