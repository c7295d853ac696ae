#include "experts.cuh"

namespace jax_router {

ExpertsKernels experts_kernels_float8() { return experts_kernels<ExpertsType::kFloat8>(); }

}  // namespace jax_router
