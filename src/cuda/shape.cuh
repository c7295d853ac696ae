// The geometry of the kernels that hold rows in registers.

#ifndef JAX_ROUTER_CUDA_SHAPE_CUH_
#define JAX_ROUTER_CUDA_SHAPE_CUH_

#include "row.cuh"
#include "warp.cuh"

namespace jax_router {

// Geometry of a kernel: kLanes lanes share a row, each with up to kChunks chunks of it and kClasses
// classes. kListed survivors fit the list of a token.
template <int kLanes_, int kChunks_, int kClasses_, int kListed_>
struct Shape {
  static constexpr int kLanes = kLanes_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kClasses = kClasses_;
  static constexpr int kListed = kListed_;
  static constexpr int kColumns = kLanes * kChunks * kChunk;
  static constexpr int kMaxima = kLanes == kWarpSize ? kClasses : 0;  // in shared memory
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_SHAPE_CUH_
