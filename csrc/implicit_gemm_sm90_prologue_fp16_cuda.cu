// Hopper's convolution of float16 that normalises x in its prologue.
#include "implicit_gemm_sm90_prologue.cuh"

namespace fused_resnet {
template struct Sm90Prologues<half_t>;
}  // namespace fused_resnet
