// A stem's batch norm, ReLU and max pooling in training on the CPU: checks, allocation, splitting
// over threads. The kernels are in cpu/batch_norm/bn_pool_kernels.h.
#include "cpu/batch_norm/statistics.h"
#include "cpu/memory_pool.h"
#include "cpu/pooling/window.h"

namespace fused_resnet {
namespace {

// g: kernel, stride and padding, each (height, width)
MaxPool window_of(const char* op, const Tensor& x, const std::vector<int64_t>& g) {
  check(g.size() == 6 && g[0] * g[1] <= 256, op,
        ": window must be a kernel of at most 256 taps, a stride and a padding, two values each");
  return max_pool_of(op, x, {g[0], g[1]}, {g[2], g[3]}, {g[4], g[5]});
}

// x (N, C, H, W) channels_last, stats (2, C) float64, weight?, bias? (C,) -> y (N, C, P, Q) and
// index (N, C, P, Q) uint8, channels_last
std::tuple<Tensor, Tensor> bn_pool(Tensor x, Tensor stats, std::optional<Tensor> weight,
                                   std::optional<Tensor> bias, double eps,
                                   std::vector<int64_t> window) {
  constexpr const char* op = "bn_pool";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  BnPool pool{};
  pool.window = window_of(op, x, window);
  const MaxPool& g = pool.window;
  const int64_t N = x.size(0);
  Tensor y = pooled_channels_last(N, g.C, g.P, g.Q, x.scalar_type());
  Tensor index = pooled_channels_last(N, g.C, g.P, g.Q, ScalarType::Byte);
  pool.window.y = y.mutable_data_ptr();
  pool.index = static_cast<uint8_t*>(index.mutable_data_ptr());
  const Partition partition(layout_of(op, x));
  with_accumulator(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Norm norm = norm_of<A>(op, stats, weight, bias, eps, g.C, x);
    const Affine affine = affine_of<A>(norm);
    const auto mean = spread<A>(partition, norm.stats.mean);
    const auto scale = spread<A>(partition, affine.scale),
               shift = spread<A>(partition, affine.shift);
    pool.mean = mean.data(), pool.scale = scale.data(), pool.shift = shift.data();
    Split(N * g.P, 1, kMinPoolTaskElements / (g.Q * g.C + 1))
        .run([&](int64_t, int64_t begin, int64_t end) {
          cpu_kernels().bn_pool[dtype](pool, begin, end);
        });
  });
  return {y, index};
}

// dy, y, index (N, C, P, Q), x (N, C, H, W), of which only the shape is used -> g (N, C, H, W),
// channels_last
Tensor bn_pool_gradient(Tensor dy, Tensor y, Tensor index, Tensor x, std::vector<int64_t> window) {
  constexpr const char* op = "bn_pool_gradient";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  BnPool pool{};
  pool.window = window_of(op, x, window);
  const MaxPool& g = pool.window;
  check(y.size(0) == x.size(0) && y.size(1) == g.C && y.size(2) == g.P && y.size(3) == g.Q, op,
        ": y of shape ", shape_of(y), " does not match x of shape ", shape_of(x), " pooled");
  check_same_layout(op, "dy", dy, "y", y);
  check(index.scalar_type() == ScalarType::Byte && index.numel() == y.numel(), op,
        ": index must be uint8 of y's shape, got ", name_of(index.scalar_type()), " of shape ",
        shape_of(index));
  Tensor dx = pooled_like(x), passed = pooled_like(dy);
  // Masks dy by the ReLU: the pooled output is positive exactly if the value it was taken from is.
  Split(dy.numel(), kLineBytes, kMinPoolTaskElements).run([&](int64_t, int64_t begin, int64_t end) {
    const auto size = static_cast<int64_t>(x.element_size());
    const auto at = [&](const Tensor& t) {
      return static_cast<const char*>(t.const_data_ptr()) + begin * size;
    };
    cpu_kernels().add_relu_backward[dtype](
        at(dy), at(y), static_cast<char*>(passed.mutable_data_ptr()) + begin * size, end - begin,
        false);
  });
  pool.index = static_cast<uint8_t*>(const_cast<void*>(index.const_data_ptr()));
  pool.dy = passed.const_data_ptr();
  pool.dx = dx.mutable_data_ptr();
  Split(x.size(0) * g.H, 1, kMinPoolTaskElements / (g.W * g.C + 1))
      .run([&](int64_t, int64_t begin, int64_t end) {
        cpu_kernels().bn_pool_gradient[dtype](pool, begin, end);
      });
  return dx;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "bn_pool(Tensor x, Tensor stats, Tensor? weight, Tensor? bias, float eps, int[] window) -> "
      "(Tensor, Tensor)");
  m.def("bn_pool_gradient(Tensor dy, Tensor y, Tensor index, Tensor x, int[] window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("bn_pool", TORCH_BOX(fused_resnet::bn_pool));
  m.impl("bn_pool_gradient", TORCH_BOX(fused_resnet::bn_pool_gradient));
}
