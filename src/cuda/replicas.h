// The CUDA kernel of `assign_replicas`. A launch allocates nothing, waits for nothing and reads
// nothing back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_REPLICAS_H_
#define JAX_ROUTER_CUDA_REPLICAS_H_

#include <cuda_runtime_api.h>

#include "replicas_call.h"

namespace jax_router {

// Clears the load for a kernel launched next, which adds to it. `overlaps` becomes true where that
// kernel may start at once (see LaunchStream): then it must wait before it adds.
cudaError_t clear_load(const Replicas& replicas, cudaStream_t stream, bool* overlaps);

cudaError_t launch_replicas(const ReplicasCall& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_REPLICAS_H_
