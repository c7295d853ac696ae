// Products of matrices by a warpgroup: D[64, N] += A[64, K] B[N, K]^T, A and B in shared memory.
//
// A thread has N / 2 elements of D: for j < N / 8, with g = lane / 4 and c = 2 * (lane % 4), those
// of rows 16 * warp + g and 16 * warp + g + 8, as (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1) of
// the columns from 8 * j on.

#ifndef JAX_ROUTER_CUDA_WGMMA_CUH_
#define JAX_ROUTER_CUDA_WGMMA_CUH_

#include <cstdint>

#include "experts.h"

namespace jax_router {

// Describes a matrix in shared memory as the bulk copies leave it: rows of 128 bytes, swizzled in
// groups of 8 rows, which lie 1024 bytes apart. This is the lower half, that has the address, a
// multiple of 1024; for a part of the matrix, its offset is added in units of 16 bytes. The stride
// between columns of groups is not used: no matrix here is wider than 128 bytes.
__device__ __forceinline__ uint32_t matrix_at(uint32_t address) {
  return 1u << 16 | (address >> 4 & 0x3fff);
}
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t at) {
  constexpr uint32_t kSwizzle128 = 1u << 30;
  constexpr uint32_t kGroup = 1024 >> 4;
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(at), "n"(kSwizzle128 | kGroup));
  return descriptor;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps reads and writes of the accumulators on their side of the products.
template <int kSize>
__device__ __forceinline__ void hold(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Adds to D if `accumulate`, else overwrites it. A of 16-bit types is M-major, everything else is
// K-major; K is 16, for float8 32.
template <int kN>
struct Wgmma;

// The numbers of the operands of D, ten at a time, and what is left.
#define JAX_ROUTER_TEN(t) \
  "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9"
#define JAX_ROUTER_10 JAX_ROUTER_TEN("") ", "
#define JAX_ROUTER_20 JAX_ROUTER_10 JAX_ROUTER_TEN("1") ", "
#define JAX_ROUTER_30 JAX_ROUTER_20 JAX_ROUTER_TEN("2") ", "
#define JAX_ROUTER_50 JAX_ROUTER_30 JAX_ROUTER_TEN("3") ", " JAX_ROUTER_TEN("4") ", "
#define JAX_ROUTER_60 JAX_ROUTER_50 JAX_ROUTER_TEN("5") ", "
#define JAX_ROUTER_TWO(t) "%" t "0, %" t "1"
#define JAX_ROUTER_FOUR(t) JAX_ROUTER_TWO(t) ", %" t "2, %" t "3"
#define JAX_ROUTER_SIX(t) JAX_ROUTER_FOUR(t) ", %" t "4, %" t "5"
#define JAX_ROUTER_EIGHT(t) JAX_ROUTER_SIX(t) ", %" t "6, %" t "7"

// The operands, four and eight at a time.
#define JAX_ROUTER_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JAX_ROUTER_D8(i) JAX_ROUTER_D4(i), JAX_ROUTER_D4(i + 4)
#define JAX_ROUTER_D16(i) JAX_ROUTER_D8(i), JAX_ROUTER_D8(i + 8)
#define JAX_ROUTER_D32(i) JAX_ROUTER_D16(i), JAX_ROUTER_D16(i + 16)

#define JAX_ROUTER_UNWRAP(...) __VA_ARGS__

#define JAX_ROUTER_WGMMA_ISSUE(n, types, numbers, operands, a_at, b_at, if_at, transposed)  \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #if_at                              \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n types " {" numbers "}, %" #a_at \
               ", %" #b_at ", add, 1, 1" transposed ";\n}\n"                                \
               : JAX_ROUTER_UNWRAP operands                                                 \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

#define JAX_ROUTER_WGMMA(n, numbers, operands, a_at, b_at, if_at)                                 \
  template <>                                                                                     \
  struct Wgmma<n> {                                                                               \
    template <ExpertsType kType>                                                                  \
    static __device__ __forceinline__ void issue(float (&d)[n / 2], uint64_t a, uint64_t b,       \
                                                 bool accumulate) {                               \
      if constexpr (kType == ExpertsType::kBfloat16) {                                            \
        JAX_ROUTER_WGMMA_ISSUE(n, "k16.f32.bf16.bf16", numbers, operands, a_at, b_at, if_at,      \
                               ", 1, 0");                                                         \
      } else if constexpr (kType == ExpertsType::kFloat16) {                                      \
        JAX_ROUTER_WGMMA_ISSUE(n, "k16.f32.f16.f16", numbers, operands, a_at, b_at, if_at,        \
                               ", 1, 0");                                                         \
      } else {                                                                                    \
        JAX_ROUTER_WGMMA_ISSUE(n, "k32.f32.e4m3.e4m3", numbers, operands, a_at, b_at, if_at, ""); \
      }                                                                                           \
    }                                                                                             \
  }

JAX_ROUTER_WGMMA(8, JAX_ROUTER_FOUR(""), (JAX_ROUTER_D4(0)), 4, 5, 6);
JAX_ROUTER_WGMMA(16, JAX_ROUTER_EIGHT(""), (JAX_ROUTER_D8(0)), 8, 9, 10);
JAX_ROUTER_WGMMA(32, JAX_ROUTER_10 JAX_ROUTER_SIX("1"), (JAX_ROUTER_D16(0)), 16, 17, 18);
JAX_ROUTER_WGMMA(64, JAX_ROUTER_30 JAX_ROUTER_TWO("3"), (JAX_ROUTER_D32(0)), 32, 33, 34);
JAX_ROUTER_WGMMA(128, JAX_ROUTER_60 JAX_ROUTER_FOUR("6"), (JAX_ROUTER_D32(0), JAX_ROUTER_D32(32)),
                 64, 65, 66);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_WGMMA_CUH_
