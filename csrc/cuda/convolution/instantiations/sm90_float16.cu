// All sm_90 convolutions of float16: inference, training with statistics, with the gradient
// epilogue, and with the batch norm prologue.
#include "cuda/convolution/sm90/kernel.cuh"
#include "cuda/convolution/sm90/prologue.cuh"

namespace fused_resnet {
template struct Sm90Kernels<float16_t>;
template struct Sm90Prologues<float16_t>;
}  // namespace fused_resnet
