// Calls of `permute`, `combine` and their backward, and what the CPU and the CUDA kernels share.
//
// A token is a row of `width` elements, an entry one of its `slots`. The position of an entry is
// where its row lies among the rows of all entries, sorted by expert. Positions from the sum of the
// group sizes on are those of entries in no group: their rows are zeros, and they are not read.

#ifndef JAX_ROUTER_PERMUTE_CALL_H_
#define JAX_ROUTER_PERMUTE_CALL_H_

#include <cstdint>

#include "options.h"

namespace jax_router {

inline constexpr int64_t kMostWidth = 1 << 30;  // so that a place in a row is an int

struct EntryPlan {
  const int32_t* inverse;      // [batch, tokens, slots]: the position of each entry
  const int32_t* group_sizes;  // [batch, experts]
  int64_t batch;
  int64_t tokens;
  int64_t slots;
  int64_t experts;
  int64_t width;

  JAX_ROUTER_HOST_DEVICE int64_t entries() const { return tokens * slots; }

  // How many entries are in a group, from the sum of the group sizes. The kernels follow no other
  // position, so whatever a plan holds, they stay inside their rows.
  JAX_ROUTER_HOST_DEVICE int64_t grouped(int64_t sum) const {
    const int64_t positive = sum > 0 ? sum : 0;
    return positive < entries() ? positive : entries();
  }
};

// Writes the row of every token to the positions of its entries.
struct Permute {
  EntryPlan plan;
  const void* tokens;  // [batch, tokens, width]
  void* rows;          // [batch, entries, width] of the same type
  LogitsType type;
};

// Adds up the rows of the entries of every token, times their weights, in the order of the slots.
struct Combine {
  EntryPlan plan;
  const void* rows;      // [batch, entries, width]
  const float* weights;  // [batch, tokens, slots]; null: all 1
  void* tokens;          // [batch, tokens, width] of the type of the rows
  LogitsType type;
};

// The gradients of `combine`. Each needs the other operand; one of them may be left out.
struct CombineBackward {
  EntryPlan plan;
  const void* cotangent;    // [batch, tokens, width] of the type of the rows
  const float* weights;     // null where the gradient of the rows is
  void* rows_gradient;      // [batch, entries, width] or null
  const void* rows;         // null where the gradient of the weights is
  float* weights_gradient;  // [batch, tokens, slots] or null
  LogitsType type;
};

}  // namespace jax_router

#endif  // JAX_ROUTER_PERMUTE_CALL_H_
