// add_relu and its backward on CUDA devices.
//   y = max(x + residual, 0), relu(NaN) = NaN;   dx = dy where !(y <= 0), else 0
// Layout: all tensors have one shape and one memory order; a kernel processes n flat elements.
// Arithmetic in float32 (float64 for float64), one rounding.
// A block processes tiles of kThreads * kUnroll packs of 16 bytes, in a grid-stride loop. A thread
// processes kUnroll packs, kThreads apart, and issues all their loads before it uses the first.
// Elements after the last full pack, and all elements of pointers that are not aligned to 16 bytes,
// are processed one at a time.
// Memory traffic: 3 elements per element of y (two reads, one write). No shared memory. Speed: not
// yet measured.
#include "cuda/device/launch.h"

namespace fused_resnet {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kBlocksPerSm = 16;

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

// a, b, out: (n,). `out` may alias a or b, so there is no __restrict__, and a thread loads before
// it stores. The first `packs` packs are accessed 16 bytes at a time.
template <typename Op, typename T>
__global__ void __launch_bounds__(kThreads)
    elementwise_kernel(const T* a, const T* b, T* out, int64_t packs, int64_t n) {
  constexpr int size = Pack<T>::size;
  const int64_t tile = int64_t{kThreads} * kUnroll;
  for (int64_t base = blockIdx.x * tile + threadIdx.x; base < packs; base += gridDim.x * tile) {
    uint4 a_bits[kUnroll], b_bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < packs) {
        a_bits[u] = load_global<uint4>(a + i * size);
        b_bits[u] = load_global<uint4>(b + i * size);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = base + u * kThreads;
      if (i < packs) {
        const Pack<T> a_pack = unpack<T>(a_bits[u]);
        const Pack<T> b_pack = unpack<T>(b_bits[u]);
        Pack<T> out_pack;
#pragma unroll
        for (int k = 0; k < size; ++k)
          out_pack.values[k] = Op::apply(a_pack.values[k], b_pack.values[k]);
        store_global<uint4>(out + i * size, packed(out_pack));
      }
    }
  }
  const int64_t first = packs * size + blockIdx.x * int64_t{kThreads} + threadIdx.x;
  for (int64_t i = first; i < n; i += gridDim.x * int64_t{kThreads}) out[i] = Op::apply(a[i], b[i]);
}

template <typename Op, typename T>
void launch_elementwise(const Tensor& a, const Tensor& b, const Tensor& out) {
  const DeviceScope scope(a);
  const auto* a_ptr = static_cast<const T*>(a.const_data_ptr());
  const auto* b_ptr = static_cast<const T*>(b.const_data_ptr());
  auto* out_ptr = static_cast<T*>(out.mutable_data_ptr());
  const int64_t n = a.numel();
  const bool vectors = aligned16(a_ptr) && aligned16(b_ptr) && aligned16(out_ptr);
  const int64_t packs = vectors ? n / Pack<T>::size : 0;
  const int64_t items = std::max(packs / kUnroll, n - packs * Pack<T>::size);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(items, kThreads), 1,
                                             int64_t{scope.multiprocessors()} * kBlocksPerSm);
  scope.launch({blocks, kThreads}, elementwise_kernel<Op, T>, a_ptr, b_ptr, out_ptr, packs, n);
}

// out = Op(a, b), elementwise. a, b, out have the same shape and memory order; `out` may alias a or
// b.
template <typename Op>
void run_elementwise(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                     const Tensor& b, const Tensor& out) {
  const DtypeIndex dtype = dtype_index(op, a_name, a);
  check_dense(op, a_name, a);
  check_same_layout(op, b_name, b, a_name, a);
  check_same_layout(op, "out", out, a_name, a);
  if (a.numel() == 0) return;
  with_element(dtype, [&](auto element) { launch_elementwise<Op, decltype(element)>(a, b, out); });
}

// x, residual (any shape, the same for both) -> out, which may alias x or residual
void add_relu_out(Tensor x, Tensor residual, Tensor out) {
  run_elementwise<AddRelu>("add_relu", "x", x, "residual", residual, out);
}

// x, residual (any shape, the same for both) -> y
Tensor add_relu(Tensor x, Tensor residual) {
  Tensor y = empty_output_on(x);
  add_relu_out(x, residual, y);
  return y;
}

// dy, y (any shape, the same for both) -> dx, which is also the gradient of residual
Tensor add_relu_backward(Tensor dy, Tensor y) {
  Tensor dx = empty_output_on(dy);
  run_elementwise<AddReluBackward>("add_relu_backward", "dy", dy, "y", y, dx);
  return dx;
}

}  // namespace

void list_add_relu_kernels(std::vector<CudaKernel>& list, bool gpu) {
  describe_kernel(list, "add_relu_float32", elementwise_kernel<AddRelu, float>, gpu);
  describe_kernel(list, "add_relu_bfloat16", elementwise_kernel<AddRelu, bfloat16_t>, gpu);
  describe_kernel(list, "add_relu_float16", elementwise_kernel<AddRelu, float16_t>, gpu);
  describe_kernel(list, "add_relu_float64", elementwise_kernel<AddRelu, double>, gpu);
  describe_kernel(list, "add_relu_backward_float32", elementwise_kernel<AddReluBackward, float>,
                  gpu);
  describe_kernel(list, "add_relu_backward_bfloat16",
                  elementwise_kernel<AddReluBackward, bfloat16_t>, gpu);
  describe_kernel(list, "add_relu_backward_float16", elementwise_kernel<AddReluBackward, float16_t>,
                  gpu);
  describe_kernel(list, "add_relu_backward_float64", elementwise_kernel<AddReluBackward, double>,
                  gpu);
}

}  // namespace fused_resnet

FUSED_RESNET_CUDA_OPS(m) {
  m.impl("add_relu", TORCH_BOX(fused_resnet::add_relu));
  m.impl("add_relu_out", TORCH_BOX(fused_resnet::add_relu_out));
  m.impl("add_relu_backward", TORCH_BOX(fused_resnet::add_relu_backward));
}
