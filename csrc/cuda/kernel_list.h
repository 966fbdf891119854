// The interface of the CUDA files to facts.cpp. No torch, Python or CUDA headers.
#pragma once

#include <string>
#include <vector>

namespace fused_resnet {

struct CudaKernel {
  std::string name;
  int binary_version;  // e.g. 90; -1 without a GPU
  int registers;       // per thread, or -1
  int shared_bytes;    // per block, static, or -1
};

std::string cuda_toolkit_version();  // e.g. "13.0"
std::vector<CudaKernel> cuda_kernels();

// One function for each CUDA file with kernels. gpu: whether a GPU is available to query.
void list_add_relu_kernels(std::vector<CudaKernel>& list, bool gpu);
void list_stem_kernels(std::vector<CudaKernel>& list, bool gpu);
void list_implicit_gemm_kernels(std::vector<CudaKernel>& list, bool gpu);
void list_implicit_gemm_sm90_kernels(std::vector<CudaKernel>& list, bool gpu);
void list_prologue_kernels(std::vector<CudaKernel>& list, bool gpu);
void list_bn_add_relu_kernels(std::vector<CudaKernel>& list, bool gpu);
void list_bn_statistics_kernels(std::vector<CudaKernel>& list, bool gpu);
void list_bn_gradient_sums_kernels(std::vector<CudaKernel>& list, bool gpu);

}  // namespace fused_resnet
