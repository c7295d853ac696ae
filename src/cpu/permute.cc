// `permute`, `combine` and their backward on the CPU. Each goes over the tokens and finds the rows
// of their entries by the inverse of the order, so that a token's own row is read or written once.

#include "permute.h"

#include <cstring>
#include <type_traits>

#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

constexpr int64_t kTile = 1024;  // elements whose sums stay in the first cache
constexpr int64_t kLanes = 32;   // partial sums of a dot product
constexpr int64_t kDotBlock = 16 * kLanes;

size_t bytes_of(LogitsType type) { return type == LogitsType::kFloat32 ? 4 : 2; }

int64_t grouped_entries(const EntryPlan& plan, int64_t batch) {
  const int32_t* sizes = plan.group_sizes + batch * plan.experts;
  int64_t sum = 0;
  for (int64_t e = 0; e < plan.experts; ++e) sum += sizes[e];
  return plan.grouped(sum);
}

// Calls body(token, first row of its batch, entries in a group) for tokens [begin, end).
template <typename Body>
void for_tokens(const EntryPlan& plan, int64_t begin, int64_t end, Body body) {
  int64_t batch = -1;
  int64_t grouped = 0;
  for (int64_t token = begin; token < end; ++token) {
    if (token / plan.tokens != batch) {
      batch = token / plan.tokens;
      grouped = grouped_entries(plan, batch);
    }
    body(token, batch * plan.entries(), grouped);
  }
}

void permute(const Permute& call, int64_t begin, int64_t end) {
  const EntryPlan& plan = call.plan;
  const size_t bytes = static_cast<size_t>(plan.width) * bytes_of(call.type);
  const char* tokens = static_cast<const char*>(call.tokens);
  char* rows = static_cast<char*>(call.rows);
  for_tokens(plan, begin, end, [&](int64_t token, int64_t first, int64_t grouped) {
    const char* source = tokens + static_cast<size_t>(token) * bytes;
    for (int64_t slot = 0; slot < plan.slots; ++slot) {
      const int64_t position = plan.inverse[token * plan.slots + slot];
      if (position < 0 || position >= plan.entries()) continue;
      char* row = rows + static_cast<size_t>(first + position) * bytes;
      if (position < grouped) {
        std::memcpy(row, source, bytes);
      } else {
        std::memset(row, 0, bytes);
      }
    }
  });
}

template <typename T>
inline float load_value(const T* row, int64_t i) {
  return bits_float(load_bits(row, i));
}

template <typename T>
void add_weighted(const T* __restrict row, float weight, int64_t size, float* __restrict sums) {
  JAX_ROUTER_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) sums[i] = multiply_add(weight, load_value(row, i), sums[i]);
}

template <typename T>
void store_row(const float* __restrict values, int64_t size, T* __restrict row) {
  JAX_ROUTER_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) store_value(row, i, values[i]);
}

template <typename T>
void combine_tokens(const Combine& call, int64_t begin, int64_t end) {
  const EntryPlan& plan = call.plan;
  const T* rows = static_cast<const T*>(call.rows);
  T* tokens = static_cast<T*>(call.tokens);
  for_tokens(plan, begin, end, [&](int64_t token, int64_t first, int64_t grouped) {
    for (int64_t start = 0; start < plan.width; start += kTile) {
      const int64_t size = plan.width - start < kTile ? plan.width - start : kTile;
      alignas(64) float sums[kTile];
      std::memset(sums, 0, static_cast<size_t>(size) * sizeof(float));
      for (int64_t slot = 0; slot < plan.slots; ++slot) {
        const int64_t entry = token * plan.slots + slot;
        const int64_t position = plan.inverse[entry];
        if (position < 0 || position >= grouped) continue;
        const float weight = call.weights == nullptr ? 1.0f : call.weights[entry];
        add_weighted(rows + (first + position) * plan.width + start, weight, size, sums);
      }
      store_row(sums, size, tokens + token * plan.width + start);
    }
  });
}

template <typename T>
void scale_row(const T* __restrict row, float weight, int64_t size, T* __restrict scaled) {
  JAX_ROUTER_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) store_value(scaled, i, weight * load_value(row, i));
}

template <typename T>
inline void add_products(const T* __restrict a, const T* __restrict b, int64_t count,
                         float* __restrict sums) {
  for (int64_t j = 0; j < count; ++j) {
    sums[j] = multiply_add(load_value(a, j), load_value(b, j), sums[j]);
  }
}

// Dot product of two rows, in partial sums of blocks, so that the rounding errors of long rows do
// not add up. The order of additions depends on the size alone.
template <typename T>
float dot(const T* a, const T* b, int64_t size) {
  alignas(64) float total[kLanes] = {};
  for (int64_t begin = 0; begin < size; begin += kDotBlock) {
    const int64_t end = begin + kDotBlock < size ? begin + kDotBlock : size;
    alignas(64) float sums[kLanes] = {};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) add_products(a + i, b + i, kLanes, sums);
    add_products(a + i, b + i, end - i, sums);
    for (int64_t j = 0; j < kLanes; ++j) total[j] += sums[j];
  }
  for (int64_t distance = kLanes / 2; distance > 0; distance /= 2) {
    for (int64_t j = 0; j < distance; ++j) total[j] += total[j + distance];
  }
  return total[0];
}

template <typename T>
void combine_backward_tokens(const CombineBackward& call, int64_t begin, int64_t end) {
  const EntryPlan& plan = call.plan;
  const T* rows = static_cast<const T*>(call.rows);
  T* gradients = static_cast<T*>(call.rows_gradient);
  for_tokens(plan, begin, end, [&](int64_t token, int64_t first, int64_t grouped) {
    const T* cotangent = static_cast<const T*>(call.cotangent) + token * plan.width;
    for (int64_t slot = 0; slot < plan.slots; ++slot) {
      const int64_t entry = token * plan.slots + slot;
      const int64_t position = plan.inverse[entry];
      const bool in_group = position >= 0 && position < grouped;
      const int64_t offset = (first + position) * plan.width;
      if (call.weights_gradient != nullptr) {
        call.weights_gradient[entry] = in_group ? dot(cotangent, rows + offset, plan.width) : 0.0f;
      }
      if (gradients == nullptr || position < 0 || position >= plan.entries()) continue;
      if (in_group) {
        scale_row(cotangent, call.weights[entry], plan.width, gradients + offset);
      } else {
        std::memset(gradients + offset, 0, static_cast<size_t>(plan.width) * sizeof(T));
      }
    }
  });
}

void combine(const Combine& call, int64_t begin, int64_t end) {
  with_type(call.type, [&](auto* type) {
    combine_tokens<typename std::remove_pointer<decltype(type)>::type>(call, begin, end);
  });
}

void combine_backward(const CombineBackward& call, int64_t begin, int64_t end) {
  with_type(call.type, [&](auto* type) {
    combine_backward_tokens<typename std::remove_pointer<decltype(type)>::type>(call, begin, end);
  });
}

}  // namespace

TokenKernel<Permute> permute_kernel() { return permute; }

TokenKernel<Combine> combine_kernel() { return combine; }

TokenKernel<CombineBackward> combine_backward_kernel() { return combine_backward; }

}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router
