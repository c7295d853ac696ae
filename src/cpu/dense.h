// The results of `dense` on the CPU: a row of probs and of the map, from the slots that the forward
// of `route` has just filled.

#ifndef JAX_ROUTER_CPU_DENSE_H_
#define JAX_ROUTER_CPU_DENSE_H_

#include <cstdint>
#include <cstring>

#include "rows.h"

namespace jax_router {
namespace JAX_ROUTER_ISA {
namespace {

inline bool is_dense(const RouteForward& call) { return call.probs != nullptr; }

// Writes row `token` of probs and map from its k slots: the experts given, E where a slot is
// invalid, and the weights as written. `sums` is scratch, zero before and after: it adds up the
// weights of an expert that was given twice, and adding to 0 turns the mark -0 into +0.
template <typename T>
void write_dense_row(const RouteForward& call, int64_t k, int64_t token, const int32_t* slot_expert,
                     float* sums) {
  const float* weights = call.weights + token * k;
  const int64_t experts = call.experts;
  const int64_t map_bytes = call.map_row_bytes();
  T* probs = static_cast<T*>(call.probs) + token * experts;
  uint8_t* map = call.map + token * map_bytes;
  std::memset(probs, 0, static_cast<size_t>(experts) * sizeof(T));
  std::memset(map, 0, static_cast<size_t>(map_bytes));
  for (int64_t i = 0; i < k; ++i) {
    const int32_t e = slot_expert[i];
    if (e >= experts) continue;
    sums[e] += weights[i];
    store_value(probs, e, sums[e]);
    if (call.map_format == MapFormat::kBytemap) {
      map[e] = 1;
    } else {
      map[e / 8] |= static_cast<uint8_t>(1 << (e % 8));
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    if (slot_expert[i] < experts) sums[slot_expert[i]] = 0.0f;
  }
}

}  // namespace
}  // namespace JAX_ROUTER_ISA
}  // namespace jax_router

#endif  // JAX_ROUTER_CPU_DENSE_H_
