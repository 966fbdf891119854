// add_relu and its backward on the CPU: checks, allocation, splitting over threads.
// Kernels and their memory traffic: cpu/add_relu_kernels.h.
#include "common.h"
#include "cpu/isa/kernels.h"
#include "cpu/threads.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMinTaskElements = 32768;  // elements that justify another task

using Kernel = void (*)(const void*, const void*, void*, int64_t, bool);

// out = kernel(a, b), elementwise; a, b and out have one shape and memory order. out may alias a or
// b.
void run_elementwise(Kernel kernel, const Tensor& a, const Tensor& b, const Tensor& out) {
  const int64_t n = a.numel(), size = static_cast<int64_t>(a.element_size());
  if (n == 0) return;
  const auto* a_ptr = static_cast<const char*>(a.const_data_ptr());
  const auto* b_ptr = static_cast<const char*>(b.const_data_ptr());
  auto* out_ptr = static_cast<char*>(out.mutable_data_ptr());
  // In place, the overwritten line has just been read: a non-temporal store gains nothing.
  const bool in_place = out_ptr == a_ptr || out_ptr == b_ptr;
  const bool stream = !in_place && use_streaming_stores(out_ptr, n * size);
  Split(n, kLineBytes, kMinTaskElements).run([&](int64_t, int64_t begin, int64_t end) {
    kernel(a_ptr + begin * size, b_ptr + begin * size, out_ptr + begin * size, end - begin, stream);
  });
}

// x, residual (any shape, the same for both) -> out, which may alias either
void add_relu_out(Tensor x, Tensor residual, Tensor out) {
  const DtypeIndex dtype = dtype_index("add_relu", "x", x);
  check_dense("add_relu", "x", x);
  check_same_layout("add_relu", "residual", residual, "x", x);
  check_same_layout("add_relu", "out", out, "x", x);
  run_elementwise(cpu_kernels().add_relu[dtype], x, residual, out);
}

// x, residual (any shape, the same for both) -> y
Tensor add_relu(Tensor x, Tensor residual) {
  Tensor y = empty_output_like(x);
  add_relu_out(x, residual, y);
  return y;
}

// dy, y (any shape, the same for both) -> dx, which is also the residual's gradient
Tensor add_relu_backward(Tensor dy, Tensor y) {
  const DtypeIndex dtype = dtype_index("add_relu_backward", "dy", dy);
  check_dense("add_relu_backward", "dy", dy);
  check_same_layout("add_relu_backward", "y", y, "dy", dy);
  Tensor dx = empty_output_like(dy);
  run_elementwise(cpu_kernels().add_relu_backward[dtype], dy, y, dx);
  return dx;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def("add_relu(Tensor x, Tensor residual) -> Tensor");
  m.def("add_relu_out(Tensor x, Tensor residual, Tensor(a!) out) -> ()");
  m.def("add_relu_backward(Tensor dy, Tensor y) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("add_relu", TORCH_BOX(fused_resnet::add_relu));
  m.impl("add_relu_out", TORCH_BOX(fused_resnet::add_relu_out));
  m.impl("add_relu_backward", TORCH_BOX(fused_resnet::add_relu_backward));
}
