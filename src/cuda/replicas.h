// The CUDA kernel of `assign_replicas`. A launch allocates nothing, waits for nothing and reads
// nothing back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_REPLICAS_H_
#define JAX_ROUTER_CUDA_REPLICAS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "replicas_call.h"

namespace jax_router {

// How many copies of a load of so many words the blocks that route so many tokens add to: a power
// of two. Additions to one sector of memory take turns, so that many tokens want many sectors.
int64_t load_copies(int64_t tokens, int64_t words);

// Clears the copies of the load for a kernel launched next, which adds to them. `overlaps` becomes
// true where that kernel may start at once (see LaunchStream): then it must wait before it adds.
cudaError_t clear_load(const Replicas& replicas, cudaStream_t stream, bool* overlaps);

// Adds the copies up after that kernel, if there are several. `overlaps`: what clear_load found.
cudaError_t sum_load(const Replicas& replicas, cudaStream_t stream, bool overlaps);

cudaError_t launch_replicas(const ReplicasCall& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_REPLICAS_H_
