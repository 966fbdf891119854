// Training batch norm as separate passes, for the operations that training places between them:
// statistics merged over processes, two norms applied and added in one pass, an activation
// recomputed from the same statistics. Outputs come from the memory pool (cpu/memory_pool.h).
#include "cpu/batch_norm/passes.h"

#include "cpu/batch_norm/statistics.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {

// x (N, C, H, W) -> (2, C) float64: mean and biased variance
Tensor bn_statistics(Tensor x) {
  constexpr const char* op = "bn_statistics";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Partition partition(layout_of(op, x));
  const Statistics stats = statistics(partition, x, dtype);
  return to_rows(x, {&stats.mean, &stats.var}, partition.layout.C);
}

// y = activation(norm(x) + residual); with residual_stats the residual is normalised too.
// x, residual? (N, C, H, W); stats, residual_stats? (2, C) float64; vectors (C,)
Tensor bn_apply(Tensor x, Tensor stats, std::optional<Tensor> weight, std::optional<Tensor> bias,
                double eps, std::optional<Tensor> residual, std::optional<Tensor> residual_stats,
                std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias,
                double residual_eps, int64_t activation) {
  constexpr const char* op = "bn_apply";
  const Activation last = activation_of(op, activation);
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Partition partition(layout_of(op, x));
  const int64_t C = partition.layout.C;
  if (residual) check_same_layout(op, "residual", *residual, "x", x);
  check(residual.has_value() || !residual_stats, op,
        ": residual must be given with its statistics");
  Tensor y = pooled_like(x);
  with_accumulator(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Norm norm = norm_of<A>(op, stats, weight, bias, eps, C, x);
    if (residual_stats) {
      const Norm other =
          norm_of<A>(op, *residual_stats, residual_weight, residual_bias, residual_eps, C, x);
      apply_norm<A>(partition, dtype, x, norm, residual, &other, last, y);
    } else {
      apply_norm<A>(partition, dtype, x, norm, residual, nullptr, last, y);
    }
  });
  return y;
}

// dy, x, y?, x2? (N, C, H, W); stats, stats2? (2, C) float64 -> (3, C) float64: sum g, sum g (x -
// mean), sum g (x2 - mean2), with g = dy masked by y; and g itself (N, C, H, W) if `masked`, else
// an empty tensor. With `recompute_mask`, y is relu(norm(x)) by weight, bias and eps, recomputed
// instead of read.
std::tuple<Tensor, Tensor> bn_reduce(Tensor dy, std::optional<Tensor> y, Tensor x, Tensor stats,
                                     std::optional<Tensor> weight, std::optional<Tensor> bias,
                                     double eps, bool recompute_mask, std::optional<Tensor> x2,
                                     std::optional<Tensor> stats2, bool masked) {
  constexpr const char* op = "bn_reduce";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Partition partition(layout_of(op, x));
  const int64_t C = partition.layout.C;
  check_same_layout(op, "dy", dy, "x", x);
  if (y) check_same_layout(op, "y", *y, "x", x);
  check_rows(op, "statistics", stats, 2, C);
  check(x2.has_value() == stats2.has_value(), op, ": x2 must be given with its statistics");
  if (x2) check_same_layout(op, "x2", *x2, "x", x), check_rows(op, "stats2", *stats2, 2, C);
  Tensor g = masked ? pooled_like(x) : torch::stable::new_empty(x, {0});
  const Statistics second = stats2 ? to_statistics(*stats2) : Statistics{};
  const GradientSums sums = with_accumulator(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Norm norm = norm_of<A>(op, stats, weight, bias, eps, C, x);
    const Affine affine = affine_of<A>(norm);
    GradientSums found =
        reduce_gradient<A>(partition, dtype, dy,
                           {recompute_mask ? std::nullopt : y, recompute_mask ? &affine : nullptr},
                           x, norm.stats, x2, &second, masked ? &g : nullptr);
    // The kernels subtract the means rounded to A.
    for (int64_t c = 0; c < C; ++c) {
      found[1][c] -= found[0][c] * norm.template rounding_error<A>(c);
      if (x2) found[2][c] -= found[0][c] * Norm{second, {}, {}, 0}.template rounding_error<A>(c);
    }
    return found;
  });
  return {to_rows(x, {&sums[0], &sums[1], &sums[2]}, C), g};
}

// dy, y?, x (N, C, H, W); stats (2, C), sum_g and sum_gx (C,), float64, over `count` values per
// channel; weight?, bias? (C,) -> dx (N, C, H, W). recompute_mask: as in bn_reduce
Tensor bn_gradient(Tensor dy, std::optional<Tensor> y, Tensor x, Tensor stats, Tensor sums,
                   int64_t row, double count, std::optional<Tensor> weight,
                   std::optional<Tensor> bias, double eps, bool recompute_mask) {
  constexpr const char* op = "bn_gradient";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Partition partition(layout_of(op, x));
  const int64_t C = partition.layout.C;
  check_same_layout(op, "dy", dy, "x", x);
  if (y) check_same_layout(op, "y", *y, "x", x);
  check_rows(op, "sums", sums, 3, C);
  check(row == 1 || row == 2, op, ": row must be 1 or 2, got ", row);
  Tensor dx = pooled_like(x);
  with_accumulator(dtype, [&](auto zero) {
    using A = decltype(zero);
    const Norm norm = norm_of<A>(op, stats, weight, bias, eps, C, x);
    const Affine affine = affine_of<A>(norm);
    apply_gradient<A>(partition, dtype, dy,
                      {recompute_mask ? std::nullopt : y, recompute_mask ? &affine : nullptr}, x,
                      norm, row_of(sums, 0), row_of(sums, row), count, dx);
  });
  return dx;
}

// dweight = sum_gx / sqrt(var + eps), dbias = sum_g: (C,), float32, or float64 if `wide`
std::tuple<Tensor, Tensor> bn_parameter_gradients(Tensor sums, int64_t row, Tensor stats,
                                                  double eps, bool wide) {
  constexpr const char* op = "bn_parameter_gradients";
  check(sums.dim() == 2 && (row == 1 || row == 2), op, ": sums must have shape (3, C), got ",
        shape_of(sums));
  const int64_t C = sums.size(1);
  check_rows(op, "sums", sums, 3, C);
  check_rows(op, "statistics", stats, 2, C);
  std::vector<double> dweight = row_of(sums, row);
  const Norm norm{to_statistics(stats), {}, {}, eps};
  for (int64_t c = 0; c < C; ++c) dweight[c] *= norm.invstd(c);
  const std::vector<double> dbias = row_of(sums, 0);
  return wide ? std::make_tuple(to_tensor<double>(sums, dweight), to_tensor<double>(sums, dbias))
              : std::make_tuple(to_tensor<float>(sums, dweight), to_tensor<float>(sums, dbias));
}

// running = running * (1 - momentum) + now * momentum for every norm, in place; the variance is
// unbiased over `count` values. means, vars: (C,) float32, contiguous; counters: () int64,
// incremented, or empty for a norm without one. The arithmetic is float32, in the order of the
// formula.
void bn_update_running(std::vector<Tensor> means, std::vector<Tensor> vars,
                       std::vector<Tensor> counters, std::vector<Tensor> stats,
                       std::vector<double> momenta, std::vector<double> counts) {
  constexpr const char* op = "bn_update_running";
  const size_t norms = means.size();
  check(vars.size() == norms && counters.size() == norms && stats.size() == norms &&
            momenta.size() == norms && counts.size() == norms,
        op, ": every argument must have ", norms, " values");
  for (size_t i = 0; i < norms; ++i) {
    const int64_t C = means[i].numel();
    check_rows(op, "statistics", stats[i], 2, C);
    check_channel_vector(op, "running_mean", means[i], C, ScalarType::Float, stats[i]);
    check_channel_vector(op, "running_var", vars[i], C, ScalarType::Float, stats[i]);
    check(counters[i].numel() <= 1 && counters[i].scalar_type() == ScalarType::Long &&
              counters[i].is_cpu(),
          op, ": a counter must be one int64, got ", name_of(counters[i].scalar_type()),
          " of shape ", shape_of(counters[i]));
  }
  for (size_t i = 0; i < norms; ++i) {
    const int64_t C = means[i].numel();
    const auto* now = static_cast<const double*>(stats[i].const_data_ptr());
    auto* mean = static_cast<float*>(means[i].mutable_data_ptr());
    auto* var = static_cast<float*>(vars[i].mutable_data_ptr());
    const auto keep = static_cast<float>(1.0 - momenta[i]), take = static_cast<float>(momenta[i]);
    for (int64_t c = 0; c < C; ++c) {
      const auto unbiased =
          static_cast<float>(static_cast<float>(now[C + c]) * (counts[i] / (counts[i] - 1)));
      mean[c] = mean[c] * keep + static_cast<float>(now[c]) * take;
      var[c] = var[c] * keep + unbiased * take;
    }
    if (counters[i].numel() == 1) ++*static_cast<int64_t*>(counters[i].mutable_data_ptr());
  }
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def("bn_statistics(Tensor x) -> Tensor");
  m.def(
      "bn_apply(Tensor x, Tensor stats, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
      "Tensor? residual_stats, Tensor? residual_weight, Tensor? residual_bias, "
      "float residual_eps, int activation) -> Tensor");
  m.def(
      "bn_reduce(Tensor dy, Tensor? y, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, "
      "float eps, bool recompute_mask, Tensor? x2, Tensor? stats2, bool masked) -> (Tensor, "
      "Tensor)");
  m.def(
      "bn_gradient(Tensor dy, Tensor? y, Tensor x, Tensor stats, Tensor sums, int row, "
      "float count, Tensor? weight, Tensor? bias, float eps, bool recompute_mask) -> Tensor");
  m.def(
      "bn_parameter_gradients(Tensor sums, int row, Tensor stats, float eps, bool wide) -> "
      "(Tensor, Tensor)");
  m.def(
      "bn_update_running(Tensor(a!)[] means, Tensor(b!)[] vars, Tensor(c!)[] counters, "
      "Tensor[] stats, float[] momenta, float[] counts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("bn_statistics", TORCH_BOX(fused_resnet::bn_statistics));
  m.impl("bn_apply", TORCH_BOX(fused_resnet::bn_apply));
  m.impl("bn_reduce", TORCH_BOX(fused_resnet::bn_reduce));
  m.impl("bn_gradient", TORCH_BOX(fused_resnet::bn_gradient));
  m.impl("bn_parameter_gradients", TORCH_BOX(fused_resnet::bn_parameter_gradients));
  m.impl("bn_update_running", TORCH_BOX(fused_resnet::bn_update_running));
}
