// Handlers of what surrounds routing in a layer: orders and rows, block layouts, dense experts,
// replicas.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "blocks.h"
#include "blocks_ffi.h"
#include "experts.h"
#include "experts_ffi.h"
#include "ffi.h"
#include "module.h"
#include "parallel.h"
#include "permute.h"
#include "permute_ffi.h"
#include "plan.h"
#include "plan_ffi.h"
#include "replicas.h"
#include "replicas_ffi.h"
#include "route.h"
#include "route_ffi.h"

namespace nb = nanobind;

namespace jax_router {
namespace {

// ---- permute, combine ----

template <typename Call>
ffi::Future run_tokens(ffi::ThreadPool& pool, TokenKernel<Call> kernel, const Call& call) {
  const int64_t cost = (call.plan.slots + 1) * (call.plan.width + 16);
  return parallel_rows(pool, call.plan.batch * call.plan.tokens, cost,
                       [kernel, call](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

ffi::Future permute(ffi::ThreadPool pool, ffi::AnyBuffer tokens, ffi::AnyBuffer inverse,
                    ffi::AnyBuffer group_sizes, ffi::Result<ffi::AnyBuffer> rows) {
  Permute call;
  ffi::Error error = decode_permute(tokens, inverse, group_sizes, *rows, &call);
  if (error.failure()) return finished(std::move(error));
  return run_tokens(pool, JAX_ROUTER_BEST(permute_kernel), call);
}

ffi::Future permute_backward(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer inverse,
                             ffi::AnyBuffer group_sizes, ffi::Result<ffi::AnyBuffer> tokens) {
  Combine call;
  ffi::Error error = decode_combine(rows, nullptr, inverse, group_sizes, *tokens, &call);
  if (error.failure()) return finished(std::move(error));
  return run_tokens(pool, JAX_ROUTER_BEST(combine_kernel), call);
}

ffi::Future combine(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                    ffi::AnyBuffer inverse, ffi::AnyBuffer group_sizes,
                    ffi::Result<ffi::AnyBuffer> tokens) {
  Combine call;
  ffi::Error error = decode_combine(rows, &weights, inverse, group_sizes, *tokens, &call);
  if (error.failure()) return finished(std::move(error));
  return run_tokens(pool, JAX_ROUTER_BEST(combine_kernel), call);
}

ffi::Future combine_backward(ffi::ThreadPool pool, ffi::AnyBuffer cotangent, ffi::AnyBuffer inverse,
                             ffi::AnyBuffer group_sizes, ffi::RemainingArgs optional,
                             ffi::RemainingRets results, bool of_rows, bool of_weights) {
  CombineBackward call;
  ffi::Error error = decode_combine_backward(of_rows, of_weights, cotangent, inverse, group_sizes,
                                             optional, results, &call);
  if (error.failure()) return finished(std::move(error));
  return run_tokens(pool, JAX_ROUTER_BEST(combine_backward_kernel), call);
}

XLA_FFI_DEFINE_HANDLER(kPermute, permute, bind_permute<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kPermuteBackward, permute_backward,
                       bind_permute_backward<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kCombine, combine, bind_combine<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kCombineBackward, combine_backward,
                       bind_combine_backward<ffi::ThreadPool>());

// ---- blocks ----

int64_t blocks_cost(const Blocks& call) {
  return 4 * call.entries() + call.positions + call.num_experts;
}

void plan_row(const BlocksKernel& kernel, const Blocks& call, int64_t row) {
  kernel.place(call, row);
  kernel.scatter(call, row, 0, call.chunks);
}

ffi::Future blocks(ffi::ThreadPool pool, ffi::AnyBuffer experts, ffi::AnyBuffer weights,
                   ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> ids,
                   ffi::Result<ffi::AnyBuffer> sorted_weights,
                   ffi::Result<ffi::AnyBuffer> block_experts,
                   ffi::Result<ffi::AnyBuffer> num_padded, ffi::Result<ffi::AnyBuffer> num_tokens,
                   ffi::Result<ffi::AnyBuffer> inverse, ffi::Result<ffi::AnyBuffer> scratch,
                   int64_t num_experts, int64_t block_size, int64_t layout, bool has_mask,
                   bool has_num_valid) {
  Blocks call;
  ffi::Error error = decode_blocks(
      {num_experts, block_size, layout}, has_mask, has_num_valid, experts, weights, optional,
      {*ids, *sorted_weights, *block_experts, *num_padded, *num_tokens, *inverse, *scratch}, &call);
  if (error.failure()) return finished(std::move(error));
  const BlocksKernel kernel = JAX_ROUTER_BEST(blocks_kernel);
  if (call.batch == 1) {
    kernel.place(call, 0);
    return parallel_rows(
        pool, call.chunks, 4 * call.chunk_entries() + 1,
        [kernel, call](int64_t begin, int64_t end) { kernel.scatter(call, 0, begin, end); });
  }
  return parallel_rows(pool, call.batch, blocks_cost(call),
                       [kernel, call](int64_t begin, int64_t end) {
                         for (int64_t row = begin; row < end; ++row) plan_row(kernel, call, row);
                       });
}

// The rows of the batch at the same time or, if there is one alone, its tokens and then their plan.
ffi::Future route_and_plan_blocks(
    ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
    ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> experts,
    ffi::Result<ffi::AnyBuffer> normalizer, ffi::Result<ffi::AnyBuffer> ids,
    ffi::Result<ffi::AnyBuffer> sorted_weights, ffi::Result<ffi::AnyBuffer> block_experts,
    ffi::Result<ffi::AnyBuffer> num_padded, ffi::Result<ffi::AnyBuffer> num_tokens,
    ffi::Result<ffi::AnyBuffer> inverse, ffi::Result<ffi::AnyBuffer> scratch,
    ffi::RemainingRets zeros, int64_t k, int64_t score, bool renormalize, float scale,
    int64_t group_count, int64_t group_keep, int64_t group_score, int64_t num_experts,
    int64_t block_size, int64_t layout, bool has_bias, bool has_where, bool has_experts) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteAndPlanBlocks call;
  ffi::Error error = decode_route_and_plan_blocks(
      options, has_bias, has_where, has_experts, {num_experts, block_size, layout}, logits,
      optional, *weights, *experts, *normalizer,
      {*ids, *sorted_weights, *block_experts, *num_padded, *num_tokens, *inverse, *scratch}, zeros,
      &call);
  if (error.failure()) return finished(std::move(error));
  if (call.zeros_bytes > 0) std::memset(call.zeros, 0, call.zeros_bytes);
  const RouteForwardKernel kernel = JAX_ROUTER_BEST(route_forward_kernel);
  const BlocksKernel plan = JAX_ROUTER_BEST(blocks_kernel);
  const int64_t tokens = call.blocks.tokens;
  const int64_t cost = call.route.experts + 8 * options.k;
  const auto route_tokens = [kernel, call, options](int64_t begin, int64_t end) {
    const Scratch memory(kernel.scratch_bytes(call.route, options));
    kernel.run(call.route, options, begin, end, memory.data());
  };
  if (call.blocks.batch == 1) {
    return parallel_rows(pool, tokens, cost, route_tokens,
                         [plan, call] { plan_row(plan, call.blocks, 0); });
  }
  return parallel_rows(pool, call.blocks.batch, tokens * cost + blocks_cost(call.blocks),
                       [route_tokens, plan, call, tokens](int64_t begin, int64_t end) {
                         route_tokens(begin * tokens, end * tokens);
                         for (int64_t row = begin; row < end; ++row) {
                           plan_row(plan, call.blocks, row);
                         }
                       });
}

XLA_FFI_DEFINE_HANDLER(kBlocks, blocks, bind_blocks<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kRouteAndPlanBlocks, route_and_plan_blocks,
                       bind_route_and_plan_blocks<ffi::ThreadPool>());

// ---- plan ----

ffi::Future plan(ffi::ThreadPool pool, ffi::AnyBuffer ids, ffi::Result<ffi::AnyBuffer> order,
                 ffi::Result<ffi::AnyBuffer> inverse, ffi::Result<ffi::AnyBuffer> group_sizes,
                 ffi::Result<ffi::AnyBuffer> counts) {
  PlanCall call;
  ffi::Error error = decode_plan(ids, *order, *inverse, *group_sizes, *counts, &call);
  if (error.failure()) return finished(std::move(error));
  return parallel_rows(pool, call.batch, plan_cost(call), [call](int64_t begin, int64_t end) {
    const Scratch scratch(plan_scratch_bytes(call));
    run_plan(call, begin, end, scratch.data());
  });
}

XLA_FFI_DEFINE_HANDLER(kPlan, plan, bind_plan<ffi::ThreadPool>());

// ---- experts ----

ffi::Future experts(ffi::ThreadPool pool, ffi::AnyBuffer h, ffi::AnyBuffer w2, ffi::AnyBuffer alpha,
                    ffi::Result<ffi::AnyBuffer> result) {
  Experts call;
  ffi::Error error = decode_experts(h, w2, alpha, *result, &call);
  if (error.failure()) return finished(std::move(error));
  const ExpertsKernel kernel = JAX_ROUTER_BEST(experts_kernel);
  const auto shared = std::make_shared<Scratch>(kernel.shared_bytes(call));
  kernel.prepare(call, shared->data());
  return parallel_rows(pool, kernel.tasks(call), kernel.task_cost(call, shared->data()),
                       [kernel, call, shared](int64_t begin, int64_t end) {
                         const Scratch scratch(kernel.scratch_bytes(call));
                         kernel.run(call, shared->data(), begin, end, scratch.data());
                       });
}

XLA_FFI_DEFINE_HANDLER(kExperts, experts, bind_experts<ffi::ThreadPool>());

// ---- replicas ----

ffi::Future replicas(ffi::ThreadPool pool, ffi::AnyBuffer experts, ffi::AnyBuffer table,
                     ffi::AnyBuffer counts, ffi::AnyBuffer offset, ffi::RemainingArgs optional,
                     ffi::Result<ffi::AnyBuffer> physical, ffi::Result<ffi::AnyBuffer> load,
                     int64_t num_physical, int64_t policy, int64_t load_of, bool has_where) {
  ReplicasCall call;
  ffi::Error error = decode_replicas({num_physical, policy, load_of}, has_where, experts, table,
                                     counts, offset, optional, *physical, *load, &call);
  if (error.failure()) return finished(std::move(error));
  prepare_replicas(call);
  return parallel_rows(pool, replicas_tasks(call), replicas_task_cost(call),
                       [call](int64_t begin, int64_t end) {
                         const Scratch scratch(replicas_scratch_bytes(call));
                         run_replicas(call, begin, end, scratch.data());
                       });
}

// The replicas of a chunk of tokens follow its routing while its experts are in the cache.
ffi::Future route_and_assign_replicas(
    ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::AnyBuffer table, ffi::AnyBuffer counts,
    ffi::AnyBuffer offset, ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> weights,
    ffi::Result<ffi::AnyBuffer> experts, ffi::Result<ffi::AnyBuffer> normalizer,
    ffi::Result<ffi::AnyBuffer> physical, ffi::Result<ffi::AnyBuffer> load, int64_t k,
    int64_t score, bool renormalize, float scale, int64_t group_count, int64_t group_keep,
    int64_t group_score, int64_t num_physical, int64_t policy, int64_t load_of, bool has_bias,
    bool has_where, bool has_experts) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  ffi::Error error = decode_route_and_assign_replicas(
      options, {num_physical, policy, load_of}, has_bias, has_where, has_experts, logits, optional,
      {table, counts, offset, *weights, *experts, *normalizer, *physical, *load}, &call);
  if (error.failure()) return finished(std::move(error));
  prepare_routed_replicas(call.replicas);
  const RouteForwardKernel kernel = JAX_ROUTER_BEST(route_forward_kernel);
  return parallel_rows(
      pool, call.tokens, call.experts + 16 * k,
      [kernel, call, options](int64_t begin, int64_t end) {
        const Scratch scratch(kernel.scratch_bytes(call, options));
        kernel.run(call, options, begin, end, scratch.data());
        const Scratch own(routed_replicas_scratch_bytes(call.replicas, (end - begin) * options.k));
        run_routed_replicas(call, options, begin, end, own.data());
      });
}

XLA_FFI_DEFINE_HANDLER(kReplicas, replicas, bind_replicas<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kRouteAndAssignReplicas, route_and_assign_replicas,
                       bind_route_and_assign_replicas<ffi::ThreadPool>());

}  // namespace

void add_layer_handlers(nb::dict& table) {
  table["permute"] = nb::capsule(reinterpret_cast<void*>(kPermute));
  table["permute_backward"] = nb::capsule(reinterpret_cast<void*>(kPermuteBackward));
  table["combine"] = nb::capsule(reinterpret_cast<void*>(kCombine));
  table["combine_backward"] = nb::capsule(reinterpret_cast<void*>(kCombineBackward));
  table["blocks"] = nb::capsule(reinterpret_cast<void*>(kBlocks));
  table["route_and_plan_blocks"] = nb::capsule(reinterpret_cast<void*>(kRouteAndPlanBlocks));
  table["experts"] = nb::capsule(reinterpret_cast<void*>(kExperts));
  table["plan"] = nb::capsule(reinterpret_cast<void*>(kPlan));
  table["assign_replicas"] = nb::capsule(reinterpret_cast<void*>(kReplicas));
  table["route_and_assign_replicas"] =
      nb::capsule(reinterpret_cast<void*>(kRouteAndAssignReplicas));
}

}  // namespace jax_router
