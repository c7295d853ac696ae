// The forward for up to 256 experts and k <= 8: four tokens a warp, eight lanes each.

#include <cstdint>

#include "registers.cuh"
#include "route.h"

namespace jax_router {
namespace {

template <int kChunks>
using LaneShape = Shape<8, kChunks, 4, 32>;

constexpr int kTokens = 4;       // of a warp
constexpr int kStatsWarps = 16;  // of a block that gathers statistics

// Loads the rows of `tokens` tokens from `first` on.
template <typename T, typename S>
__device__ __forceinline__ void load_rows(const RouteForward& call, int64_t first, int tokens,
                                          RegisterRow<T, S>& registers) {
  const int lane = threadIdx.x % kWarpSize;
  const int group = lane / S::kLanes;
  const int64_t token = first + (group < tokens ? group : 0);
  registers.load(static_cast<const T*>(call.logits) + token * call.experts,
                 static_cast<int>(call.experts), call.aligned, lane % S::kLanes);
}

// Routes these tokens, whose rows are in `registers`. `groups`: the warp's, where kBiased; `bits`:
// its bitmaps; `sums`: of its groups of lanes.
template <typename T, typename S, bool kBiased, Extra kExtra, typename Sums>
__device__ __forceinline__ void route_tokens(const RouteForward& call, const RouteOptions& options,
                                             int64_t first, int tokens,
                                             const RegisterRow<T, S>& registers,
                                             WarpScratch<S, kTokens>& scratch,
                                             GroupScratch<S>* groups, uint32_t* bits, Sums* sums,
                                             int32_t* counts) {
  using Scratch = WarpScratch<S, kTokens>;
  constexpr bool kDense = kExtra == Extra::kDense;
  constexpr int kAtOnce = kExtra == Extra::kStats ? 2 : S::kChunks;  // statistics need registers
  const int warp_lane = threadIdx.x % kWarpSize;
  const int lane = warp_lane % S::kLanes;
  const int group = warp_lane / S::kLanes;
  const int64_t token = group < tokens ? first + group : call.tokens;
  const int64_t present = group < tokens ? token : first;
  RowValues<T, kBiased> row = row_values<T, kBiased>(call, options, present);
  const bool real = call.where == nullptr || call.where[present];
  const int words = kDense ? bitmap_words(call) : 0;
  if constexpr (kDense) {
    clear_bitmap(bits, kTokens * words, warp_lane);
    clear_dense<T>(call, first, tokens, warp_lane);
  }

  const uint32_t lists = shared_address(scratch.ids);
  const uint32_t ids = lists + 2 * Scratch::kStride * group;
  bool fits;
  Candidates found = list_candidates<T, S, kBiased, kAtOnce>(
      options, row, registers, ids, kBiased ? groups + group : nullptr, {}, lane, &fits);
  if constexpr (kExtra == Extra::kStats) {
    add_registers<T, S, kBiased>(call, options, registers, found, token, real, *sums, lane);
  }
  __syncwarp();
  if (!__all_sync(kAllLanes, fits)) {
    for (int g = 0; g < kTokens; ++g) {
      const int source = g * S::kLanes;
      if (__shfl_sync(kAllLanes, fits, source)) continue;
      RowValues<T, kBiased> other =
          row_values<T, kBiased>(call, options, g < tokens ? first + g : first);
      other.softmax.largest = __shfl_sync(kAllLanes, row.softmax.largest, source);
      other.softmax.total = __shfl_sync(kAllLanes, row.softmax.total, source);
      if constexpr (kBiased) {
        other.kept.mask = __shfl_sync(kAllLanes, row.kept.mask, source);
      }
      const int32_t bound_key = __shfl_sync(kAllLanes, found.bound_key, source);
      const int32_t top_key = __shfl_sync(kAllLanes, found.top_key, source);
      const Relisted listed =
          relist<S::kListed>(other, bound_key, top_key, static_cast<int>(options.k),
                             ClassMaxima<0>{}, lists + 2 * Scratch::kStride * g, warp_lane);
      if (g == group) found.replace(listed);
    }
    __syncwarp();
  }
  const TokenContext context = context_of(token, real, found, ids, bits + group * words, counts);
  rank_group<kExtra>(call, options, context, row, scratch.ranks, group, lane);
  if (words > 0) {
    __syncwarp();
    write_bitmap(call, first, tokens, bits, words, warp_lane);
  }
}

template <typename T, typename S, bool kBiased, bool kDense>
__global__ void __launch_bounds__(kRegisterWarps* kWarpSize, kBiased ? 4 : (kDense ? 7 : 8))
    route_lanes_kernel(const __grid_constant__ RouteForward call,
                       const __grid_constant__ RouteOptions options) {
  __shared__ WarpScratch<S, kTokens> scratches[kRegisterWarps];
  __shared__ GroupScratch<S> groups[kBiased ? kRegisterWarps * kTokens : 1];
  extern __shared__ uint32_t bitmaps[];
  const int warp = warp_index();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kRegisterWarps + warp) * kTokens;
  if (first >= call.tokens) return;
  const int tokens = static_cast<int>(min(int64_t{kTokens}, call.tokens - first));
  uint32_t* const bits = bitmaps + warp * kTokens * (kDense ? bitmap_words(call) : 0);
  RegisterRow<T, S> registers;
  load_rows(call, first, tokens, registers);
  route_tokens<T, S, kBiased, kDense ? Extra::kDense : Extra::kNone, void>(
      call, options, first, tokens, registers, scratches[warp],
      groups + (kBiased ? warp * kTokens : 0), bits, nullptr, nullptr);
}

template <typename T, typename S, bool kBiased, bool kAnyScore>
__global__ void __launch_bounds__(kStatsWarps* kWarpSize, 1)
    route_lanes_stats_kernel(const __grid_constant__ RouteForward call,
                             const __grid_constant__ RouteOptions options,
                             const __grid_constant__ TokenBlocks blocks) {
  __shared__ WarpScratch<S, kTokens> scratches[kStatsWarps];
  extern __shared__ float4 sums_memory[];
  constexpr int kGroups = kStatsWarps * kTokens;
  float* const scores = reinterpret_cast<float*>(sums_memory);
  const BlockSums block{scores, reinterpret_cast<int32_t*>(scores + kGroups * S::kColumns), kGroups,
                        S::kColumns};
  GroupScratch<S>* const groups = reinterpret_cast<GroupScratch<S>*>(
      reinterpret_cast<char*>(block.counts) + BlockSums::count_bytes(call));
  const int warp = warp_index();
  const int group = threadIdx.x / S::kLanes;
  const TokenRange range = block_range(call, blocks);
  const auto tokens_at = [&](int i) { return min(kTokens, range.count - i); };
  RegisterRow<T, S> registers;
  int i = warp * kTokens;
  if (i < range.count) load_rows(call, range.first + i, tokens_at(i), registers);
  block.clear(call.experts);
  GroupSums<SharedSums, kAnyScore> sums{{block.scores + group * S::kColumns}};
  while (i < range.count) {
    route_tokens<T, S, kBiased, Extra::kStats>(call, options, range.first + i, tokens_at(i),
                                               registers, scratches[warp], groups + warp * kTokens,
                                               nullptr, &sums, block.counts);
    __syncwarp();
    i += kStatsWarps * kTokens;
    if (i < range.count) load_rows(call, range.first + i, tokens_at(i), registers);
  }
  block.write(call, sums.z, sums.tokens);
}

template <typename T, typename S>
cudaError_t launch(const RouteForward& call, const RouteOptions& options, cudaStream_t stream) {
  constexpr int64_t kBlockTokens = int64_t{kRegisterWarps} * kTokens;
  const unsigned blocks = static_cast<unsigned>((call.tokens + kBlockTokens - 1) / kBlockTokens);
  const int64_t bytes = sizeof(uint32_t) * kBlockTokens * bitmap_words(call);
  const auto kernel = with_bool(needs_keys(call, options), [&](auto biased) {
    return call.probs == nullptr ? route_lanes_kernel<T, S, biased.value, false>
                                 : route_lanes_kernel<T, S, biased.value, true>;
  });
  return launch_kernel(kernel, blocks, kRegisterWarps * kWarpSize, bytes, {stream, call.overlaps},
                       call, options);
}

template <typename T, typename S>
cudaError_t launch_lanes_stats(const RouteForward& call, const RouteOptions& options,
                               cudaStream_t stream) {
  const TokenBlocks blocks(call);
  const auto kernel = needs_keys(call, options) ? route_lanes_stats_kernel<T, S, true, true>
                      : options.score == Score::kSoftmax
                          ? route_lanes_stats_kernel<T, S, false, false>
                          : route_lanes_stats_kernel<T, S, false, true>;
  const int group_bytes = needs_keys(call, options)
                              ? kStatsWarps * kTokens * static_cast<int>(sizeof(GroupScratch<S>))
                              : 0;
  const int bytes = BlockSums::score_bytes(kStatsWarps * kTokens, S::kColumns) +
                    BlockSums::count_bytes(call) + group_bytes;
  return launch_blocks(kernel, blocks.count(call), kStatsWarps, bytes, stream, call, options,
                       blocks);
}

template <typename T>
cudaError_t launch_type(const RouteForward& call, const RouteOptions& options,
                        cudaStream_t stream) {
  if (call.experts <= 128) return launch<T, LaneShape<4>>(call, options, stream);
  return launch<T, LaneShape<8>>(call, options, stream);
}

template <typename T>
cudaError_t launch_stats_type(const RouteForward& call, const RouteOptions& options,
                              cudaStream_t stream) {
  if (call.experts <= 128) return launch_lanes_stats<T, LaneShape<4>>(call, options, stream);
  return launch_lanes_stats<T, LaneShape<8>>(call, options, stream);
}

}  // namespace

cudaError_t launch_route_lanes(const RouteForward& call, const RouteOptions& options,
                               cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return has_stats(call) ? launch_stats_type<T>(call, options, stream)
                           : launch_type<T>(call, options, stream);
  });
}

}  // namespace jax_router
