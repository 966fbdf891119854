// Every sm_90 convolution of bfloat16: plain, with the gradient's epilogue, and with the norm's
// prologue.
#include "cuda/convolution/sm90/kernel.cuh"
#include "cuda/convolution/sm90/prologue.cuh"

namespace fused_resnet {
template struct Sm90Kernels<bfloat16_t>;
template struct Sm90Prologues<bfloat16_t>;
}  // namespace fused_resnet
