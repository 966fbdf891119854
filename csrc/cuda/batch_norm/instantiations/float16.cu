// The kernels of bn_add_relu for float16: a file of their own, to be compiled beside the others.
#include "cuda/batch_norm/launch.cuh"

namespace fused_resnet {
FUSED_RESNET_BN_KERNELS(float16_t)
}  // namespace fused_resnet
