#include "experts.cuh"

namespace jax_router {

ExpertsKernel experts_kernel_float16(int tokens) {
  return find_experts_kernel<ExpertsType::kFloat16>(tokens);
}

}  // namespace jax_router
