// The handler of `quantile_histogram`: its binding, and how a call is made of operands and results.

#ifndef JAX_ROUTER_BALANCE_FFI_H_
#define JAX_ROUTER_BALANCE_FFI_H_

#include <cstdint>
#include <string>

#include "ffi.h"
#include "histogram.h"

namespace jax_router {

// The operands, results and attributes; the context is a thread pool or a stream.
template <typename Context>
auto bind_quantile_histogram() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
      .template Arg<ffi::AnyBuffer>()  // cutoff [*B, T]
      .template Arg<ffi::AnyBuffer>()  // bounds [*B, 2]
      .RemainingArgs()                 // where [*B, T]
      .template Ret<ffi::AnyBuffer>()  // counts [*B, E, bins]
      .template Attr<int64_t>("score")
      .template Attr<bool>("has_where");
}

// Fills a call from its operands and result, checking every size and type.
inline ffi::Error decode_quantile_histogram(int64_t score, bool has_where,
                                            const ffi::AnyBuffer& logits,
                                            const ffi::AnyBuffer& cutoff,
                                            const ffi::AnyBuffer& bounds,
                                            const ffi::RemainingArgs& optional,
                                            const ffi::AnyBuffer& counts, QuantileHistogram* call) {
  *call = QuantileHistogram{};
  const auto shape = logits.dimensions();
  if (shape.size() < 2) return invalid("logits must have shape [..., T, E]");
  if (counts.dimensions().size() < 2) return invalid("counts must have shape [..., E, bins]");
  call->experts = last_dimension(logits);
  call->tokens = shape[shape.size() - 2];
  call->batch = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) call->batch *= shape[i];
  call->bins = last_dimension(counts);
  if (call->bins < 1 || call->bins > kMostBins) {
    return invalid("bins must be between 1 and " + std::to_string(kMostBins) + ", got " +
                   std::to_string(call->bins));
  }
  if (score < 0 || score > static_cast<int64_t>(Score::kNone) ||
      static_cast<Score>(score) == Score::kSoftmax) {
    return invalid("score is out of range");
  }
  call->score = static_cast<Score>(score);
  JAX_ROUTER_RETURN_IF_ERROR(decode_logits_type(logits, &call->logits_type));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("cutoff", cutoff, call->batch * call->tokens));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("cutoff", cutoff, ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("bounds", bounds, call->batch * 2));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("bounds", bounds, ffi::DataType::F32));
  if (optional.size() != static_cast<size_t>(has_where)) {
    return invalid("wrong number of operands");
  }
  if (has_where) {
    const auto where = optional.get<ffi::AnyBuffer>(0).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("where", where, call->batch * call->tokens));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("where", where, ffi::DataType::PRED));
    call->where = static_cast<const bool*>(where.untyped_data());
  }
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("counts", counts, call->batch * call->experts * call->bins));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("counts", counts, ffi::DataType::S32));
  call->logits = logits.untyped_data();
  call->cutoff = static_cast<const float*>(cutoff.untyped_data());
  call->bounds = static_cast<const float*>(bounds.untyped_data());
  call->counts = static_cast<int32_t*>(counts.untyped_data());
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_BALANCE_FFI_H_
