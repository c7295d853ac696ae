#include "experts.cuh"

namespace jax_router {

ExpertsKernel experts_kernel_bfloat16(int tokens) {
  return find_experts_kernel<ExpertsType::kBfloat16>(tokens);
}

}  // namespace jax_router
