// The CPU kernel of `experts`, compiled once for every instruction set that is dispatched on.

#ifndef JAX_ROUTER_CPU_EXPERTS_H_
#define JAX_ROUTER_CPU_EXPERTS_H_

#include <cstddef>
#include <cstdint>

#include "experts_call.h"

namespace jax_router {

// A call is cut into tasks: a batch row, a block of its tokens, and a tile of the hidden size. No
// two tasks write to the same place, and no sum is cut, so the result does not depend on who runs
// which. `prepare` finds the tokens of every expert, in memory that all tasks then share.
struct ExpertsKernel {
  size_t (*shared_bytes)(const Experts&);
  void (*prepare)(const Experts&, void* shared);
  int64_t (*tasks)(const Experts&);
  int64_t (*task_cost)(const Experts&, const void* shared);
  size_t (*scratch_bytes)(const Experts&);
  void (*run)(const Experts&, const void* shared, int64_t begin, int64_t end, void* scratch);
};

namespace baseline {
ExpertsKernel experts_kernel();
}  // namespace baseline

namespace avx2 {
ExpertsKernel experts_kernel();
}  // namespace avx2

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_EXPERTS_H_
