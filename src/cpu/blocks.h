// The CPU kernel of `blocks`, compiled once for every instruction set that is dispatched on.

#ifndef JAX_ROUTER_CPU_BLOCKS_H_
#define JAX_ROUTER_CPU_BLOCKS_H_

#include <cstdint>

#include "blocks_call.h"

namespace jax_router {

// A counting sort. `place` counts the entries of a row, says where those of each chunk go, and
// writes all that belongs to no entry; then `scatter` writes the entries of the row's chunks
// [begin, end), in any order.
struct BlocksKernel {
  void (*place)(const Blocks&, int64_t row);
  void (*scatter)(const Blocks&, int64_t row, int64_t begin, int64_t end);
};

namespace baseline {
BlocksKernel blocks_kernel();
}  // namespace baseline

namespace avx2 {
BlocksKernel blocks_kernel();
}  // namespace avx2

}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_BLOCKS_H_
