// `assign_replicas` on the CPU. A task assigns the tokens of a batch row, or a part of them, and
// counts its load on its own. Loads are integers: no order of additions changes them.

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

// Assigns tokens [begin, end) of a batch row. Copies of what does not change stay in registers, for
// the compiler sees that no result overwrites them.
template <Policy kPolicy, Load kLoad>
void assign_tokens(const ReplicasCall& given, int64_t row, int64_t begin, int64_t end,
                   int32_t* load) {
  ReplicasCall call = given;
  call.policy = kPolicy;
  call.load_of = kLoad;
  const int32_t* table = call.table + row * call.num_experts * call.width;
  const int32_t* counts = call.counts + row * call.num_experts;
  const bool* where = call.where == nullptr ? nullptr : call.where + row * call.tokens;
  const uint32_t offset = call.offset[row];
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* experts = call.experts + (row * call.tokens + t) * call.slots;
    int32_t* physical = call.physical + (row * call.tokens + t) * call.slots;
    const bool padding = where != nullptr && !where[t];
    const uint32_t token = offset + static_cast<uint32_t>(t);
    for (int64_t j = 0; j < call.slots; ++j) {
      const Replica replica = find_replica(call, table, counts, token, padding ? -1 : experts[j]);
      physical[j] = replica.slot;
      if (replica.bin >= 0) ++load[replica.bin];
    }
  }
}

template <Policy kPolicy>
void assign_counted(const ReplicasCall& call, int64_t row, int64_t begin, int64_t end,
                    int32_t* load) {
  if (call.load_of == Load::kLogical) {
    assign_tokens<kPolicy, Load::kLogical>(call, row, begin, end, load);
  } else {
    assign_tokens<kPolicy, Load::kPhysical>(call, row, begin, end, load);
  }
}

void run_task(const ReplicasCall& call, const Split& split, int64_t task, int32_t* scratch) {
  const int64_t row = task / split.parts;
  const int64_t begin = task % split.parts * split.part_tokens;
  const int64_t limit = begin + split.part_tokens;
  const int64_t end = limit < call.tokens ? limit : call.tokens;
  int32_t* load = call.load + row * call.bins;
  int32_t* own = split.parts == 1 ? load : scratch;
  std::memset(own, 0, static_cast<size_t>(call.bins) * sizeof(int32_t));
  if (call.policy == Policy::kHash) {
    assign_counted<Policy::kHash>(call, row, begin, end, own);
  } else {
    assign_counted<Policy::kXorshift>(call, row, begin, end, own);
  }
  if (split.parts == 1) return;
  for (int64_t i = 0; i < call.bins; ++i) {
    if (own[i] != 0) __atomic_fetch_add(load + i, own[i], __ATOMIC_RELAXED);
  }
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

}  // namespace jax_router
