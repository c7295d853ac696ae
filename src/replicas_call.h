// The replicas of experts, one call of `assign_replicas`, and the choice of a replica that the CPU
// and the CUDA kernels share.

#ifndef JAX_ROUTER_REPLICAS_CALL_H_
#define JAX_ROUTER_REPLICAS_CALL_H_

#include <cstdint>

#include "host_device.h"

namespace jax_router {

// The order of each enumeration is the order of the names in jax_router/_replicas.py.
enum class Policy : int { kHash, kXorshift };
enum class Load : int { kLogical, kPhysical };

// Replicas for `batch` rows of tokens, and what is made of the experts of these.
struct Replicas {
  const int32_t* table;    // [batch, num_experts, width]
  const int32_t* counts;   // [batch, num_experts]
  const uint32_t* offset;  // [batch]: index of the first token
  int64_t batch;
  int64_t num_experts;  // fits int32
  int64_t width;        // fits int32
  int32_t num_physical;
  Policy policy;
  Load load_of;
  int64_t bins;       // of a row of load; fits int32
  int32_t* physical;  // [batch, tokens, slots]
  int32_t* load;      // [batch, bins]
};

// Every row has `tokens` tokens with `slots` ids each. Where is null if absent.
struct ReplicasCall : Replicas {
  const int32_t* experts;  // [batch, tokens, slots]
  const bool* where;       // [batch, tokens]
  int64_t tokens;
  int64_t slots;
};

// A bijection of 32-bit integers, MurmurHash3's finalizer.
JAX_ROUTER_HOST_DEVICE inline uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// The number that picks a replica of an expert for a token.
JAX_ROUTER_HOST_DEVICE inline uint32_t draw_replica(Policy policy, uint32_t token, int32_t expert) {
  if (policy == Policy::kHash) return mix_bits(token + 0x9e3779b9u * static_cast<uint32_t>(expert));
  token ^= token >> 7;
  token ^= token << 9;
  return token ^ (token >> 13);
}

struct Replica {
  int32_t slot;  // num_physical: none
  int32_t bin;   // of the load; -1: not counted
};

// The replica of an expert for a token. `table` and `counts` are those of its batch row.
JAX_ROUTER_HOST_DEVICE inline Replica find_replica(const Replicas& replicas, const int32_t* table,
                                                   const int32_t* counts, uint32_t token,
                                                   int32_t expert) {
  const Replica none = {replicas.num_physical, -1};
  if (static_cast<uint32_t>(expert) >= static_cast<uint32_t>(replicas.num_experts)) return none;
  const int32_t count = counts[expert];
  if (count < 1 || count > replicas.width) return none;
  const uint32_t choice =
      draw_replica(replicas.policy, token, expert) % static_cast<uint32_t>(count);
  const int32_t slot = table[expert * replicas.width + choice];
  if (static_cast<uint32_t>(slot) >= static_cast<uint32_t>(replicas.num_physical)) return none;
  return {slot, replicas.load_of == Load::kLogical ? expert : slot};
}

}  // namespace jax_router

#endif  // JAX_ROUTER_REPLICAS_CALL_H_
