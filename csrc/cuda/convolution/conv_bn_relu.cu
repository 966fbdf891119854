// conv_bn_relu on CUDA devices: checks, and dispatch to the kernel of the tile.
#include <limits>

#include "cuda/convolution/prologue.h"

namespace fused_resnet {
namespace {

constexpr const char* kOp = "implicit_gemm";

void check_matrix(const char* name, const Tensor& t, const Tensor& x,
                  std::initializer_list<int64_t> shape) {
  check(t.scalar_type() == x.scalar_type(), kOp, ": ", name, " must have x's dtype ",
        name_of(x.scalar_type()), ", got ", name_of(t.scalar_type()));
  check(t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(), kOp, ": ", name,
        " must be on x's device");
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == shape.begin()[d];
  check(same, kOp, ": ", name, " has a wrong shape ", shape_of(t));
  check(aligned16(t.const_data_ptr()), kOp, ": ", name, " must be aligned to 16 bytes");
}

void check_rows(const char* name, const Tensor& t) {
  check(layout_of(kOp, t).channels_last, kOp, ": ", name, " must be channels_last, got strides ",
        strides_of(t), " for shape ", shape_of(t));
}

// Checks all arguments and returns the problem. x (N, C, H, W) channels_last, weight (K, R, S, C /
// groups) contiguous, y (N, K, P, Q) channels_last; tile: a row of kGemmTiles.
ConvProblem problem_of(const Tensor& x, const Tensor& weight, const Tensor& y,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups, int64_t tile,
                       int64_t splits) {
  check(dtype_index(kOp, "x", x) != kFloat64, kOp,
        ": x must be float32, bfloat16 or float16, got float64");
  check(tile >= 0 && tile < kGemmTileCount, kOp, ": tile must be below ", kGemmTileCount, ", got ",
        tile);
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, kOp,
        ": stride, padding and dilation must be pairs");
  check(x.dim() == 4 && y.dim() == 4 && weight.dim() == 4, kOp,
        ": x, weight and y must be 4-D, got ", shape_of(x), ", ", shape_of(weight), " and ",
        shape_of(y));
  const int64_t N = x.size(0), C = x.size(1), K = weight.size(0);
  check(groups > 0 && C % groups == 0 && K % groups == 0, kOp, ": groups must divide C and K, got ",
        groups, " for ", C, " and ", K);
  const int64_t elements = 16 / static_cast<int64_t>(x.element_size());
  check(C / groups % elements == 0 && K / groups % elements == 0, kOp,
        ": channels and outputs of a group must be multiples of ", elements, ", got ", C / groups,
        " and ", K / groups);
  const auto in_int = [](int64_t v) {
    check(v >= 0 && v < int64_t{1} << 30, kOp,
          ": sizes, stride, padding and dilation must be from 0 to 2^30 - 1, got ", v);
    return static_cast<int>(v);
  };
  const ConvProblem problem{N,
                            in_int(x.size(2)),
                            in_int(x.size(3)),
                            in_int(C / groups),
                            in_int(K / groups),
                            in_int(weight.size(1)),
                            in_int(weight.size(2)),
                            in_int(y.size(2)),
                            in_int(y.size(3)),
                            in_int(stride[0]),
                            in_int(stride[1]),
                            in_int(padding[0]),
                            in_int(padding[1]),
                            in_int(dilation[0]),
                            in_int(dilation[1]),
                            in_int(groups)};
  const auto pixels = [](int64_t size, int64_t pad, int64_t kernel, int64_t step, int64_t gap) {
    return (size + 2 * pad - gap * (kernel - 1) - 1) / step + 1;
  };
  check(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 &&
            problem.P == pixels(problem.H, padding[0], problem.R, stride[0], dilation[0]) &&
            problem.Q == pixels(problem.W, padding[1], problem.S, stride[1], dilation[1]),
        kOp, ": y has a wrong shape ", shape_of(y), " for x ", shape_of(x));
  check_matrix("weight", weight, x, {K, problem.R, problem.S, problem.C});
  int64_t row = 1;
  for (int64_t d = 3; d >= 0; row *= weight.size(d--))
    check(weight.size(d) <= 1 || weight.stride(d) == row, kOp,
          ": weight must be contiguous, got strides ", strides_of(weight));
  check_matrix("y", y, x, {N, K, problem.P, problem.Q});
  // The end of the last tile, some pixels later, must fit in an int too.
  check(problem.M() < std::numeric_limits<int>::max() - 1024, kOp, ": y has ", problem.M(),
        " pixels, more than an int can hold");
  check(aligned16(x.const_data_ptr()), kOp, ": x must be aligned to 16 bytes");
  check_rows("x", x);
  check_rows("y", y);
  check(splits >= 1, kOp, ": splits must be positive, got ", splits);
  check(splits == 1 || kGemmTiles[tile].architecture == 80, kOp,
        ": splits must be 1 for Hopper's kernels, got ", splits);
  return problem;
}

// Those of the plain convolution.
ConvOperands operands_of(const Tensor& x, const Tensor& weight, const Tensor& y) {
  ConvOperands operands{};
  operands.dtype = dtype_index(kOp, "x", x);
  operands.x = x.const_data_ptr();
  operands.weight = weight.const_data_ptr();
  operands.y = y.mutable_data_ptr();
  return operands;
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// A norm of C channels by the statistics of bn_merge_statistics, checked.
NormOperands norm_of(const Tensor& mean, const Tensor& var, const Tensor& rest,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     double eps, int64_t C, const Tensor& x) {
  const auto vector = [&](const char* name, const Tensor& t) {
    check_channel_vector(kOp, name, t, C, ScalarType::Float, x);
    return floats(t);
  };
  return {vector("mean", mean),
          vector("var", var),
          vector("rest", rest),
          weight ? vector("norm_weight", *weight) : nullptr,
          bias ? vector("norm_bias", *bias) : nullptr,
          static_cast<float>(eps)};
}

// Room for what a training epilogue writes of y: (parts, rows, outputs) float32, and the pixels per
// part.
std::tuple<Tensor, int64_t> parts_for(const ConvProblem& problem, const Tensor& y, int64_t rows,
                                      int64_t tile, int64_t splits) {
  check(y.numel() > 0, kOp, ": y must not be empty");
  const int64_t pixels = splits > 1 ? kMergedPixels : kGemmTiles[tile].part_pixels();
  return {torch::stable::new_empty(y, {ceil_div(problem.M(), pixels), rows, y.size(1)},
                                   ScalarType::Float),
          pixels};
}

void launch(const ConvProblem& problem, const ConvOperands& operands, int64_t tile, int64_t splits,
            const Tensor& x) {
  const DeviceScope scope(x);
  if (kGemmTiles[tile].architecture == 90)
    return launch_implicit_gemm_sm90(scope, problem, operands, kGemmTiles[tile]);
  std::optional<Tensor> partial;
  if (splits > 1)
    partial = torch::stable::new_empty(
        x, {splits, problem.M(), int64_t{problem.groups} * problem.K}, ScalarType::Float);
  launch_implicit_gemm_sm80(scope, problem, operands, kGemmTiles[tile], static_cast<int>(splits),
                            partial ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr);
}

// x (N, C, H, W), weight (K, R, S, C / groups), scale, shift (K,) float32, residual (N, K, P, Q) ->
// writes y (N, K, P, Q)
void implicit_gemm(Tensor x, Tensor weight, Tensor scale, Tensor shift,
                   std::optional<Tensor> residual, Tensor y, int64_t activation,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups, int64_t tile, int64_t splits) {
  const ConvProblem problem =
      problem_of(x, weight, y, stride, padding, dilation, groups, tile, splits);
  const int64_t K = weight.size(0);
  if (residual) {
    check_matrix("residual", *residual, x, {problem.N, K, problem.P, problem.Q});
    check_rows("residual", *residual);
  }
  check_channel_vector(kOp, "scale", scale, K, ScalarType::Float, x);
  check_channel_vector(kOp, "shift", shift, K, ScalarType::Float, x);
  if (y.numel() == 0) return;
  ConvOperands operands = operands_of(x, weight, y);
  operands.scale = floats(scale);
  operands.shift = floats(shift);
  if (residual) operands.residual = residual->const_data_ptr();
  operands.activation = activation_of(kOp, activation);
  launch(problem, operands, tile, splits, x);
}

// x (N, C, H, W), weight (K, R, S, C / groups) -> writes the convolution to z (N, K, P, Q); returns
// its statistics (parts, 3, K) float32 (cuda/convolution/statistics.cuh) and the pixels per part.
std::tuple<Tensor, int64_t> convolution_statistics(Tensor x, Tensor weight, Tensor z,
                                                   std::vector<int64_t> stride,
                                                   std::vector<int64_t> padding,
                                                   std::vector<int64_t> dilation, int64_t groups,
                                                   int64_t tile, int64_t splits) {
  const ConvProblem problem =
      problem_of(x, weight, z, stride, padding, dilation, groups, tile, splits);
  const auto [statistics, pixels] = parts_for(problem, z, 3, tile, splits);
  ConvOperands operands = operands_of(x, weight, z);
  operands.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  launch(problem, operands, tile, splits, x);
  return {statistics, pixels};
}

// The same for relu(norm(x)) in place of x, without storing it. mean, var, rest (C,) from
// bn_merge_statistics, norm_weight?, norm_bias? (C,), all float32; weight (K, 1, 1, C), z (N, K, H,
// W).
std::tuple<Tensor, int64_t> normalised_convolution_statistics(
    Tensor x, Tensor mean, Tensor var, Tensor rest, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, double eps, Tensor weight, Tensor z, int64_t tile) {
  const ConvProblem problem = problem_of(x, weight, z, {1, 1}, {0, 0}, {1, 1}, 1, tile, 1);
  check(problem.pointwise(), kOp, ": batch norm of x requires a 1x1 convolution, got ", problem.R,
        "x", problem.S);
  ConvOperands operands = operands_of(x, weight, z);
  check(operands.dtype == kFloat16 || operands.dtype == kBFloat16, kOp,
        ": batch norm of x requires x of float16 or bfloat16, got ", name_of(x.scalar_type()));
  check(kGemmTiles[tile].normalises(), kOp, ": no kernel of tile ", tile, " normalises x");
  const auto [statistics, pixels] = parts_for(problem, z, 3, tile, 1);
  Tensor table = torch::stable::new_empty(x, {kNormTableRows, problem.C}, ScalarType::Float);
  auto* const norm_table = static_cast<float*>(table.mutable_data_ptr());
  launch_fold_norm(DeviceScope(x),
                   norm_of(mean, var, rest, norm_weight, norm_bias, eps, problem.C, x), problem.C,
                   norm_table);
  operands.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  operands.norm = norm_table;
  launch(problem, operands, tile, 1, x);
  return {statistics, pixels};
}

// Input gradient of a convolution of stride 1 whose input was relu(norm(x)), computed as a
// convolution of dy (N, K, P, Q) by weight (C, R, S, K / groups). x (N, C, H, W); mean, var, rest
// (C,) from bn_merge_statistics; norm_weight?, norm_bias? (C,). Writes the gradient masked by the
// ReLU to g (N, C, H, W); returns its sums (parts, 2, C) float32 (cuda/convolution/gradient.cuh).
Tensor convolution_gradient_sums(Tensor dy, Tensor weight, Tensor g, Tensor x, Tensor mean,
                                 Tensor var, Tensor rest, std::optional<Tensor> norm_weight,
                                 std::optional<Tensor> norm_bias, double eps,
                                 std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                 int64_t groups, int64_t tile, int64_t splits) {
  check(dy.element_size() == 2, kOp, ": dy must be bfloat16 or float16, got ",
        name_of(dy.scalar_type()));
  const ConvProblem problem =
      problem_of(dy, weight, g, {1, 1}, padding, dilation, groups, tile, splits);
  const Tensor sums = std::get<0>(parts_for(problem, g, 2, tile, splits));
  check_matrix("x", x, dy, {problem.N, weight.size(0), problem.P, problem.Q});
  check_rows("x", x);
  ConvOperands operands = operands_of(dy, weight, g);
  operands.mask = {norm_of(mean, var, rest, norm_weight, norm_bias, eps, weight.size(0), dy),
                   x.const_data_ptr(), static_cast<float*>(sums.mutable_data_ptr())};
  launch(problem, operands, tile, splits, dy);
  return sums;
}

}  // namespace
}  // namespace fused_resnet

FUSED_RESNET_CUDA_OPS(m) {
  m.impl("implicit_gemm", TORCH_BOX(fused_resnet::implicit_gemm));
  m.impl("convolution_statistics", TORCH_BOX(fused_resnet::convolution_statistics));
  m.impl("normalised_convolution_statistics",
         TORCH_BOX(fused_resnet::normalised_convolution_statistics));
  m.impl("convolution_gradient_sums", TORCH_BOX(fused_resnet::convolution_gradient_sums));
}
