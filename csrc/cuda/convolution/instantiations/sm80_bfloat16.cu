// All sm_80 convolutions of bfloat16: inference, training with statistics, with the gradient
// epilogue, and with the batch norm prologue.
#include "cuda/convolution/sm80/gradient.cuh"
#include "cuda/convolution/sm80/launch.cuh"
#include "cuda/convolution/sm80/prologue.cuh"

namespace fused_resnet {
FUSED_RESNET_IMPLICIT_GEMM_SM80(, bfloat16_t)
template struct Sm80Gradient<bfloat16_t>;
template struct Sm80Prologues<bfloat16_t>;
}  // namespace fused_resnet
