// Sums of the counts of chunks.

#include <cstdint>

#include "sums.cuh"
#include "warp.cuh"

namespace jax_router {
namespace {

// A warp has a column to itself, and each of its lanes a stretch of the chunks.
constexpr int kStretches = kWarpSize;
constexpr int kThreads = kWarpSize * kStretches;

__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(const ChunkCounts call, const int64_t stretch) {
  __shared__ int32_t sums[kStretches][kWarpSize + 1];
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t columns = call.columns;
  const int64_t begin = warp * stretch;
  const int64_t end = min(begin + stretch, call.chunks);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpSize;
  const bool inside = first + lane < columns;
  for (int64_t row = blockIdx.y; row < call.batch; row += gridDim.y) {
    int32_t* column = call.counts + row * call.row_stride + first + lane;
    int32_t sum = 0;
    if (inside) {
#pragma unroll 4
      for (int64_t b = begin; b < end; ++b) sum += column[b * columns];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    const int32_t own = sums[lane][warp];
    const int32_t inclusive = inclusive_sum(own, lane);
    sums[lane][warp] = inclusive - own;
    if (lane == kWarpSize - 1 && first + warp < call.total_columns) {
      call.totals[row * call.total_stride + first + warp] = inclusive;
    }
    __syncthreads();
    if (inside && begin < end) {
      sum_over<int32_t>(column + begin * columns, columns, end - begin, sums[warp][lane]);
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_sum_chunks(const ChunkCounts& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((call.columns + kWarpSize - 1) / kWarpSize),
                  static_cast<unsigned>(call.batch < kMostGridRows ? call.batch : kMostGridRows));
  const int64_t stretch = (call.chunks + kStretches - 1) / kStretches;
  return launch_blocks(sum_chunks_kernel, grid, kStretches, 0, stream, call, stretch);
}

}  // namespace jax_router
