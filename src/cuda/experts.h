// The CUDA kernel of `experts`, for Hopper: what it takes, and its launch, which allocates nothing,
// waits for nothing and reads nothing back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_EXPERTS_H_
#define JAX_ROUTER_CUDA_EXPERTS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "experts_call.h"
#include "options.h"

namespace jax_router {

enum class ExpertsType : int { kBfloat16, kFloat16, kFloat8 };

inline constexpr int kScaleBlock = 128;         // rows and columns that share a scale in float8
inline constexpr int kMostExpertsBlocks = 144;  // resident thread blocks that are made use of
inline constexpr int kMostTileTokens = 512;     // of a tile of the result

// One call: the sum over experts and i of alpha[t, e] * h[t, e, i] * w2[e, i, n].
struct DenseExperts {
  ExpertsType type;
  const void* h;         // [tokens, experts * depth]
  const void* w2;        // [experts * depth, hidden]; float8: [hidden, experts * depth]
  const float* alpha;    // [tokens, experts]
  const float* h_scale;  // float8: [tokens, experts * depth / 128], else null
  const float* w_scale;  // float8: [ceil(hidden / 128), experts * depth / 128], else null
  void* result;          // [tokens, hidden]
  LogitsType result_type;
  int64_t tokens;
  int64_t experts;
  int64_t depth;   // a multiple of 64; float8: of 128
  int64_t hidden;  // a multiple of 8
  // Scratch, see ExpertsScratch.
  float* multipliers;
  int32_t* chosen;
  int32_t* counts;
  int32_t* tickets;
  float* partials;
};

// The rows of the hidden size of a tile of the result, 64 or 128; 0: chosen by the number of
// tokens.
struct ExpertsTactic {
  int hidden_tile;
};

// Elements of the scratch of a call.
struct ExpertsScratch {
  int64_t multipliers;  // of the tokens that have chosen an expert, times their scales
  int64_t chosen;       // these tokens
  int64_t counts;       // how many
  int64_t tickets;
  int64_t partials;
};

ExpertsScratch experts_scratch(const DenseExperts& call, ExpertsTactic tactic);

// Whether the kernel is in this build and runs on a device, by its number.
bool dense_experts_run(int device);

cudaError_t launch_dense_experts(const DenseExperts& call, ExpertsTactic tactic,
                                 cudaStream_t stream);

// The same of a call as XLA makes it: one launch for each batch row, all with the same scratch.
int64_t experts_scratch_words(const Experts& call);  // of 4 bytes
cudaError_t launch_experts(const Experts& call, int32_t* scratch, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_H_
