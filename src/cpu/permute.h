// The CPU kernels of `permute`, `combine` and their backward, compiled once for every instruction
// set that is dispatched on.

#ifndef JAX_ROUTER_CPU_PERMUTE_H_
#define JAX_ROUTER_CPU_PERMUTE_H_

#include <cstdint>

#include "permute_call.h"

namespace jax_router {

// A kernel works on tokens [begin, end) of all batch rows. No two tokens write to the same place,
// if the plan is one.
template <typename Call>
using TokenKernel = void (*)(const Call&, int64_t begin, int64_t end);

namespace baseline {
TokenKernel<Permute> permute_kernel();
TokenKernel<Combine> combine_kernel();
TokenKernel<CombineBackward> combine_backward_kernel();
}  // namespace baseline

namespace avx2 {
TokenKernel<Permute> permute_kernel();
TokenKernel<Combine> combine_kernel();
TokenKernel<CombineBackward> combine_backward_kernel();
}  // namespace avx2

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_PERMUTE_H_
