// The kernels of bn_add_relu for float32: a file of their own, to be compiled beside the others.
#include "cuda/batch_norm/launch.cuh"

namespace fused_resnet {
FUSED_RESNET_BN_KERNELS(float)
}  // namespace fused_resnet
