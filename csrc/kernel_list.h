// What module.cpp asks of the CUDA files: no torch, no Python, no CUDA headers.
#pragma once

#include <string>
#include <vector>

namespace fused_resnet {

struct CudaKernel {
  std::string name;
  int binary_version;  // e.g. 90; -1 where there is no GPU to ask
  int registers;       // per thread, or -1
  int shared_bytes;    // per block, static, or -1
};

std::string cuda_toolkit_version();  // e.g. "13.0"
std::vector<CudaKernel> cuda_kernels();

}  // namespace fused_resnet
