// Rows of tokens in chunks of 16 bytes, and the threads that share a row.

#ifndef JAX_ROUTER_CUDA_PERMUTE_CUH_
#define JAX_ROUTER_CUDA_PERMUTE_CUH_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "permute_call.h"
#include "warp.cuh"

namespace jax_router {

// ---- chunks ----

inline constexpr int kChunkBytes = 16;

// What one load takes: `kCount` elements that fill 16 bytes, or one element of a row that is not
// aligned to them.
template <typename T, int kCount>
using Raw = std::conditional_t<kCount != 1, uint4,
                               std::conditional_t<std::is_same_v<T, float>, float, unsigned short>>;

template <typename T, int kCount>
__device__ __forceinline__ void unpack(const Raw<T, kCount>& raw, float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    if constexpr (std::is_same_v<T, float>) {
      x[0] = raw;
    } else {
      x[0] = to_float(T{raw});
    }
  } else {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        x[i] = __uint_as_float(words[i]);
      } else {
        x[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
        x[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
      }
    }
  }
}

// Two neighbours of 16 bits, rounded to nearest even.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, Bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

template <typename T, int kCount>
__device__ __forceinline__ Raw<T, kCount> pack(const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    if constexpr (std::is_same_v<T, float>) {
      return x[0];
    } else {
      return to_half<T>(x[0]).bits;
    }
  } else if constexpr (std::is_same_v<T, float>) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
            __float_as_uint(x[3])};
  } else {
    return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]),
            pack_pair<T>(x[6], x[7])};
  }
}

// ---- teams: the threads that share a token ----

inline constexpr int kMostThreads = 256;  // of a block
inline constexpr int kSlotsAtOnce = 8;    // entries whose rows are on their way together

// A team is a part of a warp, a warp, or a block of several warps.
struct Shape {
  dim3 grid;  // tokens, batch rows, parts of a row
  int threads;
  int team;
};

// The size of a team, from the chunks of a row alone, for the order of sums follows from it: each
// thread has two chunks or, of long rows, more.
inline int team_size(int64_t chunks) {
  const int64_t wanted = (chunks + 1) / 2;
  if (wanted <= kWarpSize) {
    int team = 1;
    while (team < wanted) team *= 2;
    return team;
  }
  const int64_t needed = (chunks + kMostThreads - 1) / kMostThreads;
  const int64_t rounds = needed > 2 ? needed : 2;
  const int64_t even = (chunks + rounds - 1) / rounds;
  return static_cast<int>((even + kWarpSize - 1) / kWarpSize * kWarpSize);
}

// `split_rows`: whether several blocks may share a row where there are few tokens.
inline Shape make_shape(const EntryPlan& plan, int64_t chunks, bool split_rows, int processors) {
  constexpr int64_t kThreadsPerProcessor = 2048;
  Shape shape;
  shape.team = team_size(chunks);
  shape.threads = shape.team > kWarpSize ? shape.team : kMostThreads;
  const auto blocks_of_tokens = [&] {
    const int64_t teams = shape.threads / shape.team;
    return (plan.tokens + teams - 1) / teams;
  };
  while (shape.threads > kWarpSize && shape.team <= kWarpSize &&
         blocks_of_tokens() * plan.batch < processors) {
    shape.threads /= 2;
  }
  const int64_t most = processors * (kThreadsPerProcessor / shape.threads);
  const int64_t rows = plan.batch < most ? plan.batch : most;
  const int64_t wanted = blocks_of_tokens();
  const int64_t columns = wanted < most / rows ? wanted : most / rows;
  int64_t parts = 1;
  if (split_rows) {
    const int64_t rounds = (chunks + shape.team - 1) / shape.team;
    const int64_t idle = processors / (columns * rows);
    parts = idle < rounds ? idle : rounds;
  }
  shape.grid = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(rows),
                    static_cast<unsigned>(parts > 1 ? parts : 1));
  return shape;
}

// The positions in groups are those below this. All threads of the block call it.
__device__ __forceinline__ uint32_t grouped_entries(const EntryPlan& plan, int64_t batch) {
  __shared__ unsigned parts[kMostThreads / kWarpSize];
  const int32_t* sizes = plan.group_sizes + batch * plan.experts;
  unsigned sum = 0;
  for (int64_t e = threadIdx.x; e < plan.experts; e += blockDim.x) {
    sum += static_cast<unsigned>(__ldg(sizes + e));
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  __syncthreads();  // the parts of the batch row before have been read
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  sum = 0;
  for (unsigned w = 0; w < blockDim.x / kWarpSize; ++w) sum += parts[w];
  return static_cast<uint32_t>(plan.grouped(static_cast<int32_t>(sum)));
}

// A token, as the threads of its team see it.
struct TokenRow {
  int64_t token;     // of all batch rows
  int64_t first;     // row of position 0 of its batch row
  uint32_t grouped;  // positions below this are in a group
  const int32_t* inverse;
};

// Calls body(row) for every token of the team. The threads of a team are always together, and those
// of a block if it is one team.
template <typename Body>
__device__ __forceinline__ void for_tokens(const EntryPlan& plan, int team, Body body) {
  const int teams = blockDim.x / team;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * teams + threadIdx.x / team;
  const int64_t step = static_cast<int64_t>(gridDim.x) * teams;
  for (int64_t batch = blockIdx.y; batch < plan.batch; batch += gridDim.y) {
    TokenRow row;
    row.grouped = grouped_entries(plan, batch);
    row.first = batch * plan.entries();
    for (int64_t t = begin; t < plan.tokens; t += step) {
      row.token = batch * plan.tokens + t;
      row.inverse = plan.inverse + row.token * plan.slots;
      body(row);
    }
  }
}

// Sum over the lanes of a team, or of a warp of it, in a fixed order; each of them gets it.
__device__ __forceinline__ float team_sum(float value, int team) {
  const int width = team < kWarpSize ? team : kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned mask =
      width == kWarpSize ? kAllLanes : ((1u << width) - 1u) << (lane / width * width);
  for (int distance = width / 2; distance > 0; distance /= 2) {
    value = __fadd_rn(value, __shfl_xor_sync(mask, value, distance));
  }
  return value;
}

}  // namespace jax_router

#endif  // JAX_ROUTER_CUDA_PERMUTE_CUH_
