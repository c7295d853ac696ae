// Maps of matrices in global memory, by which bulk copies bring boxes of them to shared memory.

#ifndef JAX_ROUTER_CUDA_TENSOR_MAP_H_
#define JAX_ROUTER_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_router {

// A map of `rows` rows of `columns` elements of 1 or 2 bytes, in boxes of `box_rows` rows of 128
// bytes that are swizzled in shared memory; what is outside of the matrix reads as 0. Rows lie one
// after another, at multiples of 16 bytes.
cudaError_t make_tensor_map(const void* matrix, int64_t rows, int64_t columns, int element_bytes,
                            int box_rows, CUtensorMap* map);

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_TENSOR_MAP_H_
