// The replicas of a token's experts, written and counted by the kernels of `route`.

#ifndef JAX_ROUTER_CUDA_ASSIGN_CUH_
#define JAX_ROUTER_CUDA_ASSIGN_CUH_

#include <cstdint>

#include "options.h"
#include "warp.cuh"

namespace jax_router {

// What a token's batch row has of the replicas, and the token's index.
struct TokenReplicas {
  const int32_t* table;
  const int32_t* counts;
  int32_t* load;
  uint32_t index;

  __device__ __forceinline__ TokenReplicas(const RouteForward& call, int64_t token) {
    const Replicas& replicas = call.replicas;
    // A division of 64 bits takes a hundred instructions.
    const int64_t row = call.tokens == call.tokens_per_batch ? 0 : token / call.tokens_per_batch;
    table = replicas.table + row * call.experts * replicas.width;
    counts = replicas.counts + row * call.experts;
    load = replicas.load + row * replicas.bins;
    index = replicas.offset[row] + static_cast<uint32_t>(token - row * call.tokens_per_batch);
  }
};

// Assigns slots first, first + 1 ... of a token, those below k. An expert out of range has none.
// Integers are added: no order of additions changes the load, which is clear once the kernel before
// this one is complete.
template <int kSlots>
__device__ __forceinline__ void assign_slots(const RouteForward& call, int64_t token, int first,
                                             int k, const int (&experts)[kSlots]) {
  const TokenReplicas mine(call, token);
  int32_t bins[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    bins[i] = -1;
    if (first + i >= k) continue;
    const Replica replica =
        find_replica(call.replicas, mine.table, mine.counts, mine.index, experts[i]);
    call.replicas.physical[token * k + first + i] = replica.slot;
    bins[i] = replica.bin;
  }
  wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    if (bins[i] >= 0) atomicAdd(mine.load + bins[i], 1);
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_ASSIGN_CUH_
