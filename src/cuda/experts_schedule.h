// Who does what in `experts`: how the tiles of the result and the experts are dealt to blocks.
//
// Every tile takes all experts. The experts of all tiles, laid end to end, are cut into as many
// pieces of the same length as there are blocks. Where a cut falls into a tile, its pieces leave
// partial sums. Cuts depend on sizes alone.

#ifndef JAX_ROUTER_CUDA_EXPERTS_SCHEDULE_H_
#define JAX_ROUTER_CUDA_EXPERTS_SCHEDULE_H_

#include <cstdint>

#include "options.h"

namespace jax_router {

// A part of a tile that one block computes.
struct ExpertsPiece {
  int tile;
  int begin;  // experts
  int end;
  int slot;  // of its partial sums; -1 where it is a whole tile
};

// Where the partial sums of a tile are, in ascending order of their experts.
struct ExpertsSlots {
  int first;
  int count;
};

struct ExpertsSchedule {
  int tiles;
  int experts;
  int blocks;  // that have a piece, at most one for each expert of each tile

  JAX_ROUTER_HOST_DEVICE static ExpertsSchedule make(int tiles, int experts, int blocks) {
    const int64_t units = int64_t{tiles} * experts;
    return {tiles, experts, units < blocks ? static_cast<int>(units) : blocks};
  }

  JAX_ROUTER_HOST_DEVICE int64_t units() const { return int64_t{tiles} * experts; }

  // The block that has a unit.
  JAX_ROUTER_HOST_DEVICE int owner(int64_t unit) const {
    return static_cast<int>(((unit + 1) * blocks - 1) / units());
  }

  JAX_ROUTER_HOST_DEVICE ExpertsSlots slots(int tile) const {
    const int first = owner(int64_t{tile} * experts);
    const int last = owner(int64_t{tile + 1} * experts - 1);
    return {first + tile, last - first + 1};
  }

  // The piece number `index` of a block; false where it has no more.
  JAX_ROUTER_HOST_DEVICE bool piece(int block, int index, ExpertsPiece* found) const {
    if (block >= blocks) return false;
    const int64_t begin = block * units() / blocks;
    const int64_t end = (block + 1) * units() / blocks;
    const int tile = static_cast<int>(begin / experts) + index;
    const int64_t start = int64_t{tile} * experts;
    if (start >= end) return false;
    const int from = begin > start ? static_cast<int>(begin - start) : 0;
    const int to = end < start + experts ? static_cast<int>(end - start) : experts;
    *found = {tile, from, to, to - from == experts ? -1 : block + tile};
    return true;
  }
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_SCHEDULE_H_
