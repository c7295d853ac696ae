#include <cstdint>

#include "experts.cuh"
#include "experts.h"
#include "route.h"
#include "tensor_map.h"
#include "warp.cuh"

namespace jax_router {
namespace {

constexpr int64_t kMostExperts = 65536;
constexpr int kPrepareThreads = 256;
constexpr int kMostWideTokens = 192;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the kernel before: which tokens have chosen an expert, and their multipliers ----

struct Prepare {
  const float* alpha;    // [tokens, experts]
  const float* h_scale;  // [tokens, experts * blocks] or null
  int64_t tokens;
  int tile_tokens;
  int experts;
  int blocks;
  float* multipliers;  // [token tiles, experts * blocks, tile_tokens]
  int32_t* chosen;     // [token tiles, experts, tile_tokens], ascending
  int32_t* counts;     // [token tiles, experts]
  int32_t* tickets;
  int64_t num_tickets;
};

// The multiplier of a token that has chosen the expert: not 0, whatever its scale, so that an
// infinite sum stays one.
__device__ __forceinline__ float scaled(float alpha, float scale) {
  const float product = alpha * scale;
  return product == 0.0f ? copysignf(1e-45f, product) : product;
}

// A block lists the tokens of an expert.
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const Prepare call) {
  constexpr int kWarps = kPrepareThreads / kWarpSize;
  __shared__ int found[kWarps];
  let_next_kernel_start();
  const int64_t list = blockIdx.y * int64_t{gridDim.x} + blockIdx.x;
  const int64_t thread = list * kPrepareThreads + threadIdx.x;
  for (int64_t i = thread; i < call.num_tickets;
       i += int64_t{gridDim.x} * gridDim.y * kPrepareThreads) {
    call.tickets[i] = 0;
  }
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_index();
  const int expert = blockIdx.x;
  const int64_t first = blockIdx.y * int64_t{call.tile_tokens};
  const int64_t left = call.tokens - first;
  const int tokens = left < call.tile_tokens ? static_cast<int>(left) : call.tile_tokens;
  int count = 0;
  for (int begin = 0; begin < tokens; begin += kPrepareThreads) {
    const int token = begin + threadIdx.x;
    const int64_t at = (first + token) * call.experts + expert;
    const float alpha = token < tokens ? __ldg(call.alpha + at) : 0.0f;
    const unsigned all = __ballot_sync(kAllLanes, alpha != 0.0f);
    if (lane == 0) found[warp] = __popc(all);
    __syncthreads();
    int slot = count + __popc(all & lanes_below(lane));
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) slot += found[i];
      count += found[i];
    }
    __syncthreads();
    if (alpha == 0.0f) continue;
    call.chosen[list * call.tile_tokens + slot] = token;
    float* to = call.multipliers + list * call.blocks * call.tile_tokens + slot;
    if (call.h_scale == nullptr) {
      *to = alpha;
    } else {
#pragma unroll 4
      for (int b = 0; b < call.blocks; ++b) {
        to[b * call.tile_tokens] = scaled(alpha, __ldg(call.h_scale + at * call.blocks + b));
      }
    }
  }
  if (threadIdx.x == 0) call.counts[list] = count;
}

// ---- sizes ----

struct Tiles {
  int hidden_tile;
  int64_t token_tiles;
  int tile_tokens;
  int64_t count;
};

Tiles tiles_of(const DenseExperts& call, ExpertsTactic tactic) {
  Tiles tiles{};
  tiles.token_tiles = call.tokens > kMostTileTokens ? divide_up(call.tokens, kMostTileTokens) : 1;
  tiles.tile_tokens = static_cast<int>(divide_up(call.tokens, tiles.token_tiles));
  // The faster one on an H100. A wider tile of many tokens would leave no room for enough stages.
  const bool wide = call.type != ExpertsType::kFloat8 && tiles.tile_tokens <= kMostWideTokens;
  tiles.hidden_tile = tactic.hidden_tile > 0 ? tactic.hidden_tile : wide ? 128 : 64;
  tiles.count = divide_up(call.hidden, tiles.hidden_tile) * tiles.token_tiles;
  return tiles;
}

// How many blocks share the work. In 16 bits, where reading the weights takes longest, some
// processors less do no harm, and sums of whole tiles, or of halves of them, need not be put
// together.
int64_t blocks_of(const DenseExperts& call, const Tiles& tiles, int64_t processors) {
  const int64_t whole = processors / tiles.count * tiles.count;
  const bool most = 5 * whole >= 4 * processors;
  return call.type != ExpertsType::kFloat8 && most ? whole : processors;
}

// How many stages a block may be ahead, the fastest on an H100. Fewer keep the blocks in step, and
// what they read together lies together in memory.
int most_stages(const DenseExperts& call, const Tiles& tiles) {
  if (call.type == ExpertsType::kFloat8) return 6;
  return tiles.hidden_tile == 128 ? 4 : 8;
}

int blocks_of_depth(const DenseExperts& call) {
  return call.type == ExpertsType::kFloat8 ? static_cast<int>(call.depth / kScaleBlock) : 1;
}

// ---- launches ----

ExpertsKernels kernels_of(ExpertsType type) {
  switch (type) {
    case ExpertsType::kBfloat16:
      return experts_kernels_bfloat16();
    case ExpertsType::kFloat16:
      return experts_kernels_float16();
    default:
      return experts_kernels_float8();
  }
}

cudaError_t launch_prepare(const DenseExperts& call, const Tiles& tiles, cudaStream_t stream) {
  Prepare prepare{};
  prepare.alpha = call.alpha;
  prepare.h_scale = call.h_scale;
  prepare.tokens = call.tokens;
  prepare.tile_tokens = tiles.tile_tokens;
  prepare.experts = static_cast<int>(call.experts);
  prepare.blocks = blocks_of_depth(call);
  prepare.multipliers = call.multipliers;
  prepare.chosen = call.chosen;
  prepare.counts = call.counts;
  prepare.tickets = call.tickets;
  prepare.num_tickets = tiles.count;
  const dim3 grid(static_cast<unsigned>(call.experts), static_cast<unsigned>(tiles.token_tiles));
  return launch_kernel(prepare_kernel, grid, kPrepareThreads, 0, stream, prepare);
}

cudaError_t make_weights_map(const DenseExperts& call, CUtensorMap* map) {
  const int64_t columns = call.experts * call.depth;
  if (call.type == ExpertsType::kFloat8) {
    return make_tensor_map(call.w2, call.hidden, columns, 1, 64, map);
  }
  return make_tensor_map(call.w2, columns, call.hidden, 2, 64, map);
}

}  // namespace

ExpertsScratch experts_scratch(const DenseExperts& call, ExpertsTactic tactic) {
  const Tiles tiles = tiles_of(call, tactic);
  const int64_t lists = tiles.token_tiles * call.experts;
  ExpertsScratch scratch{};
  scratch.multipliers = lists * blocks_of_depth(call) * tiles.tile_tokens;
  scratch.chosen = lists * tiles.tile_tokens;
  scratch.counts = lists;
  scratch.tickets = tiles.count;
  scratch.partials =
      (kMostExpertsBlocks + tiles.count) * tiles.hidden_tile * int64_t{tiles.tile_tokens};
  return scratch;
}

bool dense_experts_run(int device) {
#ifdef JAX_ROUTER_HAS_SM90A
  int major = 0, minor = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
#else
  static_cast<void>(device);
  return false;
#endif
}

cudaError_t launch_dense_experts(const DenseExperts& call, ExpertsTactic tactic,
                                 cudaStream_t stream) {
  if (call.tokens == 0) return cudaSuccess;
  const Tiles tiles = tiles_of(call, tactic);
  if (call.experts > kMostExperts || call.experts * call.depth > INT32_MAX ||
      call.tokens > kMostGridRows * int64_t{kMostTileTokens} || call.hidden > INT32_MAX ||
      tiles.count > INT32_MAX ||
      call.depth % (call.type == ExpertsType::kFloat8 ? kScaleBlock : 64) != 0 ||
      call.hidden % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  CUtensorMap weights_map;
  cudaError_t status = make_weights_map(call, &weights_map);
  if (status != cudaSuccess) return status;
  status = launch_prepare(call, tiles, stream);
  if (status != cudaSuccess) return status;
  int64_t blocks = blocks_of(call, tiles, device_limits().processors);
  if (blocks > kMostExpertsBlocks) blocks = kMostExpertsBlocks;
  if (tiles.count * call.experts < blocks) blocks = tiles.count * call.experts;
  ExpertsWork work{};
  work.layout = ExpertsLayout(tiles.hidden_tile, tiles.tile_tokens);
  work.most_stages = most_stages(call, tiles);
  work.experts = static_cast<int>(call.experts);
  work.tiles = static_cast<int>(tiles.count);
  work.h = static_cast<const char*>(call.h);
  work.multipliers = call.multipliers;
  work.chosen = call.chosen;
  work.counts = call.counts;
  work.w_scale = call.w_scale;
  work.partials = call.partials;
  work.tickets = call.tickets;
  work.result = call.result;
  work.result_type = call.result_type;
  work.tokens = call.tokens;
  work.hidden = call.hidden;
  work.tile_tokens = tiles.tile_tokens;
  work.token_tiles = static_cast<int>(tiles.token_tiles);
  work.blocks = blocks_of_depth(call);
  work.parts = call.type == ExpertsType::kFloat8 ? 1 : static_cast<int>(call.depth / 64);
  const ExpertsKernels kernels = kernels_of(call.type);
  const void* kernel = tiles.hidden_tile == 64 ? kernels.narrow : kernels.wide;
  status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kExpertsShared);
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(kLoadThreads + 2 * tiles.hidden_tile));
  config.dynamicSmemBytes = static_cast<size_t>(work.layout.bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = kProgrammaticLaunch ? 1 : 0;
  void* arguments[] = {&weights_map, &work};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

// ---- calls of XLA ----

namespace {

// A batch row, without scratch.
DenseExperts batch_row(const Experts& call, int64_t row) {
  const int64_t columns = call.experts * call.depth;
  const int64_t tokens = row * call.tokens;
  const int64_t scales = columns / kScaleBlock;
  const int64_t scale_rows = divide_up(call.width, kScaleBlock);
  const int bytes = call.float8 ? 1 : 2;
  const int result_bytes = call.result_type == LogitsType::kFloat32 ? 4 : 2;
  DenseExperts one{};
  one.type = call.float8                          ? ExpertsType::kFloat8
             : call.type == LogitsType::kBfloat16 ? ExpertsType::kBfloat16
                                                  : ExpertsType::kFloat16;
  one.h = static_cast<const char*>(call.h) + tokens * columns * bytes;
  one.w2 = static_cast<const char*>(call.w2) + row * columns * call.width * bytes;
  one.alpha = call.alpha + tokens * call.experts;
  if (call.float8) {
    one.h_scale = call.h_scale + tokens * scales;
    one.w_scale = call.w2_scale + row * scale_rows * scales;
  }
  one.result = static_cast<char*>(call.result) + tokens * call.width * result_bytes;
  one.result_type = call.result_type;
  one.tokens = call.tokens;
  one.experts = call.experts;
  one.depth = call.depth;
  one.hidden = call.width;
  return one;
}

}  // namespace

int64_t experts_scratch_words(const Experts& call) {
  const ExpertsScratch scratch = experts_scratch(batch_row(call, 0), {});
  return scratch.partials + scratch.multipliers + scratch.chosen + scratch.counts + scratch.tickets;
}

cudaError_t launch_experts(const Experts& call, int32_t* scratch, cudaStream_t stream) {
  int device;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  // Elsewhere the kernel is empty, and would leave the result as it was.
  if (!dense_experts_run(device)) return cudaErrorNoKernelImageForDevice;
  if (!call.float8 && call.type == LogitsType::kFloat32) return cudaErrorInvalidValue;
  for (int64_t row = 0; row < call.batch; ++row) {
    DenseExperts one = batch_row(call, row);
    const ExpertsScratch sizes = experts_scratch(one, {});
    // Those that must be aligned come first, at multiples of 16 bytes.
    one.partials = reinterpret_cast<float*>(scratch);
    one.multipliers = one.partials + sizes.partials;
    one.chosen = reinterpret_cast<int32_t*>(one.multipliers + sizes.multipliers);
    one.counts = one.chosen + sizes.chosen;
    one.tickets = one.counts + sizes.counts;
    const cudaError_t launched = launch_dense_experts(one, {}, stream);
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

}  // namespace jax_router
