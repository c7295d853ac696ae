// `plan` on the CPU: a counting sort. Two halves of the entries are counted and scattered side by
// side, each with its own counters: one that is raised for every entry must wait for its own last
// value, and two such chains hide each other where one expert has them all.

#include "plan.h"

#include <cstring>

namespace jax_router {
namespace {

// A half has counters of its own, which must cost less than its entries.
bool halved(const PlanCall& call) { return call.experts < call.entries / 2; }

template <int kParts>
void plan_row(const PlanCall& call, int64_t row, int32_t* offsets) {
  const uint32_t experts = static_cast<uint32_t>(call.experts);
  const int64_t columns = call.experts + 1;
  const int64_t entries = call.entries;
  const int64_t part = entries / kParts;
  const int32_t* ids = call.ids + row * entries;
  int32_t* order = call.order + row * entries;
  int32_t* inverse = call.inverse + row * entries;
  int32_t* sizes = call.group_sizes + row * call.experts;

  int32_t* last = offsets + (kParts - 1) * columns;
  std::memset(offsets, 0, static_cast<size_t>(kParts * columns) * sizeof(int32_t));
  for (int64_t i = 0; i < part; ++i) {
    for (int p = 0; p < kParts; ++p) ++offsets[p * columns + group_of(ids[p * part + i], experts)];
  }
  for (int64_t f = kParts * part; f < entries; ++f) ++last[group_of(ids[f], experts)];

  int32_t position = 0;
  for (int64_t e = 0; e < columns; ++e) {
    const int32_t start = position;
    for (int p = 0; p < kParts; ++p) {
      const int32_t count = offsets[p * columns + e];
      offsets[p * columns + e] = position;
      position += count;
    }
    if (e < call.experts) sizes[e] = position - start;
  }

  const auto place = [=](int64_t f, int32_t* own) {
    const int32_t target = own[group_of(ids[f], experts)]++;
    inverse[f] = target;
    order[target] = static_cast<int32_t>(f);
  };
  for (int64_t i = 0; i < part; ++i) {
    for (int p = 0; p < kParts; ++p) place(p * part + i, offsets + p * columns);
  }
  for (int64_t f = kParts * part; f < entries; ++f) place(f, last);
}

}  // namespace

int64_t plan_cost(const PlanCall& call) { return 4 * call.entries + call.experts; }

size_t plan_scratch_bytes(const PlanCall& call) {
  return static_cast<size_t>((halved(call) ? 2 : 1) * (call.experts + 1)) * sizeof(int32_t);
}

void run_plan(const PlanCall& call, int64_t begin, int64_t end, void* scratch) {
  int32_t* offsets = static_cast<int32_t*>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    if (halved(call)) {
      plan_row<2>(call, row, offsets);
    } else {
      plan_row<1>(call, row, offsets);
    }
  }
}

}  // namespace jax_router
