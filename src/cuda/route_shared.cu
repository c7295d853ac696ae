// The forward for rows of a thousand experts and more, k <= 48 and no bias: each warp owns a row of
// shared memory, which a bulk copy fills again as soon as the survivors of the row before are out.

#include <cstdint>

#include "bulk.cuh"
#include "dense.cuh"
#include "route.h"
#include "survivors.cuh"
#include "write.cuh"

namespace jax_router {
namespace {

constexpr int kMostWarps = 32;
constexpr int kFewestWarps = 4;  // with fewer, loading and choosing hardly overlap
constexpr int kListed = 128;     // survivors at most
constexpr int kPadding = kChunk * kWarpSize;

// A row in shared memory, read by one warp, and padded with -inf to a multiple of 128.
template <typename T>
struct SharedRow {
  const T* logits;
  int chunks;  // a lane
  int lane;

  __device__ __forceinline__ void load(int j, float (&x)[kChunk]) const {
    Four<T>::load(logits + (j * kWarpSize + lane) * kChunk).unpack(x);
  }

  template <int kClasses>
  __device__ __forceinline__ Bound bound(int k, ClassMaxima<kClasses> maxima) const {
    float classes[kClasses];
#pragma unroll
    for (int i = 0; i < kClasses; ++i) classes[i] = -kInfinity;
#pragma unroll 4
    for (int j = 0; j < chunks; ++j) {
      float x[kChunk];
      load(j, x);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        classes[c % kClasses] = larger(classes[c % kClasses], x[c]);
      }
    }
    return kth_of_classes(classes, k, maxima, lane);
  }

  template <typename List>
  __device__ __forceinline__ void list(float bound, List& survivors) const {
    for (int first = 0; first < chunks; first += kMaskChunks) {
      uint32_t mask = 0;
#pragma unroll
      for (int j = 0; j < kMaskChunks; ++j) {
        if (first + j >= chunks) break;
        float x[kChunk];
        load(first + j, x);
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
          if (x[c] >= bound) mask |= 1u << (kChunk * j + c);
        }
      }
      survivors.append(mask, first * kChunk * kWarpSize);
    }
  }

  // In the order of additions that the CPU has: 128 partial sums, then pairwise.
  __device__ __forceinline__ Softmax softmax(float top) const {
    const float largest = larger(smaller(top, kLargest), -kLargest);
    float sums[kChunk] = {};
    for (int j = 0; j < chunks; ++j) {
      float x[kChunk];
      load(j, x);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        sums[c] = add(sums[c], softmax_term(larger(x[c], -kInfinity), largest));
      }
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) sums[c] = warp_sum(sums[c]);
    const float total = add(add(sums[0], sums[2]), add(sums[1], sums[3]));
    return {largest, total > 0.0f ? total : 1.0f};
  }
};

// Starts to fill a row of shared memory, or fills it where rows are not aligned.
template <typename T>
__device__ __forceinline__ void fill_row(const RouteForward& call, int64_t token, T* row,
                                         CopyBarrier& barrier, int lane) {
  const int experts = static_cast<int>(call.experts);
  const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
  if (kHasBulkCopy && call.aligned) {
    if (lane == 0) barrier.load(row, logits, experts * static_cast<uint32_t>(sizeof(T)));
    return;
  }
  for (int e = lane; e < experts; e += kWarpSize) row[e] = logits[e];
}

struct SharedScratch {
  RankScratch ranks;
  uint32_t list_words[kListed];  // of the survivors, once the row itself may be overwritten
  uint16_t ids[kListed + 2];     // a list has room for one more
  CopyBarrier filled;
};

// Sizes of a warp's shared memory: its row, its scratch and its row of a bitmap, in this order.
struct SharedLayout {
  int row_bytes;
  int bitmap_words;

  JAX_ROUTER_HOST_DEVICE SharedLayout(const RouteForward& call, int size)
      : row_bytes(static_cast<int>((call.experts + kPadding - 1) / kPadding * kPadding * size)),
        bitmap_words(jax_router::bitmap_words(call)) {}
  JAX_ROUTER_HOST_DEVICE int bytes() const {
    const int bitmap = (bitmap_words + 3) / 4 * 16;
    return row_bytes + static_cast<int>(sizeof(SharedScratch)) + bitmap;
  }
};

template <typename T, int kClasses, bool kDense>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 1)
    route_shared_kernel(const __grid_constant__ RouteForward call,
                        const __grid_constant__ RouteOptions options) {
  extern __shared__ int4 shared_memory[];
  __shared__ int taken;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const SharedLayout layout(call, sizeof(T));
  char* const memory = reinterpret_cast<char*>(shared_memory) + warp * layout.bytes();
  T* const row = reinterpret_cast<T*>(memory);
  SharedScratch& scratch = *reinterpret_cast<SharedScratch*>(memory + layout.row_bytes);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(&scratch + 1);
  const uint32_t ids = shared_address(scratch.ids);
  const ClassMaxima<kClasses> maxima{shared_address(scratch.ranks.words)};
  const int k = static_cast<int>(options.k);
  const int experts = static_cast<int>(call.experts);
  const int chunks = (experts + kPadding - 1) / kPadding;
  for (int e = experts + lane; e < chunks * kPadding; e += kWarpSize) {
    store_value(row + e, -kInfinity);
  }
  if (threadIdx.x == 0) taken = blockDim.x / kWarpSize;
  if (lane == 0) scratch.filled.init();
  __syncthreads();

  // Blocks take tokens in turn, so that all of them read from one part of memory at a time.
  const int tokens = static_cast<int>((call.tokens - blockIdx.x + gridDim.x - 1) / gridDim.x);
  const auto token_at = [&](int i) { return blockIdx.x + static_cast<int64_t>(i) * gridDim.x; };
  int next = warp;
  if (next < tokens) fill_row(call, token_at(next), row, scratch.filled, lane);
  for (uint32_t phase = 0; next < tokens; phase ^= 1) {
    const int64_t token = token_at(next);
    const bool real = call.where == nullptr || call.where[token];
    if (call.aligned) scratch.filled.wait(phase);
    __syncwarp();
    const SharedRow<T> shared{row, chunks, lane};
    RowValues<T, false> values{row, nullptr, experts, true, options.score, {0.0f, 1.0f}};
    const Bound bound = shared.bound(k, maxima);
    int32_t bound_key = key_from_float(bound.bound);
    if (options.dense_gradient()) values.softmax = shared.softmax(float_from_key(bound.top_key));
    Survivors<kWarpSize, kListed> survivors{ids, lane, 0};
    shared.list(bound.bound, survivors);
    if (survivors.overflow() || !(bound.bound > -kInfinity)) {
      const Relisted listed =
          relist<kListed>(values, bound_key, bound.top_key, k, maxima, ids, lane);
      survivors.count = listed.count;
      bound_key = listed.bound_key;
    }
    __syncwarp();
    for (int slot = lane; slot < survivors.count; slot += kWarpSize) {
      const int expert = static_cast<int>(load_shared_u16(ids + 2 * slot));
      scratch.list_words[slot] = Words<T, false>::word(values, expert);
    }
    __syncwarp();
    if (lane == 0) next = atomicAdd(&taken, 1);
    next = __shfl_sync(kAllLanes, next, 0);
    if (next < tokens) fill_row(call, token_at(next), row, scratch.filled, lane);

    if constexpr (kDense) {
      // Not earlier, or the zeros would have left the cache by the time they are written over.
      clear_bitmap(bits, layout.bitmap_words, lane);
      clear_dense<T>(call, token, 1, lane);
    }
    const TokenContext context{token,
                               real,
                               survivors.count,
                               unsigned_key(bound_key - 1),
                               unsigned_key(bound.top_key),
                               values.softmax,
                               ids,
                               bits};
    const auto word_at = [&](int slot) { return scratch.list_words[slot]; };
    finish_token<kDense>(call, options, context, values, scratch.ranks, word_at, lane);
    __syncwarp();
    if (kDense && layout.bitmap_words > 0) {
      write_bitmap(call, token, 1, bits, layout.bitmap_words, lane);
      __syncwarp();
    }
  }
}

// How many warps of a block find room on this device, each with its own row; 0 if none does.
int most_warps(const RouteForward& call, int size) {
  const int room = device_limits().shared_bytes - 1024;
  const int warps = room / SharedLayout(call, size).bytes();
  return warps < kMostWarps ? warps : kMostWarps;
}

template <typename T, int kClasses>
cudaError_t launch(const RouteForward& call, const RouteOptions& options, cudaStream_t stream) {
  const auto kernel = call.probs == nullptr ? route_shared_kernel<T, kClasses, false>
                                            : route_shared_kernel<T, kClasses, true>;
  const int64_t processors = device_limits().processors;
  const int64_t blocks = call.tokens < processors ? call.tokens : processors;
  // No more warps than finish the block's tokens in as many rounds.
  const int64_t tokens = (call.tokens + blocks - 1) / blocks;
  const int64_t most = most_warps(call, sizeof(T));
  const int64_t rounds = (tokens + most - 1) / most;
  const int warps = static_cast<int>((tokens + rounds - 1) / rounds);
  const int bytes = warps * SharedLayout(call, sizeof(T)).bytes();
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<static_cast<unsigned>(blocks), warps * kWarpSize, bytes, stream>>>(call, options);
  return cudaGetLastError();
}

}  // namespace

bool route_shared_fits(const RouteForward& call) {
  return most_warps(call, call.logits_type == LogitsType::kFloat32 ? 4 : 2) >= kFewestWarps;
}

cudaError_t launch_route_shared(const RouteForward& call, const RouteOptions& options,
                                cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RouteForward aligned = call;
    aligned.aligned =
        reinterpret_cast<uintptr_t>(call.logits) % 16 == 0 && call.experts * sizeof(T) % 16 == 0;
    if (options.k <= 8) return launch<T, 1>(aligned, options, stream);
    return launch<T, 2>(aligned, options, stream);
  });
}

}  // namespace jax_router
