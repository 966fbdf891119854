// max_pool2d (for inference) and abs_max on the CPU: checks, allocation, splitting over threads.
// The kernels are in cpu/pooling/max_pool2d_kernels.h.
#include "common.h"
#include "cpu/isa/kernels.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMinTaskElements = 16384;  // elements that justify another task

std::array<int64_t, 2> pair_of(const char* argument, const std::vector<int64_t>& values) {
  check(values.size() == 1 || values.size() == 2, "max_pool2d: ", argument,
        " must be one or two integers, got ", values.size());
  return {values.front(), values.back()};
}

// x (N, C, H, W), channels_last in memory -> y (N, C, P, Q), channels_last
Tensor max_pool2d(Tensor x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding) {
  constexpr const char* op = "max_pool2d";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of(op, x);
  const int64_t H = x.size(2), W = x.size(3);
  check(layout.channels_last || layout.C == 1, op, ": x must be channels_last, got strides ",
        strides_of(x), " for shape ", shape_of(x));
  const auto kernel = pair_of("kernel_size", kernel_size);
  const auto step = stride.empty() ? kernel : pair_of("stride", stride);
  const auto pad = pair_of("padding", padding);
  std::array<int64_t, 2> out{};
  for (int d = 0; d < 2; ++d) {
    check(kernel[d] > 0 && step[d] > 0, op, ": kernel_size and stride must be positive, got ",
          kernel[d], " and ", step[d]);
    check(pad[d] >= 0 && 2 * pad[d] <= kernel[d], op,
          ": padding must be between 0 and half of kernel_size ", kernel[d], ", got ", pad[d]);
    const int64_t size = d == 0 ? H : W;
    const int64_t room = size + 2 * pad[d] - kernel[d];
    check(size > 0 && room >= 0, op, ": x of size ", H, " x ", W, " is smaller than the kernel ",
          kernel[0], " x ", kernel[1], " with padding ", pad[0], " x ", pad[1]);
    out[d] = room / step[d] + 1;
  }
  const int64_t N = layout.N, C = layout.C, P = out[0], Q = out[1];
  Tensor y = torch::stable::empty({N, C, P, Q}, x.scalar_type(), std::nullopt, x.device(),
                                  std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  advise_huge_pages(y, y.numel() * static_cast<int64_t>(y.element_size()));
  if (y.numel() == 0) return y;
  const MaxPool pool{x.const_data_ptr(),
                     y.mutable_data_ptr(),
                     nullptr,
                     C,
                     H,
                     W,
                     P,
                     Q,
                     kernel[0],
                     kernel[1],
                     step[0],
                     step[1],
                     pad[0],
                     pad[1]};
  const auto run = cpu_kernels().max_pool2d[dtype];
  Split(N * P, 1, std::max<int64_t>(kMinTaskElements / (Q * C), 1))
      .run([&](int64_t, int64_t begin, int64_t end) {
        std::vector<char> lines(static_cast<size_t>(W * C + 64) * x.element_size());
        MaxPool mine = pool;
        mine.lines = lines.data();
        run(mine, begin, end);
      });
  return y;
}

// max |x| over a dense tensor of any shape
double abs_max(Tensor x) {
  const DtypeIndex dtype = dtype_index("abs_max", "x", x);
  check_dense("abs_max", "x", x);
  const int64_t n = x.numel(), size = static_cast<int64_t>(x.element_size());
  if (n == 0) return 0.0;
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const Split split(n, kLineBytes, 4 * kMinTaskElements);
  std::vector<double> largest(static_cast<size_t>(split.tasks), 0.0);
  const auto run = cpu_kernels().abs_max[dtype];
  split.run([&](int64_t task, int64_t begin, int64_t end) {
    largest[task] = run(x_ptr + begin * size, end - begin);
  });
  double result = 0.0;
  for (const double value : largest)
    if (result == result && !(value <= result)) result = value;  // NaN propagates
  return result;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def("max_pool2d(Tensor x, int[] kernel_size, int[] stride, int[] padding) -> Tensor");
  m.def("abs_max(Tensor x) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(fused_resnet::max_pool2d));
  m.impl("abs_max", TORCH_BOX(fused_resnet::abs_max));
}
