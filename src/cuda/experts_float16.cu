#include "experts.cuh"

namespace jax_router {

ExpertsKernels experts_kernels_float16() { return experts_kernels<ExpertsType::kFloat16>(); }

}  // namespace jax_router
