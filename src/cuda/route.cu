// Picks the kernel of the forward for a call.

#include <cstdint>

#include "groups.cuh"
#include "options.h"
#include "replicas.h"
#include "route.h"

namespace jax_router {
namespace {

constexpr int64_t kMostListed = 48;  // k for which the kernels that list survivors are made
constexpr int64_t kMostInLanes = 256;
constexpr int64_t kMostInRegisters = 1024;
// With a bias, up to so many tokens have a warp each: that takes fewer instructions one after the
// other. And replicas are assigned by the kernel that routes.
constexpr int64_t kFewTokens = 256;

}  // namespace

DeviceLimits limits_of(int device) {
  DeviceLimits limits{};
  cudaDeviceGetAttribute(&limits.processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  limits.has_clusters = major == 9 || major == 10;  // data center chips
  limits.is_hopper = major == 9;
  return limits;
}

DeviceLimits device_limits() {
  int device = 0;
  cudaGetDevice(&device);
  return limits_of(device);
}

namespace {

// Routing and replicas by a kernel each. For many tokens that is faster: a block that adds up what
// it has counted takes fewer turns at the load than its slots one by one.
cudaError_t launch_one_after_the_other(const RouteForward& call, const RouteOptions& options,
                                       cudaStream_t stream) {
  RouteForward route = call;
  route.replicas = {};
  const cudaError_t status = launch_route(route, options, stream);
  if (status != cudaSuccess) return status;
  ReplicasCall replicas;
  static_cast<Replicas&>(replicas) = call.replicas;
  replicas.experts = static_cast<const int32_t*>(call.indices);
  replicas.where = call.where;
  replicas.tokens = call.tokens_per_batch;
  replicas.slots = options.k;
  return launch_replicas(replicas, stream);
}

}  // namespace

// The choice depends on nothing but sizes and options that are static in JAX, and every kernel
// rounds alike, so that a token gets the same bits whatever it is batched with.
cudaError_t launch_route(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream) {
  RouteForward checked = for_registers(call, options);
  if (call.replicas.load != nullptr) {
    if (call.tokens > kFewTokens && call.index_bytes == sizeof(int32_t)) {
      return launch_one_after_the_other(call, options, stream);
    }
    const cudaError_t status = clear_load(call.replicas, stream, &checked.overlaps);
    if (status != cudaSuccess) return status;
  }
  if (call.tokens == 0) return cudaSuccess;
  const bool listed =
      call.given == nullptr && options.k <= kMostListed && groups_in_registers(call, options);
  const bool few = needs_keys(call, options) && call.tokens <= kFewTokens;
  if (listed && call.experts <= kMostInLanes && options.k <= 8 && !few) {
    return launch_route_lanes(checked, options, stream);
  }
  if (listed && call.experts <= kMostInRegisters) {
    return launch_route_warp(checked, options, stream);
  }
  if (listed && !needs_keys(call, options) && call.experts < 65536 &&
      route_shared_fits(call, options)) {
    return launch_route_shared(checked, options, stream);
  }
  return launch_route_general(checked, options, stream);
}

}  // namespace jax_router
