// Exact top-k of a row of integer keys, largest first, ties to the lowest index.
//
// The row is read as classes of equal stride. The k-th largest of the class maxima is a lower bound of
// the k-th largest key, so only keys that reach it can be chosen: on random rows about k and a few.
// They are compacted (again and again while too many survive) and ranked by counting who beats them.

#ifndef JAX_ROUTER_CPU_SELECT_H_
#define JAX_ROUTER_CPU_SELECT_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

using Int32x8 = int32_t __attribute__((vector_size(32), may_alias));
using Int64x4 = int64_t __attribute__((vector_size(32), may_alias));

constexpr int64_t kMostClasses = 128;
constexpr int64_t kRankedDirectly = 32;  // so few keys are ranked as they are
constexpr int64_t kMostRanked = 128;     // more are sorted

struct SelectScratch {
  int32_t* keys;     // survivors, padded row
  int32_t* ids;      // their indices, padded row
  int64_t* pairs;    // key and index in one ordered integer, padded row
  int64_t* ordered;  // the same, best first; the result
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
// strided classes, k <= kClasses.
template <int kClasses>
inline int32_t bound_of(const int32_t* keys, int64_t padded, int64_t k) {
  constexpr int kVectors = kClasses / 8;
  Int32x8 best[kVectors];
  const Int32x8* in = reinterpret_cast<const Int32x8*>(keys);
  for (int j = 0; j < kVectors; ++j) best[j] = in[j];
  for (int64_t i = kVectors; i < padded / 8; i += kVectors) {
    for (int j = 0; j < kVectors; ++j) best[j] = best[j] > in[i + j] ? best[j] : in[i + j];
  }
  alignas(32) int32_t maxima[kClasses];
  for (int j = 0; j < kVectors; ++j) reinterpret_cast<Int32x8*>(maxima)[j] = best[j];
  Int32x8 beaten[kVectors] = {};
  for (int c = 0; c < kClasses; ++c) {
    for (int j = 0; j < kVectors; ++j) beaten[j] -= best[j] < maxima[c];
  }
  int32_t bound = INT32_MAX;
  for (int j = 0; j < kVectors; ++j) {
    for (int lane = 0; lane < 8; ++lane) {
      const bool among = beaten[j][lane] < k && best[j][lane] < bound;
      bound = among ? best[j][lane] : bound;
    }
  }
  return bound;
}

inline int32_t bound_of(const int32_t* keys, int64_t padded, int64_t k) {
  if (k <= 2) return bound_of<8>(keys, padded, k);
  if (k <= 5) return bound_of<16>(keys, padded, k);
  if (k <= 10) return bound_of<32>(keys, padded, k);
  if (k <= 40) return bound_of<64>(keys, padded, k);
  return bound_of<128>(keys, padded, k);
}

// Keeps the keys that reach the bound; of those equal to it only the first k, since ties go to the
// lowest index. In place if `ids` is given (survivors of an earlier pass), else from a row.
inline int64_t compact(const int32_t* keys, const int32_t* ids, int64_t padded, int32_t bound,
                       int64_t k, SelectScratch& scratch) {
  int64_t kept = 0;
  int64_t ties = 0;
  int32_t limit = bound;
  for (int64_t i = 0; i < padded; i += 32) {
    for (uint32_t mask = reach_mask(keys + i, limit); mask != 0; mask &= mask - 1) {
      const int64_t at = i + __builtin_ctz(mask);
      const int32_t key = keys[at];
      scratch.ids[kept] = ids == nullptr ? static_cast<int32_t>(at) : ids[at];
      scratch.keys[kept] = key;
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

// Orders the pairs by counting, for each, how many beat it.
inline void rank(int64_t count, SelectScratch& scratch) {
  const int64_t padded = round_up(count, 4);
  for (int64_t i = count; i < padded; ++i) scratch.pairs[i] = INT64_MIN;
  for (int64_t i = 0; i < padded; i += 4) {
    const Int64x4 mine = *reinterpret_cast<const Int64x4*>(scratch.pairs + i);
    Int64x4 beaten = {};
    for (int64_t j = 0; j < count; ++j) beaten -= mine < scratch.pairs[j];
    const int64_t lanes = count - i < 4 ? count - i : 4;
    for (int64_t lane = 0; lane < lanes; ++lane) scratch.ordered[beaten[lane]] = mine[lane];
  }
}

// Leaves the k best of `experts` keys in scratch.ordered, best first. `keys` is a row padded with
// kNoKey.
inline void select(const int32_t* keys, int64_t experts, int64_t k, SelectScratch& scratch) {
  const int32_t* survivors = keys;
  const int32_t* ids = nullptr;
  int64_t count = experts;
  while (k <= kMostClasses / 2 && count > kRankedDirectly && count > 2 * k) {
    const int64_t padded = round_up(count, kRowMultiple);
    const int32_t bound = bound_of(survivors, padded, k);
    const int64_t kept = compact(survivors, ids, padded, bound, k, scratch);
    for (int64_t i = kept; i < round_up(kept, kRowMultiple); ++i) scratch.keys[i] = kNoKey;
    const bool shrank = kept <= count - count / 4;
    survivors = scratch.keys;
    ids = scratch.ids;
    count = kept;
    if (count <= kMostRanked || !shrank) break;
  }
  for (int64_t i = 0; i < count; ++i) {
    scratch.pairs[i] = pack(survivors[i], ids == nullptr ? static_cast<int32_t>(i) : ids[i]);
  }
  if (count <= kMostRanked) {
    rank(count, scratch);
    return;
  }
  std::nth_element(scratch.pairs, scratch.pairs + k - 1, scratch.pairs + count, Descending());
  std::sort(scratch.pairs, scratch.pairs + k, Descending());
  std::memcpy(scratch.ordered, scratch.pairs, static_cast<size_t>(k) * sizeof(int64_t));
}

}  // namespace
}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_SELECT_H_
