// The sm_80 convolution with the gradient's epilogue, of bfloat16.
#include "cuda/convolution/sm80/gradient.cuh"

namespace fused_resnet {
template struct Sm80Gradient<bfloat16_t>;
}  // namespace fused_resnet
