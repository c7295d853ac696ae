// The CPU kernels of `route`, `dense` and `stats`, compiled once for every instruction set that is
// dispatched on.

#ifndef JAX_ROUTER_CPU_ROUTE_H_
#define JAX_ROUTER_CPU_ROUTE_H_

#include <cstddef>
#include <cstdint>

#include "options.h"

namespace jax_router {

// A kernel works on rows [begin, end) of a call, with scratch (aligned to 64 bytes) for one thread.
template <typename Call>
struct RowKernel {
  size_t (*scratch_bytes)(const Call&, const RouteOptions&);
  void (*run)(const Call&, const RouteOptions&, int64_t begin, int64_t end, void* scratch);
};

using RouteForwardKernel = RowKernel<RouteForward>;
using RouteBackwardKernel = RowKernel<RouteBackward>;

// The forward of `stats` works on blocks of tokens; `finish` adds them up when all are done.
struct StatsKernel {
  RouteForwardKernel blocks;
  void (*finish)(const RouteForward&);
};

namespace baseline {
RouteForwardKernel route_forward_kernel();
RouteBackwardKernel route_backward_kernel();
StatsKernel stats_kernel();
}  // namespace baseline

namespace avx2 {
RouteForwardKernel route_forward_kernel();
RouteBackwardKernel route_backward_kernel();
StatsKernel stats_kernel();
}  // namespace avx2

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_ROUTE_H_
