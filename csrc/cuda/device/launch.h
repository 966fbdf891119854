// What the host code of the CUDA ops shares: outputs on the device, the current stream, checked
// launches, and what the device can do. The device is that of the tensors, guarded by a
// DeviceScope.
#pragma once

#include <tuple>
#include <utility>

#include "common.h"
#include "cuda/device/device.cuh"
#include "cuda/kernel_list.h"

#if !defined(FUSED_RESNET_EMULATED)
#define FUSED_RESNET_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CUDA, m)
#else
#define FUSED_RESNET_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fused_resnet_emulated, CPU, m)
#endif

namespace fused_resnet {

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(a value of the dtype's type): its kernels' element.
template <typename Body>
void with_element(DtypeIndex dtype, const Body& body) {
  switch (dtype) {
    case kFloat32:
      body(float{});
      break;
    case kBFloat16:
      body(bfloat16_t{});
      break;
    case kFloat16:
      body(float16_t{});
      break;
    case kFloat64:
      body(double{});
      break;
  }
}

// One launch: a 1-D grid of 1-D blocks.
struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  bool together = false;  // all blocks resident at once (a cooperative launch)
};

#if !defined(FUSED_RESNET_EMULATED)

struct DeviceScope {
  torch::stable::accelerator::DeviceGuard guard;
  int32_t device;
  cudaStream_t stream;

  explicit DeviceScope(const Tensor& t)
      : guard(t.get_device_index()), device(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
    // A thread's first call may be this one. The guard does nothing where the device is the current
    // one already, and the driver's own functions (cuda/device/tensor_map.h) want a context made
    // current.
    STD_CUDA_CHECK(cudaSetDevice(device));
  }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  int architecture() const {  // e.g. 90
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
           attribute(cudaDevAttrComputeCapabilityMinor);
  }
  // What one block may ask for.
  int max_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // Blocks of a kernel that fit on a multiprocessor at once.
  template <typename Kernel>
  int resident_blocks(Kernel* kernel, int threads, int shared_bytes) const {
    allow_shared(kernel, shared_bytes);
    int blocks = 0;
    STD_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
    return blocks;
  }

  template <typename... Parameters, typename... Arguments>
  void launch(const Grid& grid, void (*kernel)(Parameters...), Arguments&&... arguments) const {
    allow_shared(kernel, grid.shared_bytes);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = stream;
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    config.attrs = &together;
    config.numAttrs = grid.together ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  // All that there is, always: the limit is the kernel's and not the launch's, and another thread
  // that launches the same kernel with less would lower it in between.
  template <typename Kernel>
  void allow_shared(Kernel* kernel, int shared_bytes) const {
    constexpr int without_asking = 48 * 1024;
    if (shared_bytes > without_asking)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          max_shared_bytes()));
  }
};

// A kernel's row in fused_resnet._C.kernels(); what only a GPU can tell is -1 without one.
template <typename Kernel>
void describe_kernel(std::vector<CudaKernel>& list, std::string name, Kernel* kernel, bool gpu) {
  CudaKernel row{std::move(name), -1, -1, -1};
  cudaFuncAttributes attributes{};
  if (gpu && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) {
    row.binary_version = attributes.binaryVersion;
    row.registers = attributes.numRegs;
    row.shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
  } else if (gpu) {
    (void)cudaGetLastError();  // a kernel of another architecture: no error for the next to find
  }
  list.push_back(row);
}

#else

struct DeviceScope {
  explicit DeviceScope(const Tensor&) {}
  int multiprocessors() const { return ::emulated::device().multiprocessors; }
  int architecture() const { return ::emulated::device().architecture; }
  int max_shared_bytes() const { return ::emulated::device().shared_bytes; }
  template <typename Kernel>
  int resident_blocks(Kernel*, int, int) const {
    return 2;
  }
  template <typename... Parameters, typename... Arguments>
  void launch(const Grid& grid, void (*kernel)(Parameters...), Arguments&&... arguments) const {
    // Converted once, as a launch copies its arguments.
    const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    const std::function<void()> body = [&] { std::apply(kernel, values); };
    (grid.together ? ::emulated::run_grid_together : ::emulated::run_grid)(
        static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.threads),
        static_cast<size_t>(grid.shared_bytes), body);
  }
};

template <typename Kernel>
void describe_kernel(std::vector<CudaKernel>& list, std::string name, Kernel*, bool) {
  list.push_back({std::move(name), -1, -1, -1});
}

#endif

// An uninitialised tensor with t's shape, strides, dtype and device.
inline Tensor empty_output_on(const Tensor& t) {
  const DeviceScope scope(t);
  return torch::stable::empty_like(t);
}

}  // namespace fused_resnet
