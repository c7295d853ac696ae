// The CUDA kernels of `route`. A launch allocates nothing, waits for nothing and reads nothing
// back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_ROUTE_H_
#define JAX_ROUTER_CUDA_ROUTE_H_

#include <cuda_runtime_api.h>

#include "options.h"

namespace jax_router {

cudaError_t launch_route(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream);

cudaError_t launch_route_backward(const RouteBackward& call, const RouteOptions& options,
                                  cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_ROUTE_H_
