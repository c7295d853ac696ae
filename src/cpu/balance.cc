// `quantile_histogram` on the CPU. A task counts a tile of experts, so that its bins stay in the
// cache, over all tokens or, where there are too few tiles to keep the threads busy, over a part of
// them. Counts are integers: no order of additions changes them.

#include "balance.h"

#include <cstring>
#include <type_traits>

#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

constexpr int64_t kTile = 16;         // experts of a task: a cache line of float32
constexpr int64_t kEnoughTasks = 64;  // fewer tiles than that are cut into parts
constexpr int64_t kFewestPartTokens = 2048;
constexpr int64_t kBlock = 16 * kTile;
constexpr int64_t kPrefetchRows = 8;

struct Split {
  int64_t tiles;
  int64_t parts;
  int64_t part_tokens;
};

Split split_work(const QuantileHistogram& call) {
  Split split;
  split.tiles = (call.experts + kTile - 1) / kTile;
  const int64_t wanted =
      kEnoughTasks / (call.batch * split.tiles > 0 ? call.batch * split.tiles : 1);
  // A part clears and adds up its own bins: that must cost less than its tokens.
  const int64_t fewest = call.bins > kFewestPartTokens ? call.bins : kFewestPartTokens;
  const int64_t possible = call.tokens / fewest;
  split.parts = wanted < possible ? wanted : possible;
  if (split.parts < 1) split.parts = 1;
  split.part_tokens = (call.tokens + split.parts - 1) / split.parts;
  return split;
}

int64_t tasks(const QuantileHistogram& call) {
  const Split split = split_work(call);
  return call.batch * split.tiles * split.parts;
}

int64_t task_cost(const QuantileHistogram& call) {
  return kTile * (split_work(call).part_tokens + call.bins / 8 + 1);
}

size_t tile_bytes(const QuantileHistogram& call) {
  return static_cast<size_t>(kTile * call.bins) * sizeof(int32_t);
}

size_t scratch_bytes(const QuantileHistogram& call) {
  return split_work(call).parts > 1 ? tile_bytes(call) : 0;
}

// Parts add to what is there; a task without parts clears its own rows.
void prepare(const QuantileHistogram& call) {
  if (split_work(call).parts == 1) return;
  const int64_t size = call.batch * call.experts * call.bins;
  std::memset(call.counts, 0, static_cast<size_t>(size) * sizeof(int32_t));
}

// A logit, NaN as -inf.
template <typename T>
inline float load_number(const T* row, int64_t i) {
  return float_from_key(key_from_bits(load_bits(row, i)));
}

// Tokens that are scored at once, and the cutoff of each as often as it has experts.
struct Block {
  alignas(64) float x[kBlock];
  alignas(64) float y[kBlock];
  alignas(64) float cutoff[kBlock];
  alignas(64) int32_t bin[kBlock];
};

template <Score kScore>
void count_block(const Bins& bins, int64_t width, int64_t size, int64_t experts, Block& block,
                 int32_t* counts) {
  elementwise_scores<kScore>(block.x, size, block.y);
  JAX_ROUTER_INDEPENDENT
  for (int64_t i = 0; i < size; ++i) block.bin[i] = find_bin(bins, block.cutoff[i], block.y[i]);
  for (int64_t i = 0; i < size; i += kTile) {
    for (int64_t j = 0; j < experts; ++j) ++counts[j * width + block.bin[i + j]];
  }
}

// Counts `experts` neighbours over tokens [begin, end) of a batch; `logits` and `counts` start at
// the first of them.
template <typename T, Score kScore>
void count_tokens(const QuantileHistogram& call, const Bins& bins, const T* logits,
                  const float* cutoff, const bool* where, int64_t experts, int64_t begin,
                  int64_t end, int32_t* counts) {
  Block block = {};
  int64_t size = 0;
  for (int64_t token = begin; token < end; ++token) {
    const T* row = logits + token * call.experts;
    if (token + kPrefetchRows < end) __builtin_prefetch(row + kPrefetchRows * call.experts);
    if (cutoff[token] == -kInfinity || (where != nullptr && !where[token])) continue;
    float* x = block.x + size;
    if (experts == kTile) {
      for (int64_t j = 0; j < kTile; ++j) x[j] = load_number(row, j);
    } else {
      for (int64_t j = 0; j < experts; ++j) x[j] = load_number(row, j);
    }
    for (int64_t j = 0; j < kTile; ++j) block.cutoff[size + j] = cutoff[token];
    size += kTile;
    if (size == kBlock) {
      count_block<kScore>(bins, call.bins, size, experts, block, counts);
      size = 0;
    }
  }
  count_block<kScore>(bins, call.bins, size, experts, block, counts);
}

template <typename T>
void count_scored(const QuantileHistogram& call, const Bins& bins, const T* logits,
                  const float* cutoff, const bool* where, int64_t experts, int64_t begin,
                  int64_t end, int32_t* counts) {
  switch (call.score) {
    case Score::kSigmoid:
      return count_tokens<T, Score::kSigmoid>(call, bins, logits, cutoff, where, experts, begin,
                                              end, counts);
    case Score::kSqrtSoftplus:
      return count_tokens<T, Score::kSqrtSoftplus>(call, bins, logits, cutoff, where, experts,
                                                   begin, end, counts);
    default:
      return count_tokens<T, Score::kNone>(call, bins, logits, cutoff, where, experts, begin, end,
                                           counts);
  }
}

void run_task(const QuantileHistogram& call, const Split& split, int64_t task, int32_t* scratch) {
  const int64_t part = task % split.parts;
  const int64_t tile = task / split.parts % split.tiles;
  const int64_t batch = task / split.parts / split.tiles;
  const int64_t first = tile * kTile;
  const int64_t experts = call.experts - first < kTile ? call.experts - first : kTile;
  const int64_t begin = part * split.part_tokens;
  const int64_t limit = begin + split.part_tokens;
  const int64_t end = limit < call.tokens ? limit : call.tokens;
  int32_t* counts = call.counts + (batch * call.experts + first) * call.bins;
  const bool whole = split.parts == 1;
  int32_t* own = whole ? counts : scratch;
  const int64_t size = experts * call.bins;
  std::memset(own, 0, static_cast<size_t>(size) * sizeof(int32_t));
  const Bins bins = make_bins(call.bounds + 2 * batch, call.bins);
  if (!bins.valid) return;
  const float* cutoff = call.cutoff + batch * call.tokens;
  const bool* where = call.where == nullptr ? nullptr : call.where + batch * call.tokens;
  with_type(call.logits_type, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    const T* logits =
        static_cast<const T*>(call.logits) + batch * call.tokens * call.experts + first;
    count_scored<T>(call, bins, logits, cutoff, where, experts, begin, end, own);
  });
  if (whole) return;
  for (int64_t i = 0; i < size; ++i) {
    if (own[i] != 0) __atomic_fetch_add(counts + i, own[i], __ATOMIC_RELAXED);
  }
}

void run(const QuantileHistogram& call, int64_t begin, int64_t end, void* scratch) {
  const Split split = split_work(call);
  for (int64_t task = begin; task < end; ++task) {
    run_task(call, split, task, static_cast<int32_t*>(scratch));
  }
}

}  // namespace

QuantileHistogramKernel quantile_histogram_kernel() {
  return {tasks, task_cost, scratch_bytes, prepare, run};
}

}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router
