// The dense results of tokens: probabilities and routing map. A row is cleared, and what was chosen
// is written over the zeros while they are in the cache, by lanes of the same warp. A bitmap is put
// together in shared memory first, since several experts share its bytes.

#ifndef JAX_ROUTER_CUDA_DENSE_CUH_
#define JAX_ROUTER_CUDA_DENSE_CUH_

#include <cstdint>

#include "options.h"
#include "warp.cuh"

namespace jax_router {

// Clears `bytes` bytes from any address on, by a whole warp.
__device__ __forceinline__ void clear(void* begin, int64_t bytes, int lane) {
  char* p = static_cast<char*>(begin);
  const int64_t head = min(bytes, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) & 15));
  if (lane < head) p[lane] = 0;
  const int64_t whole = (bytes - head) / 16;
  int4* body = reinterpret_cast<int4*>(p + head);
  for (int64_t i = lane; i < whole; i += kWarpSize) body[i] = make_int4(0, 0, 0, 0);
  const int64_t tail = head + whole * 16;
  if (lane < bytes - tail) p[tail + lane] = 0;
}

// Clears the dense results of `tokens` tokens from `first` on.
template <typename T>
__device__ __forceinline__ void clear_dense(const RouteForward& call, int64_t first, int tokens,
                                            int lane) {
  T* probs = static_cast<T*>(call.probs) + first * call.experts;
  clear(probs, tokens * call.experts * static_cast<int64_t>(sizeof(T)), lane);
  if (call.map_format == MapFormat::kBytemap) {
    clear(call.map + first * call.experts, tokens * call.experts, lane);
  }
}

// Writes one chosen expert of a cleared row.
template <typename T>
__device__ __forceinline__ void store_dense(const RouteForward& call, int64_t token, int expert,
                                            float weight, uint32_t* bits) {
  const int64_t at = token * call.experts + expert;
  store_value(static_cast<T*>(call.probs) + at, weight + 0.0f);  // no -0
  if (call.map_format == MapFormat::kBytemap) {
    call.map[at] = 1;
  } else {
    atomicOr(bits + expert / 32, 1u << expert % 32);
  }
}

// Words of shared memory for a row of a bitmap, 0 where none is asked for.
JAX_ROUTER_HOST_DEVICE inline int bitmap_words(const RouteForward& call) {
  const bool wanted = call.probs != nullptr && call.map_format == MapFormat::kBitmap;
  return wanted ? static_cast<int>((call.experts + 31) / 32) : 0;
}

__device__ __forceinline__ void clear_bitmap(uint32_t* bits, int words, int lane) {
  for (int i = lane; i < words; i += kWarpSize) bits[i] = 0;
}

// Writes the rows of a bitmap of `tokens` tokens, `words` words of shared memory each.
__device__ __forceinline__ void write_bitmap(const RouteForward& call, int64_t first, int tokens,
                                             const uint32_t* bits, int words, int lane) {
  const int row = static_cast<int>(call.map_row_bytes());
  for (int t = 0; t < tokens; ++t) {
    uint8_t* map = call.map + (first + t) * row;
    for (int i = lane; i < row; i += kWarpSize) {
      map[i] = static_cast<uint8_t>(bits[t * words + i / 4] >> (8 * (i % 4)));
    }
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_DENSE_CUH_
