// max_pool2d (for inference) and abs_max on the CPU: checks, allocation, splitting over threads.
// The kernels are in cpu/pooling/max_pool2d_kernels.h.
#include "cpu/pooling/max_pool2d.h"

#include "cpu/pooling/window.h"
#include "cpu/threads.h"

namespace fused_resnet {
namespace {

Pair pair_of(const char* argument, const std::vector<int64_t>& values) {
  check(values.size() == 1 || values.size() == 2, "max_pool2d: ", argument,
        " must be one or two integers, got ", values.size());
  return {values.front(), values.back()};
}

}  // namespace

// x (N, C, H, W), channels_last in memory -> y (N, C, P, Q), channels_last
Tensor max_pool2d(Tensor x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding) {
  constexpr const char* op = "max_pool2d";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Pair kernel = pair_of("kernel_size", kernel_size);
  MaxPool pool = max_pool_of(op, x, kernel, stride.empty() ? kernel : pair_of("stride", stride),
                             pair_of("padding", padding));
  const int64_t rows = x.size(0) * pool.P;
  Tensor y = empty_channels_last(x, x.size(0), pool.C, pool.P, pool.Q);
  if (y.numel() == 0) return y;
  pool.y = y.mutable_data_ptr();
  const auto run = cpu_kernels().max_pool2d[dtype];
  Split(rows, 1, kMinPoolTaskElements / (pool.Q * pool.C))
      .run([&](int64_t, int64_t begin, int64_t end) {
        std::vector<char> lines(static_cast<size_t>(pool.W * pool.C + 64) * x.element_size());
        MaxPool mine = pool;
        mine.lines = lines.data();
        run(mine, begin, end);
      });
  return y;
}

namespace {

// max |x| over a dense tensor of any shape
double abs_max(Tensor x) {
  const DtypeIndex dtype = dtype_index("abs_max", "x", x);
  check_dense("abs_max", "x", x);
  const int64_t n = x.numel(), size = static_cast<int64_t>(x.element_size());
  if (n == 0) return 0.0;
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const Split split(n, kLineBytes, 4 * kMinPoolTaskElements);
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
