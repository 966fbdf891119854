// add_relu and its backward on CUDA devices.
//   y = max(x + residual, 0), relu(NaN) = NaN;   dx = dy where !(y <= 0), else 0
// Layout: all tensors share one shape and one memory order; a kernel sees n flat elements.
// Arithmetic in float32 (double for float64), one rounding.
// A block owns tiles of kThreads * kUnroll packs of 16 bytes; a thread owns kUnroll packs, kThreads
// apart, and has all their loads in flight before the first is used. Blocks stride over the tiles.
// Pointers that are not aligned to 16 bytes, and what is left after the last pack, go one element
// at a time.
// Bytes: 3 elements per element of y, two read and one written. Registers only, no shared memory.
// Speed: not yet measured.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common.h"
#include "kernel_list.h"

namespace fused_resnet {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kBlocksPerSm = 16;

template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T, typename A>
__device__ inline T narrow(A v) {
  if constexpr (sizeof(T) == sizeof(A))
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}

struct AddRelu {
  template <typename T>
  __device__ static T apply(T x, T residual) {
    const auto sum = widen(x) + widen(residual);
    return narrow<T>(sum <= 0 ? decltype(sum){0} : sum);
  }
};

struct AddReluBackward {
  template <typename T>
  __device__ static T apply(T dy, T y) {
    const auto mask = widen(y);
    return mask <= 0 ? narrow<T>(decltype(mask){0}) : dy;
  }
};

// a, b, out (n,), out may be a or b: no __restrict__, and a thread's loads come before its stores.
// The first `packs` packs of each are taken 16 bytes at a time
template <typename Op, typename T>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const T* a, const T* b, T* out, int64_t packs, int64_t n) {
  using P = Pack<T>;
  const int64_t tile = int64_t{kThreads} * kUnroll;
  for (int64_t base = blockIdx.x * tile + threadIdx.x; base < packs; base += gridDim.x * tile) {
    uint4 a_bits[kUnroll], b_bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < packs) {
        a_bits[u] = reinterpret_cast<const uint4*>(a)[i];
        b_bits[u] = reinterpret_cast<const uint4*>(b)[i];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < packs) {
        const P a_pack = *reinterpret_cast<const P*>(&a_bits[u]);
        const P b_pack = *reinterpret_cast<const P*>(&b_bits[u]);
        P out_pack;
#pragma unroll
        for (int k = 0; k < P::size; ++k)
          out_pack.values[k] = Op::apply(a_pack.values[k], b_pack.values[k]);
        reinterpret_cast<uint4*>(out)[i] = *reinterpret_cast<const uint4*>(&out_pack);
      }
    }
  }
  const int64_t first = packs * P::size + blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (int64_t i = first; i < n; i += gridDim.x * int64_t{kThreads}) out[i] = Op::apply(a[i], b[i]);
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename Op, typename T>
void launch_elementwise(const Tensor& a, const Tensor& b, const Tensor& out) {
  const int32_t device = a.get_device_index();
  const auto* a_ptr = static_cast<const T*>(a.const_data_ptr());
  const auto* b_ptr = static_cast<const T*>(b.const_data_ptr());
  auto* out_ptr = static_cast<T*>(out.mutable_data_ptr());
  const int64_t n = a.numel();
  const bool vectors = aligned16(a_ptr) && aligned16(b_ptr) && aligned16(out_ptr);
  const int64_t packs = vectors ? n / Pack<T>::size : 0;
  const int64_t items = std::max(packs / kUnroll, n - packs * Pack<T>::size);
  int sms = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks =
      std::clamp<int64_t>((items + kThreads - 1) / kThreads, 1, int64_t{sms} * kBlocksPerSm);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  elementwise_kernel<Op, T>
      <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          a_ptr, b_ptr, out_ptr, packs, n);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// out = Op(a, b), element by element; a, b, out of one shape and memory order. out may be a or b.
template <typename Op>
void run_elementwise(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                     const Tensor& b, const Tensor& out) {
  const DtypeIndex dtype = dtype_index(op, a_name, a);
  check_dense(op, a_name, a);
  check_same_layout(op, b_name, b, a_name, a);
  check_same_layout(op, "out", out, a_name, a);
  if (a.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  switch (dtype) {
    case kFloat32:
      launch_elementwise<Op, float>(a, b, out);
      break;
    case kBFloat16:
      launch_elementwise<Op, __nv_bfloat16>(a, b, out);
      break;
    case kFloat16:
      launch_elementwise<Op, __half>(a, b, out);
      break;
    case kFloat64:
      launch_elementwise<Op, double>(a, b, out);
      break;
  }
}

Tensor empty_output_on(const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  return torch::stable::empty_like(like);
}

// x, residual (any shape, one for both) -> out, which may be x or residual
void add_relu_out(Tensor x, Tensor residual, Tensor out) {
  run_elementwise<AddRelu>("add_relu", "x", x, "residual", residual, out);
}

// x, residual (any shape, one for both) -> y
Tensor add_relu(Tensor x, Tensor residual) {
  Tensor y = empty_output_on(x);
  add_relu_out(x, residual, y);
  return y;
}

// dy, y (any shape, one for both) -> dx, which is the residual's gradient too
Tensor add_relu_backward(Tensor dy, Tensor y) {
  Tensor dx = empty_output_on(dy);
  run_elementwise<AddReluBackward>("add_relu_backward", "dy", dy, "y", y, dx);
  return dx;
}

template <typename Op, typename T>
void describe(std::vector<CudaKernel>& list, const char* name, bool gpu) {
  CudaKernel kernel{name, -1, -1, -1};
  cudaFuncAttributes attributes{};
  if (gpu && cudaFuncGetAttributes(&attributes, elementwise_kernel<Op, T>) == cudaSuccess) {
    kernel.binary_version = attributes.binaryVersion;
    kernel.registers = attributes.numRegs;
    kernel.shared_bytes = static_cast<int>(attributes.sharedSizeBytes);
  }
  list.push_back(kernel);
}

}  // namespace

std::string cuda_toolkit_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<CudaKernel> cuda_kernels() {
  int devices = 0;
  const bool gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  if (!gpu) (void)cudaGetLastError();  // leaves no error for the next caller to find
  std::vector<CudaKernel> list;
  describe<AddRelu, float>(list, "add_relu_float32", gpu);
  describe<AddRelu, __nv_bfloat16>(list, "add_relu_bfloat16", gpu);
  describe<AddRelu, __half>(list, "add_relu_float16", gpu);
  describe<AddRelu, double>(list, "add_relu_float64", gpu);
  describe<AddReluBackward, float>(list, "add_relu_backward_float32", gpu);
  describe<AddReluBackward, __nv_bfloat16>(list, "add_relu_backward_bfloat16", gpu);
  describe<AddReluBackward, __half>(list, "add_relu_backward_float16", gpu);
  describe<AddReluBackward, double>(list, "add_relu_backward_float64", gpu);
  return list;
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CUDA, m) {
  m.impl("add_relu", TORCH_BOX(fused_resnet::add_relu));
  m.impl("add_relu_out", TORCH_BOX(fused_resnet::add_relu_out));
  m.impl("add_relu_backward", TORCH_BOX(fused_resnet::add_relu_backward));
}
