// The handlers of `blocks` and `route_and_plan_blocks`: their bindings, and how a call is made of
// operands and results.

#ifndef JAX_ROUTER_BLOCKS_FFI_H_
#define JAX_ROUTER_BLOCKS_FFI_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "blocks_call.h"
#include "ffi.h"
#include "options.h"
#include "route_ffi.h"

namespace jax_router {

// Every attribute of `blocks`.
struct BlockAttributes {
  int64_t num_experts;
  int64_t block_size;
  int64_t layout;
};

// Adds the attributes to a binding, in their order.
template <typename Binding>
auto bind_block_attributes(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("num_experts")
      .template Attr<int64_t>("block_size")
      .template Attr<int64_t>("layout");
}

// Adds the results to a binding, in the order of BlockResults.
template <typename Binding>
auto bind_block_results(Binding binding) {
  return std::move(binding)
      .template Ret<ffi::AnyBuffer>()   // ids [*B, P]
      .template Ret<ffi::AnyBuffer>()   // weights [*B, P]
      .template Ret<ffi::AnyBuffer>()   // block_experts [*B, P / block_size]
      .template Ret<ffi::AnyBuffer>()   // num_padded [*B]
      .template Ret<ffi::AnyBuffer>()   // num_tokens [*B]
      .template Ret<ffi::AnyBuffer>()   // inverse [*B, T, k]
      .template Ret<ffi::AnyBuffer>();  // scratch [*B, chunks + 1, E]
}

struct BlockResults {
  ffi::AnyBuffer ids;
  ffi::AnyBuffer weights;
  ffi::AnyBuffer block_experts;
  ffi::AnyBuffer num_padded;
  ffi::AnyBuffer num_tokens;
  ffi::AnyBuffer inverse;
  ffi::AnyBuffer scratch;
};

// The operands, results and attributes; the context is a thread pool or a stream.
template <typename Context>
auto bind_blocks() {
  return bind_block_attributes(
             bind_block_results(ffi::Ffi::Bind()
                                    .Ctx<Context>()
                                    .template Arg<ffi::AnyBuffer>()  // experts [*B, T, k]
                                    .template Arg<ffi::AnyBuffer>()  // weights [*B, T, k]
                                    .RemainingArgs()))               // mask [*B, E], num_valid [*B]
      .template Attr<bool>("has_mask")
      .template Attr<bool>("has_num_valid");
}

template <typename Context>
auto bind_route_and_plan_blocks() {
  return bind_block_attributes(
             bind_options(
                 bind_block_results(
                     ffi::Ffi::Bind()
                         .Ctx<Context>()
                         .template Arg<ffi::AnyBuffer>()  // logits [*B, T, E]
                         .RemainingArgs()  // bias [*B, E], where [*B, T], experts [*B, T, k]
                         .template Ret<ffi::AnyBuffer>()  // weights [*B, T, k]
                         .template Ret<ffi::AnyBuffer>()  // experts [*B, T, k]
                         .template Ret<ffi::AnyBuffer>()  // normalizer [*B, T]
                     )
                     .RemainingRets()  // a buffer to be filled with zeros
                 ))
      .template Attr<bool>("has_bias")
      .template Attr<bool>("has_where")
      .template Attr<bool>("has_experts");
}

// Fills what a call knows without its operands: batch, tokens and k are set before.
inline ffi::Error decode_block_results(const BlockAttributes& attributes,
                                       const BlockResults& results, Blocks* call) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  call->num_experts = attributes.num_experts;
  call->block_size = attributes.block_size;
  if (call->num_experts < 1 || call->num_experts > kMost) {
    return invalid("num_experts is out of range");
  }
  if (call->block_size < 1 || call->block_size > kMost) {
    return invalid("block_size is out of range");
  }
  if (attributes.layout != 0 && attributes.layout != 1) return invalid("layout is out of range");
  call->layout = static_cast<BlockLayout>(attributes.layout);
  if (call->layout == BlockLayout::kPacked && (call->k >= 1 << 8 || call->tokens >= 1 << 24)) {
    return invalid("k or the tokens do not fit the packed layout");
  }
  if (call->k < 1) return invalid("k must be at least 1");
  const int64_t entries = call->entries();
  const int64_t batch = call->batch;
  if (results.ids.dimensions().size() < 1) return invalid("ids must have shape [..., P]");
  call->positions = last_dimension(results.ids);
  const int64_t needed = entries + std::min(call->num_experts, entries) * (call->block_size - 1);
  if (entries > kMost || call->positions > kMost || call->positions < needed ||
      call->positions % call->block_size != 0) {
    return invalid("ids must have whole blocks for " + std::to_string(needed) + " positions, got " +
                   std::to_string(call->positions));
  }
  const int64_t scratch = static_cast<int64_t>(results.scratch.element_count());
  const int64_t row_scratch = batch > 0 ? scratch / batch : 2 * call->num_experts;
  call->chunks = row_scratch / call->num_experts - 1;
  if (call->chunks < 1) return invalid("scratch is too small");
  const int64_t blocks = call->positions / call->block_size;
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("ids", results.ids, batch * call->positions));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("ids", results.ids, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("sorted weights", results.weights, batch * call->positions));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("sorted weights", results.weights, ffi::DataType::F32));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("block_experts", results.block_experts, batch * blocks));
  JAX_ROUTER_RETURN_IF_ERROR(
      check_type("block_experts", results.block_experts, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("num_padded", results.num_padded, batch));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("num_padded", results.num_padded, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("num_tokens", results.num_tokens, batch));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("num_tokens", results.num_tokens, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("inverse", results.inverse, batch * entries));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("inverse", results.inverse, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("scratch", results.scratch, ffi::DataType::S32));
  call->ids = static_cast<int32_t*>(results.ids.untyped_data());
  call->sorted_weights = static_cast<float*>(results.weights.untyped_data());
  call->block_experts = static_cast<int32_t*>(results.block_experts.untyped_data());
  call->num_padded = static_cast<int32_t*>(results.num_padded.untyped_data());
  call->num_tokens = static_cast<int32_t*>(results.num_tokens.untyped_data());
  call->inverse = static_cast<int32_t*>(results.inverse.untyped_data());
  call->scratch = static_cast<int32_t*>(results.scratch.untyped_data());
  return ffi::Error::Success();
}

// Fills a call from its operands and results, checking every size and type.
inline ffi::Error decode_blocks(const BlockAttributes& attributes, bool has_mask,
                                bool has_num_valid, const ffi::AnyBuffer& experts,
                                const ffi::AnyBuffer& weights, const ffi::RemainingArgs& optional,
                                const BlockResults& results, Blocks* call) {
  *call = Blocks{};
  const auto shape = experts.dimensions();
  if (shape.size() < 2) return invalid("experts must have shape [..., T, k]");
  call->k = shape[shape.size() - 1];
  call->tokens = shape[shape.size() - 2];
  call->batch = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) call->batch *= shape[i];
  JAX_ROUTER_RETURN_IF_ERROR(decode_block_results(attributes, results, call));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("experts", experts, ffi::DataType::S32));
  JAX_ROUTER_RETURN_IF_ERROR(check_elements("weights", weights, call->batch * call->entries()));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("weights", weights, ffi::DataType::F32));
  if (optional.size() != static_cast<size_t>(has_mask + has_num_valid)) {
    return invalid("wrong number of operands");
  }
  size_t next = 0;
  if (has_mask) {
    const auto mask = optional.get<ffi::AnyBuffer>(next++).value();
    JAX_ROUTER_RETURN_IF_ERROR(
        check_elements("expert_mask", mask, call->batch * call->num_experts));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("expert_mask", mask, ffi::DataType::PRED));
    call->mask = static_cast<const bool*>(mask.untyped_data());
  }
  if (has_num_valid) {
    const auto num_valid = optional.get<ffi::AnyBuffer>(next++).value();
    JAX_ROUTER_RETURN_IF_ERROR(check_elements("num_valid", num_valid, call->batch));
    JAX_ROUTER_RETURN_IF_ERROR(check_type("num_valid", num_valid, ffi::DataType::S32));
    call->num_valid = static_cast<const int32_t*>(num_valid.untyped_data());
  }
  call->experts = static_cast<const int32_t*>(experts.untyped_data());
  call->weights = static_cast<const float*>(weights.untyped_data());
  return ffi::Error::Success();
}

// The same for a plan made of a routing in one call.
inline ffi::Error decode_route_and_plan_blocks(
    const RouteOptions& options, bool has_bias, bool has_where, bool has_experts,
    const BlockAttributes& attributes, const ffi::AnyBuffer& logits,
    const ffi::RemainingArgs& optional, const ffi::AnyBuffer& weights,
    const ffi::AnyBuffer& experts, const ffi::AnyBuffer& normalizer, const BlockResults& results,
    const ffi::RemainingRets& zeros, RouteAndPlanBlocks* call) {
  *call = RouteAndPlanBlocks{};
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_forward(options, has_bias, has_where, has_experts, logits,
                                                  optional, weights, experts, normalizer,
                                                  &call->route));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("experts", experts, ffi::DataType::S32));
  const auto shape = logits.dimensions();
  Blocks& blocks = call->blocks;
  blocks.k = options.k;
  blocks.tokens = shape[shape.size() - 2];
  blocks.batch = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) blocks.batch *= shape[i];
  JAX_ROUTER_RETURN_IF_ERROR(decode_block_results(attributes, results, &blocks));
  if (blocks.num_experts != call->route.experts)
    return invalid("num_experts must be that of logits");
  blocks.experts = static_cast<const int32_t*>(experts.untyped_data());
  blocks.weights = call->route.weights;
  if (zeros.size() > 1) return invalid("wrong number of results");
  if (zeros.size() == 1) {
    auto buffer = zeros.get<ffi::AnyBuffer>(0).value();
    call->zeros = buffer->untyped_data();
    call->zeros_bytes = buffer->size_bytes();
  }
  return ffi::Error::Success();
}

}  // namespace jax_router

#endif  // JAX_ROUTER_BLOCKS_FFI_H_
