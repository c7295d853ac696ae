#include "experts.cuh"

namespace jax_router {

ExpertsKernels experts_kernels_bfloat16() { return experts_kernels<ExpertsType::kBfloat16>(); }

}  // namespace jax_router
