// The handlers of `permute`, `combine` and their backward: their bindings, and how a call is made
// of operands and results.

#ifndef JAX_ROUTER_PERMUTE_FFI_H_
#define JAX_ROUTER_PERMUTE_FFI_H_

#include <cstdint>
#include <string>

#include "ffi.h"
#include "permute_call.h"

namespace jax_router {

// The operands, results and attributes; the context is a thread pool or a stream.
template <typename Context>
auto bind_permute() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()   // tokens [*B, T, d]
      .template Arg<ffi::AnyBuffer>()   // inverse [*B, T, k]
      .template Arg<ffi::AnyBuffer>()   // group sizes [*B, E]
      .template Ret<ffi::AnyBuffer>();  // rows [*B, T * k, d]
}

template <typename Context>
auto bind_permute_backward() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()   // rows [*B, T * k, d]
      .template Arg<ffi::AnyBuffer>()   // inverse [*B, T, k]
      .template Arg<ffi::AnyBuffer>()   // group sizes [*B, E]
      .template Ret<ffi::AnyBuffer>();  // tokens [*B, T, d]
}

template <typename Context>
auto bind_combine() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()   // rows [*B, T * k, d]
      .template Arg<ffi::AnyBuffer>()   // weights [*B, T, k]
      .template Arg<ffi::AnyBuffer>()   // inverse [*B, T, k]
      .template Arg<ffi::AnyBuffer>()   // group sizes [*B, E]
      .template Ret<ffi::AnyBuffer>();  // tokens [*B, T, d]
}

template <typename Context>
auto bind_combine_backward() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // cotangent [*B, T, d]
      .template Arg<ffi::AnyBuffer>()  // inverse [*B, T, k]
      .template Arg<ffi::AnyBuffer>()  // group sizes [*B, E]
      .RemainingArgs()                 // rows [*B, T * k, d] if of_weights, weights if of_rows
      .RemainingRets()                 // their gradients, each if asked for
      .template Attr<bool>("of_rows")
      .template Attr<bool>("of_weights");
}

// `rows` have the batch dimensions and the width, and any number of rows.
inline ffi::Error decode_entry_plan(const ffi::AnyBuffer& rows, const ffi::AnyBuffer& inverse,
                                    const ffi::AnyBuffer& group_sizes, EntryPlan* plan) {
  const auto shape = inverse.dimensions();
  if (shape.size() < 2) return invalid("inverse must have shape [..., T, k]");
  if (rows.dimensions().size() != shape.size()) return invalid("rows must have shape [..., d]");
  if (group_sizes.dimensions().size() + 1 != shape.size()) {
    return invalid("group_sizes must have shape [..., E]");
  }
  plan->batch = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) plan->batch *= shape[i];
  plan->tokens = shape[shape.size() - 2];
  plan->slots = shape[shape.size() - 1];
  plan->experts = last_dimension(group_sizes);
  plan->width = last_dimension(rows);
  if (plan->width > kMostWidth) return invalid("rows must have at most 2**30 elements");
  if (plan->entries() > INT32_MAX) return invalid("a plan must have fewer than 2**31 entries");
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("group_sizes", group_sizes, plan->batch * plan->experts));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("inverse", inverse, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("group_sizes", group_sizes, ffi::DataType::S32));
  plan->inverse = static_cast<const int32_t*>(inverse.untyped_data());
  plan->group_sizes = static_cast<const int32_t*>(group_sizes.untyped_data());
  return ffi::Error::Success();
}

inline ffi::Error decode_row_type(const ffi::AnyBuffer& rows, LogitsType* type) {
  if (decode_logits_type(rows, type).success()) return ffi::Error::Success();
  return invalid("rows must be float32, bfloat16 or float16");
}

// Whether a buffer has a row for every token, or for every entry, of the given type.
inline ffi::Error check_token_rows(const char* name, const ffi::AnyBuffer& buffer,
                                   const EntryPlan& plan, ffi::DataType type) {
  JAX_ROUTER_RETURN_IF_ERROR(check_type(name, buffer, type));
  return check_elements(name, buffer, plan.batch * plan.tokens * plan.width);
}

inline ffi::Error check_entry_rows(const char* name, const ffi::AnyBuffer& buffer,
                                   const EntryPlan& plan, ffi::DataType type) {
  JAX_ROUTER_RETURN_IF_ERROR(check_type(name, buffer, type));
  return check_elements(name, buffer, plan.batch * plan.entries() * plan.width);
}

// Whether a buffer has a float32 for every entry.
inline ffi::Error check_weights(const char* name, const ffi::AnyBuffer& buffer,
                                const EntryPlan& plan) {
  JAX_ROUTER_RETURN_IF_ERROR(check_type(name, buffer, ffi::DataType::F32));
  return check_elements(name, buffer, plan.batch * plan.entries());
}

inline ffi::Error decode_permute(const ffi::AnyBuffer& tokens, const ffi::AnyBuffer& inverse,
                                 const ffi::AnyBuffer& group_sizes, const ffi::AnyBuffer& rows,
                                 Permute* call) {
  *call = Permute{};
  JAX_ROUTER_RETURN_IF_ERROR(decode_entry_plan(tokens, inverse, group_sizes, &call->plan));
  JAX_ROUTER_RETURN_IF_ERROR(decode_row_type(tokens, &call->type));
  const ffi::DataType type = tokens.element_type();
  JAX_ROUTER_RETURN_IF_ERROR(check_token_rows("tokens", tokens, call->plan, type));
  JAX_ROUTER_RETURN_IF_ERROR(check_entry_rows("rows", rows, call->plan, type));
  call->tokens = tokens.untyped_data();
  call->rows = rows.untyped_data();
  return ffi::Error::Success();
}

// `weights` is null for the backward of `permute`.
inline ffi::Error decode_combine(const ffi::AnyBuffer& rows, const ffi::AnyBuffer* weights,
                                 const ffi::AnyBuffer& inverse, const ffi::AnyBuffer& group_sizes,
                                 const ffi::AnyBuffer& tokens, Combine* call) {
  *call = Combine{};
  JAX_ROUTER_RETURN_IF_ERROR(decode_entry_plan(rows, inverse, group_sizes, &call->plan));
  JAX_ROUTER_RETURN_IF_ERROR(decode_row_type(rows, &call->type));
  const ffi::DataType type = rows.element_type();
  JAX_ROUTER_RETURN_IF_ERROR(check_entry_rows("rows", rows, call->plan, type));
  JAX_ROUTER_RETURN_IF_ERROR(check_token_rows("tokens", tokens, call->plan, type));
  if (weights != nullptr) {
    JAX_ROUTER_RETURN_IF_ERROR(check_weights("weights", *weights, call->plan));
    call->weights = static_cast<const float*>(weights->untyped_data());
  }
  call->rows = rows.untyped_data();
  call->tokens = tokens.untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error decode_combine_backward(
    bool of_rows, bool of_weights, const ffi::AnyBuffer& cotangent, const ffi::AnyBuffer& inverse,
    const ffi::AnyBuffer& group_sizes, const ffi::RemainingArgs& optional,
    const ffi::RemainingRets& results, CombineBackward* call) {
  *call = CombineBackward{};
  JAX_ROUTER_RETURN_IF_ERROR(decode_entry_plan(cotangent, inverse, group_sizes, &call->plan));
  JAX_ROUTER_RETURN_IF_ERROR(decode_row_type(cotangent, &call->type));
  const ffi::DataType type = cotangent.element_type();
  JAX_ROUTER_RETURN_IF_ERROR(check_token_rows("cotangent", cotangent, call->plan, type));
  call->cotangent = cotangent.untyped_data();
  const size_t count = static_cast<size_t>(of_rows) + static_cast<size_t>(of_weights);
  if (optional.size() != count || results.size() != count) {
    return invalid("wrong number of operands or results");
  }
  if (of_weights) {
    const auto rows = optional.get<ffi::AnyBuffer>(0).value();
    const auto gradient = **results.get<ffi::AnyBuffer>(count - 1);
    JAX_ROUTER_RETURN_IF_ERROR(check_entry_rows("rows", rows, call->plan, type));
    JAX_ROUTER_RETURN_IF_ERROR(check_weights("gradient of the weights", gradient, call->plan));
    call->rows = rows.untyped_data();
    call->weights_gradient = static_cast<float*>(gradient.untyped_data());
  }
  if (of_rows) {
    const auto weights = optional.get<ffi::AnyBuffer>(count - 1).value();
    const auto gradient = **results.get<ffi::AnyBuffer>(0);
    JAX_ROUTER_RETURN_IF_ERROR(check_weights("weights", weights, call->plan));
    JAX_ROUTER_RETURN_IF_ERROR(
        check_entry_rows("gradient of the rows", gradient, call->plan, type));
    call->weights = static_cast<const float*>(weights.untyped_data());
    call->rows_gradient = gradient.untyped_data();
  }
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_PERMUTE_FFI_H_
