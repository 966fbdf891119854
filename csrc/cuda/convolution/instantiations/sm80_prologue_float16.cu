// The sm_80 convolution of float16 that normalises x in its prologue.
#include "cuda/convolution/sm80/prologue.cuh"

namespace fused_resnet {
template struct Sm80Prologues<half_t>;
}  // namespace fused_resnet
