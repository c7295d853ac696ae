// Who does what in `experts`: how the tiles of the result and the experts are dealt to clusters.
//
// A tile takes all experts. As many rounds of whole tiles as there are clusters for are done first.
// The tiles left are cut at experts so that every cluster has as much: the first experts of a tile
// go to its own clusters, as many as there are for every tile, and the rest of all tiles, laid end
// to end, is dealt to the clusters left over. So clusters go through the experts side by side, and
// find in the cache what another has read. Cuts depend on sizes alone.
//
// Everything fits 32 bits: there are at most 144 clusters and 65536 experts.

#ifndef JAX_ROUTER_CUDA_EXPERTS_SCHEDULE_H_
#define JAX_ROUTER_CUDA_EXPERTS_SCHEDULE_H_

#include "options.h"

namespace jax_router {

// A part of a tile that one cluster computes.
struct ExpertsPiece {
  int tile;
  int begin;  // experts
  int end;
  int slot;  // of its partial sums; -1 where it is a whole tile
};

// Where the partial sums of a tile are: `own` slots from `own_first` on, then `rest` slots from
// `rest_first` on, in ascending order of their experts.
struct ExpertsPieces {
  int own_first;
  int own;
  int rest_first;
  int rest;
};

struct ExpertsSchedule {
  int experts;
  int clusters;
  int rounds;          // of whole tiles
  int split_tiles;     // that are cut
  int split_clusters;  // at most one for each of their experts
  int own;             // clusters that each of these has for itself
  int rest_expert;     // the first that is left to others
  int rest_clusters;

  static ExpertsSchedule make(int tiles, int experts, int clusters) {
    ExpertsSchedule s{};
    s.experts = experts;
    s.clusters = clusters;
    s.rounds = tiles / clusters;
    s.split_tiles = tiles % clusters;
    if (s.split_tiles == 0) return s;
    const int units = s.split_tiles * experts;
    s.split_clusters = clusters < units ? clusters : units;
    s.own = s.split_clusters / s.split_tiles;
    s.rest_expert = s.bound(s.own);
    const int left = s.split_clusters - s.own * s.split_tiles;
    s.rest_clusters = left < s.rest_units() ? left : s.rest_units();
    return s;
  }

  // How many pieces have slots.
  int slots() const {
    if (split_tiles == 0) return 0;
    return (own + 1) * split_tiles + rest_clusters;
  }

  // Where the experts of a cluster of its own end and those of the next begin.
  JAX_ROUTER_HOST_DEVICE int bound(int i) const {
    return i * split_tiles * experts / split_clusters;
  }
  JAX_ROUTER_HOST_DEVICE int rest_experts() const { return experts - rest_expert; }
  JAX_ROUTER_HOST_DEVICE int rest_units() const { return split_tiles * rest_experts(); }

  // The cluster among those of the rest that has a unit of it.
  JAX_ROUTER_HOST_DEVICE int rest_owner(int unit) const {
    return ((unit + 1) * rest_clusters - 1) / rest_units();
  }

  JAX_ROUTER_HOST_DEVICE ExpertsPieces pieces(int tile) const {
    const int t = tile - rounds * clusters;
    ExpertsPieces found{t * own, own, 0, 0};
    if (rest_experts() > 0) {
      const int first = rest_owner(t * rest_experts());
      found.rest_first = own * split_tiles + first + t;
      found.rest = rest_owner((t + 1) * rest_experts() - 1) - first + 1;
    }
    return found;
  }

  // The piece number `index` of a cluster; false where it has no more.
  JAX_ROUTER_HOST_DEVICE bool piece(int cluster, int index, ExpertsPiece* found) const {
    if (index < rounds) {
      *found = {index * clusters + cluster, 0, experts, -1};
      return true;
    }
    index -= rounds;
    const int first = rounds * clusters;
    if (cluster < own * split_tiles) {
      if (index > 0) return false;
      const int t = cluster % split_tiles;
      const int i = cluster / split_tiles;
      const bool whole = own == 1 && rest_experts() == 0;
      *found = {first + t, bound(i), bound(i + 1), whole ? -1 : t * own + i};
      return true;
    }
    const int i = cluster - own * split_tiles;
    if (i >= rest_clusters) return false;
    const int begin = i * rest_units() / rest_clusters;
    const int end = (i + 1) * rest_units() / rest_clusters;
    const int t = begin / rest_experts() + index;
    const int tile_begin = t * rest_experts();
    if (tile_begin >= end) return false;
    const int tile_end = tile_begin + rest_experts();
    const int from = begin > tile_begin ? begin : tile_begin;
    const int to = end < tile_end ? end : tile_end;
    *found = {first + t, rest_expert + from - tile_begin, rest_expert + to - tile_begin,
              own * split_tiles + i + t};
    return true;
  }
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_SCHEDULE_H_
