// The CUDA kernels of `scores`. A launch allocates nothing, waits for nothing and reads nothing
// back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_SCORES_H_
#define JAX_ROUTER_CUDA_SCORES_H_

#include <cuda_runtime_api.h>

#include "scores_call.h"

namespace jax_router {

cudaError_t launch_scores(const ScoresForward& call, cudaStream_t stream);

cudaError_t launch_scores_backward(const ScoresBackward& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_SCORES_H_
