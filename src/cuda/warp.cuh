// What every CUDA kernel shares: reductions over a warp, loads and stores by type, launch sizes.

#ifndef JAX_ROUTER_CUDA_WARP_CUH_
#define JAX_ROUTER_CUDA_WARP_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "options.h"
#include "scalar.h"

namespace jax_router {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The warp of the block. The shuffle tells the compiler that all lanes agree: without it every
// shuffle in a loop over the rows of a warp is guarded against divergence.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarpSize), 0);
}

__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1u; }

// Bits of the numbers up to `most`.
__device__ __forceinline__ int bits_of(uint32_t most) { return 32 - __clz(static_cast<int>(most)); }

// The lanes with the same value below 2**bits. __match_any_sync takes as long as there are
// different values, this always as long as there are bits.
__device__ __forceinline__ unsigned equal_lanes(uint32_t value, int bits) {
  unsigned peers = kAllLanes;
#pragma unroll 4
  for (int b = 0; b < bits; ++b) {
    const bool set = (value >> b & 1) != 0;
    const unsigned ballot = __ballot_sync(kAllLanes, set);
    peers &= set ? ballot : ~ballot;
  }
  return peers;
}

// ---- shared memory by its own addresses, which fit one register ----

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void store_shared_u16(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<uint16_t>(value))
               : "memory");
}
__device__ __forceinline__ void store_shared_u32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_shared_u16(uint32_t address) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_shared_u32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ void load_shared_four(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// ---- reductions: every lane gets the result, additions have a fixed order ----

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// A sum that carries its rounding error along, so that many equal terms do not drift.
struct CompensatedSum {
  float sum = 0.0f;
  float error = 0.0f;
  __device__ __forceinline__ void add(float term) {
    const float value = __fsub_rn(term, error);
    const float next = __fadd_rn(sum, value);
    error = __fsub_rn(__fsub_rn(next, sum), value);
    sum = next;
  }
};

// ---- types ----

struct Bfloat16 {
  static constexpr uint32_t kLowest = 0xff80;  // -inf
  uint16_t bits;
};
struct Float16 {
  static constexpr uint32_t kLowest = 0xfc00;
  uint16_t bits;
};

__device__ __forceinline__ int32_t load_bits(const float* p) { return __float_as_int(__ldg(p)); }
__device__ __forceinline__ int32_t load_bits(const Bfloat16* p) {
  return bits_from_bfloat16(__ldg(&p->bits));
}
__device__ __forceinline__ int32_t load_bits(const Float16* p) {
  return bits_from_float16(__ldg(&p->bits));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bfloat16 x) {
  return __int_as_float(bits_from_bfloat16(x.bits));
}
__device__ __forceinline__ float to_float(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

// Rounded to nearest even.
template <typename T>
__device__ __forceinline__ T to_half(float x) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return {__half_as_ushort(__float2half_rn(x))};
  }
}

// Four neighbours as they lie in memory, from an address aligned to all four.
template <typename T>
struct Four {
  uint2 raw;

  __device__ __forceinline__ static Four lowest() {
    constexpr uint32_t both = T::kLowest * 0x10001u;
    return {{both, both}};
  }

  __device__ __forceinline__ static Four load(const T* p) {
    return {*reinterpret_cast<const uint2*>(p)};
  }
  // The first `count` of the four one by one, -inf for the rest.
  __device__ __forceinline__ static Four load_some(const T* p, int count) {
    uint32_t x[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = c < count ? p[c].bits : T::kLowest;
    return {{x[0] | x[1] << 16, x[2] | x[3] << 16}};
  }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<uint2*>(p) = raw; }
  __device__ __forceinline__ static Four pack(const float (&x)[4]) {
    const auto pair = [](float low, float high) {
      return to_half<T>(low).bits | static_cast<uint32_t>(to_half<T>(high).bits) << 16;
    };
    return {{pair(x[0], x[1]), pair(x[2], x[3])}};
  }
  __device__ __forceinline__ void unpack(float (&x)[4]) const {
    x[0] = to_float(T{static_cast<uint16_t>(raw.x)});
    x[1] = to_float(T{static_cast<uint16_t>(raw.x >> 16)});
    x[2] = to_float(T{static_cast<uint16_t>(raw.y)});
    x[3] = to_float(T{static_cast<uint16_t>(raw.y >> 16)});
  }
};
template <>
struct Four<float> {
  float4 raw;

  __device__ __forceinline__ static Four lowest() {
    return {{-kInfinity, -kInfinity, -kInfinity, -kInfinity}};
  }

  __device__ __forceinline__ static Four load(const float* p) {
    return {*reinterpret_cast<const float4*>(p)};
  }
  __device__ __forceinline__ static Four load_some(const float* p, int count) {
    float x[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = c < count ? p[c] : -kInfinity;
    return {{x[0], x[1], x[2], x[3]}};
  }
  __device__ __forceinline__ void store(float* p) const { *reinterpret_cast<float4*>(p) = raw; }
  __device__ __forceinline__ static Four pack(const float (&x)[4]) {
    return {{x[0], x[1], x[2], x[3]}};
  }
  __device__ __forceinline__ void unpack(float (&x)[4]) const {
    x[0] = raw.x;
    x[1] = raw.y;
    x[2] = raw.z;
    x[3] = raw.w;
  }
};

__device__ __forceinline__ void store_value(float* p, float x) { *p = x; }
template <typename T>
__device__ __forceinline__ void store_value(T* p, float x) {
  *p = to_half<T>(x);
}

// Calls f with a null pointer to the type of the logits.
template <typename F>
auto with_type(LogitsType type, F f) {
  switch (type) {
    case LogitsType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case LogitsType::kBfloat16:
      return f(static_cast<Bfloat16*>(nullptr));
    default:
      return f(static_cast<Float16*>(nullptr));
  }
}

// Calls f with std::true_type or std::false_type.
template <typename F>
auto with_bool(bool value, F f) {
  return value ? f(std::true_type()) : f(std::false_type());
}

// An index of any width. Indices are never negative.
__device__ __forceinline__ void store_index(void* indices, int bytes, int64_t i, int32_t value) {
  switch (bytes) {
    case 1:
      static_cast<uint8_t*>(indices)[i] = static_cast<uint8_t>(value);
      break;
    case 2:
      static_cast<uint16_t*>(indices)[i] = static_cast<uint16_t>(value);
      break;
    case 4:
      static_cast<int32_t*>(indices)[i] = value;
      break;
    default:
      static_cast<int64_t*>(indices)[i] = value;
  }
}

__device__ __forceinline__ int64_t load_index(const void* indices, int bytes, int64_t i) {
  switch (bytes) {
    case 1:
      return static_cast<const uint8_t*>(indices)[i];
    case 2:
      return static_cast<const uint16_t*>(indices)[i];
    case 4:
      return static_cast<const uint32_t*>(indices)[i];
    default:
      return static_cast<const int64_t*>(indices)[i];
  }
}

// ---- launches ----

// Whether a kernel may start while the one that clears memory for it still runs, where there are
// the instructions for that (compute capability 9).
inline constexpr bool kProgrammaticLaunch = true;

// For the kernel before: lets the next one start once all blocks have come here.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kProgrammaticLaunch) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// For the next one: waits until the kernel before is complete and its writes can be seen.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kProgrammaticLaunch) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where a kernel is launched, and whether it may overlap the kernel before it there. If it may, at
// least one of its threads must wait for that one, or what follows in the stream might not.
struct LaunchStream {
  cudaStream_t stream;
  bool overlaps;

  LaunchStream(cudaStream_t on, bool may_overlap = false) : stream(on), overlaps(may_overlap) {}
};

template <typename Kernel, typename... Args>
cudaError_t launch_kernel(Kernel kernel, dim3 blocks, int threads, int64_t bytes, LaunchStream to,
                          const Args&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = to.stream;
  config.attrs = &overlap;
  config.numAttrs = to.overlaps ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, args...);
  return cudaGetLastError();
}

// One warp a row, each warp with its own piece of shared memory.

inline constexpr int kSharedBytesPerBlock = 48 * 1024;  // of this several warps of a block share
inline constexpr int kMostBlocks = 4096;                // more rows than that are looped over

template <typename Kernel, typename... Args>
cudaError_t launch_rows(Kernel kernel, int64_t rows, int64_t bytes_per_warp, LaunchStream stream,
                        const Args&... args) {
  if (rows == 0) return cudaSuccess;
  int warps = 8;
  while (warps > 1 && warps * bytes_per_warp > kSharedBytesPerBlock) warps /= 2;
  const int64_t bytes = warps * bytes_per_warp;
  if (bytes > kSharedBytesPerBlock) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) return status;
  }
  const int64_t wanted = (rows + warps - 1) / warps;
  const unsigned blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  return launch_kernel(kernel, blocks, warps * kWarpSize, bytes, stream, args...);
}

inline constexpr int64_t kMostGridRows = 65535;  // gridDim.y; more are looped over

// A launch of blocks of so many warps with `bytes` of shared memory.
template <typename Kernel, typename... Args>
cudaError_t launch_blocks(Kernel kernel, dim3 blocks, int warps, int bytes, LaunchStream stream,
                          const Args&... args) {
  if (bytes > 0) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess) return status;
  }
  return launch_kernel(kernel, blocks, warps * kWarpSize, bytes, stream, args...);
}

// The rows of a warp in such a launch.
struct WarpRows {
  int lane;
  int warp;
  int64_t first;
  int64_t stride;
};

__device__ __forceinline__ WarpRows warp_rows() {
  const int warps = blockDim.x / kWarpSize;
  const int warp = warp_index();
  return {static_cast<int>(threadIdx.x % kWarpSize), warp,
          static_cast<int64_t>(blockIdx.x) * warps + warp, static_cast<int64_t>(gridDim.x) * warps};
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_WARP_CUH_
