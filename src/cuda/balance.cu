// `quantile_histogram` in CUDA. A block counts a tile of experts over a part of the tokens, in
// shared memory where the bins fit, and adds its bins to the result. Atomics add integers only: no
// order of additions changes the counts.

#include <cstdint>
#include <type_traits>

#include "balance.h"
#include "route.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int kThreads = 256;
constexpr int kMostTileShift = 3;          // eight float32 logits are a sector of memory
constexpr int kUnroll = 4;                 // tokens that a thread reads before it counts them
constexpr int64_t kTileBytes = 64 * 1024;  // bins of a tile, so that several blocks share an SM
constexpr int64_t kFewestPartTokens = 256;
constexpr int64_t kBlocksPerProcessor = 5;

struct Split {
  int tile_shift;  // 2**tile_shift experts a tile
  int64_t tiles;
  int64_t parts;
  int64_t part_tokens;
};

// Counts one expert (`logits`, `counts` start at it) over tokens first, first + step ... of [0,
// end).
template <typename T>
__device__ __forceinline__ void count_tokens(const QuantileHistogram& call, const Bins& bins,
                                             const T* logits, const float* cutoff,
                                             const bool* where, int64_t first, int64_t end,
                                             int step, int32_t* counts) {
  for (int64_t t = first; t < end; t += static_cast<int64_t>(step) * kUnroll) {
    float x[kUnroll];
    float limit[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t token = t + static_cast<int64_t>(u) * step;
      x[u] = 0.0f;
      limit[u] = -kInfinity;
      if (token < end) {
        x[u] = __int_as_float(load_bits(logits + token * call.experts));
        if (where == nullptr || where[token]) limit[u] = __ldg(cutoff + token);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (limit[u] == -kInfinity) continue;
      // NaN counts as -inf.
      const float y = elementwise_score(x[u] == x[u] ? x[u] : -kInfinity, call.score);
      atomicAdd(counts + find_bin(bins, limit[u], y), 1);
    }
  }
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kThreads)
    quantile_histogram_kernel(const QuantileHistogram call, const Split split) {
  extern __shared__ int32_t shared_counts[];
  const int tile = 1 << split.tile_shift;
  const int column = threadIdx.x & (tile - 1);
  const int row = threadIdx.x >> split.tile_shift;
  const int step = blockDim.x >> split.tile_shift;
  const int64_t blocks = call.batch * split.tiles * split.parts;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    // Neighbouring blocks take neighbouring tiles: together they read whole rows.
    const int64_t first = block % split.tiles << split.tile_shift;
    const int64_t part = block / split.tiles % split.parts;
    const int64_t batch = block / split.tiles / split.parts;
    const int64_t left = call.experts - first;
    const int experts = left < tile ? static_cast<int>(left) : tile;
    int32_t* counts = call.counts + (batch * call.experts + first) * call.bins;
    const int size = kShared ? experts * static_cast<int>(call.bins) : 0;
    if constexpr (kShared) {
      for (int i = threadIdx.x; i < size; i += kThreads) shared_counts[i] = 0;
      __syncthreads();
    }
    const Bins bins = make_bins(call.bounds + 2 * batch, call.bins);
    if (bins.valid && column < experts) {
      const int64_t offset = batch * call.tokens;
      const T* logits = static_cast<const T*>(call.logits) + offset * call.experts + first + column;
      const bool* where = call.where == nullptr ? nullptr : call.where + offset;
      const int64_t begin = part * split.part_tokens;
      const int64_t limit = begin + split.part_tokens;
      const int64_t end = limit < call.tokens ? limit : call.tokens;
      int32_t* own = (kShared ? shared_counts : counts) + column * call.bins;
      count_tokens(call, bins, logits, call.cutoff + offset, where, begin + row, end, step, own);
    }
    if constexpr (kShared) {
      __syncthreads();
      // The next round clears what the same thread has read here, so it need not wait.
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int32_t value = shared_counts[i];
        if (split.parts == 1) {
          counts[i] = value;
        } else if (value != 0) {
          atomicAdd(counts + i, value);
        }
      }
    }
  }
}

Split split_work(const QuantileHistogram& call, int processors) {
  Split split;
  split.tile_shift = kMostTileShift;
  const int64_t row_bytes = call.bins * static_cast<int64_t>(sizeof(int32_t));
  while (split.tile_shift > 0 && (row_bytes << split.tile_shift) > kTileBytes) --split.tile_shift;
  split.tiles = (call.experts + (int64_t{1} << split.tile_shift) - 1) >> split.tile_shift;
  const int64_t wanted = kBlocksPerProcessor * processors / (call.batch * split.tiles);
  // A part goes over all its bins twice: that must cost less than its tokens.
  const int64_t bins_tokens = call.bins / 4;
  const int64_t fewest = bins_tokens > kFewestPartTokens ? bins_tokens : kFewestPartTokens;
  const int64_t possible = call.tokens / fewest;
  split.parts = wanted < possible ? wanted : possible;
  if (split.parts < 1) split.parts = 1;
  split.part_tokens = (call.tokens + split.parts - 1) / split.parts;
  return split;
}

template <typename T, bool kShared>
cudaError_t launch(const QuantileHistogram& call, const Split& split, int64_t shared_bytes,
                   int processors, cudaStream_t stream) {
  const auto kernel = quantile_histogram_kernel<T, kShared>;
  if (shared_bytes > kSharedBytesPerBlock) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  const int64_t wanted = call.batch * split.tiles * split.parts;
  const int64_t most = 2 * kBlocksPerProcessor * processors;
  const unsigned blocks = static_cast<unsigned>(wanted < most ? wanted : most);
  kernel<<<blocks, kThreads, static_cast<size_t>(shared_bytes), stream>>>(call, split);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_quantile_histogram(const QuantileHistogram& call, cudaStream_t stream) {
  const int64_t size = call.batch * call.experts * call.bins;
  if (size == 0) return cudaSuccess;
  const DeviceLimits limits = device_limits();
  const Split split = split_work(call, limits.processors);
  const int64_t shared_bytes = (call.bins * static_cast<int64_t>(sizeof(int32_t)))
                               << split.tile_shift;
  const bool shared = shared_bytes <= limits.shared_bytes;
  if (!shared || split.parts > 1) {
    const cudaError_t status =
        cudaMemsetAsync(call.counts, 0, static_cast<size_t>(size) * sizeof(int32_t), stream);
    if (status != cudaSuccess) return status;
  }
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (shared) return launch<T, true>(call, split, shared_bytes, limits.processors, stream);
    return launch<T, false>(call, split, 0, limits.processors, stream);
  });
}

}  // namespace jax_router
