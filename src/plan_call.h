// One call of `plan`, and what its CPU and its CUDA kernel share.

#ifndef JAX_ROUTER_PLAN_CALL_H_
#define JAX_ROUTER_PLAN_CALL_H_

#include <cstdint>

#include "options.h"

namespace jax_router {

// Of a batch row with more entries than that, the CUDA kernels count blocks of entries on their
// own. How many blocks there are is up to Python, which makes room for their counts.
inline constexpr int64_t kMostWholeEntries = 1 << 14;
inline constexpr int64_t kMostBlockEntries = 1 << 15;

// `batch` rows of `entries` ids. One outside [0, experts) counts as the id `experts`, the group of
// the entries in no group.
struct PlanCall {
  const int32_t* ids;  // [batch, entries]
  int64_t batch;
  int64_t entries;  // at most 2**31 - 1
  int64_t experts;
  int64_t blocks;        // of a batch row; 0 where none are needed
  int32_t* order;        // [batch, entries]
  int32_t* inverse;      // [batch, entries]
  int32_t* group_sizes;  // [batch, experts]
  int32_t* counts;       // [batch, blocks, experts + 1]: scratch

  JAX_ROUTER_HOST_DEVICE bool whole() const { return entries <= kMostWholeEntries; }
};

// The group of an id. A negative one becomes a large unsigned one.
JAX_ROUTER_HOST_DEVICE inline uint32_t group_of(int32_t id, uint32_t experts) {
  const uint32_t group = static_cast<uint32_t>(id);
  return group < experts ? group : experts;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_PLAN_CALL_H_
