// The handler of `experts`: its binding, and how a call is made of operands and results.

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

// The batch dimensions are those that w2 has before its last three.
inline ffi::Error decode_experts(const ffi::AnyBuffer& h, const ffi::AnyBuffer& w2,
                                 const ffi::AnyBuffer& alpha, const ffi::AnyBuffer& result,
                                 Experts* call) {
  *call = Experts{};
  const auto h_shape = h.dimensions();
  const auto w2_shape = w2.dimensions();
  if (w2_shape.size() < 3) return invalid("w2 must have shape [..., E, I, H]");
  const size_t batch_dimensions = w2_shape.size() - 3;
  if (h_shape.size() < batch_dimensions + 2) return invalid("h must have shape [..., E, I]");
  call->batch = 1;
  call->tokens = 1;
  for (size_t i = 0; i < batch_dimensions; ++i) call->batch *= w2_shape[i];
  for (size_t i = batch_dimensions; i + 2 < h_shape.size(); ++i) call->tokens *= h_shape[i];
  call->experts = w2_shape[batch_dimensions];
  call->depth = w2_shape[batch_dimensions + 1];
  call->width = w2_shape[batch_dimensions + 2];
  const int64_t rows = call->batch * call->tokens;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("h", h, rows * call->experts * call->depth));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("alpha", alpha, rows * call->experts));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("result", result, rows * call->width));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("w2", w2, h.element_type()));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("alpha", alpha, ffi::DataType::F32));
  if (decode_logits_type(h, &call->type).failure() ||
      decode_logits_type(result, &call->result_type).failure()) {
    return invalid("h and the result must be float32, bfloat16 or float16");
  }
  call->h = h.untyped_data();
  call->w2 = w2.untyped_data();
  call->alpha = static_cast<const float*>(alpha.untyped_data());
  call->result = result.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_EXPERTS_FFI_H_
