// The CPU kernels of `scores`, compiled once for every instruction set that is dispatched on.

#ifndef JAX_ROUTER_CPU_SCORES_H_
#define JAX_ROUTER_CPU_SCORES_H_

#include <cstddef>
#include <cstdint>

#include "scores_call.h"

namespace jax_router {

// A kernel works on rows [begin, end) of a call, with scratch (aligned to 64 bytes) for one thread.
template <typename Call>
struct ScoresKernel {
  size_t (*scratch_bytes)(const Call&);
  void (*run)(const Call&, int64_t begin, int64_t end, void* scratch);
};

namespace baseline {
ScoresKernel<ScoresForward> scores_kernel();
ScoresKernel<ScoresBackward> scores_backward_kernel();
}  // namespace baseline

namespace avx2 {
ScoresKernel<ScoresForward> scores_kernel();
ScoresKernel<ScoresBackward> scores_backward_kernel();
}  // namespace avx2

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_SCORES_H_
