// Hopper's convolution of float16 that normalises x in its prologue.
#include "cuda/convolution/sm90/prologue.cuh"

namespace fused_resnet {
template struct Sm90Prologues<half_t>;
}  // namespace fused_resnet
