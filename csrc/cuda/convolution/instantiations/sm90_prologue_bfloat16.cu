// Hopper's convolution of bfloat16 that normalises x in its prologue.
#include "cuda/convolution/sm90/prologue.cuh"

namespace fused_resnet {
template struct Sm90Prologues<bfloat16_t>;
}  // namespace fused_resnet
