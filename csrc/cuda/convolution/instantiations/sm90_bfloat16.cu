// All sm_90 convolutions of bfloat16: inference, training with statistics, with the gradient
// epilogue, and with the batch norm prologue.
#include "cuda/convolution/sm90/kernel.cuh"
#include "cuda/convolution/sm90/prologue.cuh"

namespace fused_resnet {
template struct Sm90Kernels<bfloat16_t>;
template struct Sm90Prologues<bfloat16_t>;
}  // namespace fused_resnet
