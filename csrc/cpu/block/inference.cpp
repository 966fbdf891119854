// A residual block's inference on the CPU as one op: the convolutions that
// fused_resnet/fusion/inference runs one by one, without the Python interpreter between them.
#include "cpu/batch_norm/passes.h"
#include "cpu/block/block.h"
#include "cpu/convolution/conv_bn_relu.h"

namespace fused_resnet {
namespace {

constexpr size_t kConvTensors = 5;  // weight, winograd, scale, shift, first_channel

// y = relu(conv_n(... relu(conv_1(x))) + shortcut(x)), with every norm folded into its convolution.
// With `statistics`, (2, C) float64, the block is pre-activated: conv_1 reads relu(norm(x)), the
// shortcut starts from there if `shared`, and no ReLU follows the addition.
// x (N, C, H, W) channels_last, which may be overwritten if `overwrite`. convs: packed as for
// conv_bn_relu, five tensors each, a projection shortcut last; geometry: kCount values each.
Tensor block_inference(Tensor x, std::optional<Tensor> statistics, std::optional<Tensor> weight,
                       std::optional<Tensor> bias, double eps, std::vector<Tensor> convs,
                       std::vector<int64_t> geometry, int64_t shortcut, int64_t pad_stride,
                       bool shared, bool overwrite) {
  constexpr const char* op = "block_inference";
  const size_t n = convs.size() / kConvTensors;
  const size_t main = n - (shortcut == kProjection ? 1 : 0);
  check(shortcut >= kNone && shortcut <= kPad && n * kConvTensors == convs.size() &&
            geometry.size() == n * kCount && n <= 64 && main >= 1,
        op, ": got ", convs.size(), " tensors and ", geometry.size(),
        " geometry values, which do not describe a block");
  const auto run = [&](size_t i, const Tensor& from, bool relu,
                       const std::optional<Tensor>& residual = {}, bool in_place = false) {
    const Tensor* conv = &convs[kConvTensors * i];
    const auto values = geometry.begin() + static_cast<int64_t>(kCount * i);
    return conv_bn_relu(from, conv[0], conv[1], conv[2], conv[3], conv[4], residual, in_place, relu,
                        {values, values + kCount});
  };
  Tensor h = x;
  if (statistics) h = bn_apply(x, *statistics, weight, bias, eps, {}, {}, {}, {}, 0, true);
  const bool from_norm = statistics && shared;
  const Tensor source = from_norm ? h : x;
  for (size_t i = 0; i + 1 < main; ++i) h = run(i, h, true);
  std::optional<Tensor> residual;
  if (shortcut == kProjection) residual = run(main, source, false);
  if (shortcut == kPad) residual = padded(source, geometry[kCount * (main - 1) + kK], pad_stride);
  const bool identity = shortcut == kIdentity;
  if (identity) residual = source;
  return run(main - 1, h, !statistics, residual, !identity || overwrite || from_norm);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "block_inference(Tensor x, Tensor? statistics, Tensor? weight, Tensor? bias, float eps, "
      "Tensor[] convs, int[] geometry, int shortcut, int pad_stride, bool shared, bool overwrite) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("block_inference", TORCH_BOX(fused_resnet::block_inference));
}
