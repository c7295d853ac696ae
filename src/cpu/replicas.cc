// `assign_replicas` on the CPU. A task assigns the tokens of a batch row, or a part of them, and
// counts its load on its own. Loads are integers: no order of additions changes them. And what
// `route_and_assign_replicas` does with tokens that have just been routed.

#include "replicas.h"

#include <cstring>

namespace jax_router {
namespace {

constexpr int64_t kFewestPartIds = 4096;

struct Split {
  int64_t parts;  // of a batch row
  int64_t part_tokens;
};

Split split_work(const ReplicasCall& call) {
  // A part clears and adds up its own load: that must cost less than its ids.
  const int64_t fewest = 2 * call.bins > kFewestPartIds ? 2 * call.bins : kFewestPartIds;
  Split split;
  split.parts = call.tokens * call.slots / fewest;
  if (split.parts < 1) split.parts = 1;
  split.part_tokens = (call.tokens + split.parts - 1) / split.parts;
  return split;
}

// Some tokens of a batch row, with `slots` ids each. Where is null if absent.
template <typename Index>
struct Tokens {
  int64_t row;
  int64_t begin;  // in the row
  int64_t count;
  int64_t slots;
  const Index* experts;
  const bool* where;
  int32_t* physical;
};

// Assigns them, and calls count(bin) for each that counts. Copies of what does not change stay in
// registers, for the compiler sees that no result overwrites them.
template <Policy kPolicy, Load kLoad, typename Index, typename Count>
void assign_by(const Replicas& given, const Tokens<Index>& tokens, Count count) {
  Replicas replicas = given;
  replicas.policy = kPolicy;
  replicas.load_of = kLoad;
  const int32_t* table = replicas.table + tokens.row * replicas.num_experts * replicas.width;
  const int32_t* counts = replicas.counts + tokens.row * replicas.num_experts;
  const uint32_t first = replicas.offset[tokens.row] + static_cast<uint32_t>(tokens.begin);
  for (int64_t t = 0; t < tokens.count; ++t) {
    const Index* experts = tokens.experts + t * tokens.slots;
    int32_t* physical = tokens.physical + t * tokens.slots;
    const bool padding = tokens.where != nullptr && !tokens.where[t];
    const uint32_t token = first + static_cast<uint32_t>(t);
    for (int64_t j = 0; j < tokens.slots; ++j) {
      const int32_t expert = padding ? -1 : static_cast<int32_t>(experts[j]);
      const Replica replica = find_replica(replicas, table, counts, token, expert);
      physical[j] = replica.slot;
      if (replica.bin >= 0) count(replica.bin);
    }
  }
}

template <typename Index, typename Count>
void assign(const Replicas& replicas, const Tokens<Index>& tokens, Count count) {
  const bool hash = replicas.policy == Policy::kHash;
  if (replicas.load_of == Load::kLogical) {
    hash ? assign_by<Policy::kHash, Load::kLogical>(replicas, tokens, count)
         : assign_by<Policy::kXorshift, Load::kLogical>(replicas, tokens, count);
  } else {
    hash ? assign_by<Policy::kHash, Load::kPhysical>(replicas, tokens, count)
         : assign_by<Policy::kXorshift, Load::kPhysical>(replicas, tokens, count);
  }
}

// Adds a load of one thread to that of all.
void add_load(const int32_t* own, int64_t bins, int32_t* load) {
  for (int64_t i = 0; i < bins; ++i) {
    if (own[i] != 0) __atomic_fetch_add(load + i, own[i], __ATOMIC_RELAXED);
  }
}

void run_task(const ReplicasCall& call, const Split& split, int64_t task, int32_t* scratch) {
  const int64_t row = task / split.parts;
  const int64_t begin = task % split.parts * split.part_tokens;
  const int64_t limit = begin + split.part_tokens;
  const int64_t end = limit < call.tokens ? limit : call.tokens;
  const int64_t first = row * call.tokens + begin;
  int32_t* load = call.load + row * call.bins;
  int32_t* own = split.parts == 1 ? load : scratch;
  std::memset(own, 0, static_cast<size_t>(call.bins) * sizeof(int32_t));
  const Tokens<int32_t> tokens{row,
                               begin,
                               end - begin,
                               call.slots,
                               call.experts + first * call.slots,
                               call.where == nullptr ? nullptr : call.where + first,
                               call.physical + first * call.slots};
  assign(call, tokens, [own](int32_t bin) { ++own[bin]; });
  if (split.parts > 1) add_load(own, call.bins, load);
}

// Assigns routed tokens [begin, end), all of one batch row, with `own` load for one thread.
template <typename Index>
void assign_routed(const RouteForward& call, int64_t k, int64_t begin, int64_t end, int32_t* own) {
  const Replicas& replicas = call.replicas;
  const int64_t row = begin / call.tokens_per_batch;
  int32_t* load = replicas.load + row * replicas.bins;
  // Padding has the expert E.
  const Tokens<Index> tokens{row,
                             begin - row * call.tokens_per_batch,
                             end - begin,
                             k,
                             static_cast<const Index*>(call.indices) + begin * k,
                             nullptr,
                             replicas.physical + begin * k};
  if (replicas.bins > tokens.count * k) {
    assign(replicas, tokens,
           [load](int32_t bin) { __atomic_fetch_add(load + bin, 1, __ATOMIC_RELAXED); });
    return;
  }
  std::memset(own, 0, static_cast<size_t>(replicas.bins) * sizeof(int32_t));
  assign(replicas, tokens, [own](int32_t bin) { ++own[bin]; });
  add_load(own, replicas.bins, load);
}

}  // namespace

int64_t replicas_tasks(const ReplicasCall& call) { return call.batch * split_work(call).parts; }

int64_t replicas_task_cost(const ReplicasCall& call) {
  return 8 * split_work(call).part_tokens * call.slots + call.bins + 1;
}

size_t replicas_scratch_bytes(const ReplicasCall& call) {
  return split_work(call).parts == 1 ? 0 : static_cast<size_t>(call.bins) * sizeof(int32_t);
}

void prepare_replicas(const ReplicasCall& call) {
  if (split_work(call).parts == 1) return;  // a task without parts clears its own row
  const int64_t size = call.batch * call.bins;
  std::memset(call.load, 0, static_cast<size_t>(size) * sizeof(int32_t));
}

void run_replicas(const ReplicasCall& call, int64_t begin, int64_t end, void* scratch) {
  const Split split = split_work(call);
  for (int64_t task = begin; task < end; ++task) {
    run_task(call, split, task, static_cast<int32_t*>(scratch));
  }
}

void prepare_routed_replicas(const Replicas& replicas) {
  const int64_t size = replicas.batch * replicas.bins;
  std::memset(replicas.load, 0, static_cast<size_t>(size) * sizeof(int32_t));
}

size_t routed_replicas_scratch_bytes(const Replicas& replicas, int64_t ids) {
  return static_cast<size_t>(replicas.bins < ids ? replicas.bins : ids) * sizeof(int32_t);
}

void run_routed_replicas(const RouteForward& call, const RouteOptions& options, int64_t begin,
                         int64_t end, void* scratch) {
  int32_t* own = static_cast<int32_t*>(scratch);
  for (int64_t first = begin; first < end;) {
    const int64_t limit = (first / call.tokens_per_batch + 1) * call.tokens_per_batch;
    const int64_t last = limit < end ? limit : end;
    switch (call.index_bytes) {
      case 1:
        assign_routed<uint8_t>(call, options.k, first, last, own);
        break;
      case 2:
        assign_routed<uint16_t>(call, options.k, first, last, own);
        break;
      case 4:
        assign_routed<uint32_t>(call, options.k, first, last, own);
        break;
      default:
        assign_routed<uint64_t>(call, options.k, first, last, own);
    }
    first = last;
  }
}

}  // namespace jax_router
