// The forward for up to 256 experts and k <= 8: four tokens a warp, eight lanes each.

#include <cstdint>

#include "registers.cuh"
#include "route.h"

namespace jax_router {
namespace {

template <int kChunks>
using LaneShape = Shape<8, kChunks, 4, 32>;

constexpr int kTokens = 4;  // of a warp

template <typename T, typename S, bool kBiased, bool kDense>
__global__ void __launch_bounds__(kRegisterWarps* kWarpSize, kBiased ? 5 : 8)
    route_lanes_kernel(const __grid_constant__ RouteForward call,
                       const __grid_constant__ RouteOptions options) {
  using Scratch = WarpScratch<S, kTokens>;
  __shared__ Scratch scratches[kRegisterWarps];
  extern __shared__ uint32_t bitmaps[];
  const int warp_lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = warp_lane % S::kLanes;
  const int group = warp_lane / S::kLanes;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kRegisterWarps + warp) * kTokens;
  if (first >= call.tokens) return;
  const int tokens = static_cast<int>(min(int64_t{kTokens}, call.tokens - first));
  Scratch& scratch = scratches[warp];
  const int64_t token = first + group;
  const int64_t present = group < tokens ? token : first;
  RowValues<T, kBiased> row = row_values<T, kBiased>(call, options, present);
  RegisterRow<T, S> registers;
  registers.load(row.logits, row.experts, call.aligned, lane);
  const bool real = call.where == nullptr || call.where[present];
  const int words = kDense ? bitmap_words(call) : 0;
  uint32_t* const bits = bitmaps + warp * kTokens * words;
  if constexpr (kDense) {
    clear_bitmap(bits, kTokens * words, warp_lane);
    clear_dense<T>(call, first, tokens, warp_lane);
  }

  const uint32_t lists = shared_address(scratch.ids);
  const uint32_t ids = lists + 2 * Scratch::kStride * group;
  bool fits;
  Candidates found = list_candidates<T, S, kBiased>(options, row, registers, ids, {}, lane, &fits);
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
  const TokenContext context =
      context_of(group < tokens ? token : call.tokens, real, found, ids, bits + group * words);
  rank_group<kDense>(call, options, context, row, scratch.ranks, group, lane);
  if (words > 0) {
    __syncwarp();
    write_bitmap(call, first, tokens, bits, words, warp_lane);
  }
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

template <typename T>
cudaError_t launch_type(const RouteForward& call, const RouteOptions& options,
                        cudaStream_t stream) {
  if (call.experts <= 128) return launch<T, LaneShape<4>>(call, options, stream);
  return launch<T, LaneShape<8>>(call, options, stream);
}

}  // namespace

cudaError_t launch_route_lanes(const RouteForward& call, const RouteOptions& options,
                               cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    return launch_type<std::remove_pointer_t<decltype(type)>>(call, options, stream);
  });
}

}  // namespace jax_router
