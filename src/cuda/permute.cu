// `permute`, `combine` and their backward in CUDA. A team of threads takes a token and finds the
// rows of its entries by the inverse of the order, so that the token's own row is read or written
// once. Blocks stay and go over many tokens, so that each adds up the group sizes but once.

#include <cstdint>
#include <type_traits>

#include "permute.cuh"
#include "permute.h"
#include "route.h"

namespace jax_router {
namespace {

constexpr int kCopies = 2;  // units of a row that a thread of `permute` holds

// Chunk c of the row at a position.
__device__ __forceinline__ int64_t at(uint32_t position, int chunks, int c) {
  return static_cast<int64_t>(static_cast<uint64_t>(position) * static_cast<uint32_t>(chunks)) + c;
}

// Rows of `units` units, of whatever type they are.
template <typename Unit>
__global__ void __launch_bounds__(kMostThreads)
    permute_kernel(const Permute call, const int units, const int team) {
  const EntryPlan& plan = call.plan;
  const int slots = static_cast<int>(plan.slots);
  const uint32_t entries = static_cast<uint32_t>(plan.entries());
  const int step = gridDim.z * team;
  const int begin = blockIdx.z * team + threadIdx.x % team;
  for_tokens(plan, team, [&](const TokenRow& row) {
    const Unit* source = static_cast<const Unit*>(call.tokens) + row.token * units;
    Unit* rows = static_cast<Unit*>(call.rows) + row.first * units;
    for (int c = begin; c < units; c += kCopies * step) {
      Unit raw[kCopies];
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (c + i * step < units) raw[i] = __ldcs(source + c + i * step);
      }
      for (int slot = 0; slot < slots; slot += kSlotsAtOnce) {
        uint32_t position[kSlotsAtOnce];
#pragma unroll
        for (int s = 0; s < kSlotsAtOnce; ++s) {
          position[s] = slot + s < slots ? __ldg(row.inverse + slot + s) : UINT32_MAX;
        }
#pragma unroll
        for (int s = 0; s < kSlotsAtOnce; ++s) {
          if (position[s] >= entries) continue;
          Unit* target = rows + at(position[s], units, c);
          const bool in_group = position[s] < row.grouped;
#pragma unroll
          for (int i = 0; i < kCopies; ++i) {
            if (c + i * step < units) __stcs(target + i * step, in_group ? raw[i] : Unit{});
          }
        }
      }
    }
  });
}

// `kSlots`: entries whose rows are on their way together. A thread of few slots needs few
// registers, so that there are more of them.
template <typename T, int kCount, bool kWeighted, int kSlots>
__global__ void __launch_bounds__(kMostThreads, 2)
    combine_kernel(const Combine call, const int chunks, const int team) {
  const EntryPlan& plan = call.plan;
  const int slots = static_cast<int>(plan.slots);
  const int step = gridDim.z * team;
  const int begin = blockIdx.z * team + threadIdx.x % team;
  auto* tokens = static_cast<Raw<T, kCount>*>(call.tokens);
  for_tokens(plan, team, [&](const TokenRow& row) {
    const auto* rows = static_cast<const Raw<T, kCount>*>(call.rows) + row.first * chunks;
    const float* weights = call.weights + row.token * plan.slots;
    for (int c = begin; c < chunks; c += step) {
      float sums[kCount] = {};
      for (int slot = 0; slot < slots; slot += kSlots) {
        Raw<T, kCount> raw[kSlots];
        uint32_t position[kSlots];
        float weight[kSlots];
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          position[s] = slot + s < slots ? __ldg(row.inverse + slot + s) : UINT32_MAX;
          weight[s] = kWeighted && slot + s < slots ? __ldg(weights + slot + s) : 1.0f;
        }
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          if (position[s] < row.grouped) raw[s] = __ldcs(rows + at(position[s], chunks, c));
        }
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
          if (position[s] >= row.grouped) continue;
          float x[kCount];
          unpack<T, kCount>(raw[s], x);
#pragma unroll
          for (int i = 0; i < kCount; ++i) sums[i] = multiply_add(weight[s], x[i], sums[i]);
        }
      }
      tokens[row.token * chunks + c] = pack<T, kCount>(sums);
    }
  });
}

// Writes the gradients of the weights of up to kSlots entries from the sums of the threads.
// `parts` takes turns, so that a block of one team waits once: when a buffer is written again, all
// threads have met since it was read.
template <int kSlots>
__device__ __forceinline__ void store_dots(const float (&dots)[kSlots], int count, int team,
                                           float (*parts)[kSlots], float* gradient) {
  float sums[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (s < count) sums[s] = team_sum(dots[s], team);
  }
  if (team <= kWarpSize) {
    if (threadIdx.x % team != 0) return;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (s < count) gradient[s] = sums[s];
    }
    return;
  }
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (s < count) parts[threadIdx.x / kWarpSize][s] = sums[s];
    }
  }
  __syncthreads();
  if (threadIdx.x < count) {
    float sum = 0.0f;
    for (int w = 0; w < team / kWarpSize; ++w) sum = __fadd_rn(sum, parts[w][threadIdx.x]);
    gradient[threadIdx.x] = sum;
  }
}

// Blocks of `combine_backward_kernel` that a processor must have room for: the fewer rows a thread
// has on their way, the more threads it takes.
constexpr int backward_blocks(int slots) { return slots == 2 ? 4 : slots == 4 ? 3 : 2; }

template <typename T, int kCount, int kSlots>
__global__ void __launch_bounds__(kMostThreads, backward_blocks(kSlots))
    combine_backward_kernel(const CombineBackward call, const int chunks, const int team) {
  __shared__ float parts[2][kMostThreads / kWarpSize][kSlots];
  const EntryPlan& plan = call.plan;
  const int slots = static_cast<int>(plan.slots);
  const uint32_t entries = static_cast<uint32_t>(plan.entries());
  const int rank = threadIdx.x % team;
  const bool of_rows = call.rows_gradient != nullptr;
  const bool of_weights = call.weights_gradient != nullptr;
  int turn = 0;
  for_tokens(plan, team, [&](const TokenRow& row) {
    const auto* rows = static_cast<const Raw<T, kCount>*>(call.rows) + row.first * chunks;
    auto* gradients = static_cast<Raw<T, kCount>*>(call.rows_gradient) + row.first * chunks;
    const auto* cotangent = static_cast<const Raw<T, kCount>*>(call.cotangent) + row.token * chunks;
    for (int slot = 0; slot < slots; slot += kSlots) {
      const int count = slots - slot < kSlots ? slots - slot : kSlots;
      const int64_t entry = row.token * plan.slots + slot;
      uint32_t position[kSlots];
      float weight[kSlots];
      float dots[kSlots] = {};
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        position[s] = s < count ? __ldg(row.inverse + slot + s) : UINT32_MAX;
        weight[s] = s < count && of_rows ? __ldg(call.weights + entry + s) : 0.0f;
      }
      for (int c = rank; c < chunks; c += team) {
        Raw<T, kCount> raw[kSlots];
        if (of_weights) {
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            if (position[s] >= row.grouped) continue;
            raw[s] = __ldcs(rows + at(position[s], chunks, c));
          }
        }
        float g[kCount];
        unpack<T, kCount>(__ldg(cotangent + c), g);
        if (of_rows) {
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            if (position[s] >= entries) continue;
            float scaled[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              scaled[i] = position[s] < row.grouped ? multiply(weight[s], g[i]) : 0.0f;
            }
            __stcs(gradients + at(position[s], chunks, c), pack<T, kCount>(scaled));
          }
        }
        if (of_weights) {
#pragma unroll
          for (int s = 0; s < kSlots; ++s) {
            if (position[s] >= row.grouped) continue;
            float x[kCount];
            unpack<T, kCount>(raw[s], x);
#pragma unroll
            for (int i = 0; i < kCount; ++i) dots[s] = multiply_add(g[i], x[i], dots[s]);
          }
        }
      }
      if (of_weights) {
        store_dots(dots, count, team, parts[turn], call.weights_gradient + entry);
        turn ^= 1;
      }
    }
  });
}

// ---- launches ----

template <typename Kernel, typename Call>
cudaError_t launch(Kernel kernel, const Call& call, int64_t chunks, bool split_rows,
                   cudaStream_t stream) {
  const Shape shape = make_shape(call.plan, chunks, split_rows, device_limits().processors);
  kernel<<<shape.grid, shape.threads, 0, stream>>>(call, static_cast<int>(chunks), shape.team);
  return cudaGetLastError();
}

bool is_multiple(int64_t row_bytes, int bytes, const void* a, const void* b) {
  const auto address = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return (static_cast<uint64_t>(row_bytes) | address) % static_cast<uint64_t>(bytes) == 0;
}

int64_t row_bytes(const EntryPlan& plan, LogitsType type) {
  return plan.width * (type == LogitsType::kFloat32 ? 4 : 2);
}

// Calls f with a null pointer to the type of the rows and how many elements a chunk has.
template <typename F>
cudaError_t with_chunks(LogitsType type, bool aligned, F f) {
  return with_type(type, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    if (aligned) return f(null, std::integral_constant<int, kChunkBytes / sizeof(T)>());
    return f(null, std::integral_constant<int, 1>());
  });
}

// Calls f with the least number of slots at once that does for a token, if it matters.
template <int kCount, typename F>
cudaError_t with_slots(int64_t slots, F f) {
  if constexpr (kCount > 1) {
    if (slots <= 2) return f(std::integral_constant<int, 2>());
    if (slots <= 4) return f(std::integral_constant<int, 4>());
  }
  return f(std::integral_constant<int, kSlotsAtOnce>());
}

}  // namespace

cudaError_t launch_permute(const Permute& call, cudaStream_t stream) {
  const EntryPlan& plan = call.plan;
  if (plan.batch * plan.entries() * plan.width == 0) return cudaSuccess;
  const int64_t bytes = row_bytes(plan, call.type);
  const auto aligned = [&](int to) { return is_multiple(bytes, to, call.tokens, call.rows); };
  if (aligned(16)) return launch(permute_kernel<uint4>, call, bytes / 16, true, stream);
  if (aligned(4)) return launch(permute_kernel<uint32_t>, call, bytes / 4, true, stream);
  return launch(permute_kernel<uint16_t>, call, bytes / 2, true, stream);
}

cudaError_t launch_combine(const Combine& call, cudaStream_t stream) {
  const EntryPlan& plan = call.plan;
  if (plan.batch * plan.tokens * plan.width == 0) return cudaSuccess;
  const int64_t bytes = row_bytes(plan, call.type);
  const bool aligned = is_multiple(bytes, kChunkBytes, call.tokens, call.rows);
  return with_chunks(call.type, aligned, [&](auto* null, auto count) {
    constexpr int kCount = decltype(count)::value;
    return with_bool(call.weights != nullptr, [&](auto weighted) {
      return with_slots<kCount>(plan.slots, [&](auto slots) {
        using T = std::remove_pointer_t<decltype(null)>;
        const auto kernel =
            combine_kernel<T, kCount, decltype(weighted)::value, decltype(slots)::value>;
        return launch(kernel, call, plan.width / kCount, true, stream);
      });
    });
  });
}

cudaError_t launch_combine_backward(const CombineBackward& call, cudaStream_t stream) {
  const EntryPlan& plan = call.plan;
  if (plan.batch * plan.entries() == 0) return cudaSuccess;
  const int64_t bytes = row_bytes(plan, call.type);
  const bool aligned = is_multiple(bytes, kChunkBytes, call.rows, call.rows_gradient) &&
                       is_multiple(bytes, kChunkBytes, call.cotangent, nullptr);
  return with_chunks(call.type, aligned, [&](auto* null, auto count) {
    constexpr int kCount = decltype(count)::value;
    return with_slots<kCount>(plan.slots, [&](auto slots) {
      using T = std::remove_pointer_t<decltype(null)>;
      const auto kernel = combine_backward_kernel<T, kCount, decltype(slots)::value>;
      return launch(kernel, call, plan.width / kCount, false, stream);
    });
  });
}

}  // namespace jax_router
