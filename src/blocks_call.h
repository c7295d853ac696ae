// Calls of `blocks` (entries, a token's slots, sorted by expert, each expert's run padded to whole
// blocks) and of `route_and_plan_blocks`.

#ifndef JAX_ROUTER_BLOCKS_CALL_H_
#define JAX_ROUTER_BLOCKS_CALL_H_

#include <cstddef>
#include <cstdint>

#include "options.h"

namespace jax_router {

// In the order of the names in jax_router/_blocks.py.
enum class BlockLayout : int { kFlat, kPacked };

// Every row of the batch is a plan of its own. Absent operands are null.
struct Blocks {
  const int32_t* experts;    // [batch, tokens, k]; one outside 0 .. num_experts - 1 is dropped
  const float* weights;      // [batch, tokens, k]
  const bool* mask;          // [batch, num_experts]; experts without it are dropped
  const int32_t* num_valid;  // [batch]; tokens from there on are dropped
  int64_t batch;
  int64_t tokens;
  int64_t k;
  int64_t num_experts;
  int64_t block_size;
  BlockLayout layout;
  int64_t positions;       // of a row, all blocks together, used or not
  int64_t chunks;          // into which the entries of a row are cut, at least 1
  int32_t* ids;            // [batch, positions]
  float* sorted_weights;   // [batch, positions]
  int32_t* block_experts;  // [batch, positions / block_size]
  int32_t* num_padded;     // [batch]
  int32_t* num_tokens;     // [batch]
  int32_t* inverse;        // [batch, tokens, k]
  // [batch, chunks + 1, num_experts]: of each chunk how many entries of each expert it has, then
  // where they go; at last the same of the whole row.
  int32_t* scratch;

  JAX_ROUTER_HOST_DEVICE int64_t entries() const { return tokens * k; }

  JAX_ROUTER_HOST_DEVICE int64_t chunk_entries() const { return (entries() + chunks - 1) / chunks; }

  JAX_ROUTER_HOST_DEVICE int32_t* chunk_counts(int64_t row, int64_t chunk) const {
    return scratch + (row * (chunks + 1) + chunk) * num_experts;
  }

  JAX_ROUTER_HOST_DEVICE int64_t valid_tokens(int64_t row) const {
    if (num_valid == nullptr) return tokens;
    const int64_t n = num_valid[row];
    return n < 0 ? 0 : (n < tokens ? n : tokens);
  }

  // The id of a position that holds no entry, of a row with n valid tokens.
  JAX_ROUTER_HOST_DEVICE int32_t pad_id(int64_t n) const {
    return layout == BlockLayout::kFlat ? static_cast<int32_t>(entries()) : packed_id(n, k);
  }

  JAX_ROUTER_HOST_DEVICE static int32_t packed_id(int64_t token, int64_t slot) {
    return static_cast<int32_t>(static_cast<uint32_t>(slot) << 24 | static_cast<uint32_t>(token));
  }
};

// A call of `route_and_plan_blocks`: the routing, the plan made of it, and bytes to be cleared.
struct RouteAndPlanBlocks {
  RouteForward route;
  Blocks blocks;
  void* zeros;  // may be null
  size_t zeros_bytes;
};

}  // namespace jax_router

#endif  // JAX_ROUTER_BLOCKS_CALL_H_
