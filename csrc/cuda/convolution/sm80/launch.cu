// Dispatches the sm_80 convolution by dtype. The kernels are compiled in
// cuda/convolution/instantiations/.
#include "cuda/convolution/sm80/launch.cuh"

namespace fused_resnet {

FUSED_RESNET_IMPLICIT_GEMM_SM80(extern, float16_t)
FUSED_RESNET_IMPLICIT_GEMM_SM80(extern, bfloat16_t)
FUSED_RESNET_IMPLICIT_GEMM_SM80(extern, float)

void launch_implicit_gemm_sm80(const DeviceScope& scope, const ConvProblem& problem,
                               const ConvOperands& operands, const GemmTile& tile, int splits,
                               float* partial) {
  switch (operands.dtype) {
    case kFloat16:
      return launch_implicit_gemm_sm80_of<float16_t>(scope, problem, operands, tile, splits,
                                                     partial);
    case kBFloat16:
      return launch_implicit_gemm_sm80_of<bfloat16_t>(scope, problem, operands, tile, splits,
                                                      partial);
    case kFloat32:
      return launch_implicit_gemm_sm80_of<float>(scope, problem, operands, tile, splits, partial);
    default:
      check(false, "implicit_gemm: no kernel for ", operands.dtype);
  }
}

void list_implicit_gemm_kernels(std::vector<CudaKernel>& list, bool gpu) {
  list_implicit_gemm_sm80_of<float16_t>(list, "float16", gpu);
  list_implicit_gemm_sm80_of<bfloat16_t>(list, "bfloat16", gpu);
  list_implicit_gemm_sm80_of<float>(list, "float32", gpu);
  Sm80Prologues<float16_t>::list(list, gpu);
  Sm80Prologues<bfloat16_t>::list(list, gpu);
}

}  // namespace fused_resnet
