// The handlers of `stats`: their bindings, and how a call is made of operands and results.

#ifndef JAX_ROUTER_STATS_FFI_H_
#define JAX_ROUTER_STATS_FFI_H_

#include <cstdint>
#include <string>
#include <utility>

#include "ffi.h"
#include "options.h"
#include "route_ffi.h"

namespace jax_router {

template <typename Context>
auto bind_stats() {
  return bind_options(ffi::Ffi::Bind()
                          .Ctx<Context>()
                          .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
                          .RemainingArgs()  // bias [*B, E], where [*B, T], experts [*B, T, k]
                          // weights [*B, T, k], experts [*B, T, k], normalizer [*B, T],
                          // softmax [*B, T, 2], expert_counts [*B, E], score_sums [*B, E],
                          // z_sum [*B], num_tokens [*B], scratch [*B, scratch_words()]
                          .RemainingRets())
      .template Attr<bool>("has_bias")
      .template Attr<bool>("has_where")
      .template Attr<bool>("has_experts");
}

template <typename Context>
auto bind_stats_backward() {
  return bind_options(ffi::Ffi::Bind()
                          .Ctx<Context>()
                          .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
                          .template Arg<ffi::AnyBuffer>()  // softmax [*B, T, 2]
                          // With weights: cotangent, weights, experts [*B, T, k] and normalizer
                          // [*B, T]. With scores: cotangent [*B, E]. With z: cotangent [*B].
                          .RemainingArgs()
                          .template Ret<ffi::AnyBuffer>()  // gradient [*B, T, E]
                      )
      .template Attr<bool>("has_weights")
      .template Attr<bool>("has_scores")
      .template Attr<bool>("has_z");
}

// How many 32-bit words the blocks of a batch row take: each has counts and sums of every expert,
// its z sum and its number of tokens.
inline int64_t scratch_words(int64_t tokens, int64_t experts) {
  return blocks_of_batch(tokens) * (2 * experts + 2);
}

// Fills a forward call from its operands and results, checking every size and type.
inline ffi::Error decode_stats_forward(const RouteOptions& options, bool has_bias, bool has_where,
                                       bool has_experts, const ffi::AnyBuffer& logits,
                                       const ffi::RemainingArgs& optional,
                                       const ffi::RemainingRets& results, RouteForward* call) {
  if (results.size() != 9) return invalid("wrong number of results");
  const auto result = [&](size_t i) { return **results.get<ffi::AnyBuffer>(i); };
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_forward(options, has_bias, has_where, has_experts, logits,
                                                  optional, result(0), result(1), result(2), call));
  const BatchShape shape = batch_shape(logits);
  call->tokens_per_batch = shape.tokens;
  struct Expected {
    const char* name;
    int64_t elements;
    ffi::DataType type;
  };
  const int64_t rows = shape.batches * call->experts;
  const Expected expected[] = {{"softmax", 2 * call->tokens, ffi::DataType::F32},
                               {"expert_counts", rows, ffi::DataType::S32},
                               {"score_sums", rows, ffi::DataType::F32},
                               {"z_sum", shape.batches, ffi::DataType::F32},
                               {"num_tokens", shape.batches, ffi::DataType::S32}};
  for (size_t i = 0; i < 5; ++i) {
    const ffi::AnyBuffer buffer = result(3 + i);
    JAX_ROUTER_RETURN_IF_ERROR(check_elements(expected[i].name, buffer, expected[i].elements));
    JAX_ROUTER_RETURN_IF_ERROR(check_type(expected[i].name, buffer, expected[i].type));
  }
  const int64_t blocks = shape.batches * blocks_of_batch(shape.tokens);
  const ffi::AnyBuffer scratch = result(8);
  JAX_ROUTER_RETURN_IF_ERROR(check_type("scratch", scratch, ffi::DataType::S32));
  // It may be larger: where the number of tokens was not known yet.
  if (static_cast<int64_t>(scratch.element_count()) <
      shape.batches * scratch_words(shape.tokens, call->experts)) {
    return invalid("scratch is too small: " + std::to_string(scratch.element_count()));
  }
  RouteStats& stats = call->stats;
  stats.softmax = static_cast<SavedSoftmax*>(result(3).untyped_data());
  stats.expert_counts = static_cast<int32_t*>(result(4).untyped_data());
  stats.score_sums = static_cast<float*>(result(5).untyped_data());
  stats.z_sum = static_cast<float*>(result(6).untyped_data());
  stats.num_tokens = static_cast<int32_t*>(result(7).untyped_data());
  stats.batches = shape.batches;
  int32_t* words = static_cast<int32_t*>(scratch.untyped_data());
  stats.block_counts = words;
  stats.block_sums = reinterpret_cast<float*>(words + blocks * call->experts);
  stats.block_z = stats.block_sums + blocks * call->experts;
  stats.block_tokens = reinterpret_cast<int32_t*>(stats.block_z + blocks);
  return ffi::Error::Success();
}

// The same for the backward.
inline ffi::Error decode_stats_backward(const RouteOptions& options, bool has_weights,
                                        bool has_scores, bool has_z, const ffi::AnyBuffer& logits,
                                        const ffi::AnyBuffer& softmax,
                                        const ffi::RemainingArgs& optional,
                                        const ffi::AnyBuffer& gradient, RouteBackward* call) {
  *call = RouteBackward{};
  if (logits.dimensions().size() < 2) return invalid("logits must have shape [..., T, E]");
  call->experts = last_dimension(logits);
  JAX_ROUTER_RETURN_IF_ERROR(check_options(options, call->experts));
  const BatchShape shape = batch_shape(logits);
  call->tokens_per_batch = shape.tokens;
  call->tokens = shape.batches * shape.tokens;
  if (optional.size() != static_cast<size_t>(4 * has_weights + has_scores + has_z)) {
    return invalid("wrong number of operands");
  }
  const auto operand = [&](size_t i) { return *optional.get<ffi::AnyBuffer>(i); };
  size_t next = 0;
  if (has_weights) {
    const ffi::AnyBuffer cotangent = operand(0);
    const int64_t slots = call->tokens * options.k;
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("cotangent", cotangent, slots));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("cotangent", cotangent, ffi::DataType::F32));
    call->cotangent = cotangent.untyped_data();
    JAX_ROUTER_RETURN_IF_ERROR(decode_choice(options, operand(1), operand(2), operand(3), call));
    next = 4;
  }
  if (has_scores) {
    const ffi::AnyBuffer scores = operand(next++);
    JAX_ROUTER_RETURN_IF_ERROR(
        check_elements("score cotangent", scores, shape.batches * call->experts));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("score cotangent", scores, ffi::DataType::F32));
    call->score_cotangent = static_cast<const float*>(scores.untyped_data());
  }
  if (has_z) {
    const ffi::AnyBuffer z = operand(next++);
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("z cotangent", z, shape.batches));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("z cotangent", z, ffi::DataType::F32));
    call->z_cotangent = static_cast<const float*>(z.untyped_data());
  }
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("softmax", softmax, 2 * call->tokens));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("softmax", softmax, ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("gradient", gradient, call->tokens * call->experts));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("gradient", gradient, logits.element_type()));
  call->softmax = static_cast<const SavedSoftmax*>(softmax.untyped_data());
  call->logits = logits.untyped_data();
  call->gradient = gradient.untyped_data();
  return decode_logits_type(gradient, &call->logits_type);
}

}  // namespace jax_router

#endif  // JAX_ROUTER_STATS_FFI_H_
