// The handlers of `route` and `dense`: their bindings, and how a call is made of operands and
// results.

#ifndef JAX_ROUTER_ROUTE_FFI_H_
#define JAX_ROUTER_ROUTE_FFI_H_

#include <cstdint>
#include <string>
#include <utility>

#include "ffi.h"
#include "options.h"

namespace jax_router {

// Every option of `route` as it arrives: FFI attributes are 64-bit integers, bool or float.
struct OptionAttributes {
  int64_t k;
  int64_t score;
  bool renormalize;
  float scale;
  int64_t group_count;
  int64_t group_keep;
  int64_t group_score;

  RouteOptions decode() const {
    return {k,          static_cast<Score>(score),           renormalize, scale, group_count,
            group_keep, static_cast<GroupScore>(group_score)};
  }
};

// Adds the attributes of `route` to a binding, in the order of OptionAttributes.
template <typename Binding>
auto bind_options(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("k")
      .template Attr<int64_t>("score")
      .template Attr<bool>("renormalize")
      .template Attr<float>("scale")
      .template Attr<int64_t>("group_count")
      .template Attr<int64_t>("group_keep")
      .template Attr<int64_t>("group_score");
}

// The operands, results and attributes of each handler; the context is a thread pool or a stream.
template <typename Context>
auto bind_route() {
  return bind_options(ffi::Ffi::Bind()
                          .Ctx<Context>()
                          .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
                          .RemainingArgs()  // bias [*B, E], where [*B, T], experts [*B, T, k]
                          .template Ret<ffi::AnyBuffer>()  // weights [*B, T, k]
                          .template Ret<ffi::AnyBuffer>()  // experts [*B, T, k]
                          .template Ret<ffi::AnyBuffer>()  // normalizer [*B, T]
                      )
      .template Attr<bool>("has_bias")
      .template Attr<bool>("has_where")
      .template Attr<bool>("has_experts");
}

template <typename Context>
auto bind_dense() {
  return bind_options(ffi::Ffi::Bind()
                          .Ctx<Context>()
                          .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
                          .RemainingArgs()  // bias [*B, E], where [*B, T], experts [*B, T, k]
                          .template Ret<ffi::AnyBuffer>()  // probs [*B, T, E]
                          .template Ret<ffi::AnyBuffer>()  // map [*B, T, E or ceil(E / 8)]
                          .template Ret<ffi::AnyBuffer>()  // weights [*B, T, k]
                          .template Ret<ffi::AnyBuffer>()  // experts [*B, T, k]
                          .template Ret<ffi::AnyBuffer>()  // normalizer [*B, T]
                      )
      .template Attr<bool>("has_bias")
      .template Attr<bool>("has_where")
      .template Attr<bool>("has_experts")
      .template Attr<int64_t>("map_format");
}

// The backward of `route` and of `dense`, which differ in their cotangent alone.
template <typename Context>
auto bind_route_backward() {
  return bind_options(ffi::Ffi::Bind()
                          .Ctx<Context>()
                          .template Arg<ffi::AnyBuffer>()  // cotangent [*B, T, k] or [*B, T, E]
                          .template Arg<ffi::AnyBuffer>()  // weights [*B, T, k]
                          .template Arg<ffi::AnyBuffer>()  // experts [*B, T, k]
                          .template Arg<ffi::AnyBuffer>()  // normalizer [*B, T]
                          .RemainingArgs()                 // logits [*B, T, E]
                          .template Ret<ffi::AnyBuffer>()  // gradient [*B, T, E]
  );
}

inline ffi::Error check_options(const RouteOptions& options, int64_t experts) {
  if (options.k < 1 || options.k > experts) {
    return invalid("k must be between 1 and the number of experts = " + std::to_string(experts) +
                   ", got " + std::to_string(options.k));
  }
  const int64_t count = options.group_count;
  if (count < 0 || count > experts) return invalid("group_count is out of range");
  if (count > 0 &&
      (experts % count != 0 || options.group_keep < 1 || options.group_keep > count ||
       options.k > options.group_keep * (experts / count) || options.group_terms() < 1)) {
    return invalid("groups do not fit " + std::to_string(experts) +
                   " experts and k = " + std::to_string(options.k));
  }
  return ffi::Error::Success();
}

// Batch rows and tokens of each, from a buffer [*B, T, E or k].
struct BatchShape {
  int64_t batches;
  int64_t tokens;
};

inline BatchShape batch_shape(const ffi::AnyBuffer& buffer) {
  const auto dimensions = buffer.dimensions();
  BatchShape shape{1, dimensions[dimensions.size() - 2]};
  for (size_t i = 0; i + 2 < dimensions.size(); ++i) shape.batches *= dimensions[i];
  return shape;
}

// Fills a forward call from its operands and results, checking every size and type.
inline ffi::Error decode_route_forward(const RouteOptions& options, bool has_bias, bool has_where,
                                       bool has_experts, const ffi::AnyBuffer& logits,
                                       const ffi::RemainingArgs& optional,
                                       const ffi::AnyBuffer& weights, const ffi::AnyBuffer& experts,
                                       const ffi::AnyBuffer& normalizer, RouteForward* call) {
  *call = RouteForward{};
  if (logits.dimensions().size() < 2) return invalid("logits must have shape [..., T, E]");
  call->experts = last_dimension(logits);
  JAX_ROUTER_RETURN_IF_ERROR(check_options(options, call->experts));
  call->tokens = static_cast<int64_t>(logits.element_count()) / call->experts;
  call->logits = logits.untyped_data();
  JAX_ROUTER_RETURN_IF_ERROR(decode_logits_type(logits, &call->logits_type));
  if (optional.size() != static_cast<size_t>(has_bias + has_where + has_experts)) {
    return invalid("wrong number of operands");
  }
  size_t next = 0;
  if (has_bias) {
    const auto bias = optional.get<ffi::AnyBuffer>(next++).value();
    const int64_t tokens = logits.dimensions()[logits.dimensions().size() - 2];
    const int64_t rows = tokens > 0 ? call->tokens / tokens : 0;
    if (tokens > 0) {
      JAX_ROUTER_RETURN_IF_ERROR(check_elements("bias", bias, rows * call->experts));
    }
    JAX_ROUTER_RETURN_IF_ERROR(check_type("bias", bias, ffi::DataType::F32));
    call->bias = static_cast<const float*>(bias.untyped_data());
    call->tokens_per_batch = tokens;
  }
  if (has_where) {
    const auto where = optional.get<ffi::AnyBuffer>(next++).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("where", where, call->tokens));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("where", where, ffi::DataType::PRED));
    call->where = static_cast<const bool*>(where.untyped_data());
  }
  if (has_experts) {
    const auto given = optional.get<ffi::AnyBuffer>(next++).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("experts", given, call->tokens * options.k));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("experts", given, ffi::DataType::S32));
    call->given = static_cast<const int32_t*>(given.untyped_data());
  }
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("weights", weights, call->tokens * options.k));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("weights", weights, ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("experts", experts, call->tokens * options.k));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("normalizer", normalizer, call->tokens));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("normalizer", normalizer, ffi::DataType::F32));
  call->weights = static_cast<float*>(weights.untyped_data());
  call->indices = experts.untyped_data();
  call->normalizer = static_cast<float*>(normalizer.untyped_data());
  return decode_index_bytes(experts, &call->index_bytes);
}

// The same with the dense results.
inline ffi::Error decode_dense_forward(const RouteOptions& options, bool has_bias, bool has_where,
                                       bool has_experts, int64_t map_format,
                                       const ffi::AnyBuffer& logits,
                                       const ffi::RemainingArgs& optional,
                                       const ffi::AnyBuffer& probs, const ffi::AnyBuffer& map,
                                       const ffi::AnyBuffer& weights, const ffi::AnyBuffer& experts,
                                       const ffi::AnyBuffer& normalizer, RouteForward* call) {
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_forward(options, has_bias, has_where, has_experts, logits,
                                                  optional, weights, experts, normalizer, call));
  if (map_format != 0 && map_format != 1) return invalid("map_format is out of range");
  call->map_format = static_cast<MapFormat>(map_format);
  const bool bytes = call->map_format == MapFormat::kBytemap;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("probs", probs, call->tokens * call->experts));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("probs", probs, logits.element_type()));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("map", map, call->tokens * call->map_row_bytes()));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_type("map", map, bytes ? ffi::DataType::PRED : ffi::DataType::U8));
  call->probs = probs.untyped_data();
  call->map = static_cast<uint8_t*>(map.untyped_data());
  return ffi::Error::Success();
}

// What the forward left of the choice, for a backward call whose number of tokens is set.
inline ffi::Error decode_choice(const RouteOptions& options, const ffi::AnyBuffer& weights,
                                const ffi::AnyBuffer& experts, const ffi::AnyBuffer& normalizer,
                                RouteBackward* call) {
  const int64_t slots = call->tokens * options.k;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("weights", weights, slots));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("weights", weights, ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("experts", experts, slots));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("normalizer", normalizer, call->tokens));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("normalizer", normalizer, ffi::DataType::F32));
  call->weights = static_cast<const float*>(weights.untyped_data());
  call->indices = experts.untyped_data();
  call->normalizer = static_cast<const float*>(normalizer.untyped_data());
  return decode_index_bytes(experts, &call->index_bytes);
}

// The backward of `route` or `dense`.
inline ffi::Error decode_route_backward(
    const RouteOptions& options, bool dense_cotangent, const ffi::AnyBuffer& cotangent,
    const ffi::AnyBuffer& weights, const ffi::AnyBuffer& experts, const ffi::AnyBuffer& normalizer,
    const ffi::RemainingArgs& optional, const ffi::AnyBuffer& gradient, RouteBackward* call) {
  *call = RouteBackward{};
  if (gradient.dimensions().size() < 2) return invalid("gradient must have shape [..., T, E]");
  call->experts = last_dimension(gradient);
  JAX_ROUTER_RETURN_IF_ERROR(check_options(options, call->experts));
  call->tokens = static_cast<int64_t>(gradient.element_count()) / call->experts;
  const int64_t slots = call->tokens * options.k;
  call->dense_cotangent = dense_cotangent;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements(
      "cotangent", cotangent, dense_cotangent ? call->tokens * call->experts : slots));
  JAX_ROUTER_RETURN_IF_ERROR(check_type(
      "cotangent", cotangent, dense_cotangent ? gradient.element_type() : ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(decode_choice(options, weights, experts, normalizer, call));
  if (optional.size() != static_cast<size_t>(options.dense_gradient())) {
    return invalid("logits are needed where the gradient is dense, and only there");
  }
  if (options.dense_gradient()) {
    const auto logits = optional.get<ffi::AnyBuffer>(0).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("logits", logits, call->tokens * call->experts));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("logits", logits, gradient.element_type()));
    call->logits = logits.untyped_data();
  }
  call->cotangent = cotangent.untyped_data();
  call->gradient = gradient.untyped_data();
  return decode_logits_type(gradient, &call->logits_type);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_ROUTE_FFI_H_
