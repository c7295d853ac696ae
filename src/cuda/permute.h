// The CUDA kernels of `permute`, `combine` and their backward. A launch allocates nothing, waits
// for nothing and reads nothing back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_PERMUTE_H_
#define JAX_ROUTER_CUDA_PERMUTE_H_

#include <cuda_runtime_api.h>

#include "permute_call.h"

namespace jax_router {

cudaError_t launch_permute(const Permute& call, cudaStream_t stream);

// Of `combine`, and the backward of `permute`.
cudaError_t launch_combine(const Combine& call, cudaStream_t stream);

cudaError_t launch_combine_backward(const CombineBackward& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_PERMUTE_H_
