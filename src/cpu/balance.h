// The CPU kernel of `quantile_histogram`, compiled once for every instruction set that is
// dispatched on.

#ifndef JAX_ROUTER_CPU_BALANCE_H_
#define JAX_ROUTER_CPU_BALANCE_H_

#include <cstddef>
#include <cstdint>

#include "histogram.h"

namespace jax_router {

// The work is cut into tasks: a few experts over all tokens or over a part of them. `prepare` comes
// before every task, `run` does tasks [begin, end) with scratch (aligned to 64 bytes) for one
// thread.
struct QuantileHistogramKernel {
  int64_t (*tasks)(const QuantileHistogram&);
  int64_t (*task_cost)(const QuantileHistogram&);
  size_t (*scratch_bytes)(const QuantileHistogram&);
  void (*prepare)(const QuantileHistogram&);
  void (*run)(const QuantileHistogram&, int64_t begin, int64_t end, void* scratch);
};

namespace baseline {
QuantileHistogramKernel quantile_histogram_kernel();
}  // namespace baseline

namespace avx2 {
QuantileHistogramKernel quantile_histogram_kernel();
}  // namespace avx2

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_BALANCE_H_
