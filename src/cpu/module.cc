// The CPU module: handlers that bind the kernels of routing to XLA, and the table of all handlers.

#include "module.h"

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>
#include <utility>

#include "balance.h"
#include "balance_ffi.h"
#include "ffi.h"
#include "parallel.h"
#include "route.h"
#include "route_ffi.h"
#include "scores.h"
#include "scores_ffi.h"
#include "stats_ffi.h"

namespace nb = nanobind;

namespace jax_router {
namespace {

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
  add_layer_handlers(table);
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
