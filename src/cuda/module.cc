// The CUDA module: handlers that bind the kernels to XLA, and their table.

#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

#include "balance.h"
#include "balance_ffi.h"
#include "blocks.h"
#include "blocks_ffi.h"
#include "experts.h"
#include "experts_ffi.h"
#include "ffi.h"
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

using Stream = ffi::PlatformStream<cudaStream_t>;

ffi::Error launch_result(const char* name, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_router: the launch of ") + name +
                              " failed: " + cudaGetErrorString(status));
}

// ---- route ----

ffi::Error route(cudaStream_t stream, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                 ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> experts,
                 ffi::Result<ffi::AnyBuffer> normalizer, int64_t k, int64_t score, bool renormalize,
                 float scale, int64_t group_count, int64_t group_keep, int64_t group_score,
                 bool has_bias, bool has_where, bool has_experts) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_forward(options, has_bias, has_where, has_experts, logits,
                                                  optional, *weights, *experts, *normalizer,
                                                  &call));
  return launch_result("route", launch_route(call, options, stream));
}

ffi::Error dense(cudaStream_t stream, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                 ffi::Result<ffi::AnyBuffer> probs, ffi::Result<ffi::AnyBuffer> map,
                 ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> experts,
                 ffi::Result<ffi::AnyBuffer> normalizer, int64_t k, int64_t score, bool renormalize,
                 float scale, int64_t group_count, int64_t group_keep, int64_t group_score,
                 bool has_bias, bool has_where, bool has_experts, int64_t map_format) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_dense_forward(options, has_bias, has_where, has_experts,
                                                  map_format, logits, optional, *probs, *map,
                                                  *weights, *experts, *normalizer, &call));
  return launch_result("dense", launch_route(call, options, stream));
}

// Of `route` and of `dense`.
template <bool kDenseCotangent>
ffi::Error route_backward(cudaStream_t stream, ffi::AnyBuffer cotangent, ffi::AnyBuffer weights,
                          ffi::AnyBuffer experts, ffi::AnyBuffer normalizer,
                          ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> gradient,
                          int64_t k, int64_t score, bool renormalize, float scale,
                          int64_t group_count, int64_t group_keep, int64_t group_score) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteBackward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_backward(options, kDenseCotangent, cotangent, weights,
                                                   experts, normalizer, optional, *gradient,
                                                   &call));
  return launch_result("route_backward", launch_route_backward(call, options, stream));
}

// ---- stats ----

ffi::Error stats(cudaStream_t stream, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                 ffi::RemainingRets results, int64_t k, int64_t score, bool renormalize,
                 float scale, int64_t group_count, int64_t group_keep, int64_t group_score,
                 bool has_bias, bool has_where, bool has_experts) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_stats_forward(options, has_bias, has_where, has_experts, logits,
                                                  optional, results, &call));
  return launch_result("stats", launch_stats(call, options, stream));
}

ffi::Error stats_backward(cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer softmax,
                          ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> gradient,
                          int64_t k, int64_t score, bool renormalize, float scale,
                          int64_t group_count, int64_t group_keep, int64_t group_score,
                          bool has_weights, bool has_scores, bool has_z) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteBackward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_stats_backward(options, has_weights, has_scores, has_z, logits,
                                                   softmax, optional, *gradient, &call));
  return launch_result("stats_backward", launch_route_backward(call, options, stream));
}

XLA_FFI_DEFINE_HANDLER(kRoute, route, bind_route<Stream>(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRouteBackward, route_backward<false>, bind_route_backward<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kDense, dense, bind_dense<Stream>(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kDenseBackward, route_backward<true>, bind_route_backward<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kStats, stats, bind_stats<Stream>(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kStatsBackward, stats_backward, bind_stats_backward<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- scores ----

ffi::Error scores(cudaStream_t stream, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
                  ffi::Result<ffi::AnyBuffer> scores, int64_t score) {
  ScoresForward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_scores_forward(score, logits, optional, *scores, &call));
  return launch_result("scores", launch_scores(call, stream));
}

ffi::Error scores_backward(cudaStream_t stream, ffi::AnyBuffer cotangent, ffi::AnyBuffer logits,
                           ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> gradient,
                           int64_t score) {
  ScoresBackward call;
  JAX_ROUTER_RETURN_IF_ERROR(
      decode_scores_backward(score, cotangent, logits, optional, *gradient, &call));
  return launch_result("scores_backward", launch_scores_backward(call, stream));
}

XLA_FFI_DEFINE_HANDLER(kScores, scores, bind_scores<Stream>(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kScoresBackward, scores_backward, bind_scores_backward<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- balance ----

ffi::Error quantile_histogram(cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer cutoff,
                              ffi::AnyBuffer bounds, ffi::RemainingArgs optional,
                              ffi::Result<ffi::AnyBuffer> counts, int64_t score, bool has_where) {
  QuantileHistogram call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_quantile_histogram(score, has_where, logits, cutoff, bounds,
                                                       optional, *counts, &call));
  return launch_result("quantile_histogram", launch_quantile_histogram(call, stream));
}

XLA_FFI_DEFINE_HANDLER(kQuantileHistogram, quantile_histogram, bind_quantile_histogram<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- permute, combine ----

ffi::Error permute(cudaStream_t stream, ffi::AnyBuffer tokens, ffi::AnyBuffer inverse,
                   ffi::AnyBuffer group_sizes, ffi::Result<ffi::AnyBuffer> rows) {
  Permute call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_permute(tokens, inverse, group_sizes, *rows, &call));
  return launch_result("permute", launch_permute(call, stream));
}

ffi::Error permute_backward(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer inverse,
                            ffi::AnyBuffer group_sizes, ffi::Result<ffi::AnyBuffer> tokens) {
  Combine call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_combine(rows, nullptr, inverse, group_sizes, *tokens, &call));
  return launch_result("permute_backward", launch_combine(call, stream));
}

ffi::Error combine(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                   ffi::AnyBuffer inverse, ffi::AnyBuffer group_sizes,
                   ffi::Result<ffi::AnyBuffer> tokens) {
  Combine call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_combine(rows, &weights, inverse, group_sizes, *tokens, &call));
  return launch_result("combine", launch_combine(call, stream));
}

ffi::Error combine_backward(cudaStream_t stream, ffi::AnyBuffer cotangent, ffi::AnyBuffer inverse,
                            ffi::AnyBuffer group_sizes, ffi::RemainingArgs optional,
                            ffi::RemainingRets results, bool of_rows, bool of_weights) {
  CombineBackward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_combine_backward(of_rows, of_weights, cotangent, inverse,
                                                     group_sizes, optional, results, &call));
  return launch_result("combine_backward", launch_combine_backward(call, stream));
}

XLA_FFI_DEFINE_HANDLER(kPermute, permute, bind_permute<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kPermuteBackward, permute_backward, bind_permute_backward<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombine, combine, bind_combine<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCombineBackward, combine_backward, bind_combine_backward<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- blocks ----

ffi::Error blocks(cudaStream_t stream, ffi::AnyBuffer experts, ffi::AnyBuffer weights,
                  ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> ids,
                  ffi::Result<ffi::AnyBuffer> sorted_weights,
                  ffi::Result<ffi::AnyBuffer> block_experts, ffi::Result<ffi::AnyBuffer> num_padded,
                  ffi::Result<ffi::AnyBuffer> num_tokens, ffi::Result<ffi::AnyBuffer> inverse,
                  ffi::Result<ffi::AnyBuffer> scratch, int64_t num_experts, int64_t block_size,
                  int64_t layout, bool has_mask, bool has_num_valid) {
  Blocks call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_blocks(
      {num_experts, block_size, layout}, has_mask, has_num_valid, experts, weights, optional,
      {*ids, *sorted_weights, *block_experts, *num_padded, *num_tokens, *inverse, *scratch},
      &call));
  return launch_result("blocks", launch_blocks_plan(call, stream));
}

ffi::Error route_and_plan_blocks(
    cudaStream_t stream, ffi::AnyBuffer logits, ffi::RemainingArgs optional,
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
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_and_plan_blocks(
      options, has_bias, has_where, has_experts, {num_experts, block_size, layout}, logits,
      optional, *weights, *experts, *normalizer,
      {*ids, *sorted_weights, *block_experts, *num_padded, *num_tokens, *inverse, *scratch}, zeros,
      &call));
  return launch_result("route_and_plan_blocks",
                       launch_route_and_plan_blocks(call, options, stream));
}

XLA_FFI_DEFINE_HANDLER(kBlocks, blocks, bind_blocks<Stream>(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRouteAndPlanBlocks, route_and_plan_blocks,
                       bind_route_and_plan_blocks<Stream>(), {ffi::Traits::kCmdBufferCompatible});

// ---- plan ----

ffi::Error plan(cudaStream_t stream, ffi::AnyBuffer ids, ffi::Result<ffi::AnyBuffer> order,
                ffi::Result<ffi::AnyBuffer> inverse, ffi::Result<ffi::AnyBuffer> group_sizes,
                ffi::Result<ffi::AnyBuffer> counts) {
  PlanCall call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_plan(ids, *order, *inverse, *group_sizes, *counts, &call));
  return launch_result("plan", launch_plan(call, stream));
}

XLA_FFI_DEFINE_HANDLER(kPlan, plan, bind_plan<Stream>(), {ffi::Traits::kCmdBufferCompatible});

// ---- experts ----

// The scratch is a result that Python drops.
ffi::Error launch_experts_call(const Experts& call, ffi::AnyBuffer& scratch, cudaStream_t stream) {
  JAX_ROUTER_RETURN_IF_ERROR(
      check_elements("the scratch", scratch, call.batch * experts_scratch_words(call)));
  JAX_ROUTER_RETURN_IF_ERROR(check_type("the scratch", scratch, ffi::DataType::S32));
  return launch_result("experts",
                       launch_experts(call, static_cast<int32_t*>(scratch.untyped_data()), stream));
}

ffi::Error experts(cudaStream_t stream, ffi::AnyBuffer h, ffi::AnyBuffer w2, ffi::AnyBuffer alpha,
                   ffi::Result<ffi::AnyBuffer> result, ffi::Result<ffi::AnyBuffer> scratch) {
  Experts call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_experts(h, w2, alpha, *result, &call));
  return launch_experts_call(call, *scratch, stream);
}

ffi::Error experts_float8(cudaStream_t stream, ffi::AnyBuffer h, ffi::AnyBuffer w2,
                          ffi::AnyBuffer alpha, ffi::AnyBuffer h_scale, ffi::AnyBuffer w2_scale,
                          ffi::Result<ffi::AnyBuffer> result, ffi::Result<ffi::AnyBuffer> scratch) {
  Experts call;
  JAX_ROUTER_RETURN_IF_ERROR(
      decode_experts_float8(h, w2, alpha, h_scale, w2_scale, *result, &call));
  return launch_experts_call(call, *scratch, stream);
}

XLA_FFI_DEFINE_HANDLER(kExperts, experts, bind_experts<Stream>().Ret<ffi::AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExpertsFloat8, experts_float8,
                       bind_experts_float8<Stream>().Ret<ffi::AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});

// ---- replicas ----

ffi::Error replicas(cudaStream_t stream, ffi::AnyBuffer experts, ffi::AnyBuffer table,
                    ffi::AnyBuffer counts, ffi::AnyBuffer offset, ffi::RemainingArgs optional,
                    ffi::Result<ffi::AnyBuffer> physical, ffi::Result<ffi::AnyBuffer> load,
                    int64_t num_physical, int64_t policy, int64_t load_of, bool has_where) {
  ReplicasCall call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_replicas({num_physical, policy, load_of}, has_where, experts,
                                             table, counts, offset, optional, *physical, *load,
                                             &call));
  return launch_result("assign_replicas", launch_replicas(call, stream));
}

ffi::Error route_and_assign_replicas(
    cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer table, ffi::AnyBuffer counts,
    ffi::AnyBuffer offset, ffi::RemainingArgs optional, ffi::Result<ffi::AnyBuffer> weights,
    ffi::Result<ffi::AnyBuffer> experts, ffi::Result<ffi::AnyBuffer> normalizer,
    ffi::Result<ffi::AnyBuffer> physical, ffi::Result<ffi::AnyBuffer> load, int64_t k,
    int64_t score, bool renormalize, float scale, int64_t group_count, int64_t group_keep,
    int64_t group_score, int64_t num_physical, int64_t policy, int64_t load_of, bool has_bias,
    bool has_where, bool has_experts) {
  const RouteOptions options =
      OptionAttributes{k, score, renormalize, scale, group_count, group_keep, group_score}.decode();
  RouteForward call;
  JAX_ROUTER_RETURN_IF_ERROR(decode_route_and_assign_replicas(
      options, {num_physical, policy, load_of}, has_bias, has_where, has_experts, logits, optional,
      {table, counts, offset, *weights, *experts, *normalizer, *physical, *load}, &call));
  return launch_result("route_and_assign_replicas", launch_route(call, options, stream));
}

XLA_FFI_DEFINE_HANDLER(kReplicas, replicas, bind_replicas<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kRouteAndAssignReplicas, route_and_assign_replicas,
                       bind_route_and_assign_replicas<Stream>(),
                       {ffi::Traits::kCmdBufferCompatible});

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
  table["plan"] = nb::capsule(reinterpret_cast<void*>(kPlan));
  table["experts"] = nb::capsule(reinterpret_cast<void*>(kExperts));
  table["experts_float8"] = nb::capsule(reinterpret_cast<void*>(kExpertsFloat8));
  table["assign_replicas"] = nb::capsule(reinterpret_cast<void*>(kReplicas));
  table["route_and_assign_replicas"] =
      nb::capsule(reinterpret_cast<void*>(kRouteAndAssignReplicas));
  return table;
}

int64_t max_fused_tokens(int64_t experts, int64_t k, int64_t group_count, int device) {
  RouteOptions options{};
  options.k = k;
  options.group_count = group_count;
  return most_fused_tokens(experts, options, device);
}

int64_t experts_scratch_of(bool float8, int64_t tokens, int64_t experts, int64_t depth,
                           int64_t width) {
  Experts call{};
  call.float8 = float8;
  call.tokens = tokens;
  call.experts = experts;
  call.depth = depth;
  call.width = width;
  return experts_scratch_words(call);
}

}  // namespace
}  // namespace jax_router

NB_MODULE(_cuda, m) {
  m.doc() = "CUDA handlers of jax_router.";
  m.def("handlers", &jax_router::handlers, "FFI handlers by name.");
  m.def("max_fused_tokens", &jax_router::max_fused_tokens,
        "Up to how many tokens route_and_plan_blocks is one kernel on a device, by its number.");
  m.def("experts_run", &jax_router::dense_experts_run,
        "Whether the kernel of experts is in this build and runs on a device, by its number.");
  m.def("experts_scratch", &jax_router::experts_scratch_of,
        "Scratch of the kernel of experts for a batch row, in elements of 4 bytes.");
  m.def(
      "ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "XLA FFI version (major, minor) that this module was compiled for.");
}
