// The groups of experts that stay, of rows in registers.

#ifndef JAX_ROUTER_CUDA_GROUPS_CUH_
#define JAX_ROUTER_CUDA_GROUPS_CUH_

#include <cstdint>

#include "network.cuh"
#include "options.h"
#include "row.cuh"
#include "scalar.h"
#include "shape.cuh"
#include "warp.cuh"

namespace jax_router {

inline constexpr int kMostGroups = 64;

// Shared memory of a group of lanes: the two largest values of each chunk, then the keys of the
// groups.
template <typename S>
struct GroupScratch {
  float2 chunks[S::kColumns / kChunk];
  int32_t keys[kMostGroups];
};

// Largest and second largest of what `a` and `b` are of.
__device__ __forceinline__ float2 merged(float2 a, float2 b) {
  return {larger(a.x, b.x), larger(smaller(a.x, b.x), larger(a.y, b.y))};
}

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

// Leaves the values of the best groups and puts -inf in place of the others; everywhere, where
// fewer groups than stay have a score.
template <typename S>
__device__ __forceinline__ KeptGroups keep_groups(const RouteOptions& options, int experts,
                                                  float (&x)[S::kChunks][kChunk],
                                                  GroupScratch<S>& scratch, int lane) {
  const int count = static_cast<int>(options.group_count);
  const int size = experts / count;
  const int chunks = size / kChunk;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    const float2 low{larger(x[j][0], x[j][1]), smaller(x[j][0], x[j][1])};
    const float2 high{larger(x[j][2], x[j][3]), smaller(x[j][2], x[j][3])};
    scratch.chunks[j * S::kLanes + lane] = merged(low, high);
  }
  __syncwarp();
  const bool two = options.group_terms() == 2;
  for (int g = lane; g < count; g += S::kLanes) {
    float2 best{-kInfinity, -kInfinity};
    for (int i = 0; i < chunks; ++i) best = merged(best, scratch.chunks[g * chunks + i]);
    scratch.keys[g] = key_from_float(two ? add_keys(best.x, best.y) : best.x);
  }
  __syncwarp();
  const int rounds = (count + S::kLanes - 1) / S::kLanes;
  uint64_t mask = 0;
  int above = 0;
  for (int i = 0; i < rounds; ++i) {
    const int g = i * S::kLanes + lane;
    const int32_t mine = g < count ? scratch.keys[g] : kNoKey;
    int beaten = 0;
    for (int other = 0; other < count; ++other) {
      const int32_t key = scratch.keys[other];
      beaten += key > mine || (key == mine && other < g);
    }
    const unsigned kept = __ballot_sync(kAllLanes, g < count && beaten < options.group_keep);
    const unsigned scored = __ballot_sync(kAllLanes, mine > kLowestKey);
    const int first = threadIdx.x % kWarpSize / S::kLanes * S::kLanes;
    constexpr unsigned kOwn = S::kLanes == kWarpSize ? kAllLanes : (1u << S::kLanes % 32) - 1u;
    mask |= static_cast<uint64_t>(kept >> first & kOwn) << i * S::kLanes;
    above += __popc(scored >> first & kOwn);
  }
  if (above < options.group_keep) mask = 0;
  // A group's number by a multiplication: exact for so few chunks.
  const uint32_t inverse = (65536u + chunks - 1) / chunks;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
    const uint32_t group = (j * S::kLanes + lane) * inverse >> 16;
    if (group < kMostGroups && (mask >> group & 1) != 0) continue;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) x[j][c] = -kInfinity;
  }
  return {mask, size};
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_GROUPS_CUH_
