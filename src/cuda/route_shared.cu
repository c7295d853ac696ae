// The forward for rows of a thousand experts and more, k <= 48 and no bias: each warp owns a row of
// shared memory, which a bulk copy fills again as soon as the survivors of the row before are out.

#include <algorithm>
#include <cstdint>

#include "dense.cuh"
#include "route.h"
#include "shared_row.cuh"
#include "stats.cuh"
#include "survivors.cuh"
#include "write.cuh"

namespace jax_router {
namespace {

constexpr int kMostWarps = 32;
constexpr int kMostStatsWarps = 16;
constexpr int kFewestWarps = 4;  // with fewer, loading and choosing hardly overlap
constexpr int kListed = 128;     // survivors at most

struct SharedScratch {
  RankScratch ranks;
  uint32_t list_words[kListed];  // of the survivors, once the row itself may be overwritten
  uint16_t ids[kListed + 2];     // a list has room for one more
  CopyBarrier filled;
};

// The words of slots of a list, 0 past the count.
struct ListedWords {
  const uint32_t* listed;

  template <int kSlots>
  __device__ __forceinline__ void operator()(int first, int count,
                                             uint32_t (&words)[kSlots]) const {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) words[i] = first + i < count ? listed[first + i] : 0;
  }
};

// Sizes of a warp's shared memory: its row, its scratch and its row of a bitmap, in this order.
struct SharedLayout {
  int columns;
  int row_bytes;
  int bitmap_words;

  JAX_ROUTER_HOST_DEVICE SharedLayout(const RouteForward& call, int size)
      : columns(static_cast<int>((call.experts + kPadding - 1) / kPadding * kPadding)),
        row_bytes(columns * size),
        bitmap_words(jax_router::bitmap_words(call)) {}
  JAX_ROUTER_HOST_DEVICE int bytes() const {
    const int bitmap = (bitmap_words + 3) / 4 * 16;
    return row_bytes + static_cast<int>(sizeof(SharedScratch)) + bitmap;
  }
};

// Which tokens a warp takes. Blocks take tokens in turn, so that all of them read from one part of
// memory at a time, and its warps as they come; where there are statistics, whose bits depend on
// it, each has its own.
template <bool kStats>
struct Turns {
  int64_t first;
  int64_t stride;
  int tokens;  // of the block
  int* taken;

  __device__ __forceinline__ int64_t token(int i) const { return first + i * stride; }
  __device__ __forceinline__ int next(int i, int lane) const {
    if constexpr (kStats) return i + blockDim.x / kWarpSize;
    int next = 0;
    if (lane == 0) next = atomicAdd(taken, 1);
    return __shfl_sync(kAllLanes, next, 0);
  }
};

// Routes the tokens whose turn it is, by one warp with its own row. `sums` keeps kMost chunks a
// lane in registers, or any number in shared memory for 0.
template <typename T, int kClasses, Extra kExtra, int kMost, typename Sums>
__device__ __forceinline__ void route_in_turn(const RouteForward& call, const RouteOptions& options,
                                              const Turns<kExtra == Extra::kStats>& turns,
                                              const SharedLayout& layout, char* memory, Sums* sums,
                                              int32_t* counts) {
  constexpr bool kDense = kExtra == Extra::kDense;
  const int lane = threadIdx.x % kWarpSize;
  T* const row = reinterpret_cast<T*>(memory);
  SharedScratch& scratch = *reinterpret_cast<SharedScratch*>(memory + layout.row_bytes);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(&scratch + 1);
  const uint32_t ids = shared_address(scratch.ids);
  const ClassMaxima<kClasses> maxima{shared_address(scratch.ranks.words)};
  const int k = static_cast<int>(options.k);
  const int experts = static_cast<int>(call.experts);
  const int chunks = layout.columns / kPadding;
  for (int e = experts + lane; e < layout.columns; e += kWarpSize) {
    store_value(row + e, -kInfinity);
  }
  if (lane == 0) scratch.filled.init();
  __syncwarp();

  int next = warp_index();
  if (next < turns.tokens) fill_row(call, turns.token(next), row, scratch.filled, lane);
  for (uint32_t phase = 0; next < turns.tokens; phase ^= 1) {
    const int64_t token = turns.token(next);
    const bool real = call.where == nullptr || call.where[token];
    if (call.aligned) scratch.filled.wait(phase);
    __syncwarp();
    const SharedRow<T> shared{row, chunks, lane};
    RowValues<T, false> values{row, nullptr, experts, true, options.score, {0.0f, 1.0f}};
    const Bound bound = shared.bound(k, maxima);
    int32_t bound_key = key_from_float(bound.bound);
    if (options.dense_gradient()) values.softmax = shared.softmax(float_from_key(bound.top_key));
    Survivors<kWarpSize, kListed> survivors{ids, lane, 0};
    const Exponential exponential(float_from_key(bound.top_key));
    LaneTotal total;
    shared.list(bound.bound, survivors, [&](const float (&x)[kChunk]) {
      if constexpr (kExtra == Extra::kStats) {
        if constexpr (Sums::kListed) {
          total.add(x, [&](float y) { return exponential.near_term(y); });
        }
      }
    });
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
    if constexpr (kExtra == Extra::kStats) {
      const auto visit_row = [&](auto visit) { shared.template visit_chunks<kMost>(visit); };
      sums->template add<kWarpSize>(call, options, token, real, visit_row, exponential,
                                    Sums::kListed ? &total : nullptr, lane);
    }
    __syncwarp();
    next = turns.next(next, lane);
    if (next < turns.tokens) fill_row(call, turns.token(next), row, scratch.filled, lane);

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
                               bits,
                               counts};
    const ListedWords words{scratch.list_words};
    finish_token<kExtra>(call, options, context, values, scratch.ranks, words, lane);
    __syncwarp();
    if (kDense && layout.bitmap_words > 0) {
      write_bitmap(call, token, 1, bits, layout.bitmap_words, lane);
      __syncwarp();
    }
  }
}

template <typename T, int kClasses, bool kDense>
__global__ void __launch_bounds__(kMostWarps* kWarpSize, 1)
    route_shared_kernel(const __grid_constant__ RouteForward call,
                        const __grid_constant__ RouteOptions options) {
  extern __shared__ int4 shared_memory[];
  __shared__ int taken;
  const SharedLayout layout(call, sizeof(T));
  if (threadIdx.x == 0) taken = blockDim.x / kWarpSize;
  __syncthreads();
  const int tokens = static_cast<int>((call.tokens - blockIdx.x + gridDim.x - 1) / gridDim.x);
  const Turns<false> turns{blockIdx.x, gridDim.x, tokens, &taken};
  char* const memory = reinterpret_cast<char*>(shared_memory) + warp_index() * layout.bytes();
  route_in_turn<T, kClasses, kDense ? Extra::kDense : Extra::kNone, 0,
                GroupSums<SharedSums, false>>(call, options, turns, layout, memory, nullptr,
                                              nullptr);
}

// Shared memory of a block that gathers statistics: the warps' rows, the counts, and the sums of
// scores. Where these are in registers they take the place of the rows when all are done.
struct StatsLayout {
  int rows;
  int counts;
  int scores;

  JAX_ROUTER_HOST_DEVICE StatsLayout(const RouteForward& call, const SharedLayout& layout,
                                     int warps, bool in_registers)
      : rows(warps * layout.bytes()),
        counts(BlockSums::count_bytes(call)),
        scores(BlockSums::score_bytes(warps, layout.columns)) {
    if (!in_registers) return;
    rows = rows > scores ? rows : scores;
    scores = 0;
  }
  JAX_ROUTER_HOST_DEVICE int bytes() const { return rows + counts + scores; }
};

template <typename T, int kMost, bool kAnyScore>
__global__ void __launch_bounds__(kMostStatsWarps* kWarpSize, 1)
    route_shared_stats_kernel(const __grid_constant__ RouteForward call,
                              const __grid_constant__ RouteOptions options,
                              const __grid_constant__ TokenBlocks blocks) {
  extern __shared__ int4 shared_memory[];
  constexpr bool kInRegisters = kMost > 0;
  char* const memory = reinterpret_cast<char*>(shared_memory);
  const SharedLayout layout(call, sizeof(T));
  const int warps = blockDim.x / kWarpSize;
  const int warp = warp_index();
  const StatsLayout sizes(call, layout, warps, kInRegisters);
  const BlockSums block{
      reinterpret_cast<float*>(memory + (kInRegisters ? 0 : sizes.rows + sizes.counts)),
      reinterpret_cast<int32_t*>(memory + sizes.rows), warps, layout.columns};
  const TokenRange range = block_range(call, blocks);
  const Turns<true> turns{range.first, 1, range.count, nullptr};
  char* const row = memory + warp * layout.bytes();
  float* const scores = block.scores + warp * layout.columns;
  if constexpr (kInRegisters) {
    block.clear_counts(call.experts);
    GroupSums<RegisterSums<kMost>, kAnyScore> sums;
    route_in_turn<T, 2, Extra::kStats, kMost>(call, options, turns, layout, row, &sums,
                                              block.counts);
    __syncthreads();
    sums.scores.store(scores, layout.columns, threadIdx.x % kWarpSize);
    block.write(call, sums.z, sums.tokens);
  } else {
    block.clear(call.experts);
    GroupSums<SharedSums, kAnyScore> sums{{scores}};
    route_in_turn<T, 2, Extra::kStats, kMost>(call, options, turns, layout, row, &sums,
                                              block.counts);
    block.write(call, sums.z, sums.tokens);
  }
}

constexpr int kMostChunks = 18;  // of the sums that a lane keeps in registers

bool sums_in_registers(const RouteForward& call, const RouteOptions& options) {
  return options.score == Score::kSoftmax && call.experts <= kMostChunks * kPadding;
}

// How many warps of a block find room on this device, each with its own row; 0 if none does.
int most_warps(const RouteForward& call, const RouteOptions& options, int size) {
  const SharedLayout layout(call, size);
  const int room = device_limits().shared_bytes - 1024;
  if (!has_stats(call)) return std::min(kMostWarps, room / layout.bytes());
  int warps = kMostStatsWarps;
  while (warps > 0 &&
         StatsLayout(call, layout, warps, sums_in_registers(call, options)).bytes() > room)
    --warps;
  return warps;
}

// Warps of a block for so many tokens: no more than finish them in as many rounds.
int even_warps(const RouteForward& call, const RouteOptions& options, int size, int64_t tokens) {
  const int64_t most = most_warps(call, options, size);
  const int64_t rounds = (tokens + most - 1) / most;
  return static_cast<int>((tokens + rounds - 1) / rounds);
}

template <typename T>
cudaError_t launch_stats(const RouteForward& call, const RouteOptions& options,
                         cudaStream_t stream) {
  const TokenBlocks blocks(call);
  const int warps = even_warps(call, options, sizeof(T), blocks.tokens);
  const StatsLayout sizes(call, SharedLayout(call, sizeof(T)), warps,
                          sums_in_registers(call, options));
  const bool softmax = options.score == Score::kSoftmax;
  const auto kernel = !softmax ? route_shared_stats_kernel<T, 0, true>
                      : sums_in_registers(call, options)
                          ? route_shared_stats_kernel<T, kMostChunks, false>
                          : route_shared_stats_kernel<T, 0, false>;
  return launch_blocks(kernel, blocks.count(call), warps, sizes.bytes(), stream, call, options,
                       blocks);
}

template <typename T, int kClasses>
cudaError_t launch(const RouteForward& call, const RouteOptions& options, cudaStream_t stream) {
  const auto kernel = call.probs == nullptr ? route_shared_kernel<T, kClasses, false>
                                            : route_shared_kernel<T, kClasses, true>;
  const int64_t processors = device_limits().processors;
  const int64_t blocks = call.tokens < processors ? call.tokens : processors;
  const int warps = even_warps(call, options, sizeof(T), (call.tokens + blocks - 1) / blocks);
  const int bytes = warps * SharedLayout(call, sizeof(T)).bytes();
  return launch_blocks(kernel, static_cast<unsigned>(blocks), warps, bytes, {stream, call.overlaps},
                       call, options);
}

template <typename T>
cudaError_t launch_type(const RouteForward& call, const RouteOptions& options,
                        cudaStream_t stream) {
  if (has_stats(call)) return launch_stats<T>(call, options, stream);
  return options.k <= 8 ? launch<T, 1>(call, options, stream) : launch<T, 2>(call, options, stream);
}

}  // namespace

bool route_shared_fits(const RouteForward& call, const RouteOptions& options) {
  return most_warps(call, options, call.logits_type == LogitsType::kFloat32 ? 4 : 2) >=
         kFewestWarps;
}

cudaError_t launch_route_shared(const RouteForward& call, const RouteOptions& options,
                                cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    RouteForward aligned = call;
    aligned.aligned =
        reinterpret_cast<uintptr_t>(call.logits) % 16 == 0 && call.experts * sizeof(T) % 16 == 0;
    return launch_type<T>(aligned, options, stream);
  });
}

}  // namespace jax_router
