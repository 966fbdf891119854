// Inference of a network's stem and its residual blocks on the CPU as one op: the convolutions and
// poolings that fused_resnet/fusion/inference runs one by one, without the Python interpreter
// between them, on threads that stay together.
#include "cpu/batch_norm/passes.h"
#include "cpu/block/block.h"
#include "cpu/convolution/conv_bn_relu.h"
#include "cpu/pooling/max_pool2d.h"
#include "cpu/threads.h"

namespace fused_resnet {
namespace {

constexpr size_t kConvTensors = 5;  // weight, winograd, scale, shift, first_channel
constexpr size_t kNormTensors = 3;  // statistics, weight and bias (empty if none)

// What a block's description holds besides tensors. kKernel, kStride, kPadding: two values each, of
// the max pooling after it; kernel 0: none.
enum BlockValue : size_t {
  kConvs,
  kShortcut,
  kPadStride,
  kNormFirst,
  kShared,
  kKernel,
  kStride = kKernel + 2,
  kPadding = kStride + 2,
  kBlockValues = kPadding + 2
};

struct Convs {  // packed as for conv_bn_relu, and their geometry: kCount values each
  const Tensor* tensors;
  const int64_t* geometry;
  const int64_t* activation;  // one value each

  // Convolution i, after which `next` runs; that of none: i itself.
  Tensor run(size_t i, size_t next, const Tensor& from, const std::optional<Tensor>& residual = {},
             bool in_place = false) const {
    const Tensor* conv = tensors + kConvTensors * i;
    const int64_t* values = geometry + kCount * i;
    return conv_bn_relu_before(next == i ? Upcoming{} : upcoming(tensors + kConvTensors * next),
                               from, conv[0], conv[1], conv[2], conv[3], conv[4], residual,
                               in_place, activation[i], {values, values + kCount});
  }

  // Of a convolution without Winograd weights, which have fewer channels and stay in the cache.
  static Upcoming upcoming(const Tensor* conv) {
    if (conv[1].numel() > 0) return {};
    return {static_cast<const char*>(conv[0].const_data_ptr()),
            conv[0].numel() * static_cast<int64_t>(conv[0].element_size())};
  }
};

std::optional<Tensor> unless_empty(const Tensor& t) {
  return t.numel() ? std::optional<Tensor>(t) : std::nullopt;
}

// y = a_n(conv_n(... a_1(conv_1(x))) + shortcut(x)) with activations a_i, and every norm folded
// into its convolution. With a norm, the block is pre-activated: conv_1 reads `first`(norm(x)), and
// the shortcut starts from there if shared. x may be overwritten if `overwrite`.
// Another block follows unless it is the last.
Tensor run_block(const Tensor& x, const Convs& convs, const int64_t* block, const Tensor* norm,
                 double eps, int64_t first, bool overwrite, bool last) {
  const int64_t shortcut = block[kShortcut];
  const auto main = static_cast<size_t>(block[kConvs]) - (shortcut == kProjection ? 1 : 0);
  Tensor h = x;
  if (norm)
    h = bn_apply(x, norm[0], unless_empty(norm[1]), unless_empty(norm[2]), eps, {}, {}, {}, {}, 0,
                 first);
  const bool from_norm = norm && block[kShared];
  const Tensor source = from_norm ? h : x;
  const bool projects = shortcut == kProjection;
  for (size_t i = 0; i + 1 < main; ++i)
    h = convs.run(i, projects && i + 2 == main ? main : i + 1, h);
  std::optional<Tensor> residual;
  if (projects) residual = convs.run(main, main - 1, source);
  if (shortcut == kPad)
    residual = padded(source, convs.geometry[kCount * (main - 1) + kK], block[kPadStride]);
  const bool identity = shortcut == kIdentity;
  if (identity) residual = source;
  const size_t next = last ? main - 1 : static_cast<size_t>(block[kConvs]);
  return convs.run(main - 1, next, h, residual, !identity || overwrite || from_norm);
}

// The blocks' output for x (N, C, H, W) channels_last, or of any layout if the first convolution
// copies it (kCopiedChannels); x may be overwritten if `overwrite`.
// blocks: kBlockValues each; tensors: kConvTensors per convolution, a projecting shortcut's last in
// its block, and then kNormTensors per pre-activated block; geometry: kCount values per
// convolution. Of each block, eps: its norm's, if it is pre-activated; activations: `first` and one
// per convolution. No list is empty: AOTInductor cannot pass such.
Tensor block_inference(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> geometry,
                       std::vector<double> eps, std::vector<int64_t> activations,
                       std::vector<int64_t> blocks, bool overwrite) {
  constexpr const char* op = "block_inference";
  size_t convs = 0, norms = 0;
  bool valid = blocks.size() % kBlockValues == 0;
  for (size_t at = 0; valid && at < blocks.size(); at += kBlockValues) {
    const int64_t* block = &blocks[at];
    valid = block[kShortcut] >= kNone && block[kShortcut] <= kPad && block[kConvs] <= 64 &&
            block[kConvs] > (block[kShortcut] == kProjection ? 1 : 0) && block[kPadStride] >= 1;
    convs += valid ? static_cast<size_t>(block[kConvs]) : 0;
    norms += block[kNormFirst] ? 1 : 0;
  }
  const size_t count = blocks.size() / kBlockValues;
  check(valid && tensors.size() == convs * kConvTensors + norms * kNormTensors &&
            geometry.size() == convs * kCount && eps.size() == count &&
            activations.size() == convs + count,
        op, ": got ", tensors.size(), " tensors, ", geometry.size(), " geometry values, ",
        eps.size(), " eps and ", activations.size(), " activations of ", convs,
        " convolutions and ", norms, " norms, which do not describe ", count, " blocks");
  in_region([&] {
    Convs rest{tensors.data(), geometry.data(), activations.data() + 1};
    const Tensor* norm = tensors.data() + convs * kConvTensors;
    for (size_t i = 0; i < count; ++i) {
      const int64_t* block = &blocks[i * kBlockValues];
      const bool first = block[kNormFirst];
      x = run_block(x, rest, block, first ? norm : nullptr, eps[i], rest.activation[-1], overwrite,
                    i + 1 == count);
      if (block[kKernel])
        x = max_pool2d(x, {block[kKernel], block[kKernel + 1]},
                       {block[kStride], block[kStride + 1]},
                       {block[kPadding], block[kPadding + 1]});
      overwrite = true;
      norm += first ? kNormTensors : 0;
      rest.tensors += kConvTensors * static_cast<size_t>(block[kConvs]);
      rest.geometry += kCount * block[kConvs];
      rest.activation += block[kConvs] + 1;
    }
  });
  return x;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "block_inference(Tensor x, Tensor[] tensors, int[] geometry, float[] eps, int[] activations, "
      "int[] blocks, bool overwrite) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("block_inference", TORCH_BOX(fused_resnet::block_inference));
}
