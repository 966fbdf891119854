// Every sm_90 convolution of float16: plain, with the gradient's epilogue, and with the norm's
// prologue.
#include "cuda/convolution/sm90/kernel.cuh"
#include "cuda/convolution/sm90/prologue.cuh"

namespace fused_resnet {
template struct Sm90Kernels<float16_t>;
template struct Sm90Prologues<float16_t>;
}  // namespace fused_resnet
