// The list of all CUDA kernels, for native.kernels().
#include <cuda_runtime.h>

#include "cuda/kernel_list.h"

namespace fused_resnet {

std::string cuda_toolkit_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<CudaKernel> cuda_kernels() {
  int devices = 0;
  const bool gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  if (!gpu) (void)cudaGetLastError();  // clear the error
  std::vector<CudaKernel> list;
  list_add_relu_kernels(list, gpu);
  list_stem_kernels(list, gpu);
  list_implicit_gemm_kernels(list, gpu);
  list_implicit_gemm_sm90_kernels(list, gpu);
  list_prologue_kernels(list, gpu);
  list_bn_add_relu_kernels(list, gpu);
  list_bn_statistics_kernels(list, gpu);
  list_bn_gradient_sums_kernels(list, gpu);
  return list;
}

}  // namespace fused_resnet
