// A call of `experts`, the second matmul of all experts at once, as its kernels see it.
//
//     result[t, n] = sum over experts e of weight[t, e] * (sum over i of h[t, e, i] * w2[e, i, n])
//
// An expert of weight 0 adds exactly 0 to a token, whatever its h and w2 hold. Everything is summed
// in float32, the inner sum over i first, then the experts in ascending order. In float8 128
// columns of h have a scale, and blocks of w2 of 128 x 128; its w2 lies as [width, experts *
// depth].

#ifndef JAX_ROUTER_EXPERTS_CALL_H_
#define JAX_ROUTER_EXPERTS_CALL_H_

#include <cstdint>

#include "options.h"

namespace jax_router {

struct Experts {
  const void* h;          // [batch, tokens, experts, depth]
  const void* w2;         // [batch, experts, depth, width] of the type of h
  const float* alpha;     // [batch, tokens, experts]
  void* result;           // [batch, tokens, width]
  const float* h_scale;   // float8: [batch, tokens, experts * depth / 128]
  const float* w2_scale;  // float8: [batch, ceil(width / 128), experts * depth / 128]
  bool float8;            // whether h and w2 are; else they have the type
  LogitsType type;
  LogitsType result_type;
  int64_t batch;
  int64_t tokens;
  int64_t experts;
  int64_t depth;  // intermediate size of an expert
  int64_t width;  // hidden size
};

}  // namespace jax_router

#endif  // JAX_ROUTER_EXPERTS_CALL_H_
