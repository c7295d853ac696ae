// The handlers of `experts`: their bindings, and how a call is made of operands and results.

#ifndef JAX_ROUTER_EXPERTS_FFI_H_
#define JAX_ROUTER_EXPERTS_FFI_H_

#include <cstdint>

#include "experts_call.h"
#include "ffi.h"

namespace jax_router {

// The operands and results; the context is a thread pool or a stream.
template <typename Context>
auto bind_experts() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()   // h [*B, *T, E, I]
      .template Arg<ffi::AnyBuffer>()   // w2 [*B, E, I, H]
      .template Arg<ffi::AnyBuffer>()   // alpha [*B, *T, E]
      .template Ret<ffi::AnyBuffer>();  // result [*B, *T, H]
}

// In float8.
template <typename Context>
auto bind_experts_float8() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()   // h [*B, *T, E, I]
      .template Arg<ffi::AnyBuffer>()   // w2 [*B, H, E * I]
      .template Arg<ffi::AnyBuffer>()   // alpha [*B, *T, E]
      .template Arg<ffi::AnyBuffer>()   // h_scale [*B, *T, E * I / 128]
      .template Arg<ffi::AnyBuffer>()   // w2_scale [*B, ceil(H / 128), E * I / 128]
      .template Ret<ffi::AnyBuffer>();  // result [*B, *T, H]
}

// What both have: all of h, alpha and the result, once the width is known. The batch dimensions are
// as many as are given.
inline ffi::Error decode_experts_rows(const ffi::AnyBuffer& h, const ffi::AnyBuffer& alpha,
                                      const ffi::AnyBuffer& result, size_t batch_dimensions,
                                      Experts* call) {
  const auto shape = h.dimensions();
  if (shape.size() < batch_dimensions + 2) return invalid("h must have shape [..., E, I]");
  const size_t rows_end = shape.size() - 2;
  call->batch = 1;
  call->tokens = 1;
  for (size_t i = 0; i < batch_dimensions; ++i) call->batch *= shape[i];
  for (size_t i = batch_dimensions; i < rows_end; ++i) call->tokens *= shape[i];
  call->experts = shape[rows_end];
  call->depth = shape[rows_end + 1];
  const int64_t rows = call->batch * call->tokens;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("alpha", alpha, rows * call->experts));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("result", result, rows * call->width));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("alpha", alpha, ffi::DataType::F32));
  if (decode_logits_type(result, &call->result_type).failure()) {
    return invalid("the result must be float32, bfloat16 or float16");
  }
  call->h = h.untyped_data();
  call->alpha = static_cast<const float*>(alpha.untyped_data());
  call->result = result.untyped_data();
  return ffi::Error::Success();
}

// The batch dimensions are those that w2 has before its last three.
inline ffi::Error decode_experts(const ffi::AnyBuffer& h, const ffi::AnyBuffer& w2,
                                 const ffi::AnyBuffer& alpha, const ffi::AnyBuffer& result,
                                 Experts* call) {
  *call = Experts{};
  const auto w2_shape = w2.dimensions();
  if (w2_shape.size() < 3) return invalid("w2 must have shape [..., E, I, H]");
  call->width = w2_shape.back();
  JAX_ROUTER_RETURN_IF_ERROR(decode_experts_rows(h, alpha, result, w2_shape.size() - 3, call));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("w2", w2, call->batch * call->experts * call->depth * call->width));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("w2", w2, h.element_type()));
  if (decode_logits_type(h, &call->type).failure()) {
    return invalid("h must be float32, bfloat16 or float16");
  }
  call->w2 = w2.untyped_data();
  return ffi::Error::Success();
}

// The batch dimensions are those that w2 has before its last two.
inline ffi::Error decode_experts_float8(const ffi::AnyBuffer& h, const ffi::AnyBuffer& w2,
                                        const ffi::AnyBuffer& alpha, const ffi::AnyBuffer& h_scale,
                                        const ffi::AnyBuffer& w2_scale,
                                        const ffi::AnyBuffer& result, Experts* call) {
  constexpr int64_t kBlock = 128;
  *call = Experts{};
  call->float8 = true;
  const auto w2_shape = w2.dimensions();
  if (w2_shape.size() < 2) return invalid("w2 must have shape [..., H, E * I]");
  call->width = w2_shape[w2_shape.size() - 2];
  JAX_ROUTER_RETURN_IF_ERROR(decode_experts_rows(h, alpha, result, w2_shape.size() - 2, call));
  if (call->depth % kBlock != 0) return invalid("I must be a multiple of 128 in float8");
  const int64_t columns = call->experts * call->depth;
  const int64_t scales = columns / kBlock;
  const int64_t scale_rows = (call->width + kBlock - 1) / kBlock;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("w2", w2, call->batch * call->width * columns));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("h_scale", h_scale, call->batch * call->tokens * scales));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("w2_scale", w2_scale, call->batch * scale_rows * scales));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("h", h, ffi::DataType::F8E4M3FN));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("w2", w2, ffi::DataType::F8E4M3FN));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("h_scale", h_scale, ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("w2_scale", w2_scale, ffi::DataType::F32));
  call->w2 = w2.untyped_data();
  call->h_scale = static_cast<const float*>(h_scale.untyped_data());
  call->w2_scale = static_cast<const float*>(w2_scale.untyped_data());
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_EXPERTS_FFI_H_
