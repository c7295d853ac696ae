// Bulk copies between global and shared memory, by one lane, on devices that have them.

#ifndef JAX_ROUTER_CUDA_BULK_CUH_
#define JAX_ROUTER_CUDA_BULK_CUH_

#include <cstdint>

#include "warp.cuh"

namespace jax_router {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasBulkCopy = false;
#else
inline constexpr bool kHasBulkCopy = true;
#endif

// A barrier in shared memory that one bulk copy at a time completes.
struct CopyBarrier {
  uint64_t state;

  __device__ __forceinline__ void init() {
    if constexpr (kHasBulkCopy) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&state)) : "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
  }

  // Starts a copy of `bytes` bytes; both addresses and the size are multiples of 16.
  __device__ __forceinline__ void load(void* shared, const void* global, uint32_t bytes) {
    if constexpr (kHasBulkCopy) {
      const uint32_t barrier = shared_address(&state);
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                   : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
          "[%3];" ::"r"(shared_address(shared)),
          "l"(global), "r"(bytes), "r"(barrier)
          : "memory");
    }
  }

  // Waits for the copy of the given phase: 0 for the first, then 1, 0, 1 ...
  __device__ __forceinline__ void wait(uint32_t phase) {
    if constexpr (kHasBulkCopy) {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "again:\n"
          "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
          "@done bra finished;\n"
          "bra again;\n"
          "finished:\n"
          "}\n" ::"r"(shared_address(&state)),
          "r"(phase)
          : "memory");
    }
  }
};

// Starts a copy of `bytes` bytes from shared memory; both addresses and the size are multiples of
// 16. What other lanes wrote must be ordered before by fence_for_store and a barrier.
__device__ __forceinline__ void start_store(void* global, const void* shared, uint32_t bytes) {
  if constexpr (kHasBulkCopy) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

// Makes this thread's writes to shared memory visible to bulk copies.
__device__ __forceinline__ void fence_for_store() {
  if constexpr (kHasBulkCopy) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Waits until all but the latest kPending stores of this thread have read shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_stores() {
  if constexpr (kHasBulkCopy) {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_BULK_CUH_
