// The CPU module: handlers that bind the kernels to XLA, and their table.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "balance.h"
#include "balance_ffi.h"
#include "blocks.h"
#include "blocks_ffi.h"
#include "experts.h"
#include "experts_ffi.h"
#include "ffi.h"
#include "parallel.h"
#include "permute.h"
#include "permute_ffi.h"
#include "plan.h"
#include "plan_ffi.h"
#include "replicas.h"
#include "replicas_ffi.h"
#include "route.h"
#include "route_ffi.h"
#include "scores.h"
#include "scores_ffi.h"
#include "stats_ffi.h"

namespace nb = nanobind;

namespace jax_router {
namespace {

// ---- dispatch by instruction set ----

// Calls a function of the namespace for the best instruction set that the processor has.
#ifdef JAX_ROUTER_HAS_AVX2
bool has_avx2() {
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                __builtin_cpu_supports("bmi");
  return supported;
}
#define JAX_ROUTER_BEST(function) (has_avx2() ? avx2::function() : baseline::function())
#else
#define JAX_ROUTER_BEST(function) baseline::function()
#endif

template <typename Call>
ffi::Future run_rows(ffi::ThreadPool& pool, const RowKernel<Call>& kernel, const Call& call,
                     const RouteOptions& options) {
  return parallel_rows(pool, call.tokens, call.experts + 8 * options.k,
                       [kernel, call, options](int64_t begin, int64_t end) {
                         const Scratch scratch(kernel.scratch_bytes(call, options));
                         kernel.run(call, options, begin, end, scratch.data());
                       });
}

// ---- route, dense ----

ffi::Future route(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                  ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> experts,
                  ffi::Result<ffi::AnyBuffer> normalizer, int64_t k, int64_t score,
                  bool renormalize, float scale, int64_t group_count, int64_t group_keep,
                  int64_t group_score, bool has_bias, bool has_where, bool has_experts) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  ffi::Error error = decode_route_forward(options, has_bias, has_where, has_experts, logits,
                                          optional, *weights, *experts, *normalizer, &call);
  if (error.failure()) return finished(std::move(error));
  return run_rows(pool, JAX_ROUTER_BEST(route_forward_kernel), call, options);
}

ffi::Future dense(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                  ffi::Result<ffi::AnyBuffer> probs, ffi::Result<ffi::AnyBuffer> map,
                  ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> experts,
                  ffi::Result<ffi::AnyBuffer> normalizer, int64_t k, int64_t score,
                  bool renormalize, float scale, int64_t group_count, int64_t group_keep,
                  int64_t group_score, bool has_bias, bool has_where, bool has_experts,
                  int64_t map_format) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  ffi::Error error =
      decode_dense_forward(options, has_bias, has_where, has_experts, map_format, logits, optional,
                           *probs, *map, *weights, *experts, *normalizer, &call);
  if (error.failure()) return finished(std::move(error));
  return run_rows(pool, JAX_ROUTER_BEST(route_forward_kernel), call, options);
}

// Of `route` and of `dense`.
template <bool kDenseCotangent>
ffi::Future route_backward(ffi::ThreadPool pool, ffi::AnyBuffer cotangent, ffi::AnyBuffer weights,
                           ffi::AnyBuffer experts, ffi::AnyBuffer normalizer,
                           ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> gradient,
                           int64_t k, int64_t score, bool renormalize, float scale,
                           int64_t group_count, int64_t group_keep, int64_t group_score) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteBackward call;
  ffi::Error error = decode_route_backward(options, kDenseCotangent, cotangent, weights, experts,
                                           normalizer, optional, *gradient, &call);
  if (error.failure()) return finished(std::move(error));
  return run_rows(pool, JAX_ROUTER_BEST(route_backward_kernel), call, options);
}

// ---- stats ----

ffi::Future stats(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                  ffi::RemainingRets results, int64_t k, int64_t score, bool renormalize,
                  float scale, int64_t group_count, int64_t group_keep, int64_t group_score,
                  bool has_bias, bool has_where, bool has_experts) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  ffi::Error error = decode_stats_forward(options, has_bias, has_where, has_experts, logits,
                                          optional, results, &call);
  if (error.failure()) return finished(std::move(error));
  const StatsKernel kernel = JAX_ROUTER_BEST(stats_kernel);
  const int64_t blocks = call.stats.batches * blocks_of_batch(call.tokens_per_batch);
  const int64_t cost =
      tokens_of_block(call.tokens_per_batch) * (4 * call.experts + 8 * options.k + 64);
  return parallel_rows(
      pool, blocks, cost,
      [kernel, call, options](int64_t begin, int64_t end) {
        const Scratch scratch(kernel.blocks.scratch_bytes(call, options));
        kernel.blocks.run(call, options, begin, end, scratch.data());
      },
      [kernel, call] { kernel.finish(call); });
}

ffi::Future stats_backward(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::AnyBuffer softmax,
                           ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> gradient,
                           int64_t k, int64_t score, bool renormalize, float scale,
                           int64_t group_count, int64_t group_keep, int64_t group_score,
                           bool has_weights, bool has_scores, bool has_z) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteBackward call;
  ffi::Error error = decode_stats_backward(options, has_weights, has_scores, has_z, logits, softmax,
                                           optional, *gradient, &call);
  if (error.failure()) return finished(std::move(error));
  return run_rows(pool, JAX_ROUTER_BEST(route_backward_kernel), call, options);
}

XLA_FFI_DEFINE_HANDLER(kRoute, route, bind_route<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kRouteBackward, route_backward<false>,
                       bind_route_backward<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kDense, dense, bind_dense<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kDenseBackward, route_backward<true>,
                       bind_route_backward<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kStats, stats, bind_stats<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kStatsBackward, stats_backward, bind_stats_backward<ffi::ThreadPool>());

// ---- scores ----

template <typename Call>
ffi::Future run_scores(ffi::ThreadPool& pool, const ScoresKernel<Call>& kernel, const Call& call) {
  return parallel_rows(pool, call.tokens, call.experts + 8,
                       [kernel, call](int64_t begin, int64_t end) {
                         const Scratch scratch(kernel.scratch_bytes(call));
                         kernel.run(call, begin, end, scratch.data());
                       });
}

ffi::Future scores(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                   ffi::Result<ffi::AnyBuffer> scores, int64_t score) {
  ScoresForward call;
  ffi::Error error = decode_scores_forward(score, logits, optional, *scores, &call);
  if (error.failure()) return finished(std::move(error));
  return run_scores(pool, JAX_ROUTER_BEST(scores_kernel), call);
}

ffi::Future scores_backward(ffi::ThreadPool pool, ffi::AnyBuffer cotangent, ffi::AnyBuffer logits,
                            ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> gradient,
                            int64_t score) {
  ScoresBackward call;
  ffi::Error error = decode_scores_backward(score, cotangent, logits, optional, *gradient, &call);
  if (error.failure()) return finished(std::move(error));
  return run_scores(pool, JAX_ROUTER_BEST(scores_backward_kernel), call);
}

XLA_FFI_DEFINE_HANDLER(kScores, scores, bind_scores<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kScoresBackward, scores_backward, bind_scores_backward<ffi::ThreadPool>());

// ---- balance ----

ffi::Future quantile_histogram(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::AnyBuffer cutoff,
                               ffi::AnyBuffer bounds, ffi::RemainingArgs optional,
                               ffi::Result<ffi::AnyBuffer> counts, int64_t score, bool has_where) {
  QuantileHistogram call;
  ffi::Error error =
      decode_quantile_histogram(score, has_where, logits, cutoff, bounds, optional, *counts, &call);
  if (error.failure()) return finished(std::move(error));
  const QuantileHistogramKernel kernel = JAX_ROUTER_BEST(quantile_histogram_kernel);
  kernel.prepare(call);
  return parallel_rows(pool, kernel.tasks(call), kernel.task_cost(call),
                       [kernel, call](int64_t begin, int64_t end) {
                         const Scratch scratch(kernel.scratch_bytes(call));
                         kernel.run(call, begin, end, scratch.data());
                       });
}

XLA_FFI_DEFINE_HANDLER(kQuantileHistogram, quantile_histogram,
                       bind_quantile_histogram<ffi::ThreadPool>());

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
  ffi::Error error = decode_replicas({num_physical, policy, load_of, has_where}, experts, table,
                                     counts, offset, optional, *physical, *load, &call);
  if (error.failure()) return finished(std::move(error));
  prepare_replicas(call);
  return parallel_rows(pool, replicas_tasks(call), replicas_task_cost(call),
                       [call](int64_t begin, int64_t end) {
                         const Scratch scratch(replicas_scratch_bytes(call));
                         run_replicas(call, begin, end, scratch.data());
                       });
}

XLA_FFI_DEFINE_HANDLER(kReplicas, replicas, bind_replicas<ffi::ThreadPool>());

// ---- table ----

nb::dict handlers() {
  nb::dict table;
  table["route"] = nb::capsule(reinterpret_cast<void*>(kRoute));
  table["route_backward"] = nb::capsule(reinterpret_cast<void*>(kRouteBackward));
  table["dense"] = nb::capsule(reinterpret_cast<void*>(kDense));
  table["dense_backward"] = nb::capsule(reinterpret_cast<void*>(kDenseBackward));
  table["stats"] = nb::capsule(reinterpret_cast<void*>(kStats));
  table["stats_backward"] = nb::capsule(reinterpret_cast<void*>(kStatsBackward));
  table["scores"] = nb::capsule(reinterpret_cast<void*>(kScores));
  table["scores_backward"] = nb::capsule(reinterpret_cast<void*>(kScoresBackward));
  table["quantile_histogram"] = nb::capsule(reinterpret_cast<void*>(kQuantileHistogram));
  table["permute"] = nb::capsule(reinterpret_cast<void*>(kPermute));
  table["permute_backward"] = nb::capsule(reinterpret_cast<void*>(kPermuteBackward));
  table["combine"] = nb::capsule(reinterpret_cast<void*>(kCombine));
  table["combine_backward"] = nb::capsule(reinterpret_cast<void*>(kCombineBackward));
  table["blocks"] = nb::capsule(reinterpret_cast<void*>(kBlocks));
  table["route_and_plan_blocks"] = nb::capsule(reinterpret_cast<void*>(kRouteAndPlanBlocks));
  table["experts"] = nb::capsule(reinterpret_cast<void*>(kExperts));
  table["plan"] = nb::capsule(reinterpret_cast<void*>(kPlan));
  table["assign_replicas"] = nb::capsule(reinterpret_cast<void*>(kReplicas));
  return table;
}

}  // namespace
}  // namespace jax_router

NB_MODULE(_cpu, m) {
  m.doc() = "CPU handlers of jax_router.";
  m.def("handlers", &jax_router::handlers, "FFI handlers by name.");
  m.def(
      "ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "XLA FFI version (major, minor) that this module was compiled for.");
}
