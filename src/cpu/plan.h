// The CPU kernel of `plan`. It has no arithmetic that an instruction set could speed up, so it is
// compiled once.

#ifndef JAX_ROUTER_CPU_PLAN_H_
#define JAX_ROUTER_CPU_PLAN_H_

#include <cstddef>
#include <cstdint>

#include "plan_call.h"

namespace jax_router {

// What a batch row costs, and the memory (aligned to 64 bytes) that a thread needs for it.
int64_t plan_cost(const PlanCall& call);
size_t plan_scratch_bytes(const PlanCall& call);

// Plans batch rows [begin, end).
void run_plan(const PlanCall& call, int64_t begin, int64_t end, void* scratch);

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_PLAN_H_
