// The forward of `route`, `dense` and `stats` on the CPU. Kernels know pointers, sizes and options;
// module.cc binds them to XLA.

#include "route.h"

#include <cstring>
#include <type_traits>

#include "dense.h"
#include "rows.h"
#include "select.h"
#include "stats.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

struct Row {
  int64_t padded;
  int64_t scored;  // experts, rounded up for logits and scores
  int64_t padded_k;
  int32_t* keys;  // selection keys, padded with kNoKey
  float* logits;  // where scores are needed: float32, NaN has become -inf, padded with -inf
  float* scores;  // where they are needed
  float largest;  // of `stats` alone: logit, at most the largest float
  float total;    // of the softmax terms, where the row has these; 0 if all logits are -inf
  float* group_scores;
  bool* group_kept;
  float* slot;           // logits of the chosen, then their weights
  int32_t* slot_expert;  // E where the slot is invalid
  bool* slot_active;     // whether the slot's key lies above -inf
  float* sums;           // of `dense` alone: [experts], zero between rows
  float* terms;          // of `stats` alone: softmax terms
  Selection selection;
};

Row take_row(Arena& arena, const RouteForward& call, const RouteOptions& options) {
  Row row;
  row.padded = round_up(call.experts, kRowMultiple);
  row.scored = round_up(call.experts, kScoreMultiple);
  row.padded_k = round_up(options.k, 8);
  row.keys = arena.take<int32_t>(row.padded);
  row.logits = arena.take<float>(row.scored);
  row.scores = arena.take<float>(row.scored);
  row.group_scores = arena.take<float>(options.group_count);
  row.group_kept = arena.take<bool>(options.group_count);
  row.slot = arena.take<float>(row.padded_k);
  row.slot_expert = arena.take<int32_t>(row.padded_k);
  row.slot_active = arena.take<bool>(row.padded_k);
  row.sums = arena.take<float>(is_dense(call) ? call.experts : 0);
  row.terms = arena.take<float>(has_stats(call) ? row.scored : 0);
  row.selection.keys = arena.take<int32_t>(row.padded);
  row.selection.ids = arena.take<int32_t>(row.padded);
  row.selection.survivor_keys = arena.take<int32_t>(row.padded);
  row.selection.survivor_ids = arena.take<int32_t>(row.padded);
  row.selection.pairs = arena.take<int64_t>(row.padded);
  return row;
}

// ---- loads ----

// Marks a NaN until the keys are final: under a bias a -inf logit can be chosen, a NaN cannot.
constexpr int32_t kNanKey = kLowestKey - 1;

// Whether keys or weights need the score of every expert, not only of the chosen.
bool needs_scores(const RouteForward& call, const RouteOptions& options) {
  if (options.dense_gradient()) return true;
  if (has_stats(call) && options.score != Score::kSoftmax) return true;
  if (call.given != nullptr) return false;
  if (call.bias != nullptr) return true;
  const bool summed = options.group_count > 0 && options.group_terms() > 1;
  return summed && (options.score == Score::kSigmoid || options.score == Score::kSqrtSoftplus);
}

// Keys of the logits, NaN marked if the keys are not final yet, and the scores where they are
// needed.
template <typename T>
void load_row(const RouteForward& call, const RouteOptions& options, const T* __restrict logits,
              Row& row) {
  const bool scored = needs_scores(call, options);
  if (call.given != nullptr && !scored && !has_stats(call)) return;
  const bool final_keys = call.bias == nullptr && options.group_count == 0;
  const int32_t nan_key = final_keys ? kLowestKey : kNanKey;
  int32_t* __restrict keys = row.keys;
  for (int64_t e = 0; e < call.experts; ++e) {
    const int32_t bits = load_bits(logits, e);
    keys[e] = (bits & 0x7fffffff) > 0x7f800000 ? nan_key : flip_order(bits);
  }
  for (int64_t e = call.experts; e < row.padded; ++e) keys[e] = kNoKey;
  if (!scored && !has_stats(call)) return;
  for (int64_t e = 0; e < row.scored; ++e) {
    row.logits[e] = float_from_key(keys[e] < kLowestKey ? kLowestKey : keys[e]);
  }
  if (has_stats(call)) {
    row.largest = largest_of(row.logits, row.scored);
    row.total = softmax_terms(row.logits, row.scored, row.largest, row.terms);
  }
  if (!scored) return;
  if (has_stats(call) && options.score == Score::kSoftmax) {
    const float total = row.total > 0.0f ? row.total : 1.0f;
    for (int64_t e = 0; e < row.scored; ++e) row.scores[e] = row.terms[e] / total;
  } else {
    const float total = score_row(row.logits, row.scored, options.score, row.scores);
    if (options.score == Score::kSoftmax) row.total = total;
  }
}

// ---- groups ----

float sum_of_largest(const int32_t* keys, int64_t count, int64_t terms, int64_t* pairs) {
  if (terms > count) return -kInfinity;
  if (terms <= 2) {
    int32_t first = kNoKey;
    int32_t second = kNoKey;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t loser = keys[i] < first ? keys[i] : first;
      second = loser > second ? loser : second;
      first = keys[i] > first ? keys[i] : first;
    }
    const float best = float_from_key(first);
    return terms == 1 ? best : add_keys(best, float_from_key(second));
  }
  for (int64_t i = 0; i < count; ++i) pairs[i] = pack(keys[i], 0);
  std::partial_sort(pairs, pairs + terms, pairs + count, Descending());
  float sum = float_from_key(packed_key(pairs[0]));
  for (int64_t i = 1; i < terms; ++i) sum = add_keys(sum, float_from_key(packed_key(pairs[i])));
  return sum;
}

// Keeps the best groups: the keys of all others become -inf. False if fewer than `group_keep` group
// scores lie above -inf. `group_keys` are what the group scores add up.
bool limit_to_groups(Row& row, const int32_t* group_keys, int64_t experts,
                     const RouteOptions& options) {
  const int64_t count = options.group_count;
  const int64_t size = experts / count;
  int64_t* pairs = row.selection.pairs;
  for (int64_t g = 0; g < count; ++g) {
    row.group_scores[g] = sum_of_largest(group_keys + g * size, size, options.group_terms(), pairs);
  }
  for (int64_t g = 0; g < count; ++g) {
    pairs[g] = pack(key_from_float(row.group_scores[g]), static_cast<int32_t>(g));
  }
  std::partial_sort(pairs, pairs + options.group_keep, pairs + count, Descending());
  std::memset(row.group_kept, 0, static_cast<size_t>(count));
  for (int64_t i = 0; i < options.group_keep; ++i) row.group_kept[packed_id(pairs[i])] = true;
  for (int64_t g = 0; g < count; ++g) {
    if (row.group_kept[g]) continue;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) row.keys[e] = kLowestKey;
  }
  return packed_key(pairs[options.group_keep - 1]) > kLowestKey;
}

// ---- choice ----

// Keys of scores plus bias (null: none) into `out`; NaN logits, still marked in row.keys, get -inf.
void score_keys(const Row& row, const float* __restrict scores, const float* __restrict bias,
                int64_t experts, int32_t* out) {
  for (int64_t e = 0; e < experts; ++e) {
    const float key = bias == nullptr ? scores[e] : add_keys(scores[e], bias[e]);
    out[e] = row.keys[e] == kNanKey ? kLowestKey : key_from_float(key);
  }
}

// Turns marked logit keys into final selection keys. False if the row is degenerate by its groups.
bool finish_keys(const RouteForward& call, const RouteOptions& options, const float* bias,
                 Row& row) {
  const int32_t* group_keys = row.keys;
  if (bias != nullptr) {
    const float* scores = options.score == Score::kNone ? row.logits : row.scores;
    score_keys(row, scores, bias, call.experts, row.keys);
  } else {
    const bool logits_are_keys = options.score == Score::kNone ||
                                 (options.score == Score::kSoftmax && options.renormalize) ||
                                 options.group_terms() == 1;
    if (options.group_count > 0 && !logits_are_keys) {
      score_keys(row, row.scores, nullptr, call.experts, row.selection.keys);
      group_keys = row.selection.keys;
    }
    for (int64_t e = 0; e < call.experts; ++e) {
      row.keys[e] = row.keys[e] < kLowestKey ? kLowestKey : row.keys[e];
    }
  }
  if (options.group_count == 0) return true;
  return limit_to_groups(row, group_keys, call.experts, options);
}

enum class Outcome { kChosen, kUniform, kPadding };

// Chooses the experts of a loaded row into its slots. kUniform: the row has no key above -inf.
Outcome choose(const RouteForward& call, const RouteOptions& options, int64_t token, Row& row) {
  bool enough = true;
  if (call.bias != nullptr) {
    const float* bias = call.bias + token / call.tokens_per_batch * call.experts;
    enough = finish_keys(call, options, bias, row);
  } else if (options.group_count > 0) {
    enough = finish_keys(call, options, nullptr, row);
  }
  select(row.keys, call.experts, options.k, row.selection);
  if (!enough || row.selection.keys[0] <= kLowestKey) {
    for (int64_t i = 0; i < options.k; ++i) row.slot_expert[i] = static_cast<int32_t>(i);
    return Outcome::kUniform;
  }
  for (int64_t i = 0; i < options.k; ++i) {
    row.slot_expert[i] = row.selection.ids[i];
    row.slot_active[i] = row.selection.keys[i] > kLowestKey;
  }
  return Outcome::kChosen;
}

// Takes the experts given for a row. An expert out of range becomes E and is inactive.
template <typename T>
Outcome take_given(const RouteForward& call, const RouteOptions& options, const T* logits,
                   int64_t token, Row& row) {
  const int32_t* given = call.given + token * options.k;
  bool any_valid = false;
  bool any_active = false;
  for (int64_t i = 0; i < options.k; ++i) {
    const bool valid = given[i] >= 0 && given[i] < call.experts;
    row.slot_expert[i] = valid ? given[i] : static_cast<int32_t>(call.experts);
    row.slot_active[i] = valid && key_from_bits(load_bits(logits, given[i])) > kLowestKey;
    any_valid |= valid;
    any_active |= row.slot_active[i];
  }
  return any_valid && !any_active ? Outcome::kUniform : Outcome::kChosen;
}

// ---- weights ----

// Softmax over the active slots, in place.
void softmax_slots(Row& row) {
  float largest = -kLargest;
  for (int64_t i = 0; i < row.padded_k; ++i) {
    largest = row.slot[i] > largest ? row.slot[i] : largest;
  }
  for (int64_t i = 0; i < row.padded_k; ++i) row.slot[i] = exp_nonpositive(row.slot[i] - largest);
  const float total = sum_slots(row.slot, row.padded_k);
  const float divisor = total > 0.0f ? total : 1.0f;
  for (int64_t i = 0; i < row.padded_k; ++i) row.slot[i] /= divisor;
}

// Weighs the slots of a row, before the scale. Returns the normalizer.
template <typename T>
float weigh(const RouteOptions& options, const T* logits, Row& row) {
  const int64_t k = options.k;
  if (options.dense_gradient()) {
    for (int64_t i = 0; i < k; ++i) {
      row.slot[i] = row.slot_active[i] ? row.scores[row.slot_expert[i]] : 0.0f;
    }
    return row.total > 0.0f ? row.total : 1.0f;
  }
  for (int64_t i = 0; i < k; ++i) {
    const float x = row.slot_active[i] ? bits_float(load_bits(logits, row.slot_expert[i])) : 0.0f;
    const float bounded = x < kLargest ? x : kLargest;
    row.slot[i] = row.slot_active[i] ? bounded : -kInfinity;
  }
  for (int64_t i = k; i < row.padded_k; ++i) row.slot[i] = -kInfinity;
  if (options.score == Score::kSoftmax) {
    softmax_slots(row);
    return 1.0f;
  }
  score_row(row.slot, row.padded_k, options.score, row.slot);
  if (!options.renormalize) return 1.0f;
  const float total = sum_slots(row.slot, row.padded_k) + kEpsilon;
  for (int64_t i = 0; i < k; ++i) row.slot[i] /= total;
  return total;
}

// ---- results ----

void write_row(const RouteForward& call, const RouteOptions& options, int64_t token,
               Outcome outcome, float normalizer, const Row& row) {
  const int64_t k = options.k;
  float* weights = call.weights + token * k;
  for (int64_t i = 0; i < k; ++i) {
    const bool valid = row.slot_expert[i] < call.experts;
    // Adding 0 turns an honest -0 into +0: -0 marks a slot without gradient.
    const float weight = row.slot[i] * options.scale + 0.0f;
    if (outcome == Outcome::kUniform) {
      weights[i] = valid ? 1.0f / static_cast<float>(k) : 0.0f;
    } else {
      weights[i] = row.slot_active[i] ? weight : (valid ? -0.0f : 0.0f);
    }
  }
  call.normalizer[token] = outcome == Outcome::kChosen ? normalizer : __builtin_nanf("");
  with_index(call.index_bytes, [&](auto* type) {
    using Index = typename std::remove_pointer<decltype(type)>::type;
    Index* indices = static_cast<Index*>(call.indices) + token * k;
    for (int64_t i = 0; i < k; ++i) indices[i] = static_cast<Index>(row.slot_expert[i]);
  });
}

// Adds a token to the statistics of its block.
void add_statistics(const RouteForward& call, const RouteOptions& options, int64_t token, bool real,
                    const Row& row, const Sums& sums) {
  if (!real) {
    call.stats.softmax[token] = {0.0f, 0.0f};
    return;
  }
  for (int64_t i = 0; i < options.k; ++i) {
    if (row.slot_expert[i] < call.experts) ++sums.counts[row.slot_expert[i]];
  }
  call.stats.softmax[token] = add_token(row.largest, row.total, sums);
  if (!(row.total > 0.0f)) return;
  if (options.score == Score::kSoftmax) {
    add_probabilities(row.terms, 1.0f / row.total, call.experts, sums.scores);
  } else {
    const float total = sum_row(row.scores, row.scored) + kEpsilon;
    add_shares(row.scores, total, call.experts, sums.scores);
  }
}

// `sums`: of the token's block, where there are statistics.
template <typename T>
void forward_row(const RouteForward& call, const RouteOptions& options, int64_t token,
                 const Sums& sums, Row& row) {
  Outcome outcome = Outcome::kPadding;
  float normalizer = 0.0f;
  const bool real = call.where == nullptr || call.where[token];
  if (real) {
    const T* logits = static_cast<const T*>(call.logits) + token * call.experts;
    load_row(call, options, logits, row);
    outcome = call.given == nullptr ? choose(call, options, token, row)
                                    : take_given(call, options, logits, token, row);
    if (outcome == Outcome::kChosen) normalizer = weigh(options, logits, row);
  } else {
    for (int64_t i = 0; i < options.k; ++i) {
      row.slot_expert[i] = static_cast<int32_t>(call.experts);
      row.slot_active[i] = false;
    }
  }
  write_row(call, options, token, outcome, normalizer, row);
  if (is_dense(call)) write_dense_row<T>(call, options.k, token, row.slot_expert, row.sums);
  if (has_stats(call)) add_statistics(call, options, token, real, row, sums);
}

void forward(const RouteForward& call, const RouteOptions& options, int64_t begin, int64_t end,
             void* scratch) {
  Arena arena(scratch);
  Row row = take_row(arena, call, options);
  if (is_dense(call)) std::memset(row.sums, 0, static_cast<size_t>(call.experts) * sizeof(float));
  with_type(call.logits_type, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    for (int64_t token = begin; token < end; ++token) {
      forward_row<T>(call, options, token, {}, row);
    }
  });
}

// The same for blocks of tokens, with their statistics.
void forward_blocks(const RouteForward& call, const RouteOptions& options, int64_t begin,
                    int64_t end, void* scratch) {
  Arena arena(scratch);
  Row row = take_row(arena, call, options);
  const int64_t blocks = blocks_of_batch(call.tokens_per_batch);
  const int64_t size = tokens_of_block(call.tokens_per_batch);
  with_type(call.logits_type, [&](auto* type) {
    using T = typename std::remove_pointer<decltype(type)>::type;
    for (int64_t block = begin; block < end; ++block) {
      const Sums sums = block_sums(call, block);
      clear(sums, call.experts);
      const int64_t batch = block / blocks * call.tokens_per_batch;
      const int64_t first = batch + block % blocks * size;
      const int64_t last = std::min(first + size, batch + call.tokens_per_batch);
      for (int64_t token = first; token < last; ++token) {
        forward_row<T>(call, options, token, sums, row);
      }
    }
  });
}

void finish_stats(const RouteForward& call) {
  for (int64_t batch = 0; batch < call.stats.batches; ++batch) add_blocks(call, batch);
}

size_t forward_scratch(const RouteForward& call, const RouteOptions& options) {
  Arena arena(nullptr);
  take_row(arena, call, options);
  return arena.used();
}

}  // namespace

RouteForwardKernel route_forward_kernel() { return {forward_scratch, forward}; }

StatsKernel stats_kernel() { return {{forward_scratch, forward_blocks}, finish_stats}; }

}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router
