// The handler of `assign_replicas`: its binding, and how a call is made of operands and results.

#ifndef JAX_ROUTER_REPLICAS_FFI_H_
#define JAX_ROUTER_REPLICAS_FFI_H_

#include <cstdint>

#include "ffi.h"
#include "replicas_call.h"

namespace jax_router {

// The operands, results and attributes; the context is a thread pool or a stream.
template <typename Context>
auto bind_replicas() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // experts [*B, T, k]
      .template Arg<ffi::AnyBuffer>()  // table [*B, E, R]
      .template Arg<ffi::AnyBuffer>()  // counts [*B, E]
      .template Arg<ffi::AnyBuffer>()  // offset [*B]
      .RemainingArgs()                 // where [*B, T]
      .template Ret<ffi::AnyBuffer>()  // physical [*B, T, k]
      .template Ret<ffi::AnyBuffer>()  // load [*B, E or P]
      .template Attr<int64_t>("num_physical")
      .template Attr<int64_t>("policy")
      .template Attr<int64_t>("load")
      .template Attr<bool>("has_where");
}

struct ReplicasAttributes {
  int64_t num_physical;
  int64_t policy;
  int64_t load;
  bool has_where;
};

// Fills a call from its operands and results, checking every size and type.
inline ffi::Error decode_replicas(const ReplicasAttributes& attributes,
                                  const ffi::AnyBuffer& experts, const ffi::AnyBuffer& table,
                                  const ffi::AnyBuffer& counts, const ffi::AnyBuffer& offset,
                                  const ffi::RemainingArgs& optional,
                                  const ffi::AnyBuffer& physical, const ffi::AnyBuffer& load,
                                  ReplicasCall* call) {
  *call = ReplicasCall{};
  const auto shape = experts.dimensions();
  if (shape.size() < 2) return invalid("experts must have shape [..., T, k]");
  if (table.dimensions().size() < 2) return invalid("replica_table must have shape [..., E, R]");
  if (load.dimensions().size() < 1) return invalid("load must have at least one dimension");
  call->slots = shape[shape.size() - 1];
  call->tokens = shape[shape.size() - 2];
  call->batch = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) call->batch *= shape[i];
  call->width = last_dimension(table);
  call->num_experts = table.dimensions()[table.dimensions().size() - 2];
  call->bins = last_dimension(load);
  if (call->num_experts < 1 || call->num_experts > INT32_MAX || call->width < 1 ||
      call->width > INT32_MAX || call->slots > INT32_MAX) {
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
  call->num_physical = static_cast<int32_t>(attributes.num_physical);
  call->policy = static_cast<Policy>(attributes.policy);
  call->load_of = static_cast<Load>(attributes.load);
  const int64_t bins =
      call->load_of == Load::kLogical ? call->num_experts : attributes.num_physical;
  if (call->bins != bins) return invalid("load has the wrong size");
  const int64_t tokens = call->batch * call->tokens;
  const int64_t rows = call->batch * call->num_experts;
  JAX_ROUTER_RETURN_IF_ERROR(check_type("experts", experts, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("replica_table", table, rows * call->width));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("replica_table", table, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("replica_counts", counts, rows));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("replica_counts", counts, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("token_offset", offset, call->batch));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("token_offset", offset, ffi::DataType::U32));
  if (optional.size() != static_cast<size_t>(attributes.has_where)) {
    return invalid("wrong number of operands");
  }
  if (attributes.has_where) {
    const auto where = optional.get<ffi::AnyBuffer>(0).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("where", where, tokens));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("where", where, ffi::DataType::PRED));
    call->where = static_cast<const bool*>(where.untyped_data());
  }
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("physical", physical, tokens * call->slots));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("physical", physical, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("load", load, call->batch * call->bins));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("load", load, ffi::DataType::S32));
  call->experts = static_cast<const int32_t*>(experts.untyped_data());
  call->table = static_cast<const int32_t*>(table.untyped_data());
  call->counts = static_cast<const int32_t*>(counts.untyped_data());
  call->offset = static_cast<const uint32_t*>(offset.untyped_data());
  call->physical = static_cast<int32_t*>(physical.untyped_data());
  call->load = static_cast<int32_t*>(load.untyped_data());
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_REPLICAS_FFI_H_
