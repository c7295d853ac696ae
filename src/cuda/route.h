// The CUDA kernels of `route` and `dense`. A launch allocates nothing, waits for nothing and reads
// nothing back, so it can be captured in a command buffer.

#ifndef JAX_ROUTER_CUDA_ROUTE_H_
#define JAX_ROUTER_CUDA_ROUTE_H_

#include <cuda_runtime_api.h>

#include "options.h"

namespace jax_router {

inline bool has_stats(const RouteForward& call) { return call.stats.expert_counts != nullptr; }

// The forward of `route`, or of `dense` where the call has probs, or of `route_and_assign_replicas`
// where it has replicas; or the first part of `stats`.
cudaError_t launch_route(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream);

// The forward of `stats`.
cudaError_t launch_stats(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream);

// The backward of any of them.
cudaError_t launch_route_backward(const RouteBackward& call, const RouteOptions& options,
                                  cudaStream_t stream);

// ---- the kernels that launch_route picks from; what each takes stands at its head ----

cudaError_t launch_route_lanes(const RouteForward& call, const RouteOptions& options,
                               cudaStream_t stream);
cudaError_t launch_route_warp(const RouteForward& call, const RouteOptions& options,
                              cudaStream_t stream);
bool route_shared_fits(const RouteForward& call, const RouteOptions& options);
cudaError_t launch_route_shared(const RouteForward& call, const RouteOptions& options,
                                cudaStream_t stream);
cudaError_t launch_route_general(const RouteForward& call, const RouteOptions& options,
                                 cudaStream_t stream);

// ---- the kernels that launch_route_backward picks from ----

// Of `stats`.
cudaError_t launch_stats_backward(const RouteBackward& call, const RouteOptions& options,
                                  cudaStream_t stream);
bool stats_backward_warp_fits(const RouteBackward& call, const RouteOptions& options);
cudaError_t launch_stats_backward_warp(const RouteBackward& call, const RouteOptions& options,
                                       cudaStream_t stream);
// For k > 64.
cudaError_t launch_route_backward_general(const RouteBackward& call, const RouteOptions& options,
                                          cudaStream_t stream);

// Whether rows of logits can be loaded four elements at a time.
inline bool allows_fours(const RouteForward& call) {
  const uintptr_t four = call.logits_type == LogitsType::kFloat32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(call.logits) % four == 0 && call.experts % 4 == 0;
}

// ---- the device ----

struct DeviceLimits {
  int processors;
  int shared_bytes;   // of a block, at most
  bool has_clusters;  // of eight blocks
  bool is_hopper;     // has clusters of sixteen
};

DeviceLimits limits_of(int device);
// Of the current device.
DeviceLimits device_limits();

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_ROUTE_H_
