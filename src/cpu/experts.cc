// `experts` on the CPU. A task goes over the experts that any of its tokens has chosen: it brings
// their columns of w2 into a panel of float32, multiplies the rows of their tokens by it, a few at
// a time, and adds the products, times their weights, to the totals of the tokens.

#include "experts.h"

#include <cstring>
#include <type_traits>

#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

constexpr int64_t kTokens = 256;  // of a task, so that totals and sums stay in the second cache
constexpr int64_t kWidth = 64;    // columns of a task: two cache lines of bfloat16
constexpr int64_t kDepth = 256;   // rows of a panel
constexpr int64_t kMostRows = 4;  // tokens that are multiplied at a time

int64_t blocks_of(const Experts& call) { return (call.tokens + kTokens - 1) / kTokens; }
int64_t tiles_of(const Experts& call) { return (call.width + kWidth - 1) / kWidth; }

// ---- the tokens of every expert ----

// For each block of tokens and each expert: where its tokens begin among all chosen ones. The last
// offset is their number.
struct Chosen {
  int64_t* offsets;  // [batch * blocks * experts + 1]
  int32_t* tokens;   // in their block, ascending for each expert
};

Chosen take_chosen(const Experts& call, Arena& arena) {
  Chosen chosen;
  chosen.offsets = arena.take<int64_t>(call.batch * blocks_of(call) * call.experts + 1);
  chosen.tokens = arena.take<int32_t>(call.batch * call.tokens * call.experts);
  return chosen;
}

Chosen chosen_in(const Experts& call, const void* shared) {
  Arena arena(const_cast<void*>(shared));
  return take_chosen(call, arena);
}

size_t shared_bytes(const Experts& call) {
  Arena arena(nullptr);
  take_chosen(call, arena);
  return arena.used();
}

void prepare(const Experts& call, void* shared) {
  const Chosen chosen = chosen_in(call, shared);
  const int64_t blocks = blocks_of(call);
  int64_t* offset = chosen.offsets;
  int64_t count = 0;
  for (int64_t row = 0; row < call.batch * blocks; ++row) {
    const int64_t first = row % blocks * kTokens;
    const int64_t tokens = call.tokens - first < kTokens ? call.tokens - first : kTokens;
    const float* alpha = call.alpha + (row / blocks * call.tokens + first) * call.experts;
    for (int64_t e = 0; e < call.experts; ++e) {
      *offset++ = count;
      for (int64_t t = 0; t < tokens; ++t) {
        if (alpha[t * call.experts + e] != 0.0f) chosen.tokens[count++] = static_cast<int32_t>(t);
      }
    }
  }
  *offset = count;
}

int64_t tasks(const Experts& call) { return call.batch * blocks_of(call) * tiles_of(call); }

// Multiply-adds of an average task, those for the panels included, in vectors.
int64_t task_cost(const Experts& call, const void* shared) {
  const int64_t rows = call.batch * blocks_of(call);
  if (rows == 0) return 1;
  const int64_t pairs = chosen_in(call, shared).offsets[rows * call.experts] / rows;
  return 1 + (pairs + call.experts) * call.depth * kWidth / 8;
}

// ---- products ----

struct Memory {
  float* totals;  // [kTokens, kWidth]
  float* sums;    // [kTokens, kWidth] of one expert
  float* panel;   // [kDepth, kWidth] of w2
  float* rows;    // [kMostRows, kDepth] of h
};

Memory take_memory(Arena& arena) {
  Memory memory;
  memory.totals = arena.take<float>(kTokens * kWidth);
  memory.sums = arena.take<float>(kTokens * kWidth);
  memory.panel = arena.take<float>(kDepth * kWidth);
  memory.rows = arena.take<float>(kMostRows * kDepth);
  return memory;
}

size_t scratch_bytes(const Experts&) {
  Arena arena(nullptr);
  take_memory(arena);
  return arena.used();
}

template <typename T>
inline void widen(const T* __restrict row, int64_t size, float* __restrict values) {
  JAX_ROUTER_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) values[i] = bits_float(load_bits(row, i));
}

// Adds the products of kRows rows and the panel to the sums of the rows, kColumns at a time: so
// many that their sums fill half of the vector registers.
template <int64_t kRows>
void multiply_rows(const float* __restrict rows, const float* __restrict panel, int64_t depth,
                   float* __restrict sums) {
  constexpr int64_t kColumns = kWidth / kRows;
  for (int64_t first = 0; first < kWidth; first += kColumns) {
    alignas(64) float sum[kRows][kColumns];
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < kColumns; ++j) sum[r][j] = sums[r * kWidth + first + j];
    }
    for (int64_t i = 0; i < depth; ++i) {
      JAX_ROUTER_UNROLL
      for (int64_t r = 0; r < kRows; ++r) {
        const float x = rows[r * kDepth + i];
        JAX_ROUTER_UNROLL
        for (int64_t j = 0; j < kColumns; ++j) {
          sum[r][j] = multiply_add(x, panel[i * kWidth + first + j], sum[r][j]);
        }
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < kColumns; ++j) sums[r * kWidth + first + j] = sum[r][j];
    }
  }
}

// `depth` rows of `columns` elements of an expert's w2, zeros beside them.
template <typename T>
void fill_panel(const T* w2, int64_t width, int64_t depth, int64_t columns, float* panel) {
  for (int64_t i = 0; i < depth; ++i) {
    float* row = panel + i * kWidth;
    if (columns == kWidth) {
      widen(w2 + i * width, kWidth, row);
    } else {
      widen(w2 + i * width, columns, row);
      std::memset(row + columns, 0, static_cast<size_t>(kWidth - columns) * sizeof(float));
    }
  }
}

// The sums [count, kWidth] of an expert's tokens. `h` is its part of the first token of the block,
// `stride` what lies between two tokens, `w2` its first column of the tile.
template <typename T>
void multiply_expert(const Experts& call, const T* h, int64_t stride, const int32_t* tokens,
                     int64_t count, const T* w2, int64_t columns, const Memory& memory) {
  std::memset(memory.sums, 0, static_cast<size_t>(count * kWidth) * sizeof(float));
  for (int64_t begin = 0; begin < call.depth; begin += kDepth) {
    const int64_t depth = call.depth - begin < kDepth ? call.depth - begin : kDepth;
    fill_panel(w2 + begin * call.width, call.width, depth, columns, memory.panel);
    for (int64_t t = 0; t < count;) {
      const int64_t rows = count - t >= 4 ? 4 : count - t >= 2 ? 2 : 1;
      for (int64_t r = 0; r < rows; ++r) {
        widen(h + tokens[t + r] * stride + begin, depth, memory.rows + r * kDepth);
      }
      float* sums = memory.sums + t * kWidth;
      if (rows == 4) {
        multiply_rows<4>(memory.rows, memory.panel, depth, sums);
      } else if (rows == 2) {
        multiply_rows<2>(memory.rows, memory.panel, depth, sums);
      } else {
        multiply_rows<1>(memory.rows, memory.panel, depth, sums);
      }
      t += rows;
    }
  }
}

template <typename T>
void store_totals(const float* __restrict totals, int64_t size, T* __restrict row) {
  JAX_ROUTER_INDEPENDENT
  for (int64_t j = 0; j < size; ++j) store_value(row, j, totals[j]);
}

template <typename T>
void run_task(const Experts& call, const Chosen& chosen, int64_t task, const Memory& memory) {
  const int64_t blocks = blocks_of(call);
  // Tasks of the same columns follow each other, so that w2 is read from memory once.
  const int64_t block = task % blocks;
  const int64_t tile = task / blocks % tiles_of(call);
  const int64_t batch = task / blocks / tiles_of(call);
  const int64_t first = block * kTokens;
  const int64_t tokens = call.tokens - first < kTokens ? call.tokens - first : kTokens;
  const int64_t left = tile * kWidth;
  const int64_t columns = call.width - left < kWidth ? call.width - left : kWidth;
  const int64_t token = batch * call.tokens + first;
  const int64_t stride = call.experts * call.depth;
  const T* h = static_cast<const T*>(call.h) + token * stride;
  const T* w2 = static_cast<const T*>(call.w2) + batch * stride * call.width + left;
  const float* alpha = call.alpha + token * call.experts;
  const int64_t* offsets = chosen.offsets + (batch * blocks + block) * call.experts;
  std::memset(memory.totals, 0, static_cast<size_t>(tokens * kWidth) * sizeof(float));
  for (int64_t e = 0; e < call.experts; ++e) {
    const int64_t count = offsets[e + 1] - offsets[e];
    if (count == 0) continue;
    const int32_t* members = chosen.tokens + offsets[e];
    multiply_expert(call, h + e * call.depth, stride, members, count,
                    w2 + e * call.depth * call.width, columns, memory);
    for (int64_t t = 0; t < count; ++t) {
      const float weight = alpha[members[t] * call.experts + e];
      const float* __restrict sums = memory.sums + t * kWidth;
      float* __restrict totals = memory.totals + members[t] * kWidth;
      for (int64_t j = 0; j < kWidth; ++j) totals[j] = multiply_add(weight, sums[j], totals[j]);
    }
  }
  with_type(call.result_type, [&](auto* type) {
    auto* result = static_cast<decltype(type)>(call.result) + token * call.width + left;
    for (int64_t t = 0; t < tokens; ++t) {
      store_totals(memory.totals + t * kWidth, columns, result + t * call.width);
    }
  });
}

void run(const Experts& call, const void* shared, int64_t begin, int64_t end, void* scratch) {
  const Chosen chosen = chosen_in(call, shared);
  Arena arena(scratch);
  const Memory memory = take_memory(arena);
  with_type(call.type, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    for (int64_t task = begin; task < end; ++task) run_task<T>(call, chosen, task, memory);
  });
}

}  // namespace

ExpertsKernel experts_kernel() {
  return {shared_bytes, prepare, tasks, task_cost, scratch_bytes, run};
}

}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router
