// `route_and_plan_blocks` in one launch: a cluster of blocks of threads routes the tokens of a
// batch row, waits for itself, and writes the plan of their choice. Where there are no clusters, or
// a row is too long, the kernels of `route` and `blocks` follow each other.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "blocks.cuh"
#include "blocks.h"
#include "keys_token.cuh"
#include "registers_token.cuh"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kClusterBlocks = 8;  // the most that every device with clusters has
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int64_t kMostTokens = 4 * kClusterBlocks * kWarps;  // beyond, two kernels are faster
constexpr int64_t kMostEntries = 2048;                        // of one chunk
constexpr int64_t kMostInRegisters = 512;
constexpr int64_t kMostListed = 48;
constexpr int64_t kBytesOfThread = 64;  // of zeros
constexpr int kReservedBytes = 2048;    // of shared memory, for what is not dynamic

// Few experts a token have few survivors to rank.
using FewShape = Shape<32, 4, 1, 32>;
using ManyShape = SingleShape<4>;

template <typename S>
struct RegisterScratch {
  WarpScratch<S, 1> token;
  GroupScratch<S> groups;  // where there are any
};

// How a token is routed: with its row in registers, there with a bias, or by keys.
enum class Rows { kRegisters, kBiased, kKeys };

Rows rows_of(const RouteForward& call, const RouteOptions& options) {
  const bool listed = call.given == nullptr && options.k <= kMostListed &&
                      call.experts <= kMostInRegisters && groups_in_registers(call, options);
  if (!listed) return Rows::kKeys;
  return needs_keys(call, options) ? Rows::kBiased : Rows::kRegisters;
}

int64_t shared_bytes(const RouteForward& call, const RouteOptions& options) {
  const int64_t row = rows_of(call, options) == Rows::kKeys
                          ? KeysLayout(call, options).bytes()
                          : static_cast<int64_t>(sizeof(RegisterScratch<ManyShape>));
  return std::max(table_bytes(call.experts, kWarps), kWarps * row);
}

// Whether one kernel takes so many tokens of a batch row.
bool fits(const RouteForward& call, const RouteOptions& options, int64_t tokens,
          const DeviceLimits& limits) {
  return limits.has_clusters && tokens <= kMostTokens && tokens * options.k <= kMostEntries &&
         shared_bytes(call, options) <= limits.shared_bytes - kReservedBytes;
}

__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
#endif
}

// By the blocks of threads past those that route.
__device__ __forceinline__ void clear(void* zeros, int64_t bytes, int64_t thread, int64_t threads) {
  const int64_t words = reinterpret_cast<uintptr_t>(zeros) % 16 == 0 ? bytes / 16 : 0;
  for (int64_t i = thread; i < words; i += threads) {
    static_cast<int4*>(zeros)[i] = make_int4(0, 0, 0, 0);
  }
  for (int64_t i = 16 * words + thread; i < bytes; i += threads) {
    static_cast<char*>(zeros)[i] = 0;
  }
}

template <typename T, Rows kRows, typename S>
__global__ void __launch_bounds__(kThreads, 1)
    route_and_plan_blocks_kernel(const __grid_constant__ RouteAndPlanBlocks call,
                                 const __grid_constant__ RouteOptions options) {
  extern __shared__ int4 shared[];
  const int64_t row = blockIdx.x / kClusterBlocks;
  if (row >= call.blocks.batch) {
    const int64_t first = call.blocks.batch * kClusterBlocks;
    clear(call.zeros, call.zeros_bytes, (blockIdx.x - first) * kThreads + threadIdx.x,
          (gridDim.x - first) * kThreads);
    return;
  }
  const int part = blockIdx.x % kClusterBlocks;
  const int warp = warp_index();
  const RouteForward& route = call.route;
  const int tokens = static_cast<int>(call.blocks.tokens);
  // Neighbours go to different blocks of threads, so that few tokens have a processor each.
  for (int i = warp * kClusterBlocks + part; i < tokens; i += kWarps * kClusterBlocks) {
    const int64_t token = row * tokens + i;
    if constexpr (kRows == Rows::kKeys) {
      const KeysLayout layout(route, options);
      KeysRow keys(reinterpret_cast<char*>(shared) + warp * layout.bytes(), layout,
                   static_cast<int>(route.experts), nullptr);
      route_keys<T, GroupSums<SharedSums, true>>(route, options, token, layout, keys, nullptr);
    } else {
      constexpr bool kBiased = kRows == Rows::kBiased;
      RegisterRow<T, S> registers;
      registers.load(row_values<T, kBiased>(route, options, token).logits,
                     static_cast<int>(route.experts), route.aligned, threadIdx.x % kWarpSize);
      RegisterScratch<S>& scratch = reinterpret_cast<RegisterScratch<S>*>(shared)[warp];
      route_token<T, S, kBiased, Extra::kNone, void>(route, options, token, route.tokens, registers,
                                                     scratch.token, &scratch.groups, nullptr,
                                                     nullptr, nullptr);
      __syncwarp();
    }
  }
  wait_for_cluster();
  write_blocks<kWarps>(call.blocks, row, part, kClusterBlocks,
                       static_cast<int>(call.blocks.entries()), kWarps,
                       reinterpret_cast<int32_t*>(shared));
}

template <typename T, Rows kRows, typename S>
cudaError_t launch(const RouteAndPlanBlocks& call, const RouteOptions& options,
                   const DeviceLimits& limits, cudaStream_t stream) {
  const auto kernel = route_and_plan_blocks_kernel<T, kRows, S>;
  const int bytes = static_cast<int>(shared_bytes(call.route, options));
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int64_t wanted = (static_cast<int64_t>(call.zeros_bytes) + kThreads * kBytesOfThread - 1) /
                         (kThreads * kBytesOfThread);
  const int64_t zero_blocks = std::min<int64_t>(wanted, 2 * limits.processors);
  const int64_t clusters = call.blocks.batch + (zero_blocks + kClusterBlocks - 1) / kClusterBlocks;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kClusterBlocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  status = cudaLaunchKernelEx(&config, kernel, call, options);
  return status == cudaSuccess ? cudaGetLastError() : status;
}

cudaError_t launch_chain(const RouteAndPlanBlocks& call, const RouteOptions& options,
                         cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (call.zeros_bytes > 0) status = cudaMemsetAsync(call.zeros, 0, call.zeros_bytes, stream);
  if (status == cudaSuccess) status = launch_route(call.route, options, stream);
  return status == cudaSuccess ? launch_blocks_plan(call.blocks, stream) : status;
}

}  // namespace

cudaError_t launch_route_and_plan_blocks(const RouteAndPlanBlocks& call,
                                         const RouteOptions& options, cudaStream_t stream) {
  const DeviceLimits limits = device_limits();
  if (call.blocks.batch == 0 || call.blocks.chunks > 1 ||
      !fits(call.route, options, call.blocks.tokens, limits)) {
    return launch_chain(call, options, stream);
  }
  RouteAndPlanBlocks checked = call;
  checked.route = for_registers(call.route, options);
  return with_type(call.route.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool few = options.k <= 8;
    switch (rows_of(call.route, options)) {
      case Rows::kRegisters:
        return few ? launch<T, Rows::kRegisters, FewShape>(checked, options, limits, stream)
                   : launch<T, Rows::kRegisters, ManyShape>(checked, options, limits, stream);
      case Rows::kBiased:
        return few ? launch<T, Rows::kBiased, FewShape>(checked, options, limits, stream)
                   : launch<T, Rows::kBiased, ManyShape>(checked, options, limits, stream);
      default:
        return launch<T, Rows::kKeys, void>(checked, options, limits, stream);
    }
  });
}

int64_t most_fused_tokens(int64_t experts, const RouteOptions& options, int device) {
  RouteForward call{};
  call.experts = experts;
  const int64_t most = std::min(kMostTokens, kMostEntries / options.k);
  return fits(call, options, most, limits_of(device)) ? most : 0;
}

}  // namespace jax_router
