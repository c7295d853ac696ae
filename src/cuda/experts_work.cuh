// What the warps of the kernel of `experts` share: the call, the layout of shared memory, the
// experts that are not left out, and whether a piece must be done again.

#ifndef JAX_ROUTER_CUDA_EXPERTS_WORK_CUH_
#define JAX_ROUTER_CUDA_EXPERTS_WORK_CUH_

#include <cstdint>

#include "experts.h"
#include "experts_schedule.h"
#include "pipeline.cuh"
#include "warp.cuh"

namespace jax_router {

// What the kernel needs to know of a call.
struct ExpertsWork {
  ExpertsSchedule schedule;
  const float* multipliers;  // [experts * blocks, padded_tokens]
  const uint32_t* chosen;    // [token_chunks, words]
  const float* w_scale;
  float* partials;   // [slots, blocks of a cluster, width / 8, 256 threads, 4]
  int32_t* tickets;  // [tiles, blocks of a cluster]
  void* result;
  LogitsType result_type;
  int64_t tokens;
  int64_t padded_tokens;
  int64_t hidden;
  int token_groups;  // tiles of a cluster along the tokens
  int hidden_blocks;
  int token_blocks;
  int blocks;  // of depth of an expert, with a multiplier each
  int parts;   // stages of such a block
  int words;   // of a row of the mask
  int token_chunks;
};

inline constexpr int kLoadThreads = 128;
inline constexpr int kMathThreads = 256;
inline constexpr int kExpertsThreads = kLoadThreads + kMathThreads;
// Registers of a thread. Those that warps give up must be enough for those that take more, or these
// wait for ever.
inline constexpr int kLoadRegisters = 56;
inline constexpr int kMathRegisters = 224;
inline constexpr int kLaunchRegisters = 65536 / kExpertsThreads / 8 * 8;
static_assert(kLoadRegisters * kLoadThreads + kMathRegisters * kMathThreads <=
              kLaunchRegisters * kExpertsThreads);
inline constexpr int kExpertsShared = 227 * 1024;

// Shared memory of a block. Multipliers have a ring of their own with one row more than there are
// stages: one is read until its sums are scaled, after their stage was given back.
template <ExpertsType kType, int kTokens>
struct ExpertsShape {
  static constexpr int kDepth = kType == ExpertsType::kFloat8 ? 128 : 64;  // of a stage: 128 bytes
  static constexpr int kWeightBytes = kHiddenTile * 128;
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kRowBytes = kTokens * 4;
  static constexpr int kStageBytes = kWeightBytes + kTokenBytes + kRowBytes + 16;
  static constexpr int kFit = (kExpertsShared - kRowBytes - 32) / kStageBytes;
  static constexpr int kStages = kFit < 10 ? kFit : 10;
  static constexpr int kRows = kStages + 1;
  static constexpr int kTokensAt = kStages * kWeightBytes;
  static constexpr int kRowsAt = kTokensAt + kStages * kTokenBytes;
  static constexpr int kFullAt = kRowsAt + kRows * kRowBytes;
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static constexpr int kVerdictAt = kEmptyAt + kStages * 8;
  static constexpr int kFlagAt = kVerdictAt + 16;
  static constexpr int kBytes = kFlagAt + 16;
  static_assert(kBytes <= kExpertsShared);
};

// ---- experts that are not left out ----

class ChosenExperts {
 public:
  __device__ __forceinline__ ChosenExperts(const ExpertsWork& work, int begin, int end)
      : work_(work), next_(begin), end_(end) {
    if (next_ < end_) load();
  }

  // The next expert in ascending order.
  __device__ __forceinline__ bool next(int* expert) {
    while (next_ < end_) {
      if (word_ != 0) {
        *expert = (next_ & ~31) + __ffs(static_cast<int>(word_)) - 1;
        word_ &= word_ - 1;
        return *expert < end_;
      }
      next_ = (next_ | 31) + 1;
      if (next_ < end_) load();
    }
    return false;
  }

 private:
  __device__ __forceinline__ void load() {
    word_ = 0;
#pragma unroll 1
    for (int i = 0; i < work_.token_chunks; ++i) {
      word_ |= __ldg(work_.chosen + static_cast<int64_t>(i) * work_.words + next_ / 32);
    }
    word_ &= ~0u << (next_ & 31);
  }

  const ExpertsWork& work_;
  int next_;
  int end_;
  uint32_t word_ = 0;
};

// A stage of the ring, and the parity of its barriers.
template <int kStages>
struct RingStage {
  uint32_t index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// ---- whether a piece must be done again ----

// Sums that are not finite must not reach tokens that have not chosen their expert. That takes a
// comparison for each sum, so it is left out at first; if totals are not finite in the end, the
// blocks of the cluster do the piece again with it. All warps that multiply, and the one that
// loads, of all blocks, take part in a verdict.
class Verdicts {
 public:
  // `barrier` is followed by two words, of even and odd verdicts.
  __device__ __forceinline__ Verdicts(uint32_t barrier, int ranks)
      : barrier_(barrier), ranks_(ranks) {}

  static __device__ __forceinline__ void init(uint32_t barrier, int ranks) {
    init_barrier(barrier, ranks * (kMathThreads / 32 + 1));
    store_shared(barrier + 8, 0);
    store_shared(barrier + 12, 0);
  }

  // By a warp, or by one thread as lane 0 of 1. Whether any was not good.
  __device__ __forceinline__ bool again(bool good, int lane, int lanes) {
    ++count_;
    const uint32_t word = 8 + 4 * (count_ & 1);
    for (int rank = lane; rank < ranks_; rank += lanes) {
      const uint32_t there = address_in_block(barrier_, rank);
      if (!good) {
        store_in_cluster(there + word, count_);
        fence_cluster();
      }
      arrive_in_cluster(there);
    }
    wait_barrier_of_cluster(barrier_, (count_ - 1) & 1);
    return load_shared(barrier_ + word) == count_;
  }

 private:
  uint32_t barrier_;
  int ranks_;
  uint32_t count_ = 0;
};

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_EXPERTS_WORK_CUH_
