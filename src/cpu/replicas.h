// The CPU kernels of `assign_replicas` and, after its routing, of `route_and_assign_replicas`.

#ifndef JAX_ROUTER_CPU_REPLICAS_H_
#define JAX_ROUTER_CPU_REPLICAS_H_

#include <cstddef>
#include <cstdint>

#include "options.h"
#include "replicas_call.h"

namespace jax_router {

// The work is cut into tasks: the tokens of a batch row or a part of them. `prepare_replicas` comes
// before every task; `run_replicas` does tasks [begin, end) with scratch for one thread.
int64_t replicas_tasks(const ReplicasCall& call);
int64_t replicas_task_cost(const ReplicasCall& call);
size_t replicas_scratch_bytes(const ReplicasCall& call);
void prepare_replicas(const ReplicasCall& call);
void run_replicas(const ReplicasCall& call, int64_t begin, int64_t end, void* scratch);

// The same for tokens of a forward, `prepare_routed_replicas` before the first of them and
// `run_routed_replicas` after tokens [begin, end) are routed, with scratch for so many ids.
void prepare_routed_replicas(const Replicas& replicas);
size_t routed_replicas_scratch_bytes(const Replicas& replicas, int64_t ids);
void run_routed_replicas(const RouteForward& call, const RouteOptions& options, int64_t begin,
                         int64_t end, void* scratch);

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_REPLICAS_H_
