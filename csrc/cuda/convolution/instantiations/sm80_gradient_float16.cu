// The sm_80 convolution with the gradient's epilogue, of float16.
#include "cuda/convolution/sm80/gradient.cuh"

namespace fused_resnet {
template struct Sm80Gradient<half_t>;
}  // namespace fused_resnet
