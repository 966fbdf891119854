// The sm_80 convolution of float16 that normalises x in its prologue.
#include "implicit_gemm_sm80_prologue.cuh"

namespace fused_resnet {
template struct Sm80Prologues<half_t>;
}  // namespace fused_resnet
