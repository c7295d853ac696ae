// What the parts of the CPU module share: the choice of an instruction set, rows in parallel, and
// the handlers that each part adds to the table.

#ifndef JAX_ROUTER_CPU_MODULE_H_
#define JAX_ROUTER_CPU_MODULE_H_

#include <nanobind/nanobind.h>

#include <cstdint>

#include "ffi.h"
#include "parallel.h"
#include "route.h"

namespace jax_router {

// Calls a function of the namespace for the best instruction set that the processor has.
#ifdef JAX_ROUTER_HAS_AVX2
inline bool has_avx2() {
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                __builtin_cpu_supports("bmi");
  return supported;
}
#define JAX_ROUTER_BEST(function) (has_avx2() ? avx2::function() : baseline::function())
#else
#define JAX_ROUTER_BEST(function) baseline::function()
#endif

template <typename Call>
ffi::Future run_rows(ffi::ThreadPool& pool, const RowKernel<Call>& kernel, const Call& call,
                     const RouteOptions& options) {
  return parallel_rows(pool, call.tokens, call.experts + 8 * options.k,
                       [kernel, call, options](int64_t begin, int64_t end) {
                         const Scratch scratch(kernel.scratch_bytes(call, options));
                         kernel.run(call, options, begin, end, scratch.data());
                       });
}

// permute, combine, blocks, plan, experts, replicas.
void add_layer_handlers(nanobind::dict& table);

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_MODULE_H_
