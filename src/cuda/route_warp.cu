// The forward for up to 1024 experts where a token has a warp to itself.

#include <cstdint>
#include <type_traits>

#include "registers.cuh"
#include "registers_token.cuh"
#include "route.h"

namespace jax_router {
namespace {

// With k <= 8 and no bias a warp lists the survivors of a few rows one after the other, the next
// row being loaded meanwhile, and ranks and writes them together, eight lanes each.
template <int kChunks>
using JointShape = Shape<32, kChunks, 1, 32>;

constexpr int kMostRows = 4;

// Warps of a block that gathers statistics: as many as find room with their registers.
template <typename S, bool kBiased, bool kAnyScore>
inline constexpr int kStatsWarps = kBiased || kAnyScore || S::kChunks > 4 ? 16 : 32;

constexpr int64_t kManyTokens = 8192;  // so many that every warp can take kMostRows of them

template <typename T, typename S, bool kDense>
__global__ void __launch_bounds__(kRegisterWarps* kWarpSize, S::kChunks > 4 ? 4 : 5)
    route_joint_kernel(const __grid_constant__ RouteForward call,
                       const __grid_constant__ RouteOptions options, int rows) {
  using Scratch = WarpScratch<S, kMostRows>;
  __shared__ Scratch scratches[kRegisterWarps];
  extern __shared__ uint32_t bitmaps[];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_index();
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kRegisterWarps + warp) * rows;
  if (first >= call.tokens) return;
  const int tokens = static_cast<int>(min(int64_t{rows}, call.tokens - first));
  Scratch& scratch = scratches[warp];
  const uint32_t lists = shared_address(scratch.ids);
  const ClassMaxima<S::kMaxima> maxima{shared_address(scratch.ranks.words)};
  RowValues<T, false> row = row_values<T, false>(call, options, first);
  RegisterRow<T, S> next;
  next.load(row.logits, row.experts, call.aligned, lane);
  const int words = kDense ? bitmap_words(call) : 0;
  uint32_t* const bits = bitmaps + warp * kMostRows * words;
  if constexpr (kDense) {
    clear_bitmap(bits, tokens * words, lane);
    clear_dense<T>(call, first, tokens, lane);
  }

  const int group = lane / 8;
  Candidates mine{0, 0, 0, {0.0f, 1.0f}};
  for (int r = 0; r < tokens; ++r) {
    const RegisterRow<T, S> registers = next;
    row = row_values<T, false>(call, options, first + r);
    if (r + 1 < tokens) next.load(row.logits + call.experts, row.experts, call.aligned, lane);
    const uint32_t ids = lists + 2 * Scratch::kStride * r;
    bool fits;
    Candidates found = list_candidates<T, S, false, S::kChunks>(options, row, registers, ids,
                                                                nullptr, maxima, lane, &fits);
    __syncwarp();
    if (!fits) {
      found.replace(relist<S::kListed>(row, found.bound_key, found.top_key,
                                       static_cast<int>(options.k), maxima, ids, lane));
      __syncwarp();
    }
    if (group == r) mine = found;
  }
  const int64_t token = group < tokens ? first + group : call.tokens;
  const int64_t present = group < tokens ? token : first;
  row = row_values<T, false>(call, options, present);
  row.softmax = mine.softmax;
  const bool real = call.where == nullptr || call.where[present];
  const TokenContext context =
      context_of(token, real, mine, lists + 2 * Scratch::kStride * group, bits + group * words);
  rank_group<kDense ? Extra::kDense : Extra::kNone>(call, options, context, row, scratch.ranks,
                                                    group, lane % 8);
  if (words > 0) {
    __syncwarp();
    write_bitmap(call, first, tokens, bits, words, lane);
  }
}

template <typename T, typename S, bool kBiased, bool kDense>
__global__ void __launch_bounds__(kRegisterWarps* kWarpSize,
                                  kBiased ? (kDense && S::kChunks > 4 ? 4 : 5) : (kDense ? 7 : 8))
    route_single_kernel(const __grid_constant__ RouteForward call,
                        const __grid_constant__ RouteOptions options) {
  __shared__ WarpScratch<S, 1> scratches[kRegisterWarps];
  __shared__ GroupScratch<S> groups[kBiased ? kRegisterWarps : 1];
  extern __shared__ uint32_t bitmaps[];
  const int warp = warp_index();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kRegisterWarps + warp;
  if (token >= call.tokens) return;
  uint32_t* const bits = bitmaps + warp * (kDense ? bitmap_words(call) : 0);
  RegisterRow<T, S> registers;
  registers.load(row_values<T, kBiased>(call, options, token).logits,
                 static_cast<int>(call.experts), call.aligned, threadIdx.x % kWarpSize);
  route_token<T, S, kBiased, kDense ? Extra::kDense : Extra::kNone, void>(
      call, options, token, call.tokens, registers, scratches[warp], groups + (kBiased ? warp : 0),
      bits, nullptr, nullptr);
}

template <typename T, typename S, bool kBiased, bool kAnyScore>
__global__ void __launch_bounds__(kStatsWarps<S, kBiased, kAnyScore>* kWarpSize, 1)
    route_single_stats_kernel(const __grid_constant__ RouteForward call,
                              const __grid_constant__ RouteOptions options,
                              const __grid_constant__ TokenBlocks blocks) {
  constexpr int kWarps = kStatsWarps<S, kBiased, kAnyScore>;
  __shared__ WarpScratch<S, 1> scratches[kWarps];
  extern __shared__ float4 sums_memory[];
  float* const scores = reinterpret_cast<float*>(sums_memory);
  const BlockSums block{scores, reinterpret_cast<int32_t*>(scores + kWarps * S::kColumns), kWarps,
                        S::kColumns};
  GroupScratch<S>* const groups = reinterpret_cast<GroupScratch<S>*>(
      reinterpret_cast<char*>(block.counts) + BlockSums::count_bytes(call));
  const int warp = warp_index();
  const TokenRange range = block_range(call, blocks);
  const auto load = [&](int i, RegisterRow<T, S>& registers) {
    registers.load(row_values<T, kBiased>(call, options, range.first + i).logits,
                   static_cast<int>(call.experts), call.aligned, threadIdx.x % kWarpSize);
  };
  RegisterRow<T, S> registers;
  if (warp < range.count) load(warp, registers);
  block.clear(call.experts);
  GroupSums<SharedSums, kAnyScore> sums{{block.scores + warp * S::kColumns}};
  for (int i = warp; i < range.count; i += kWarps) {
    const int64_t next = i + kWarps < range.count ? range.first + i + kWarps : call.tokens;
    route_token<T, S, kBiased, Extra::kStats>(call, options, range.first + i, next, registers,
                                              scratches[warp], groups + warp, nullptr, &sums,
                                              block.counts);
    __syncwarp();
  }
  block.write(call, sums.z, sums.tokens);
}

// The launch of either kernel: `rows` rows a warp.
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel kernel, int rows, cudaStream_t stream, const RouteForward& call,
                   const Args&... args) {
  const int64_t block_tokens = int64_t{kRegisterWarps} * rows;
  const unsigned blocks = static_cast<unsigned>((call.tokens + block_tokens - 1) / block_tokens);
  const int64_t bytes = sizeof(uint32_t) * kRegisterWarps * kMostRows * bitmap_words(call);
  return launch_kernel(kernel, blocks, kRegisterWarps * kWarpSize, bytes, {stream, call.overlaps},
                       call, args...);
}

template <typename T, int kChunks>
cudaError_t launch_chunks(const RouteForward& call, const RouteOptions& options,
                          cudaStream_t stream) {
  return with_bool(call.probs != nullptr, [&](auto dense) {
    if (!needs_keys(call, options) && options.k <= 8) {
      const int rows = call.tokens >= kManyTokens ? kMostRows : 1;
      return launch(route_joint_kernel<T, JointShape<kChunks>, dense.value>, rows, stream, call,
                    options, rows);
    }
    return with_bool(needs_keys(call, options), [&](auto biased) {
      const auto kernel = route_single_kernel<T, SingleShape<kChunks>, biased.value, dense.value>;
      return launch(kernel, 1, stream, call, options);
    });
  });
}

template <typename T, int kChunks>
cudaError_t launch_stats_chunks(const RouteForward& call, const RouteOptions& options,
                                cudaStream_t stream) {
  using S = SingleShape<kChunks>;
  const TokenBlocks blocks(call);
  const auto launch = [&](auto biased, auto any_score) {
    constexpr int kWarps = kStatsWarps<S, biased.value, any_score.value>;
    const int group_bytes = biased.value ? kWarps * static_cast<int>(sizeof(GroupScratch<S>)) : 0;
    const int bytes =
        BlockSums::score_bytes(kWarps, S::kColumns) + BlockSums::count_bytes(call) + group_bytes;
    return launch_blocks(route_single_stats_kernel<T, S, biased.value, any_score.value>,
                         blocks.count(call), kWarps, bytes, stream, call, options, blocks);
  };
  if (needs_keys(call, options)) return launch(std::true_type(), std::true_type());
  return with_bool(options.score != Score::kSoftmax,
                   [&](auto any_score) { return launch(std::false_type(), any_score); });
}

}  // namespace

cudaError_t launch_route_warp(const RouteForward& call, const RouteOptions& options,
                              cudaStream_t stream) {
  return with_type(call.logits_type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (has_stats(call)) {
      if (call.experts <= 512) return launch_stats_chunks<T, 4>(call, options, stream);
      return launch_stats_chunks<T, 8>(call, options, stream);
    }
    if (call.experts <= 512) return launch_chunks<T, 4>(call, options, stream);
    return launch_chunks<T, 8>(call, options, stream);
  });
}

}  // namespace jax_router
