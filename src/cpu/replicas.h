// The CPU kernel of `assign_replicas`.

#ifndef JAX_ROUTER_CPU_REPLICAS_H_
#define JAX_ROUTER_CPU_REPLICAS_H_

#include <cstddef>
#include <cstdint>

#include "replicas_call.h"

namespace jax_router {

// The work is cut into tasks: the tokens of a batch row or a part of them. `prepare_replicas` comes
// before every task; `run_replicas` does tasks [begin, end) with scratch for one thread.
int64_t replicas_tasks(const ReplicasCall& call);
int64_t replicas_task_cost(const ReplicasCall& call);
size_t replicas_scratch_bytes(const ReplicasCall& call);
void prepare_replicas(const ReplicasCall& call);
void run_replicas(const ReplicasCall& call, int64_t begin, int64_t end, void* scratch);

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_REPLICAS_H_
