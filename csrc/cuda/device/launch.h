// Host code shared by the CUDA ops: outputs on the device, the current stream, checked launches and
// device properties. A DeviceScope guards the tensors' device.
#pragma once

#include <tuple>
#include <utility>

#include "common.h"
#include "cuda/device/device.cuh"
#include "cuda/kernel_list.h"

#if !defined(FUSED_RESNET_EMULATED)
#define FUSED_RESNET_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CUDA, m)

// Functions of libtorch_cuda. Weak: a torch without CUDA has none, and loads the CPU kernels of the
// same library; no tensor on a GPU can ask for them there.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*,
                                                              uint32_t, bool, char**);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char*);
}
#else
#define FUSED_RESNET_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(fused_resnet_emulated, CPU, m)
#endif

namespace fused_resnet {

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body with a value of the element type that the kernels use for this dtype.
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

// A launch of a 1-D grid of 1-D blocks.
struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  bool cooperative = false;  // all blocks resident at once
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
    // This may be the thread's first CUDA call. The guard does nothing if the device is already
    // current, but the driver API (cuda/device/tensor_map.h) requires a current context.
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
  // Maximum shared memory of a block.
  int max_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // Maximum number of resident blocks per multiprocessor.
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
    cudaLaunchAttribute launch_attribute{};
    launch_attribute.id = cudaLaunchAttributeCooperative;
    launch_attribute.val.cooperative = 1;
    config.attrs = &launch_attribute;
    config.numAttrs = grid.cooperative ? 1 : 0;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  // Always set the maximum: the limit belongs to the kernel, not to the launch. Another thread that
  // launches the same kernel with less shared memory would lower it in between.
  template <typename Kernel>
  void allow_shared(Kernel* kernel, int shared_bytes) const {
    constexpr int default_limit = 48 * 1024;
    if (shared_bytes > default_limit)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          max_shared_bytes()));
  }
};

// Adds a kernel's row to native.kernels(). Properties that require a GPU are -1 without
// one.
template <typename Kernel>
void describe_kernel(std::vector<CudaKernel>& list, std::string name, Kernel* kernel, bool gpu) {
  CudaKernel row{std::move(name), -1, -1, -1};
  cudaFuncAttributes attributes{};
  if (gpu && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) {
    row.binary_version = attributes.binaryVersion;
    row.registers = attributes.numRegs;
    row.shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
  } else if (gpu) {
    (void)cudaGetLastError();  // built for another architecture: clear the error
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
    // Convert once, as a CUDA launch copies its arguments.
    const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
    const std::function<void()> body = [&] { std::apply(kernel, values); };
    (grid.cooperative ? ::emulated::run_cooperative_grid : ::emulated::run_grid)(
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
