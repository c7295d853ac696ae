// Rows in registers, and what the kernels that keep them there share.

#ifndef JAX_ROUTER_CUDA_REGISTERS_CUH_
#define JAX_ROUTER_CUDA_REGISTERS_CUH_

#include <cstdint>

#include "groups.cuh"
#include "network.cuh"
#include "options.h"
#include "registers_keys.cuh"
#include "row.cuh"
#include "shape.cuh"
#include "stats.cuh"
#include "survivors.cuh"
#include "write.cuh"

namespace jax_router {

inline constexpr int kRegisterWarps = 4;  // of a block

// A row in registers: element (j * kLanes + lane) * 4 + c in part c of chunk j.
template <typename T, typename S>
struct RegisterRow {
  Four<T> raw[S::kChunks];

  __device__ __forceinline__ void load(const T* logits, int experts, bool aligned, int lane) {
#pragma unroll
    for (int j = 0; j < S::kChunks; ++j) raw[j] = Four<T>::lowest();
    const T* mine = logits + lane * kChunk;
    if (aligned) {
#pragma unroll
      for (int j = 0; j < S::kChunks; ++j) {
        const int past = j * S::kLanes * kChunk;
        if (lane * kChunk + past < experts) raw[j] = Four<T>::load(mine + past);
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < S::kChunks; ++j) {
      const int past = j * S::kLanes * kChunk;
      raw[j] = Four<T>::load_some(mine + past, experts - lane * kChunk - past);
    }
  }
  __device__ __forceinline__ void unpack(float (&x)[S::kChunks][kChunk]) const {
#pragma unroll
    for (int j = 0; j < S::kChunks; ++j) raw[j].unpack(x[j]);
  }
};

// The largest element of each class.
template <typename S>
__device__ __forceinline__ void classify(const float (&x)[S::kChunks][kChunk],
                                         float (&classes)[S::kClasses]) {
#pragma unroll
  for (int i = 0; i < S::kClasses; ++i) classes[i] = -kInfinity;
#pragma unroll
  for (int j = 0; j < S::kChunks; ++j) {
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      classes[c % S::kClasses] = larger(classes[c % S::kClasses], x[j][c]);
    }
  }
}

template <typename S>
__device__ __forceinline__ Bound bound_of(float (&classes)[S::kClasses], int k,
                                          ClassMaxima<S::kMaxima> maxima, int lane) {
  if constexpr (S::kLanes == 8) {
    return eighth_of_classes(classes, lane);
  } else {
    return kth_of_classes(classes, k, maxima, lane);
  }
}

template <typename S>
__device__ __forceinline__ void list_survivors(const float (&x)[S::kChunks][kChunk], float bound,
                                               Survivors<S::kLanes, S::kListed>& survivors) {
#pragma unroll
  for (int first = 0; first < S::kChunks; first += kMaskChunks) {
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < kMaskChunks && first + j < S::kChunks; ++j) {
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (x[first + j][c] >= bound) mask |= 1u << (kChunk * j + c);
      }
    }
    survivors.append(mask, first * kChunk * S::kLanes);
  }
}

// What a group of lanes knows of its token once its survivors are listed.
struct Candidates {
  int count;
  int32_t bound_key;
  int32_t top_key;
  Softmax softmax;

  __device__ __forceinline__ void replace(const Relisted& listed) {
    count = listed.count;
    bound_key = listed.bound_key;
  }
};

// The bias of a token's batch row. A division of 64 bits takes a hundred instructions.
__device__ __forceinline__ const float* bias_of(const RouteForward& call, int64_t token) {
  if (call.bias == nullptr || call.tokens == call.tokens_per_batch) return call.bias;
  return call.bias + token / call.tokens_per_batch * call.experts;
}

template <typename T, bool kBiased>
__device__ __forceinline__ RowValues<T, kBiased> row_values(const RouteForward& call,
                                                            const RouteOptions& options,
                                                            int64_t token) {
  RowValues<T, kBiased> row;
  row.logits = static_cast<const T*>(call.logits) + token * call.experts;
  row.bias = kBiased ? bias_of(call, token) : nullptr;
  row.experts = static_cast<int>(call.experts);
  row.aligned = call.aligned;
  row.score = options.score;
  row.softmax = {0.0f, 1.0f};
  row.kept = {~uint64_t{0}, call.group_chunks, call.group_inverse};
  return row;
}

// Finds the largest element of each class, of the groups that stay. `x` is -inf in the others.
template <typename S, typename T>
__device__ __forceinline__ void limit_to_groups(const RouteOptions& options,
                                                RowValues<T, true>& row, Tolerance tolerance,
                                                float (&x)[S::kChunks][kChunk],
                                                float (&classes)[S::kClasses],
                                                GroupScratch<S>& scratch, int lane) {
  if (options.group_count <= 1) {
    classify<S>(x, classes);
    if (options.group_count == 0) return;
    // A single group stays unless it has no score.
    float top = classes[0];
#pragma unroll
    for (int i = 1; i < S::kClasses; ++i) top = larger(top, classes[i]);
    if (two_count<S>(top)) return;
  }
  row.kept.mask = keep_groups<S>(options, row, tolerance, x, scratch, lane);
  classify<S>(x, classes);
}

// Lists the survivors of the row that a group of lanes holds. `ids` is the group's list, `groups`
// its memory for the scores of groups, kAtOnce how many chunks have their bias in registers, too.
// Returns false in `fits` where the survivors do not fit the list.
template <typename T, typename S, bool kBiased, int kAtOnce>
__device__ __forceinline__ Candidates list_candidates(
    const RouteOptions& options, RowValues<T, kBiased>& row, const RegisterRow<T, S>& registers,
    uint32_t ids, GroupScratch<S>* groups, ClassMaxima<S::kMaxima> maxima, int lane, bool* fits) {
  float x[S::kChunks][kChunk];
  registers.unpack(x);
  float classes[S::kClasses];
  Tolerance tolerance = kExact;
  const bool sums_softmax = options.score == Score::kSoftmax && !options.renormalize;
  if constexpr (kBiased) {
    if (row.bias != nullptr && row.score == Score::kSigmoid) {
      turn_into_sigmoids<S, kAtOnce>(row, x, lane);
      tolerance = kApproximate;
    } else if (row.bias == nullptr) {
      if (sums_softmax) row.softmax = softmax_of<S>(x, top_of<S>(x));
#pragma unroll
      for (int j = 0; j < S::kChunks; ++j) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) x[j][c] = larger(x[j][c], -kInfinity);
      }
    } else {
      float4 values[S::kChunks];
#pragma unroll
      for (int j = 0; j < S::kChunks; ++j) values[j] = Four<float>::pack(x[j]).raw;
      const Comparison comparison = compare_by_any_score<S>(row, values, lane);
      row.softmax = comparison.softmax;
      tolerance = comparison.tolerance;
#pragma unroll
      for (int j = 0; j < S::kChunks; ++j) Four<float>{values[j]}.unpack(x[j]);
    }
    limit_to_groups<S>(options, row, tolerance, x, classes, *groups, lane);
  } else if (sums_softmax) {
    row.softmax = softmax_of<S>(x, top_of<S>(x));
  }
  *fits = true;
  if (row.experts <= S::kListed) {
    for (int e = lane; e < row.experts; e += S::kLanes) store_shared_u16(ids + 2 * e, e);
    return {row.experts, kLowestKey, INT32_MAX, row.softmax};
  }
  if constexpr (!kBiased) classify<S>(x, classes);
  Bound bound = bound_of<S>(classes, static_cast<int>(options.k), maxima, lane);
  float listed = bound.bound;
  if constexpr (kBiased) listed = loosen(bound, tolerance);
  Survivors<S::kLanes, S::kListed> survivors{ids, lane, 0};
  list_survivors<S>(x, listed, survivors);
  *fits = !survivors.overflow() && bound.bound > -kInfinity;
  return {survivors.count, key_from_float(bound.bound), bound.top_key, row.softmax};
}

// Adds a row to the statistics of its group.
template <typename T, typename S, bool kBiased, typename Sums>
__device__ __forceinline__ void add_registers(const RouteForward& call, const RouteOptions& options,
                                              const RegisterRow<T, S>& registers,
                                              const Candidates& found, int64_t token, bool real,
                                              Sums& sums, int lane) {
  const auto row = [&](auto visit) {
#pragma unroll
    for (int j = 0; j < S::kChunks; ++j) {
      float x[kChunk];
      registers.raw[j].unpack(x);
      visit(j, (j * S::kLanes + lane) * kChunk, x);
    }
  };
  float top;
  if (kBiased || call.experts <= S::kListed) {
    float x[S::kChunks][kChunk];
    registers.unpack(x);
    top = top_of<S>(x);
  } else {
    top = float_from_key(found.top_key);
  }
  sums.template add<S::kLanes>(call, options, token, real, row, Exponential(top), nullptr, lane);
}

// Shared memory of a warp that works on kTokens tokens at once.
template <typename S, int kTokens>
struct WarpScratch {
  static constexpr int kStride = S::kListed + 2;  // a list has room for one more; even
  RankScratch ranks;
  uint16_t ids[kTokens * kStride];
};

__device__ __forceinline__ TokenContext context_of(int64_t token, bool real,
                                                   const Candidates& found, uint32_t ids,
                                                   uint32_t* bits, int32_t* counts = nullptr) {
  return {token,
          real,
          found.count,
          unsigned_key(found.bound_key - 1),
          unsigned_key(found.top_key),
          found.softmax,
          ids,
          bits,
          counts};
}

// The words of slots of a list, 0 past the count.
template <typename T>
struct LogitWords {
  const RowValues<T, false>& row;
  uint32_t ids;

  template <int kSlots>
  __device__ __forceinline__ void operator()(int first, int count,
                                             uint32_t (&words)[kSlots]) const {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int slot = first + i;
      words[i] = slot < count ? Words<T, false>::word(row, load_shared_u16(ids + 2 * slot)) : 0;
    }
  }
};

template <typename T, bool kBiased>
__device__ __forceinline__ auto words_of(const RowValues<T, kBiased>& row, uint32_t ids) {
  if constexpr (kBiased) {
    return ExactWords<T>{row, ids};
  } else {
    return LogitWords<T>{row, ids};
  }
}

// Ranks and writes four tokens, eight lanes each.
template <Extra kExtra, typename T, bool kBiased>
__device__ __forceinline__ void rank_group(const RouteForward& call, const RouteOptions& options,
                                           const TokenContext& context,
                                           const RowValues<T, kBiased>& row, RankScratch& scratch,
                                           int group, int lane) {
  constexpr bool kUnique = Words<T, kBiased>::kUnique;
  const int k = static_cast<int>(options.k);
  const auto words = words_of(row, context.ids);
  if (__any_sync(kAllLanes, context.count > 16)) {
    rank_survivors<8, 4, kUnique>(context, k, scratch, words, group, lane);
  } else {
    rank_survivors<8, 2, kUnique>(context, k, scratch, words, group, lane);
  }
  __syncwarp();
  write_sorted<kExtra, 8, 1>(call, options, context, row, scratch.sorted + 8 * group, lane);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_REGISTERS_CUH_
