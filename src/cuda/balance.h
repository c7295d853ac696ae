// The CUDA kernel of `quantile_histogram`. A launch allocates nothing, waits for nothing and reads
// nothing back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_BALANCE_H_
#define JAX_ROUTER_CUDA_BALANCE_H_

#include <cuda_runtime_api.h>

#include "histogram.h"

namespace jax_router {

cudaError_t launch_quantile_histogram(const QuantileHistogram& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_BALANCE_H_
