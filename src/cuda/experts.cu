#include <map>
#include <mutex>
#include <tuple>

#include "experts.cuh"
#include "experts.h"
#include "tensor_map.h"

namespace jax_router {
namespace {

constexpr int kWidths[] = {16, 32, 64, 96, 112, 128, 144, 160, 192};
constexpr int64_t most_width(ExpertsType type) { return type == ExpertsType::kFloat8 ? 192 : 160; }
constexpr int64_t kMostExperts = 65536;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the kernel before: multipliers by expert, and which experts are chosen at all ----

constexpr int kPrepareThreads = 1024;

struct Prepare {
  const float* alpha;    // [tokens, experts]
  const float* h_scale;  // [tokens, experts * blocks] or null
  int64_t tokens;
  int64_t padded_tokens;
  int experts;
  int blocks;
  int chunk_tokens;
  bool skip;
  float* multipliers;  // [experts * blocks, padded_tokens], 0 for tokens that are not there
  uint32_t* chosen;    // [chunks, words]
  int32_t* tickets;
  int64_t num_tickets;
};

// The multiplier of a token; one that is not chosen has 0, whatever its scale, and no other has.
__device__ __forceinline__ float scaled(float alpha, float scale) {
  if (alpha == 0.0f) return 0.0f;
  const float product = alpha * scale;
  return product == 0.0f ? copysignf(1e-45f, product) : product;
}

// The place of a token's multiplier: a thread that multiplies has tokens 2 c, 2 c + 1, 2 c + 8 and
// 2 c + 9 of 16, and reads their multipliers together.
__device__ __forceinline__ int place_of(int token) {
  return (token & ~15) | (token >> 1 & 3) << 2 | (token >> 3 & 1) << 1 | (token & 1);
}

__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const Prepare call) {
  __shared__ float tile[32][33];
  __shared__ uint32_t words[32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t block = blockIdx.y * int64_t{gridDim.x} + blockIdx.x;
  for (int64_t i = block * kPrepareThreads + threadIdx.x; i < call.num_tickets;
       i += int64_t{gridDim.x} * gridDim.y * kPrepareThreads) {
    call.tickets[i] = 0;
  }
  const int first = blockIdx.x * 32;
  const int expert = first + lane;
  const int64_t begin = blockIdx.y * int64_t{call.chunk_tokens};
  const int64_t end = min(begin + call.chunk_tokens, call.padded_tokens);
  bool any = !call.skip;
  for (int64_t t0 = begin; t0 < end; t0 += 32) {
    const int64_t token = t0 + warp;
    const bool inside = token < call.tokens && expert < call.experts;
    const float alpha = inside ? call.alpha[token * call.experts + expert] : 0.0f;
    any |= alpha != 0.0f;
    for (int b = 0; b < call.blocks; ++b) {
      float multiplier = alpha;
      if (call.h_scale != nullptr && inside) {
        multiplier = scaled(alpha, call.h_scale[(token * call.experts + expert) * call.blocks + b]);
      }
      tile[warp][lane] = multiplier;
      __syncthreads();
      if (first + warp < call.experts && t0 + lane < call.padded_tokens) {
        const int64_t row = int64_t{first + warp} * call.blocks + b;
        call.multipliers[row * call.padded_tokens + t0 + place_of(lane)] = tile[lane][warp];
      }
      __syncthreads();
    }
  }
  const unsigned found = __ballot_sync(kAllLanes, any);
  if (lane == 0) words[warp] = found;
  __syncthreads();
  if (warp == 0) {
    const uint32_t word = __reduce_or_sync(kAllLanes, words[lane]);
    if (lane == 0) call.chosen[blockIdx.y * int64_t{gridDim.x} + blockIdx.x] = word;
  }
}

// ---- sizes ----

struct Tiles {
  int width;  // tokens
  int hidden_blocks;
  int token_blocks;
  int64_t token_groups;
  int64_t count;
  int64_t padded_tokens;
  int blocks() const { return hidden_blocks * token_blocks; }
};

Tiles tiles_of(const DenseExperts& call, ExpertsTactic tactic) {
  Tiles tiles{};
  // The faster one on an H100. Two blocks share tokens where there is one tile of these, and
  // weights where there are more.
  const int64_t most = most_width(call.type);
  const bool one = call.tokens <= most;
  tiles.token_blocks = tactic.token_blocks > 0 ? tactic.token_blocks : one ? 1 : 2;
  tiles.hidden_blocks = tactic.hidden_blocks > 0 ? tactic.hidden_blocks : one ? 2 : 1;
  const int64_t width = tactic.width > 0 ? tactic.width : most;
  tiles.token_groups = divide_up(call.tokens, width * tiles.token_blocks);
  const int64_t token_tiles = tiles.token_groups * tiles.token_blocks;
  tiles.width = tactic.width;
  for (int i = 0; tiles.width == 0; ++i) {
    if (kWidths[i] * token_tiles >= call.tokens) tiles.width = kWidths[i];
  }
  tiles.padded_tokens = token_tiles * tiles.width;
  tiles.count = divide_up(call.hidden, kHiddenTile * tiles.hidden_blocks) * tiles.token_groups;
  return tiles;
}

int blocks_of_depth(const DenseExperts& call) {
  return call.type == ExpertsType::kFloat8 ? static_cast<int>(call.depth / kScaleBlock) : 1;
}

int64_t chunks_of(const Tiles& tiles) {
  const int64_t chunks = divide_up(tiles.padded_tokens, 32);
  return chunks < kMostTokenChunks ? chunks : kMostTokenChunks;
}

// ---- launches ----

ExpertsKernel kernel_of(ExpertsType type, int width) {
  switch (type) {
    case ExpertsType::kBfloat16:
      return experts_kernel_bfloat16(width);
    case ExpertsType::kFloat16:
      return experts_kernel_float16(width);
    default:
      return experts_kernel_float8(width);
  }
}

// How many clusters are resident at a time. Asked once for each kernel, device and cluster.
cudaError_t resident_clusters(const ExpertsKernel& kernel, const cudaLaunchConfig_t& config,
                              int cluster_blocks, int* clusters) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int>, int> known;
  int device;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{device, kernel.function, cluster_blocks}];
  if (found == 0) {
    status = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kernel.shared_bytes);
    if (status != cudaSuccess) return status;
    status = cudaOccupancyMaxActiveClusters(&found, kernel.function, &config);
    if (status != cudaSuccess) return status;
  }
  *clusters = found;
  return found > 0 ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

cudaError_t launch_prepare(const DenseExperts& call, const Tiles& tiles, cudaStream_t stream) {
  const int64_t chunks = chunks_of(tiles);
  Prepare prepare{};
  prepare.alpha = call.alpha;
  prepare.h_scale = call.h_scale;
  prepare.tokens = call.tokens;
  prepare.padded_tokens = tiles.padded_tokens;
  prepare.experts = static_cast<int>(call.experts);
  prepare.blocks = blocks_of_depth(call);
  prepare.chunk_tokens =
      static_cast<int>(divide_up(divide_up(tiles.padded_tokens, 32), chunks) * 32);
  prepare.skip = call.skip;
  prepare.multipliers = call.multipliers;
  prepare.chosen = call.chosen;
  prepare.tickets = call.tickets;
  prepare.num_tickets = tiles.count * tiles.blocks();
  const dim3 grid(static_cast<unsigned>(divide_up(call.experts, 32)),
                  static_cast<unsigned>(chunks));
  prepare_kernel<<<grid, kPrepareThreads, 0, stream>>>(prepare);
  return cudaGetLastError();
}

cudaError_t make_maps(const DenseExperts& call, const Tiles& tiles, CUtensorMap* weights,
                      CUtensorMap* tokens) {
  const int64_t columns = call.experts * call.depth;
  const bool float8 = call.type == ExpertsType::kFloat8;
  const int bytes = float8 ? 1 : 2;
  const cudaError_t status =
      float8 ? make_tensor_map(call.w2, call.hidden, columns, bytes, 64, weights)
             : make_tensor_map(call.w2, columns, call.hidden, bytes, 64, weights);
  if (status != cudaSuccess) return status;
  return make_tensor_map(call.h, call.tokens, columns, bytes, tiles.width / tiles.hidden_blocks,
                         tokens);
}

}  // namespace

ExpertsScratch experts_scratch(const DenseExperts& call, ExpertsTactic tactic) {
  const Tiles tiles = tiles_of(call, tactic);
  ExpertsScratch scratch{};
  scratch.multipliers = call.experts * blocks_of_depth(call) * tiles.padded_tokens;
  scratch.chosen = chunks_of(tiles) * divide_up(call.experts, 32);
  scratch.tickets = tiles.count * tiles.blocks();
  scratch.partials = int64_t{2} * kMostExpertsBlocks * kHiddenTile * tiles.width;
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
  const int share = tiles.width / tiles.hidden_blocks;
  if (call.experts > kMostExperts || call.experts * call.depth > INT32_MAX ||
      call.tokens > INT32_MAX || call.hidden > INT32_MAX || tiles.count > INT32_MAX ||
      call.depth % (call.type == ExpertsType::kFloat8 ? kScaleBlock : 64) != 0 ||
      call.hidden % 8 != 0 || tiles.token_blocks > 2 ||
      share * tiles.hidden_blocks != tiles.width || share % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const ExpertsKernel kernel = kernel_of(call.type, tiles.width);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(tiles.blocks());
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles.blocks()));
  config.blockDim = dim3(kExpertsThreads);
  config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int resident;
  cudaError_t status = resident_clusters(kernel, config, tiles.blocks(), &resident);
  if (status != cudaSuccess) return status;
  int64_t clusters = kMostExpertsBlocks / tiles.blocks();
  if (resident < clusters) clusters = resident;
  if (tiles.count * call.experts < clusters) clusters = tiles.count * call.experts;
  config.gridDim.x = static_cast<unsigned>(clusters * tiles.blocks());

  CUtensorMap weights_map, tokens_map;
  status = make_maps(call, tiles, &weights_map, &tokens_map);
  if (status != cudaSuccess) return status;
  status = launch_prepare(call, tiles, stream);
  if (status != cudaSuccess) return status;
  ExpertsWork work{};
  work.schedule = ExpertsSchedule::make(static_cast<int>(tiles.count),
                                        static_cast<int>(call.experts), static_cast<int>(clusters));
  work.multipliers = call.multipliers;
  work.chosen = call.chosen;
  work.w_scale = call.w_scale;
  work.partials = call.partials;
  work.tickets = call.tickets;
  work.result = call.result;
  work.result_type = call.result_type;
  work.tokens = call.tokens;
  work.padded_tokens = tiles.padded_tokens;
  work.hidden = call.hidden;
  work.token_groups = static_cast<int>(tiles.token_groups);
  work.hidden_blocks = tiles.hidden_blocks;
  work.token_blocks = tiles.token_blocks;
  work.blocks = blocks_of_depth(call);
  work.parts = call.type == ExpertsType::kFloat8 ? 1 : static_cast<int>(call.depth / 64);
  work.words = static_cast<int>(divide_up(call.experts, 32));
  work.token_chunks = static_cast<int>(chunks_of(tiles));
  void* arguments[] = {&weights_map, &tokens_map, &work};
  return cudaLaunchKernelExC(&config, kernel.function, arguments);
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
  one.skip = true;
  return one;
}

}  // namespace

int64_t experts_scratch_words(const Experts& call) {
  const ExpertsScratch scratch = experts_scratch(batch_row(call, 0), {});
  return scratch.partials + scratch.multipliers + scratch.chosen + scratch.tickets;
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
    one.chosen = reinterpret_cast<uint32_t*>(one.multipliers + sizes.multipliers);
    one.tickets = reinterpret_cast<int32_t*>(one.chosen + sizes.chosen);
    const cudaError_t launched = launch_dense_experts(one, {}, stream);
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

}  // namespace jax_router
