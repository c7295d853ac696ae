// The groups of experts that stay, of rows in registers.

#ifndef JAX_ROUTER_CUDA_GROUPS_CUH_
#define JAX_ROUTER_CUDA_GROUPS_CUH_

#include <cstdint>

#include "network.cuh"
#include "options.h"
#include "route.h"
#include "row.cuh"
#include "scalar.h"
#include "shape.cuh"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kMostGroups = 64;

// Shared memory of a group of lanes: the two largest values of each chunk, an odd number of places
// to a group of experts so that their readers hit different banks; then between which limits the
// score of each group lies.
template <typename S>
struct GroupScratch {
  float2 chunks[S::kColumns / kChunk + S::kColumns / kChunk / 2];
  alignas(16) float2 limits[kMostGroups];
};

// Whether keys are more than logits: the kernels with kBiased.
inline bool needs_keys(const RouteForward& call, const RouteOptions& options) {
  return call.bias != nullptr || options.group_count > 0;
}

// Whether rows of these options can be held in registers: groups must be whole chunks, and their
// scores sums of at most two keys.
inline bool groups_in_registers(const RouteForward& call, const RouteOptions& options) {
  if (options.group_count == 0) return true;
  const bool by_key = call.bias != nullptr || options.score == Score::kNone ||
                      (options.score == Score::kSoftmax && options.renormalize) ||
                      options.group_terms() == 1;
  return by_key && options.group_count <= kMostGroups && options.group_terms() <= 2 &&
         call.experts / options.group_count % kChunk == 0;
}

// The call with what the kernels that hold rows in registers need to know besides.
inline RouteForward for_registers(const RouteForward& call, const RouteOptions& options) {
  RouteForward prepared = call;
  prepared.aligned = allows_fours(call) && reinterpret_cast<uintptr_t>(call.bias) % 16 == 0;
  if (options.group_count > 0) {
    const int chunks = static_cast<int>(call.experts / options.group_count / kChunk);
    prepared.group_chunks = chunks;
    prepared.group_inverse = chunks > 0 ? (65536u + chunks - 1) / chunks : 0;
  }
  return prepared;
}

// Largest and second largest of what `a` and `b` are of.
__device__ __forceinline__ float2 merged(float2 a, float2 b) {
  return {larger(a.x, b.x), larger(smaller(a.x, b.x), larger(a.y, b.y))};
}

// How far a key in registers may lie from the exact one: absolute + relative * |key|.
struct Tolerance {
  float absolute;
  float relative;

  __device__ __forceinline__ float of(float magnitude) const {
    return fmaf(relative, smaller(magnitude, kLargest), absolute);
  }
};

// Which lanes of this lane's group, from its first on, say so.
template <int kLanes>
__device__ __forceinline__ unsigned ballot_of_group(bool predicate) {
  const unsigned all = __ballot_sync(kAllLanes, predicate);
  if constexpr (kLanes == kWarpSize) return all;
  return all >> threadIdx.x % kWarpSize / kLanes * kLanes & ((1u << kLanes % kWarpSize) - 1u);
}

// Whether every row has two elements so far above -inf that their sum is, too; `top` is the largest
// of each lane.
template <typename S>
__device__ __forceinline__ bool two_count(float top) {
  return __all_sync(kAllLanes, __popc(ballot_of_group<S::kLanes>(top > -1e38f)) >= 2);
}

// Exact key of the score of a group of experts, in every lane of a group of lanes.
template <typename S, typename Row>
__device__ __forceinline__ int32_t exact_group_key(const Row& row, int group, bool two, int lane) {
  const int size = row.kept.chunks * kChunk;
  float2 best{-kInfinity, -kInfinity};
#pragma unroll 1
  for (int e = group * size + lane; e < (group + 1) * size; e += S::kLanes) {
    best = merged(best, {float_from_key(row.key(e)), -kInfinity});
  }
#pragma unroll
  for (int distance = S::kLanes / 2; distance > 0; distance /= 2) {
    best = merged(best, {__shfl_xor_sync(kAllLanes, best.x, distance),
                         __shfl_xor_sync(kAllLanes, best.y, distance)});
  }
  return key_from_float(two ? add_keys(best.x, best.y) : best.x);
}

// Of the groups `open`, which are too close to call, the `left` best, ties to the lowest. `keys`
// has room for one of each group.
template <typename S, typename Row>
__device__ __noinline__ uint64_t best_of_close(const Row row, uint64_t open, int left, bool two,
                                               int32_t* keys, int lane) {
  for (uint64_t rest = open; __any_sync(kAllLanes, rest != 0); rest &= rest - 1) {
    const int group = rest == 0 ? 0 : __ffsll(static_cast<int64_t>(rest)) - 1;
    const int32_t key = exact_group_key<S>(row, group, two, lane);
    if (rest != 0 && lane == 0) keys[group] = key;
  }
  __syncwarp();
  uint64_t best = 0;
  for (int first = 0; first < kMostGroups; first += S::kLanes) {
    const int group = first + lane;
    bool stays = (open >> group & 1) != 0;
    if (stays) {
      const int32_t mine = keys[group];
      int before = 0;
      for (uint64_t rest = open; rest != 0; rest &= rest - 1) {
        const int other = __ffsll(static_cast<int64_t>(rest)) - 1;
        before += keys[other] > mine || (keys[other] == mine && other < group);
      }
      stays = before < left;
    }
    best |= static_cast<uint64_t>(ballot_of_group<S::kLanes>(stays)) << first;
  }
  return best;
}

// Leaves the values of the best groups and puts -inf in place of the others; everywhere, where
// fewer groups than stay have a score. Returns which stay.
template <typename S, typename T>
__device__ __forceinline__ uint64_t keep_groups(const RouteOptions& options,
                                                const RowValues<T, true>& row, Tolerance tolerance,
                                                float (&x)[S::kChunks][kChunk],
                                                GroupScratch<S>& scratch, int lane) {
  const int count = static_cast<int>(options.group_count);
  const int keep = static_cast<int>(options.group_keep);
  const int chunks = row.kept.chunks;
  const bool two = options.group_terms() == 2;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    const float2 low{larger(x[j][0], x[j][1]), smaller(x[j][0], x[j][1])};
    const float2 high{larger(x[j][2], x[j][3]), smaller(x[j][2], x[j][3])};
    const int chunk = j * S::kLanes + lane;
    const int skipped = chunks % 2 == 0 ? row.kept.group_of(chunk) : 0;
    scratch.chunks[chunk + skipped] = merged(low, high);
  }
  __syncwarp();
  for (int g = lane; g < count + count % 2; g += S::kLanes) {
    float2 best{-kInfinity, -kInfinity};
    if (g < count) {
      const float2* mine = scratch.chunks + g * (chunks | 1);
#pragma unroll 4
      for (int i = 0; i < chunks; ++i) best = merged(best, mine[i]);
    }
    const float second = two ? best.y : 0.0f;
    const float score = larger(two ? add_keys(best.x, second) : best.x, -kInfinity);
    const float error = 2.0f * tolerance.of(fabsf(best.x) + fabsf(second));
    scratch.limits[g] = {score - error, score + error};
  }
  __syncwarp();
  uint64_t mask = 0;
  uint64_t open = 0;
  int above = 0;
  for (int first = 0; first < count; first += S::kLanes) {
    const int g = first + lane;
    const bool inside = g < count;
    const float2 mine = inside ? scratch.limits[g] : make_float2(-kInfinity, -kInfinity);
    int surely_above = 0;
    int perhaps_above = 0;  // or equal, as it is to itself
#pragma unroll 4
    for (int other = 0; other < count; other += 2) {
      const float4 both = *reinterpret_cast<const float4*>(scratch.limits + other);
      surely_above += both.x > mine.y;
      surely_above += both.z > mine.y;
      perhaps_above += both.y >= mine.x;
      perhaps_above += both.w >= mine.x;
    }
    const bool stays = perhaps_above <= keep;
    const auto groups = [&](bool predicate) {
      return static_cast<uint64_t>(ballot_of_group<S::kLanes>(inside && predicate)) << first;
    };
    mask |= groups(stays);
    open |= groups(!stays && surely_above < keep);
    above += __popcll(groups(mine.y > -kInfinity));
  }
  if (above < keep) {
    mask = 0;
    open = 0;
  }
  if (__any_sync(kAllLanes, open != 0)) {
    mask |= best_of_close<S>(row, open, keep - __popcll(mask), two,
                             reinterpret_cast<int32_t*>(scratch.limits), lane);
  }
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    const uint32_t group = row.kept.group_of(j * S::kLanes + lane);
    if (group < kMostGroups && (mask >> group & 1) != 0) continue;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) x[j][c] = -kInfinity;
  }
  return mask;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_GROUPS_CUH_
