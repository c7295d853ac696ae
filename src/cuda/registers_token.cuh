// A token routed by a warp that holds its row in registers.

#ifndef JAX_ROUTER_CUDA_REGISTERS_TOKEN_CUH_
#define JAX_ROUTER_CUDA_REGISTERS_TOKEN_CUH_

#include <cstdint>

#include "registers.cuh"

namespace jax_router {

template <int kChunks>
using SingleShape = Shape<32, kChunks, 2, 128>;

// Routes one token by one warp. `groups`: where kBiased; `bits`: its row of a bitmap; `sums` and
// `counts`: where there are statistics. Then `registers` is loaded with the row of token `next`, if
// there is one, while the choice is written.
template <typename T, typename S, bool kBiased, Extra kExtra, typename Sums>
__device__ __forceinline__ void route_token(const RouteForward& call, const RouteOptions& options,
                                            int64_t token, int64_t next,
                                            RegisterRow<T, S>& registers,
                                            WarpScratch<S, 1>& scratch, GroupScratch<S>* groups,
                                            uint32_t* bits, Sums* sums, int32_t* counts) {
  constexpr bool kDense = kExtra == Extra::kDense;
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t ids = shared_address(scratch.ids);
  const ClassMaxima<S::kMaxima> maxima{shared_address(scratch.ranks.words)};
  RowValues<T, kBiased> row = row_values<T, kBiased>(call, options, token);
  const bool real = call.where == nullptr || call.where[token];
  const int words = kDense ? bitmap_words(call) : 0;
  bool fits;
  Candidates found =
      list_candidates<T, S, kBiased, 4>(options, row, registers, ids, groups, maxima, lane, &fits);
  if constexpr (kDense) {
    clear_bitmap(bits, words, lane);
    clear_dense<T>(call, token, 1, lane);
  } else if constexpr (kExtra == Extra::kStats) {
    add_registers<T, S, kBiased>(call, options, registers, found, token, real, *sums, lane);
    if (next < call.tokens) {
      registers.load(row_values<T, kBiased>(call, options, next).logits, row.experts, call.aligned,
                     lane);
    }
  }
  __syncwarp();
  if (!fits) {
    found.replace(relist<S::kListed>(row, found.bound_key, found.top_key,
                                     static_cast<int>(options.k), maxima, ids, lane));
    __syncwarp();
  }
  finish_token<kExtra>(call, options, context_of(token, real, found, ids, bits, counts), row,
                       scratch.ranks, words_of(row, ids), lane);
  if (words > 0) {
    __syncwarp();
    write_bitmap(call, token, 1, bits, words, lane);
  }
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_REGISTERS_TOKEN_CUH_
