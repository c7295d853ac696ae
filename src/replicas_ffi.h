// The handlers of `assign_replicas` and `route_and_assign_replicas`: their bindings, and how a call
// is made of operands and results.

#ifndef JAX_ROUTER_REPLICAS_FFI_H_
#define JAX_ROUTER_REPLICAS_FFI_H_

#include <cstdint>
#include <utility>

#include "ffi.h"
#include "options.h"
#include "replicas_call.h"
#include "route_ffi.h"

namespace jax_router {

// The attributes that both have.
struct ReplicaAttributes {
  int64_t num_physical;
  int64_t policy;
  int64_t load;
};

// Adds them to a binding, in their order.
template <typename Binding>
auto bind_replica_attributes(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("num_physical")
      .template Attr<int64_t>("policy")
      .template Attr<int64_t>("load");
}

// The operands, results and attributes of each handler; the context is a thread pool or a stream.
template <typename Context>
auto bind_replicas() {
  return bind_replica_attributes(ffi::Ffi::Bind()
                                     .Ctx<Context>()
                                     .template Arg<ffi::AnyBuffer>()  // experts [*B, T, k]
                                     .template Arg<ffi::AnyBuffer>()  // table [*B, E, R]
                                     .template Arg<ffi::AnyBuffer>()  // counts [*B, E]
                                     .template Arg<ffi::AnyBuffer>()  // offset [*B]
                                     .RemainingArgs()                 // where [*B, T]
                                     .template Ret<ffi::AnyBuffer>()  // physical [*B, T, k]
                                     .template Ret<ffi::AnyBuffer>()  // load [*B, E or P]
                                 )
      .template Attr<bool>("has_where");
}

template <typename Context>
auto bind_route_and_assign_replicas() {
  return bind_replica_attributes(
             bind_options(ffi::Ffi::Bind()
                              .Ctx<Context>()
                              .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
                              .template Arg<ffi::AnyBuffer>()  // table [*B, E, R]
                              .template Arg<ffi::AnyBuffer>()  // counts [*B, E]
                              .template Arg<ffi::AnyBuffer>()  // offset [*B]
                              .RemainingArgs()  // bias [*B, E], where [*B, T], experts [*B, T, k]
                              .template Ret<ffi::AnyBuffer>()  // weights [*B, T, k]
                              .template Ret<ffi::AnyBuffer>()  // experts [*B, T, k]
                              .template Ret<ffi::AnyBuffer>()  // normalizer [*B, T]
                              .template Ret<ffi::AnyBuffer>()  // physical [*B, T, k]
                              .template Ret<ffi::AnyBuffer>()  // load [*B, E or P]
                          ))
      .template Attr<bool>("has_bias")
      .template Attr<bool>("has_where")
      .template Attr<bool>("has_experts");
}

// Fills the replicas of a call whose batch and ids (of all rows together) are known, checking every
// size and type.
inline ffi::Error decode_replica_buffers(const ReplicaAttributes& attributes,
                                         const ffi::AnyBuffer& table, const ffi::AnyBuffer& counts,
                                         const ffi::AnyBuffer& offset,
                                         const ffi::AnyBuffer& physical, const ffi::AnyBuffer& load,
                                         int64_t batch, int64_t ids, Replicas* replicas) {
  if (table.dimensions().size() < 2) return invalid("replica_table must have shape [..., E, R]");
  if (load.dimensions().size() < 1) return invalid("load must have at least one dimension");
  replicas->batch = batch;
  replicas->width = last_dimension(table);
  replicas->num_experts = table.dimensions()[table.dimensions().size() - 2];
  replicas->bins = last_dimension(load);
  if (replicas->num_experts < 1 || replicas->num_experts > INT32_MAX || replicas->width < 1 ||
      replicas->width > INT32_MAX) {
    return invalid("a size is out of range");
  }
  if (attributes.num_physical < 1 || attributes.num_physical > INT32_MAX) {
    return invalid("num_physical is out of range");
  }
  if (attributes.policy < 0 || attributes.policy > static_cast<int64_t>(Policy::kXorshift)) {
    return invalid("policy is out of range");
  }
  if (attributes.load < 0 || attributes.load > static_cast<int64_t>(Load::kPhysical)) {
    return invalid("load is out of range");
  }
  replicas->num_physical = static_cast<int32_t>(attributes.num_physical);
  replicas->policy = static_cast<Policy>(attributes.policy);
  replicas->load_of = static_cast<Load>(attributes.load);
  const int64_t bins =
      replicas->load_of == Load::kLogical ? replicas->num_experts : attributes.num_physical;
  if (replicas->bins != bins) return invalid("load has the wrong size");
  const int64_t rows = batch * replicas->num_experts;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("replica_table", table, rows * replicas->width));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("replica_table", table, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("replica_counts", counts, rows));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("replica_counts", counts, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("token_offset", offset, batch));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("token_offset", offset, ffi::DataType::U32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("physical", physical, ids));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("physical", physical, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("load", load, batch * bins));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("load", load, ffi::DataType::S32));
  replicas->table = static_cast<const int32_t*>(table.untyped_data());
  replicas->counts = static_cast<const int32_t*>(counts.untyped_data());
  replicas->offset = static_cast<const uint32_t*>(offset.untyped_data());
  replicas->physical = static_cast<int32_t*>(physical.untyped_data());
  replicas->load = static_cast<int32_t*>(load.untyped_data());
  return ffi::Error::Success();
}

// Fills a call of `assign_replicas` from its operands and results.
inline ffi::Error decode_replicas(const ReplicaAttributes& attributes, bool has_where,
                                  const ffi::AnyBuffer& experts, const ffi::AnyBuffer& table,
                                  const ffi::AnyBuffer& counts, const ffi::AnyBuffer& offset,
                                  const ffi::RemainingArgs& optional,
                                  const ffi::AnyBuffer& physical, const ffi::AnyBuffer& load,
                                  ReplicasCall* call) {
  *call = ReplicasCall{};
  const auto shape = experts.dimensions();
  if (shape.size() < 2) return invalid("experts must have shape [..., T, k]");
  const BatchShape rows = batch_shape(experts);
  call->slots = last_dimension(experts);
  call->tokens = rows.tokens;
  if (call->slots > INT32_MAX) return invalid("a size is out of range");
  const int64_t tokens = rows.batches * call->tokens;
  JAX_ROUTER_RETURN_IF_ERROR(decode_replica_buffers(
      attributes, table, counts, offset, physical, load, rows.batches, tokens * call->slots, call));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("experts", experts, ffi::DataType::S32));
  if (optional.size() != static_cast<size_t>(has_where)) {
    return invalid("wrong number of operands");
  }
  if (has_where) {
    const auto where = optional.get<ffi::AnyBuffer>(0).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("where", where, tokens));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("where", where, ffi::DataType::PRED));
    call->where = static_cast<const bool*>(where.untyped_data());
  }
  call->experts = static_cast<const int32_t*>(experts.untyped_data());
  return ffi::Error::Success();
}

// The operands and results of `route_and_assign_replicas` besides logits and what may be absent.
struct RouteReplicasBuffers {
  ffi::AnyBuffer table;
  ffi::AnyBuffer counts;
  ffi::AnyBuffer offset;
  ffi::AnyBuffer weights;
  ffi::AnyBuffer experts;
  ffi::AnyBuffer normalizer;
  ffi::AnyBuffer physical;
  ffi::AnyBuffer load;
};

// Fills a call of the forward with replicas.
inline ffi::Error decode_route_and_assign_replicas(
    const RouteOptions& options, const ReplicaAttributes& attributes, bool has_bias, bool has_where,
    bool has_experts, const ffi::AnyBuffer& logits, const ffi::RemainingArgs& optional,
    const RouteReplicasBuffers& buffers, RouteForward* call) {
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_forward(options, has_bias, has_where, has_experts, logits,
                                                  optional, buffers.weights, buffers.experts,
                                                  buffers.normalizer, call));
  const BatchShape rows = batch_shape(logits);
  call->tokens_per_batch = rows.tokens;
  JAX_ROUTER_RETURN_IF_ERROR(decode_replica_buffers(
      attributes, buffers.table, buffers.counts, buffers.offset, buffers.physical, buffers.load,
      rows.batches, call->tokens * options.k, &call->replicas));
  if (call->replicas.num_experts != call->experts) {
    return invalid("replica_table must have the experts of logits");
  }
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_REPLICAS_FFI_H_
