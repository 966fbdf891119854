// bn_add_relu and its backward on the CPU. The passes are in cpu/batch_norm/statistics.h, the
// kernels in cpu/batch_norm/bn_add_relu_kernels.h.
#include "cpu/batch_norm/statistics.h"

namespace fused_resnet {
namespace {

template <typename A>
std::tuple<Tensor, Tensor, Tensor> forward(const Partition& partition, DtypeIndex dtype,
                                           const Tensor& x, const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual, double eps,
                                           Activation activation) {
  const int64_t C = partition.layout.C;
  Tensor y = empty_output_like(x);
  const Norm norm{statistics(partition, x, dtype), to_vector<A>(weight, C, 1.0),
                  to_vector<A>(bias, C, 0.0), eps};
  apply_norm<A>(partition, dtype, x, norm, residual, nullptr, activation, y);
  return {y, to_tensor<A>(x, norm.stats.mean), to_tensor<A>(x, norm.stats.var)};
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Partition& partition, DtypeIndex dtype, const Tensor& dy, const Tensor& x,
    const std::optional<Tensor>& y, const std::optional<Tensor>& weight, const Tensor& mean,
    const Tensor& var, double eps, bool relu, bool need_dx, bool need_dresidual) {
  const int64_t C = partition.layout.C;
  Tensor nothing = torch::stable::new_empty(x, {0});
  Tensor dx = need_dx ? empty_output_like(x) : nothing;
  Tensor dresidual = need_dresidual ? empty_output_like(x) : nothing;
  const Mask mask{relu ? y : std::nullopt};
  const Norm norm{{to_vector<A>(mean), to_vector<A>(var)}, to_vector<A>(weight, C, 1.0), {}, eps};
  GradientSums sums = reduce_gradient<A>(partition, dtype, dy, mask, x, norm.stats, std::nullopt,
                                         nullptr, need_dresidual ? &dresidual : nullptr);
  auto& [dbias, dweight, unused] = sums;
  if (need_dx) {
    // dresidual, if written, holds g; otherwise g is recomputed from dy and the mask.
    const double count = static_cast<double>(partition.count);
    if (need_dresidual)
      apply_gradient<A>(partition, dtype, dresidual, {}, x, norm, dbias, dweight, count, dx);
    else
      apply_gradient<A>(partition, dtype, dy, mask, x, norm, dbias, dweight, count, dx);
  }
  for (int64_t c = 0; c < C; ++c) dweight[c] *= norm.invstd(c);
  return {dx, to_tensor<A>(x, dweight), to_tensor<A>(x, dbias), dresidual};
}

// x (N, C, H, W), weight? (C,), bias? (C,), residual? (N, C, H, W)
//   -> y (N, C, H, W), mean (C,), biased variance (C,)
std::tuple<Tensor, Tensor, Tensor> bn_add_relu(Tensor x, std::optional<Tensor> weight,
                                               std::optional<Tensor> bias,
                                               std::optional<Tensor> residual, double eps,
                                               int64_t activation) {
  constexpr const char* op = "bn_add_relu";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Partition partition(layout_of(op, x));
  const ScalarType vector_dtype = statistics_dtype(dtype);
  const int64_t C = partition.layout.C;
  if (weight) check_channel_vector(op, "weight", *weight, C, vector_dtype, x);
  if (bias) check_channel_vector(op, "bias", *bias, C, vector_dtype, x);
  if (residual) check_same_layout(op, "residual", *residual, "x", x);
  const auto run = dtype == kFloat64 ? forward<double> : forward<float>;
  return run(partition, dtype, x, weight, bias, residual, eps, activation_of(op, activation));
}

// dy, x (N, C, H, W), y? (N, C, H, W), weight? (C,), mean (C,), var (C,)
//   -> dx (N, C, H, W), dweight (C,), dbias (C,), dresidual (N, C, H, W)
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward(
    Tensor dy, Tensor x, std::optional<Tensor> y, std::optional<Tensor> weight, Tensor mean,
    Tensor var, double eps, bool relu, bool need_dx, bool need_dresidual) {
  constexpr const char* op = "bn_add_relu_backward";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Partition partition(layout_of(op, x));
  const ScalarType vector_dtype = statistics_dtype(dtype);
  const int64_t C = partition.layout.C;
  check_same_layout(op, "dy", dy, "x", x);
  check(!relu || y.has_value(), op, ": y must be given when relu is true");
  if (y) check_same_layout(op, "y", *y, "x", x);
  if (weight) check_channel_vector(op, "weight", *weight, C, vector_dtype, x);
  check_channel_vector(op, "mean", mean, C, vector_dtype, x);
  check_channel_vector(op, "var", var, C, vector_dtype, x);
  const auto run = dtype == kFloat64 ? backward<double> : backward<float>;
  return run(partition, dtype, dy, x, y, weight, mean, var, eps, relu, need_dx, need_dresidual);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "int activation) -> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "bn_add_relu_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor mean, "
      "Tensor var, float eps, bool relu, bool need_dx, bool need_dresidual) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("bn_add_relu", TORCH_BOX(fused_resnet::bn_add_relu));
  m.impl("bn_add_relu_backward", TORCH_BOX(fused_resnet::bn_add_relu_backward));
}
