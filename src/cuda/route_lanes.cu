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

// Routes `tokens` tokens from `first` on. `bits`: the warp's bitmaps; `sums`: of its groups.
template <typename T, typename S, bool kBiased, Extra kExtra>
__device__ __forceinline__ void route_tokens(const RouteForward& call, const RouteOptions& options,
                                             int64_t first, int tokens,
                                             WarpScratch<S, kTokens>& scratch, uint32_t* bits,
                                             GroupSums* sums, int32_t* counts) {
  using Scratch = WarpScratch<S, kTokens>;
  constexpr bool kDense = kExtra == Extra::kDense;
  const int warp_lane = threadIdx.x % kWarpSize;
  const int lane = warp_lane % S::kLanes;
  const int group = warp_lane / S::kLanes;
  const int64_t token = group < tokens ? first + group : call.tokens;
  const int64_t present = group < tokens ? token : first;
  RowValues<T, kBiased> row = row_values<T, kBiased>(call, options, present);
  RegisterRow<T, S> registers;
  registers.load(row.logits, row.experts, call.aligned, lane);
  const bool real = call.where == nullptr || call.where[present];
  const int words = kDense ? bitmap_words(call) : 0;
  if constexpr (kDense) {
    clear_bitmap(bits, kTokens * words, warp_lane);
    clear_dense<T>(call, first, tokens, warp_lane);
  }

  const uint32_t lists = shared_address(scratch.ids);
  const uint32_t ids = lists + 2 * Scratch::kStride * group;
  bool fits;
  Candidates found = list_candidates<T, S, kBiased>(options, row, registers, ids, {}, lane, &fits);
  if constexpr (kExtra == Extra::kStats) {
    add_registers(call, options, registers, token, real && group < tokens, *sums, lane);
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
__global__ void __launch_bounds__(kRegisterWarps* kWarpSize, kBiased ? 5 : (kDense ? 7 : 8))
    route_lanes_kernel(const __grid_constant__ RouteForward call,
                       const __grid_constant__ RouteOptions options) {
  __shared__ WarpScratch<S, kTokens> scratches[kRegisterWarps];
  extern __shared__ uint32_t bitmaps[];
  const int warp = threadIdx.x / kWarpSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kRegisterWarps + warp) * kTokens;
  if (first >= call.tokens) return;
  const int tokens = static_cast<int>(min(int64_t{kTokens}, call.tokens - first));
  uint32_t* const bits = bitmaps + warp * kTokens * (kDense ? bitmap_words(call) : 0);
  route_tokens<T, S, kBiased, kDense ? Extra::kDense : Extra::kNone>(
      call, options, first, tokens, scratches[warp], bits, nullptr, nullptr);
}

template <typename T, typename S, bool kBiased>
__global__ void __launch_bounds__(kStatsWarps* kWarpSize, 1)
    route_lanes_stats_kernel(const __grid_constant__ RouteForward call,
                             const __grid_constant__ RouteOptions options,
                             const __grid_constant__ TokenBlocks blocks) {
  __shared__ WarpScratch<S, kTokens> scratches[kStatsWarps];
  extern __shared__ float4 sums_memory[];
  const BlockSums block(sums_memory, kStatsWarps * kTokens, S::kColumns);
  const int warp = threadIdx.x / kWarpSize;
  const int group = threadIdx.x / S::kLanes;
  const TokenRange range = block_range(call, blocks);
  block.clear(call.experts);
  GroupSums sums{block.scores + group * S::kColumns};
  for (int i = warp * kTokens; i < range.count; i += kStatsWarps * kTokens) {
    route_tokens<T, S, kBiased, Extra::kStats>(call, options, range.first + i,
                                               min(kTokens, range.count - i), scratches[warp],
                                               nullptr, &sums, block.counts);
    __syncwarp();
  }
  block.write(call, sums);
}

template <typename T, typename S>
cudaError_t launch(const RouteForward& call, const RouteOptions& options, cudaStream_t stream) {
  constexpr int64_t kBlockTokens = int64_t{kRegisterWarps} * kTokens;
  const unsigned blocks = static_cast<unsigned>((call.tokens + kBlockTokens - 1) / kBlockTokens);
  const size_t bytes = sizeof(uint32_t) * kBlockTokens * bitmap_words(call);
  const auto kernel = with_bool(call.bias != nullptr, [&](auto biased) {
    return call.probs == nullptr ? route_lanes_kernel<T, S, biased.value, false>
                                 : route_lanes_kernel<T, S, biased.value, true>;
  });
  kernel<<<blocks, kRegisterWarps * kWarpSize, bytes, stream>>>(call, options);
  return cudaGetLastError();
}

template <typename T, typename S>
cudaError_t launch_lanes_stats(const RouteForward& call, const RouteOptions& options,
                               cudaStream_t stream) {
  const TokenBlocks blocks(call);
  const auto kernel = with_bool(call.bias != nullptr, [&](auto biased) {
    return route_lanes_stats_kernel<T, S, biased.value>;
  });
  const int bytes = BlockSums::bytes(kStatsWarps * kTokens, S::kColumns, call.experts);
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
