// The kernels of bn_add_relu for float16, in a separate file so that they compile in parallel.
#include "cuda/batch_norm/launch.cuh"

namespace fused_resnet {
FUSED_RESNET_BN_KERNELS(float16_t)
}  // namespace fused_resnet
