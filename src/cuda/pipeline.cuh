// Barriers in shared memory, bulk copies of tiles, and clusters: what a pipeline between warps that
// load and warps that compute is made of. For Hopper.

#ifndef JAX_ROUTER_CUDA_PIPELINE_CUH_
#define JAX_ROUTER_CUDA_PIPELINE_CUH_

#include <cuda.h>

#include <cstdint>

namespace jax_router {

// ---- barriers, by their addresses in shared memory ----

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to bulk copies.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase wait for so many bytes of copies.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// The address that another block of the cluster, or this one, has something at.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, uint32_t rank) {
  uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

__device__ __forceinline__ void arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits until the phase of the given parity, 0 for the first, has ended.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t parity) {
#ifdef JAX_ROUTER_WATCHDOG
  const long long start = clock64();
  while (!try_wait(barrier, parity)) {
    if (clock64() - start > 2000000000ll) __trap();
  }
#else
  while (!try_wait(barrier, parity)) {
  }
#endif
}

__device__ __forceinline__ void fence_cluster() {
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
}

// The same, and sees what other blocks of the cluster wrote before they arrived.
__device__ __forceinline__ void wait_barrier_of_cluster(uint32_t barrier, uint32_t parity) {
  wait_barrier(barrier, parity);
  fence_cluster();
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cta.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_in_cluster(uint32_t address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// A barrier of `threads` threads of the block; 0 is that of __syncthreads.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

// ---- clusters ----

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// ---- bulk copies ----

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t evict_normal_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Starts a copy of the box of a map at (column, row) to the same address in all blocks of the mask,
// or in this one, each of whose barriers at the same address counts its bytes. The second has a
// policy for the cache.
template <bool kMulticast>
__device__ __forceinline__ void load_box(uint32_t shared, const CUtensorMap* map, int column,
                                         int row, uint32_t barrier, uint32_t blocks) {
  const uint64_t address = reinterpret_cast<uint64_t>(map);
  if constexpr (kMulticast) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(address), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
        "l"(address), "r"(column), "r"(row), "r"(barrier)
        : "memory");
  }
}
template <bool kMulticast>
__device__ __forceinline__ void load_box(uint32_t shared, const CUtensorMap* map, int column,
                                         int row, uint32_t barrier, uint32_t blocks,
                                         uint64_t policy) {
  const uint64_t address = reinterpret_cast<uint64_t>(map);
  if constexpr (kMulticast) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(shared),
        "l"(address), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>(blocks)),
        "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(address), "r"(column), "r"(row), "r"(barrier), "l"(policy)
        : "memory");
  }
}

// Starts a copy of `bytes` bytes; both addresses and the size are multiples of 16.
__device__ __forceinline__ void load_row(uint32_t shared, const void* global, uint32_t bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_PIPELINE_CUH_
