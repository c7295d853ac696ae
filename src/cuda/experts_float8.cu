#include "experts.cuh"

namespace jax_router {

ExpertsKernel experts_kernel_float8(int tokens) {
  return find_experts_kernel<ExpertsType::kFloat8>(tokens);
}

}  // namespace jax_router
