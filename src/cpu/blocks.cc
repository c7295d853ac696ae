// `blocks` on the CPU: a counting sort whose entries keep their order, so that no chunk or thread
// shows in the result.

#include "blocks.h"

#include <cstring>

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

void fill(int32_t* out, int64_t count, int32_t value) {
  for (int64_t i = 0; i < count; ++i) out[i] = value;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

bool keeps(const Blocks& call, const bool* mask, int32_t expert) {
  // An unsigned comparison refuses negative experts, too.
  return static_cast<uint32_t>(expert) < static_cast<uint32_t>(call.num_experts) &&
         (mask == nullptr || mask[expert]);
}

const bool* row_mask(const Blocks& call, int64_t row) {
  return call.mask == nullptr ? nullptr : call.mask + row * call.num_experts;
}

// Counts the entries of each chunk, and those of the row into `totals`.
void count(const Blocks& call, int64_t row, int32_t* totals) {
  const int32_t* experts = call.experts + row * call.entries();
  const bool* mask = row_mask(call, row);
  const int64_t end = call.valid_tokens(row) * call.k;
  fill(totals, call.num_experts, 0);
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    int32_t* counts = call.chunk_counts(row, chunk);
    fill(counts, call.num_experts, 0);
    const int64_t first = chunk * call.chunk_entries();
    const int64_t last = smaller(first + call.chunk_entries(), end);
    for (int64_t i = first; i < last; ++i) {
      if (keeps(call, mask, experts[i])) ++counts[experts[i]];
    }
    for (int64_t e = 0; e < call.num_experts; ++e) totals[e] += counts[e];
  }
}

void place(const Blocks& call, int64_t row) {
  int32_t* totals = call.chunk_counts(row, call.chunks);
  count(call, row, totals);
  const int64_t n = call.valid_tokens(row);
  const int32_t pad = call.pad_id(n);
  const bool* mask = row_mask(call, row);
  int32_t* ids = call.ids + row * call.positions;
  float* weights = call.sorted_weights + row * call.positions;
  const int64_t blocks = call.positions / call.block_size;
  int32_t* block_experts = call.block_experts + row * blocks;
  int64_t position = 0;
  int64_t block = 0;
  int32_t local = 0;
  // The totals become the first position of each expert.
  for (int64_t e = 0; e < call.num_experts; ++e) {
    const int64_t used = totals[e];
    const int64_t expert_blocks = (used + call.block_size - 1) / call.block_size;
    const int64_t pads = expert_blocks * call.block_size - used;
    totals[e] = static_cast<int32_t>(position);
    fill(block_experts + block, expert_blocks, mask == nullptr ? static_cast<int32_t>(e) : local);
    fill(ids + position + used, pads, pad);
    std::memset(weights + position + used, 0, static_cast<size_t>(pads) * sizeof(float));
    position += used + pads;
    block += expert_blocks;
    if (mask != nullptr && mask[e]) ++local;
  }
  fill(ids + position, call.positions - position, pad);
  std::memset(weights + position, 0,
              static_cast<size_t>(call.positions - position) * sizeof(float));
  fill(block_experts + block, blocks - block, -1);
  call.num_padded[row] = static_cast<int32_t>(position);
  call.num_tokens[row] = static_cast<int32_t>(n);
  for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
    int32_t* counts = call.chunk_counts(row, chunk);
    for (int64_t e = 0; e < call.num_experts; ++e) {
      const int32_t own = counts[e];
      counts[e] = totals[e];
      totals[e] += own;
    }
  }
}

template <BlockLayout kLayout>
void scatter_chunk(const Blocks& call, int64_t row, int64_t chunk) {
  const int64_t offset = row * call.entries();
  const int32_t* experts = call.experts + offset;
  const float* weights = call.weights + offset;
  int32_t* inverse = call.inverse + offset;
  int32_t* ids = call.ids + row * call.positions;
  float* sorted_weights = call.sorted_weights + row * call.positions;
  int32_t* next = call.chunk_counts(row, chunk);
  const bool* mask = row_mask(call, row);
  const int64_t first = chunk * call.chunk_entries();
  const int64_t last = smaller(first + call.chunk_entries(), call.entries());
  const int64_t valid = smaller(last, call.valid_tokens(row) * call.k);
  int64_t i = first;
  int64_t token = first / call.k;
  int64_t slot = first % call.k;
  for (; i < valid; ++i) {
    int32_t position = -1;
    if (keeps(call, mask, experts[i])) {
      position = next[experts[i]]++;
      ids[position] =
          kLayout == BlockLayout::kFlat ? static_cast<int32_t>(i) : Blocks::packed_id(token, slot);
      sorted_weights[position] = weights[i];
    }
    inverse[i] = position;
    if (++slot == call.k) {
      slot = 0;
      ++token;
    }
  }
  for (; i < last; ++i) inverse[i] = -1;
}

void scatter(const Blocks& call, int64_t row, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    if (call.layout == BlockLayout::kFlat) {
      scatter_chunk<BlockLayout::kFlat>(call, row, chunk);
    } else {
      scatter_chunk<BlockLayout::kPacked>(call, row, chunk);
    }
  }
}

}  // namespace

BlocksKernel blocks_kernel() { return {place, scatter}; }

}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router
