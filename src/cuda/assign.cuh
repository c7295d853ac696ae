// The replicas of a token's experts, written and counted by the kernels of `route`.

#ifndef JAX_ROUTER_CUDA_ASSIGN_CUH_
#define JAX_ROUTER_CUDA_ASSIGN_CUH_

#include <cstdint>

#include "options.h"
#include "warp.cuh"

namespace jax_router {

// For the head of a kernel: where there are copies of the load, lets the kernel start that adds
// them up, which waits for this one.
__device__ __forceinline__ void let_sum_start(const RouteForward& call) {
  if (call.replicas.num_copies > 1) let_next_kernel_start();
}

// The replicas of slots first, first + 1 ... of a token, those below k.
template <int kSlots>
struct SlotReplicas {
  int64_t row;  // of the batch
  uint32_t index;
  int32_t counts[kSlots];

  // Reads what the choice of replicas begins with, long before it is made. An expert out of range
  // has none.
  __device__ __forceinline__ void read(const RouteForward& call, int64_t token, int first, int k,
                                       const int (&experts)[kSlots]) {
    const Replicas& replicas = call.replicas;
    // A division of 64 bits takes a hundred instructions.
    row = call.tokens == call.tokens_per_batch ? 0 : token / call.tokens_per_batch;
    index = replicas.offset[row] + static_cast<uint32_t>(token - row * call.tokens_per_batch);
    const int32_t* own_counts = replicas.counts + row * call.experts;
    const int32_t* table = replicas.table + row * call.experts * replicas.width;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      counts[i] = 0;
      if (first + i >= k || static_cast<uint32_t>(experts[i]) >= call.experts) continue;
      prefetch(table + experts[i] * replicas.width);
      counts[i] = count_replicas(replicas, own_counts, experts[i]);
    }
  }

  // Assigns and counts them. Integers are added: no order of additions changes the load, which is
  // clear once the kernel before this one is complete.
  __device__ __forceinline__ void assign(const RouteForward& call, int64_t token, int first, int k,
                                         const int (&experts)[kSlots]) const {
    const Replicas& replicas = call.replicas;
    const int32_t* table = replicas.table + row * call.experts * replicas.width;
    int32_t bins[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      bins[i] = -1;
      if (first + i >= k) continue;
      const Replica replica = choose_replica(replicas, table, counts[i], index, experts[i]);
      replicas.physical[token * k + first + i] = replica.slot;
      bins[i] = replica.bin;
    }
    const int copy = static_cast<int>(blockIdx.x) & (replicas.num_copies - 1);
    int32_t* load = replicas.copies + (copy * replicas.batch + row) * replicas.bins;
    wait_for_previous_kernel();
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (bins[i] >= 0) atomicAdd(load + bins[i], 1);
    }
  }
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_ASSIGN_CUH_
