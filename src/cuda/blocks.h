// The CUDA kernels of `blocks`. A launch allocates nothing, waits for nothing and reads nothing
// back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_BLOCKS_H_
#define JAX_ROUTER_CUDA_BLOCKS_H_

#include <cuda_runtime_api.h>

#include "blocks_call.h"

namespace jax_router {

cudaError_t launch_blocks_plan(const Blocks& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_BLOCKS_H_
