// Instances of the sm_80 convolution.
#include "implicit_gemm.h"

namespace fused_resnet {

void launch_implicit_gemm_sm80(const DeviceScope&, const ConvProblem&, const ConvOperands&,
                               const GemmTile&, int, float*) {
  check(false, "implicit_gemm: not built yet");
}

}  // namespace fused_resnet
