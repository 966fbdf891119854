// Convolutions of a training step on the CPU: the convolution itself and its input gradient, by the
// kernels of cpu/convolution/direct_kernels.h. Weights are repacked at every step, since every step
// changes them.
#include "cpu/convolution/train.h"

#include "cpu/batch_norm/passes.h"
#include "cpu/batch_norm/statistics.h"
#include "cpu/convolution/host.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {

ConvPasses& conv_passes() {
  static ConvPasses passes{};
  return passes;
}

namespace {

// TileCallback, with the address of the first of y's pixels [begin, end).
using RowCallback = std::function<void(int64_t task, const char* y, int64_t begin, int64_t end)>;

// Whether there are so few pixels for so many weights that a block of outputs processes all pixels
// at once and the weights are packed block by block in cache: they are then read from memory once
// and not written back.
bool packs_block_by_block(const ConvBnRelu& conv) {
  const int64_t blocks = (conv.K + kBlockChannels - 1) / kBlockChannels;
  const int64_t threads = torch::stable::get_num_threads();
  return conv.N * conv.P * conv.Q <= conv.K * conv.R * conv.S &&
         (blocks % threads == 0 || blocks >= 4 * threads);
}

void run_packing(const ConvBnRelu& conv, const ConvPack& pack, ConvVariant variant) {
  const int64_t tile = cpu_kernels().tile_pixels;
  const int64_t tiles = (conv.N * conv.P * conv.Q + tile - 1) / tile, vectors = conv.K / 16;
  const int64_t vector_bytes = 16 * pack.inputs * pack.taps * operand_bytes(variant);
  Split((vectors + 3) / 4, 1, 1).run([&](int64_t, int64_t begin, int64_t end) {
    const Scratch packed(4 * vector_bytes);
    for (int64_t block = begin; block < end; ++block) {
      // Offset so that the block's weights are at packed.data().
      ConvPack part = pack;
      part.direct = packed.data() - block * 4 * vector_bytes;
      cpu_kernels().conv_pack(part, 4 * block, std::min(4 * block + 4, vectors));
      ConvBnRelu prepared = conv;
      prepared.weight = part.direct;
      cpu_kernels().conv_bn_relu[variant](prepared, block, 0, tiles);
    }
  });
}

struct Convolved {
  Tensor y;
  bool callback_done;  // whether `callback` was called for all of y
};

// `convolution`, with `callback` after each tile range if y is large enough.
Convolved convolve(Tensor x, Tensor weight, bool transposed, std::optional<Tensor> residual,
                   bool overwrite, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, const RowCallback& callback = {}) {
  constexpr const char* op = "convolution";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  check(conv_supported(dtype), op, ": no kernel for ", name_of(x.scalar_type()),
        " on this processor");
  const Layout4d layout = layout_of(op, x);
  check(layout.channels_last, op, ": x must be channels_last, got strides ", strides_of(x),
        " for shape ", shape_of(x));
  check(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, op,
        ": weight must be float32 of shape (K, C, R, S), got ", name_of(weight.scalar_type()),
        " of shape ", shape_of(weight));
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t R = weight.size(2), S = weight.size(3), taps = R * S;
  const int64_t C = transposed ? rows : columns, K = transposed ? columns : rows;
  check(is_dense(weight) && (columns <= 1 || weight.stride(1) == 1) &&
            (taps == 1 || (weight.stride(2) == S * columns || R == 1)),
        op, ": weight must be channels_last, got strides ", strides_of(weight));
  check(layout.C == C, op, ": x must have ", C, " channels, got ", layout.C);
  check(C % 16 == 0 && K % 16 == 0 && taps <= kMaxPackedTaps, op,
        ": channels must be multiples of 16 and taps at most ", kMaxPackedTaps,
        ", got weight of shape ", shape_of(weight));
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
        ": stride, padding and dilation must be pairs");
  ConvBnRelu conv{};
  conv.N = x.size(0), conv.C = C, conv.H = x.size(2), conv.W = x.size(3), conv.K = K;
  conv.R = R, conv.S = S, conv.run = C;
  conv.stride_h = stride[0], conv.stride_w = stride[1];
  conv.pad_h = padding[0], conv.pad_w = padding[1];
  conv.dilation_h = dilation[0], conv.dilation_w = dilation[1];
  conv.P = out_size(conv.H, R, stride[0], padding[0], dilation[0]);
  conv.Q = out_size(conv.W, S, stride[1], padding[1], dilation[1]);
  check(conv.P > 0 && conv.Q > 0, op, ": x of size ", conv.H, " x ", conv.W,
        " is smaller than the kernel");
  conv.pointwise = taps * stride[0] * stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  if (residual) {
    const Layout4d other = layout_of(op, *residual);
    check(residual->scalar_type() == x.scalar_type() && other.N == conv.N && other.C == K &&
              residual->size(2) == conv.P && residual->size(3) == conv.Q && other.channels_last,
          op, ": residual must be ", name_of(x.scalar_type()), " of shape (", conv.N, ", ", K, ", ",
          conv.P, ", ", conv.Q, ") and channels_last, got ", name_of(residual->scalar_type()),
          " of shape ", shape_of(*residual));
  }
  Tensor y = overwrite && residual
                 ? *residual
                 : pooled_channels_last(conv.N, K, conv.P, conv.Q, x.scalar_type());
  if (y.numel() == 0) return {y, false};
  ++(transposed ? conv_passes().input_gradients : conv_passes().convolutions);
  const ConvVariant variant = *conv_variant(dtype);
  const int64_t size = operand_bytes(variant);

  conv.winograd_tile = winograd_tile_of_step(conv, variant, kMaxWinogradWeights4);
  const bool winograd = conv.winograd_tile > 0;
  ConvPack pack{};
  pack.weight = weight.const_data_ptr();
  pack.outputs = K, pack.inputs = C, pack.taps = taps;
  pack.output_stride = transposed ? 1 : taps * columns;
  pack.input_stride = transposed ? taps * columns : 1;
  for (int64_t tap = 0; tap < taps; ++tap)
    pack.tap_offset[tap] = (transposed ? taps - 1 - tap : tap) * columns;
  pack.transposed = transposed;
  pack.variant = variant;
  pack.winograd_tile = conv.winograd_tile;
  std::optional<Scratch> packed, packed_winograd;
  const auto pack_for = [&](bool direct, bool by_winograd) {
    if (direct) packed.emplace(K * C * taps * size);
    if (by_winograd) packed_winograd.emplace(winograd_products(conv.winograd_tile) * K * C * 4);
    pack.direct = direct ? packed->data() : nullptr;
    pack.winograd = by_winograd ? packed_winograd->data() : nullptr;
    Split(K / 16, 1, 1).run([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().conv_pack(pack, begin, end);
    });
    if (direct) conv.weight = pack.direct;
    if (by_winograd) conv.winograd = pack.winograd;
  };
  const std::vector<char> zeros(static_cast<size_t>(C * size), 0);
  if (residual) conv.residual = residual->const_data_ptr();
  conv.y = y.mutable_data_ptr();
  conv.zeros = zeros.data();
  if (!winograd && packs_block_by_block(conv)) {
    const Operand source(x, variant);
    conv.x = source.data();
    run_packing(conv, pack, variant);
    return {y, false};
  }

  // The Winograd algorithm leaves non-finite results to the direct one. Its weights are packed when
  // that occurs, or beforehand if y overwrites the residual, which is then lost.
  bool skipped_pixels = false;
  conv.skipped_pixels = &skipped_pixels;
  pack_for(!winograd || (overwrite && residual), winograd);
  const Source source(conv, x, variant);
  const auto* y_ptr = static_cast<const char*>(y.const_data_ptr());
  const int64_t pixel_bytes = K * static_cast<int64_t>(y.element_size());
  const bool callback_done =
      callback &&
      run_convolution_with_callback(conv, variant, [&](int64_t task, int64_t begin, int64_t end) {
        callback(task, y_ptr + begin * pixel_bytes, begin, end);
      });
  if (!callback_done) run_convolution(conv, variant);
  if (skipped_pixels) {
    pack_for(true, false);
    run_convolution(conv, variant);
  }
  return {y, callback_done && !skipped_pixels};
}

}  // namespace

// x (N, C, H, W) channels_last, float32 or bfloat16; weight (K, C, R, S) float32, channels_last ->
// y (N, K, P, Q) channels_last of x's dtype: convolution plus residual. With `transposed`, weight
// is (C, K, R, S) in that notation and its taps are reversed: the input gradient of a convolution
// of stride 1. residual (N, K, P, Q), overwritten by y if `overwrite`.
// K and C multiples of 16; padding and dilation (2,), stride (2,).
Tensor convolution(Tensor x, Tensor weight, bool transposed, std::optional<Tensor> residual,
                   bool overwrite, std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation) {
  return convolve(x, weight, transposed, residual, overwrite, stride, padding, dilation).y;
}

std::tuple<Tensor, Tensor> convolution_and_statistics(Tensor x, Tensor weight,
                                                      std::vector<int64_t> stride,
                                                      std::vector<int64_t> padding,
                                                      std::vector<int64_t> dilation) {
  // The statistics are accumulated while y is in cache, which saves one read of y from memory.
  const int64_t K = weight.dim() == 4 ? weight.size(0) : 0;
  RowStatistics sums(K, dtype_index("convolution", "x", x), torch::stable::get_num_threads());
  const auto [y, callback_done] =
      convolve(x, weight, false, {}, false, stride, padding, dilation,
               [&](int64_t task, const char* y_rows, int64_t begin, int64_t end) {
                 sums.add(task, y_rows, end - begin);
               });
  const auto found = callback_done ? sums.finish() : std::nullopt;
  return {y, found ? to_rows(y, {&found->mean, &found->var}, K) : bn_statistics(y)};
}

std::optional<std::vector<int64_t>> gradient_padding(const Tensor& weight,
                                                     const std::vector<int64_t>& stride,
                                                     const std::vector<int64_t>& padding,
                                                     const std::vector<int64_t>& dilation) {
  const int64_t down = dilation[0] * (weight.size(2) - 1) - padding[0];
  const int64_t right = dilation[1] * (weight.size(3) - 1) - padding[1];
  if (stride[0] * stride[1] != 1 || down < 0 || right < 0) return std::nullopt;
  return std::vector<int64_t>{down, right};
}

std::tuple<Tensor, Tensor> input_gradient_and_sums(Tensor dy, Tensor weight,
                                                   std::vector<int64_t> stride,
                                                   std::vector<int64_t> padding,
                                                   std::vector<int64_t> dilation, Tensor x,
                                                   Tensor stats, std::optional<Tensor> norm_weight,
                                                   std::optional<Tensor> norm_bias, double eps) {
  constexpr const char* op = "input_gradient_and_sums";
  check(weight.dim() == 4 && x.dim() == 4 && dy.dim() == 4 && x.size(1) == weight.size(1) &&
            x.scalar_type() == dy.scalar_type(),
        op, ": x must be ", name_of(dy.scalar_type()),
        " and have as many channels as weight has inputs, got ", name_of(x.scalar_type()),
        " of shape ", shape_of(x), " and weight of shape ", shape_of(weight));
  check(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
        ": stride, padding and dilation must be pairs");
  const auto around = gradient_padding(weight, stride, padding, dilation);
  const auto summed = [&](const Tensor& dx) {
    check_same_layout(op, "dx", dx, "x", x);
    return std::get<0>(
        bn_reduce(dx, {}, x, stats, norm_weight, norm_bias, eps, true, {}, {}, false));
  };
  if (!around) {
    check(dilation[0] * dilation[1] == 1, op, ": no kernel for dilation with stride");
    const Tensor dx = strided_input_gradient(dy, weight, x.size(2), x.size(3), {}, stride, padding);
    return {dx, summed(dx)};
  }
  const auto size = [&](size_t i) {
    const auto d = static_cast<int64_t>(i) + 2;
    return out_size(dy.size(d), weight.size(d), 1, around->at(i), dilation[i]);
  };
  check(layout_of(op, x).channels_last && layout_of(op, dy).N == x.size(0) &&
            x.size(2) == size(0) && x.size(3) == size(1),
        op, ": x must be channels_last and of shape (", dy.size(0), ", ", weight.size(1), ", ",
        size(0), ", ", size(1), "), got strides ", strides_of(x), " for shape ", shape_of(x));
  const Norm norm = norm_of<float>(op, stats, norm_weight, norm_bias, eps, x.size(1), x);
  RowGradientSums sums(x, norm, torch::stable::get_num_threads());
  const auto [dx, callback_done] =
      convolve(dy, weight, true, {}, false, {1, 1}, *around, dilation,
               [&](int64_t task, const char* dx_rows, int64_t begin, int64_t end) {
                 sums.add(task, dx_rows, begin, end);
               });
  if (!callback_done) return {dx, summed(dx)};
  const GradientSums found = sums.finish();
  return {dx, to_rows(x, {&found[0], &found[1], &found[2]}, x.size(1))};
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "convolution(Tensor x, Tensor weight, bool transposed, Tensor? residual, bool overwrite, "
      "int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "convolution_and_statistics(Tensor x, Tensor weight, int[] stride, int[] padding, "
      "int[] dilation) -> (Tensor, Tensor)");
  m.def(
      "input_gradient_and_sums(Tensor dy, Tensor weight, int[] stride, int[] padding, "
      "int[] dilation, Tensor x, Tensor stats, Tensor? norm_weight, Tensor? norm_bias, float eps) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("convolution", TORCH_BOX(fused_resnet::convolution));
  m.impl("convolution_and_statistics", TORCH_BOX(fused_resnet::convolution_and_statistics));
  m.impl("input_gradient_and_sums", TORCH_BOX(fused_resnet::input_gradient_and_sums));
}
