// The forward for every option and size: one warp a token, the keys of its row in shared memory.

#include <cstdint>

#include "keys_row.cuh"
#include "keys_token.cuh"
#include "route.h"
#include "stats.cuh"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kMostStatsWarps = 8;

template <typename T>
__global__ void __launch_bounds__(8 * kWarpSize, 4)
    route_general_kernel(const __grid_constant__ RouteForward call,
                         const __grid_constant__ RouteOptions options) {
  extern __shared__ int4 shared[];
  const WarpRows rows = warp_rows();
  const KeysLayout layout(call, options);
  KeysRow row(reinterpret_cast<char*>(shared) + rows.warp * layout.bytes(), layout,
              static_cast<int>(call.experts), nullptr);
  for (int64_t token = rows.first; token < call.tokens; token += rows.stride) {
    route_keys<T, GroupSums<SharedSums, true>>(call, options, token, layout, row, nullptr);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMostStatsWarps* kWarpSize, 1)
    route_general_stats_kernel(const __grid_constant__ RouteForward call,
                               const __grid_constant__ RouteOptions options,
                               const __grid_constant__ TokenBlocks blocks) {
  extern __shared__ int4 shared[];
  const KeysLayout layout(call, options);
  const int warps = blockDim.x / kWarpSize;
  const int warp = warp_index();
  float* const scores = reinterpret_cast<float*>(shared);
  char* const rows = reinterpret_cast<char*>(scores + warps * layout.padded);
  int32_t* const counts = reinterpret_cast<int32_t*>(rows + warps * layout.bytes());
  const BlockSums block{scores, counts, warps, layout.padded};
  const TokenRange range = block_range(call, blocks);
  block.clear(call.experts);
  GroupSums<SharedSums, true> sums{{block.scores + warp * layout.padded}};
  KeysRow row(rows + warp * layout.bytes(), layout, static_cast<int>(call.experts), block.counts);
  for (int i = warp; i < range.count; i += warps) {
    route_keys<T>(call, options, range.first + i, layout, row, &sums);
  }
  block.write(call, sums.z, sums.tokens);
}

// The same by blocks of one warp, which add up in global memory.
template <typename T>
__global__ void __launch_bounds__(kWarpSize, 1)
    route_general_long_stats_kernel(const __grid_constant__ RouteForward call,
                                    const __grid_constant__ RouteOptions options,
                                    const __grid_constant__ TokenBlocks blocks) {
  extern __shared__ int4 shared[];
  const KeysLayout layout(call, options);
  const int experts = static_cast<int>(call.experts);
  float* const scores = call.stats.block_sums + blockIdx.x * call.experts;
  int32_t* const counts = call.stats.block_counts + blockIdx.x * call.experts;
  for (int e = threadIdx.x; e < experts; e += kWarpSize) {
    scores[e] = 0.0f;
    counts[e] = 0;
  }
  __syncwarp();
  const TokenRange range = block_range(call, blocks);
  GroupSums<GlobalSums, true> sums{{scores, experts}};
  KeysRow row(reinterpret_cast<char*>(shared), layout, experts, counts);
  for (int i = 0; i < range.count; ++i) {
    route_keys<T>(call, options, range.first + i, layout, row, &sums);
  }
  BlockSums::write_tokens(call, sums.z, sums.tokens);
}

template <typename T>
cudaError_t launch_stats(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream) {
  const TokenBlocks blocks(call);
  const KeysLayout layout(call, options);
  const int row_bytes = static_cast<int>(layout.bytes());
  const auto bytes = [&](int warps) {
    return BlockSums::score_bytes(warps, layout.padded) + BlockSums::count_bytes(call) +
           warps * row_bytes;
  };
  const int room = device_limits().shared_bytes - 1024;
  int warps = kMostStatsWarps;
  while (warps > 0 && bytes(warps) > room) warps /= 2;
  if (warps == 0) {
    return launch_blocks(route_general_long_stats_kernel<T>, blocks.count(call), 1, row_bytes,
                         stream, call, options, blocks);
  }
  return launch_blocks(route_general_stats_kernel<T>, blocks.count(call), warps, bytes(warps),
                       stream, call, options, blocks);
}

}  // namespace

cudaError_t launch_route_general(const RouteForward& call, const RouteOptions& options,
                                 cudaStream_t stream) {
  const int64_t bytes = KeysLayout(call, options).bytes();
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (has_stats(call)) return launch_stats<T>(call, options, stream);
    return launch_rows(route_general_kernel<T>, call.tokens, bytes, {stream, call.overlaps}, call,
                       options);
  });
}

}  // namespace jax_router
