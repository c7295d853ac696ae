// The CUDA kernels of `plan`. A launch allocates nothing, waits for nothing and reads nothing back,
// so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_PLAN_H_
#define JAX_ROUTER_CUDA_PLAN_H_

#include <cuda_runtime_api.h>

#include "plan_call.h"

namespace jax_router {

cudaError_t launch_plan(const PlanCall& call, cudaStream_t stream);

// By a cluster, on Hopper.
bool plan_cluster_fits(const PlanCall& call);
cudaError_t launch_plan_cluster(const PlanCall& call, cudaStream_t stream);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_PLAN_H_
