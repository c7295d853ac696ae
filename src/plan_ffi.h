// The handler of `plan`: its binding, and how a call is made of operands and results.

#ifndef JAX_ROUTER_PLAN_FFI_H_
#define JAX_ROUTER_PLAN_FFI_H_

#include <cstdint>

#include "ffi.h"
#include "plan_call.h"

namespace jax_router {

// The operand and the results; the context is a thread pool or a stream.
template <typename Context>
auto bind_plan() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()   // ids [*B, T, k]
      .template Ret<ffi::AnyBuffer>()   // order [*B, T * k]
      .template Ret<ffi::AnyBuffer>()   // inverse [*B, T * k]
      .template Ret<ffi::AnyBuffer>()   // group_sizes [*B, E]
      .template Ret<ffi::AnyBuffer>();  // counts [*B, blocks, E + 1]: scratch
}

// Fills a call from its operand and results, checking every size and type.
inline ffi::Error decode_plan(const ffi::AnyBuffer& ids, const ffi::AnyBuffer& order,
                              const ffi::AnyBuffer& inverse, const ffi::AnyBuffer& group_sizes,
                              const ffi::AnyBuffer& counts, PlanCall* call) {
  *call = PlanCall{};
  const auto shape = ids.dimensions();
  if (shape.size() < 2) return invalid("experts must have shape [..., T, k]");
  if (group_sizes.dimensions().size() < 1) return invalid("group_sizes must have shape [..., E]");
  if (counts.dimensions().size() < 2) return invalid("counts must have shape [..., blocks, E + 1]");
  call->batch = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) call->batch *= shape[i];
  call->entries = shape[shape.size() - 2] * shape[shape.size() - 1];
  call->experts = last_dimension(group_sizes);
  call->blocks = counts.dimensions()[counts.dimensions().size() - 2];
  if (call->entries > INT32_MAX) return invalid("a plan has at most 2**31 - 1 entries");
  if (call->experts < 1 || call->experts >= INT32_MAX) {
    return invalid("the number of experts is out of range");
  }
  if (!call->whole() && call->blocks * kMostBlockEntries < call->entries) {
    return invalid("counts must have room for more blocks");
  }
  const int64_t entries = call->batch * call->entries;
  JAX_ROUTER_RETURN_IF_ERROR(check_type("experts", ids, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("order", order, entries));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("order", order, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("inverse", inverse, entries));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("inverse", inverse, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("group_sizes", group_sizes, call->batch * call->experts));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("group_sizes", group_sizes, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("counts", counts, call->batch * call->blocks * (call->experts + 1)));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("counts", counts, ffi::DataType::S32));
  call->ids = static_cast<const int32_t*>(ids.untyped_data());
  call->order = static_cast<int32_t*>(order.untyped_data());
  call->inverse = static_cast<int32_t*>(inverse.untyped_data());
  call->group_sizes = static_cast<int32_t*>(group_sizes.untyped_data());
  call->counts = static_cast<int32_t*>(counts.untyped_data());
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_PLAN_FFI_H_
