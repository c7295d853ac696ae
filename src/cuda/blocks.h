// The CUDA kernels of `blocks` and `route_and_plan_blocks`. A launch allocates nothing, waits for
// nothing and reads nothing back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_BLOCKS_H_
#define JAX_ROUTER_CUDA_BLOCKS_H_

#include <cuda_runtime_api.h>

#include "blocks_call.h"

namespace jax_router {

cudaError_t launch_blocks_plan(const Blocks& call, cudaStream_t stream);

// By one kernel where it can.
cudaError_t launch_route_and_plan_blocks(const RouteAndPlanBlocks& call,
                                         const RouteOptions& options, cudaStream_t stream);

// Up to how many tokens of a batch row that is one kernel.
int64_t most_fused_tokens(int64_t experts, const RouteOptions& options, int device);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_BLOCKS_H_
