// Hopper's convolution of bfloat16 that normalises x in its prologue.
#include "implicit_gemm_sm90_prologue.cuh"

namespace fused_resnet {
template struct Sm90Prologues<bfloat16_t>;
}  // namespace fused_resnet
