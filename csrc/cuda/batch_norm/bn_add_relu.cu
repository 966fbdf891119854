// bn_add_relu and its backward on CUDA devices: checks, outputs and workspace. The kernels are
// described in cuda/batch_norm/launch.cuh.
#include "cuda/batch_norm/bn_add_relu.h"
#include "cuda/batch_norm/gradient_sums.h"

namespace fused_resnet {
namespace {

ScalarType statistics_dtype(DtypeIndex dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// (C,) float32 (float64 for float64 data). Zeros for an empty x, for which no kernel runs.
Tensor channel_vector(const Tensor& x, DtypeIndex dtype) {
  const ScalarType vector_dtype = statistics_dtype(dtype);
  return x.numel() == 0 ? torch::stable::new_zeros(x, {x.size(1)}, vector_dtype)
                        : torch::stable::new_empty(x, {x.size(1)}, vector_dtype);
}

template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* data_of(const std::optional<Tensor>& t) {
  return t ? data_of<T>(*t) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

CutOptions cut_options(const DeviceScope& scope, const Tensor& x, int operands,
                       std::initializer_list<const void*> pointers) {
  const bool vectors = std::all_of(pointers.begin(), pointers.end(), aligned16);
  return {static_cast<int>(x.element_size()), vectors, operands, scope.multiprocessors(),
          scope.max_shared_bytes()};
}

Cut cut_for(const Layout4d& layout, const CutOptions& options) {
  return fused_resnet::cut_for(layout.N, layout.C, layout.HW, layout.channels_last, options);
}

// Partial sums (parts, sums, C), for blocks that merge the parts of a slab; empty if a slab has one
// part. Only this call's launches access it: it needs no zeroing and no synchronisation with other
// streams.
Tensor partial_sums(const Cut& cut, const Tensor& vector, int64_t sums) {
  const int64_t parts = cut.kept && cut.parts == 1 ? 0 : cut.parts;
  return torch::stable::new_empty(vector, {parts, sums, cut.C});
}

template <typename T>
void forward(const Layout4d& layout, const Tensor& x, const std::optional<Tensor>& weight,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, double eps,
             Activation activation, const Tensor& y, const Tensor& mean, const Tensor& var) {
  using A = Accumulate<T>;
  const DeviceScope scope(x);
  BnForward<T> bn{};
  bn.x = data_of<T>(x);
  bn.residual = data_of<T>(residual);
  bn.y = mutable_data<T>(y);
  const CutOptions options = cut_options(scope, x, 1, {bn.x, bn.residual, bn.y});
  bn.cut = cut_for(layout, options);
  const Tensor partial = partial_sums(bn.cut, mean, 3);
  bn.weight = data_of<A>(weight);
  bn.bias = data_of<A>(bias);
  bn.mean = mutable_data<A>(mean);
  bn.var = mutable_data<A>(var);
  bn.partial = mutable_data<A>(partial);
  bn.eps = static_cast<A>(eps);
  bn.activation = activation;
  launch_bn_forward(scope, bn, shared_bytes_of(bn.cut, options));
}

template <typename T>
void backward(const Layout4d& layout, const Tensor& dy, const Tensor& x,
              const std::optional<Tensor>& y, const std::optional<Tensor>& weight,
              const Tensor& mean, const Tensor& var, double eps, const Tensor* dx,
              const Tensor* dresidual, const Tensor& dweight, const Tensor& dbias) {
  using A = Accumulate<T>;
  const DeviceScope scope(x);
  BnBackward<T> bn{};
  bn.dy = data_of<T>(dy);
  bn.x = data_of<T>(x);
  bn.y = data_of<T>(y);
  bn.dx = dx ? mutable_data<T>(*dx) : nullptr;
  bn.dresidual = dresidual ? mutable_data<T>(*dresidual) : nullptr;
  const CutOptions options = cut_options(scope, x, 2, {bn.dy, bn.x, bn.y, bn.dx, bn.dresidual});
  bn.cut = cut_for(layout, options);
  const Tensor partial = partial_sums(bn.cut, dweight, 2);
  bn.parts = bn.cut.parts;
  const bool write_mask = !bn.cut.kept && bn.dx && !bn.dresidual && bn.y && bn.cut.packet > 1;
  const Tensor mask =
      torch::stable::new_empty(x, {write_mask ? x.numel() / bn.cut.packet : 0}, ScalarType::Byte);
  bn.new_mask = write_mask ? mutable_data<uint8_t>(mask) : nullptr;
  bn.weight = data_of<A>(weight);
  bn.mean = data_of<A>(mean);
  bn.var = data_of<A>(var);
  bn.dweight = mutable_data<A>(dweight);
  bn.dbias = mutable_data<A>(dbias);
  bn.partial = mutable_data<A>(partial);
  bn.eps = static_cast<A>(eps);
  launch_bn_backward(scope, bn, shared_bytes_of(bn.cut, options));
}

// x (N, C, H, W), weight? (C,), bias? (C,), residual? (N, C, H, W)
//   -> y (N, C, H, W), mean (C,), biased variance (C,)
std::tuple<Tensor, Tensor, Tensor> bn_add_relu(Tensor x, std::optional<Tensor> weight,
                                               std::optional<Tensor> bias,
                                               std::optional<Tensor> residual, double eps,
                                               int64_t activation) {
  constexpr const char* op = "bn_add_relu";
  const Activation last = activation_of(op, activation);
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of(op, x);
  const ScalarType vector_dtype = statistics_dtype(dtype);
  if (weight) check_channel_vector(op, "weight", *weight, layout.C, vector_dtype, x);
  if (bias) check_channel_vector(op, "bias", *bias, layout.C, vector_dtype, x);
  if (residual) check_same_layout(op, "residual", *residual, "x", x);
  const DeviceScope scope(x);
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = channel_vector(x, dtype), var = channel_vector(x, dtype);
  if (x.numel() == 0) return {y, mean, var};
  with_element(dtype, [&](auto element) {
    forward<decltype(element)>(layout, x, weight, bias, residual, eps, last, y, mean, var);
  });
  return {y, mean, var};
}

// x (N, C, H, W), mean, var, rest (C,) from bn_merge_statistics, weight?, bias? (C,), residual? (N,
// C, H, W) -> y (N, C, H, W)
Tensor bn_normalise(Tensor x, Tensor mean, Tensor var, Tensor rest, std::optional<Tensor> weight,
                    std::optional<Tensor> bias, std::optional<Tensor> residual, double eps,
                    int64_t activation) {
  constexpr const char* op = "bn_normalise";
  const Activation last = activation_of(op, activation);
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of(op, x);
  const ScalarType vector_dtype = statistics_dtype(dtype);
  for (const auto& [name, t] : {std::pair{"mean", &mean}, {"var", &var}, {"rest", &rest}})
    check_channel_vector(op, name, *t, layout.C, vector_dtype, x);
  if (weight) check_channel_vector(op, "weight", *weight, layout.C, vector_dtype, x);
  if (bias) check_channel_vector(op, "bias", *bias, layout.C, vector_dtype, x);
  if (residual) check_same_layout(op, "residual", *residual, "x", x);
  const DeviceScope scope(x);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    using A = Accumulate<T>;
    BnForward<T> bn{};
    bn.x = data_of<T>(x);
    bn.residual = data_of<T>(residual);
    bn.y = mutable_data<T>(y);
    const CutOptions options = cut_options(scope, x, 1, {bn.x, bn.residual, bn.y});
    bn.cut = cut_for(layout, options);
    bn.cut.kept = false;
    bn.weight = data_of<A>(weight);
    bn.bias = data_of<A>(bias);
    bn.mean = const_cast<A*>(data_of<A>(mean));
    bn.var = const_cast<A*>(data_of<A>(var));
    bn.rest = data_of<A>(rest);
    bn.eps = static_cast<A>(eps);
    bn.activation = last;
    launch_bn_normalise(scope, bn, shared_bytes_of(bn.cut, options));
  });
  return y;
}

// dy, x (N, C, H, W), y? (N, C, H, W), weight? (C,), mean (C,), var (C,)
//   -> dx (N, C, H, W), dweight (C,), dbias (C,), dresidual (N, C, H, W)
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward(
    Tensor dy, Tensor x, std::optional<Tensor> y, std::optional<Tensor> weight, Tensor mean,
    Tensor var, double eps, bool relu, bool need_dx, bool need_dresidual) {
  constexpr const char* op = "bn_add_relu_backward";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of(op, x);
  const ScalarType vector_dtype = statistics_dtype(dtype);
  check_same_layout(op, "dy", dy, "x", x);
  check(!relu || y.has_value(), op, ": y must be given when relu is true");
  if (y) check_same_layout(op, "y", *y, "x", x);
  if (weight) check_channel_vector(op, "weight", *weight, layout.C, vector_dtype, x);
  check_channel_vector(op, "mean", mean, layout.C, vector_dtype, x);
  check_channel_vector(op, "var", var, layout.C, vector_dtype, x);
  if (!relu) y.reset();
  const DeviceScope scope(x);
  Tensor nothing = torch::stable::new_empty(x, {0});
  Tensor dx = need_dx ? torch::stable::empty_like(x) : nothing;
  Tensor dresidual = need_dresidual ? torch::stable::empty_like(x) : nothing;
  Tensor dweight = channel_vector(x, dtype), dbias = channel_vector(x, dtype);
  if (x.numel() == 0) return {dx, dweight, dbias, dresidual};
  with_element(dtype, [&](auto element) {
    backward<decltype(element)>(layout, dy, x, y, weight, mean, var, eps, need_dx ? &dx : nullptr,
                                need_dresidual ? &dresidual : nullptr, dweight, dbias);
  });
  return {dx, dweight, dbias, dresidual};
}

// The second half of bn_add_relu_backward: g (dy masked by the ReLU), x (N, C, H, W), sums (parts,
// 2, C) (cuda/batch_norm/gradient_sums.h), weight? (C,), mean, var (C,)
//   -> dx (N, C, H, W), dweight (C,), dbias (C,)
std::tuple<Tensor, Tensor, Tensor> bn_gradient_by_sums(Tensor g, Tensor x, Tensor sums,
                                                       std::optional<Tensor> weight, Tensor mean,
                                                       Tensor var, double eps) {
  constexpr const char* op = "bn_gradient_by_sums";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of(op, x);
  check(dtype != kFloat64 && x.numel() > 0, op, ": x must be of 32 or 16 bits and not empty, got ",
        name_of(x.scalar_type()), " of shape ", shape_of(x));
  check_same_layout(op, "g", g, "x", x);
  check(sums.dim() == 3 && sums.size(0) > 0 && sums.size(1) == 2 && sums.size(2) == layout.C &&
            sums.is_contiguous() && sums.scalar_type() == ScalarType::Float,
        op, ": sums must be a contiguous float32 (parts, 2, ", layout.C, "), got shape ",
        shape_of(sums));
  if (weight) check_channel_vector(op, "weight", *weight, layout.C, ScalarType::Float, x);
  check_channel_vector(op, "mean", mean, layout.C, ScalarType::Float, x);
  check_channel_vector(op, "var", var, layout.C, ScalarType::Float, x);
  const DeviceScope scope(x);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = channel_vector(x, dtype), dbias = channel_vector(x, dtype);
  sums = reduce_sums(scope, sums);
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      BnBackward<T> bn{};
      bn.dy = data_of<T>(g);
      bn.x = data_of<T>(x);
      bn.dx = mutable_data<T>(dx);
      const CutOptions options = cut_options(scope, x, 2, {bn.dy, bn.x, bn.dx});
      bn.cut = cut_for(layout, options);
      bn.cut.kept = false;
      bn.weight = data_of<float>(weight);
      bn.mean = data_of<float>(mean);
      bn.var = data_of<float>(var);
      bn.dweight = mutable_data<float>(dweight);
      bn.dbias = mutable_data<float>(dbias);
      bn.partial = mutable_data<float>(sums);
      bn.parts = sums.size(0);
      bn.eps = static_cast<float>(eps);
      launch_bn_gradient(scope, bn, shared_bytes_of(bn.cut, options));
    }
  });
  return {dx, dweight, dbias};
}

}  // namespace

void list_bn_add_relu_kernels(std::vector<CudaKernel>& list, bool gpu) {
  list_bn_kernels<float>(list, "float32", gpu);
  list_bn_kernels<bfloat16_t>(list, "bfloat16", gpu);
  list_bn_kernels<float16_t>(list, "float16", gpu);
  list_bn_kernels<double>(list, "float64", gpu);
}

}  // namespace fused_resnet

FUSED_RESNET_CUDA_OPS(m) {
  m.impl("bn_add_relu", TORCH_BOX(fused_resnet::bn_add_relu));
  m.impl("bn_normalise", TORCH_BOX(fused_resnet::bn_normalise));
  m.impl("bn_add_relu_backward", TORCH_BOX(fused_resnet::bn_add_relu_backward));
  m.impl("bn_gradient_by_sums", TORCH_BOX(fused_resnet::bn_gradient_by_sums));
}
