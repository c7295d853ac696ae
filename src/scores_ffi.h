// The handlers of `scores`: their bindings, and how a call is made of operands and results.

#ifndef JAX_ROUTER_SCORES_FFI_H_
#define JAX_ROUTER_SCORES_FFI_H_

#include <cstdint>

#include "ffi.h"
#include "scores_call.h"

namespace jax_router {

// The operands, results and attributes of each handler; the context is a thread pool or a stream.
template <typename Context>
auto bind_scores() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
      .RemainingArgs()                 // where [*B, T]
      .template Ret<ffi::AnyBuffer>()  // scores [*B, T, E]
      .template Attr<int64_t>("score");
}

template <typename Context>
auto bind_scores_backward() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // cotangent [*B, T, E]
      .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
      .RemainingArgs()                 // where [*B, T]
      .template Ret<ffi::AnyBuffer>()  // gradient [*B, T, E]
      .template Attr<int64_t>("score");
}

inline ffi::Error decode_scores_rows(int64_t score, const ffi::AnyBuffer& logits,
                                     const ffi::RemainingArgs& optional, ScoresRows* rows) {
  if (score < 0 || score > static_cast<int64_t>(Score::kNone)) {
    return invalid("score is out of range");
  }
  rows->score = static_cast<Score>(score);
  if (logits.dimensions().size() < 1) return invalid("logits must have shape [..., E]");
  rows->experts = last_dimension(logits);
  if (rows->experts < 1) return invalid("logits must have at least one expert");
  rows->tokens = static_cast<int64_t>(logits.element_count()) / rows->experts;
  rows->logits = logits.untyped_data();
  JAX_ROUTER_RETURN_IF_ERROR(decode_logits_type(logits, &rows->logits_type));
  if (optional.size() > 1) return invalid("wrong number of operands");
  if (optional.size() == 1) {
    const auto where = optional.get<ffi::AnyBuffer>(0).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("where", where, rows->tokens));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("where", where, ffi::DataType::PRED));
    rows->where = static_cast<const bool*>(where.untyped_data());
  }
  return ffi::Error::Success();
}

// Fills a call from its operands and results, checking every size and type.
inline ffi::Error decode_scores_forward(int64_t score, const ffi::AnyBuffer& logits,
                                        const ffi::RemainingArgs& optional,
                                        const ffi::AnyBuffer& scores, ScoresForward* call) {
  *call = ScoresForward{};
  JAX_ROUTER_RETURN_IF_ERROR(decode_scores_rows(score, logits, optional, call));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("scores", scores, call->tokens * call->experts));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("scores", scores, ffi::DataType::F32));
  call->scores = static_cast<float*>(scores.untyped_data());
  return ffi::Error::Success();
}

inline ffi::Error decode_scores_backward(int64_t score, const ffi::AnyBuffer& cotangent,
                                         const ffi::AnyBuffer& logits,
                                         const ffi::RemainingArgs& optional,
                                         const ffi::AnyBuffer& gradient, ScoresBackward* call) {
  *call = ScoresBackward{};
  JAX_ROUTER_RETURN_IF_ERROR(decode_scores_rows(score, logits, optional, call));
  const int64_t elements = call->tokens * call->experts;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("cotangent", cotangent, elements));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("cotangent", cotangent, ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("gradient", gradient, elements));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("gradient", gradient, logits.element_type()));
  call->cotangent = static_cast<const float*>(cotangent.untyped_data());
  call->gradient = gradient.untyped_data();
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_SCORES_FFI_H_
