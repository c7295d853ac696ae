// Exact top-k of a row of integer keys, largest first, ties to the lowest index.
//
// The row is read as classes of equal stride. The k-th largest of the class maxima is a lower bound
// of the k-th largest key, so only keys that reach it can be chosen: on random rows about k and a
// few. They are compacted (again and again while too many survive) and ranked by counting who beats
// them.

#ifndef JAX_ROUTER_CPU_SELECT_H_
#define JAX_ROUTER_CPU_SELECT_H_

#include <algorithm>
#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

using Int32x8 = int32_t __attribute__((vector_size(32), may_alias));

constexpr int64_t kMostClasses = 128;    // rows of keys are padded to this with kNoKey
constexpr int64_t kRankedDirectly = 32;  // so few keys are ranked as they are
constexpr int64_t kFewSlots = 48;        // up to here 64 classes bound well enough
constexpr int64_t kMostRanked = 128;     // more are sorted

struct Selection {
  int32_t* keys;           // the chosen, best first, then what was not chosen; a padded row
  int32_t* ids;            // their indices
  int32_t* survivor_keys;  // scratch, padded rows
  int32_t* survivor_ids;
  int64_t* pairs;  // key and index in one ordered integer
};

inline int64_t pack(int32_t key, int32_t id) {
  const uint64_t high = static_cast<uint64_t>(static_cast<uint32_t>(key)) << 32;
  return static_cast<int64_t>(high | ~static_cast<uint32_t>(id));
}
inline int32_t packed_key(int64_t pair) { return static_cast<int32_t>(pair >> 32); }
inline int32_t packed_id(int64_t pair) {
  return static_cast<int32_t>(~static_cast<uint32_t>(static_cast<uint64_t>(pair)));
}

// Bit i is set where keys[i] >= limit, for 32 keys.
inline uint32_t reach_mask(const int32_t* keys, int32_t limit) {
  uint32_t mask = 0;
#ifdef __AVX2__
  const __m256i below = _mm256_set1_epi32(limit - 1);
  for (int j = 0; j < 4; ++j) {
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(keys) + j);
    const __m256 reached = _mm256_castsi256_ps(_mm256_cmpgt_epi32(v, below));
    mask |= static_cast<uint32_t>(_mm256_movemask_ps(reached)) << (8 * j);
  }
#else
  for (int j = 0; j < 32; ++j) mask |= static_cast<uint32_t>(keys[j] >= limit) << j;
#endif
  return mask;
}

// A lower bound of the k-th largest of `padded` keys: the k-th largest of the maxima of kClasses
// strided classes, k <= kClasses. The inner loops are unrolled so that the vectors stay in
// registers.
template <int kClasses>
inline int32_t bound_of(const int32_t* keys, int64_t padded, int64_t k) {
  constexpr int kVectors = kClasses / 8;
  const Int32x8* in = reinterpret_cast<const Int32x8*>(keys);
  Int32x8 best[kVectors];
  JAX_ROUTER_UNROLL
  for (int j = 0; j < kVectors; ++j) best[j] = in[j];
  for (int64_t i = kVectors; i < padded / 8; i += kVectors) {
    JAX_ROUTER_UNROLL
    for (int j = 0; j < kVectors; ++j) best[j] = best[j] > in[i + j] ? best[j] : in[i + j];
  }
  alignas(32) int32_t maxima[kClasses];
  JAX_ROUTER_UNROLL
  for (int j = 0; j < kVectors; ++j) reinterpret_cast<Int32x8*>(maxima)[j] = best[j];
  Int32x8 beaten[kVectors] = {};
  for (int c = 0; c < kClasses; ++c) {
    const Int32x8 other = Int32x8{} + maxima[c];
    JAX_ROUTER_UNROLL
    for (int j = 0; j < kVectors; ++j) beaten[j] -= best[j] < other;
  }
  // The smallest of the maxima that fewer than k others beat.
  const Int32x8 needed = Int32x8{} + static_cast<int32_t>(k);
  Int32x8 smallest = Int32x8{} + INT32_MAX;
  JAX_ROUTER_UNROLL
  for (int j = 0; j < kVectors; ++j) {
    const Int32x8 among = beaten[j] < needed ? best[j] : smallest;
    smallest = among < smallest ? among : smallest;
  }
  int32_t bound = smallest[0];
  for (int lane = 1; lane < 8; ++lane) bound = smallest[lane] < bound ? smallest[lane] : bound;
  return bound;
}

inline int32_t bound_of(const int32_t* keys, int64_t padded, int64_t k) {
  if (k <= 2) return bound_of<8>(keys, padded, k);
  if (k <= 5) return bound_of<16>(keys, padded, k);
  if (k <= 10) return bound_of<32>(keys, padded, k);
  if (k <= kFewSlots) return bound_of<64>(keys, padded, k);
  return bound_of<128>(keys, padded, k);
}

// Keeps the keys that reach the bound; of those equal to it only the first k, since ties go to the
// lowest index. In place if `ids` is given (survivors of an earlier pass), else from a row.
inline int64_t compact(const int32_t* keys, const int32_t* ids, int64_t padded, int32_t bound,
                       int64_t k, Selection& selection) {
  int64_t kept = 0;
  int64_t ties = 0;
  int32_t limit = bound;
  for (int64_t i = 0; i < padded; i += 32) {
    for (uint32_t mask = reach_mask(keys + i, limit); mask != 0; mask &= mask - 1) {
      const int64_t at = i + __builtin_ctz(mask);
      const int32_t key = keys[at];
      selection.survivor_ids[kept] = ids == nullptr ? static_cast<int32_t>(at) : ids[at];
      selection.survivor_keys[kept] = key;
      kept += key >= limit;
      ties += key == bound;
      limit = ties >= k ? bound + 1 : limit;
    }
  }
  return kept;
}

struct Descending {
  bool operator()(int64_t a, int64_t b) const { return a > b; }
};

// Orders few keys by counting, for each, how many beat it. Indices ascend, so of equal keys the
// earlier beats the later: key_j > key_i - 1 for j < i, key_j > key_i for j > i.
inline void rank(const int32_t* keys, const int32_t* ids, int64_t count, Selection& selection) {
  static constexpr Int32x8 kLater[8] = {{0, 1, 1, 1, 1, 1, 1, 1}, {0, 0, 1, 1, 1, 1, 1, 1},
                                        {0, 0, 0, 1, 1, 1, 1, 1}, {0, 0, 0, 0, 1, 1, 1, 1},
                                        {0, 0, 0, 0, 0, 1, 1, 1}, {0, 0, 0, 0, 0, 0, 1, 1},
                                        {0, 0, 0, 0, 0, 0, 0, 1}, {0, 0, 0, 0, 0, 0, 0, 0}};
  for (int64_t i = 0; i < count; i += 8) {
    const Int32x8 mine = *reinterpret_cast<const Int32x8*>(keys + i);
    const Int32x8 just_below = mine - 1;
    Int32x8 beaten = {};
    for (int64_t j = 0; j < i; ++j) beaten -= just_below < keys[j];
    for (int64_t j = 0; j < 8; ++j) beaten -= mine - kLater[j] < keys[i + j];
    for (int64_t j = i + 8; j < count; ++j) beaten -= mine < keys[j];
    const int64_t lanes = count - i < 8 ? count - i : 8;
    alignas(32) int32_t ranks[8];
    *reinterpret_cast<Int32x8*>(ranks) = beaten;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      selection.keys[ranks[lane]] = keys[i + lane];
      selection.ids[ranks[lane]] = ids == nullptr ? static_cast<int32_t>(i + lane) : ids[i + lane];
    }
  }
}

// Orders many keys by partial sorting.
inline void sort(const int32_t* keys, const int32_t* ids, int64_t count, int64_t k,
                 Selection& selection) {
  int64_t* pairs = selection.pairs;
  for (int64_t i = 0; i < count; ++i) {
    pairs[i] = pack(keys[i], ids == nullptr ? static_cast<int32_t>(i) : ids[i]);
  }
  std::nth_element(pairs, pairs + k - 1, pairs + count, Descending());
  std::sort(pairs, pairs + k, Descending());
  for (int64_t i = 0; i < k; ++i) {
    selection.keys[i] = packed_key(pairs[i]);
    selection.ids[i] = packed_id(pairs[i]);
  }
}

// Leaves the k best of `experts` keys in the selection, best first. `keys` is a row padded with
// kNoKey.
inline void select(const int32_t* keys, int64_t experts, int64_t k, Selection& selection) {
  const int32_t* survivors = keys;
  const int32_t* ids = nullptr;
  int64_t count = experts;
  const int64_t multiple = k <= kFewSlots ? kMostClasses / 2 : kMostClasses;
  while (k <= kMostClasses * 3 / 4 && count > kRankedDirectly && count > 2 * k) {
    const int64_t padded = round_up(count, multiple);
    const int32_t bound = bound_of(survivors, padded, k);
    const int64_t kept = compact(survivors, ids, padded, bound, k, selection);
    for (int64_t i = kept; i < round_up(kept, multiple); ++i) {
      selection.survivor_keys[i] = kNoKey;
    }
    const bool shrank = kept <= count - count / 4;
    survivors = selection.survivor_keys;
    ids = selection.survivor_ids;
    count = kept;
    if (count <= kMostRanked || !shrank) break;
  }
  if (count <= kMostRanked) {
    rank(survivors, ids, count, selection);
  } else {
    sort(survivors, ids, count, k, selection);
  }
}

}  // namespace
}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_SELECT_H_
