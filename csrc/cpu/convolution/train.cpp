// Convolutions of a training step on the CPU: the convolution itself and its input gradient, by the
// kernels of cpu/convolution/direct_kernels.h. Weights are repacked at every step, since every step
// changes them.
#include "cpu/convolution/train.h"

#include "cpu/batch_norm/passes.h"
#include "cpu/batch_norm/statistics.h"
#include "cpu/convolution/groups.h"
#include "cpu/convolution/host.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {

ConvPasses& conv_passes() {
  static ConvPasses passes{};
  return passes;
}

namespace {

// The convolution of stride 1 that is the input gradient of c, by weights with reversed taps;
// nullopt if there is none.
std::optional<ConvShape> turned(const ConvShape& c) {
  const int64_t down = c.dilation_h * (c.R - 1) - c.pad_h;
  const int64_t right = c.dilation_w * (c.S - 1) - c.pad_w;
  if (c.stride_h * c.stride_w != 1 || down < 0 || right < 0) return std::nullopt;
  return ConvShape{c.N, c.K, c.P,  c.Q,   c.C,          c.H,          c.W,      c.R,     c.S,
                   1,   1,   down, right, c.dilation_h, c.dilation_w, c.groups, c.merged};
}

std::vector<int64_t> sizes_of(const Tensor& weight) {
  return {weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
}

// Checks x (N, C, H, W) or dy (N, K, P, Q), `name`, and the weight of a pass.
void check_operands(const char* op, Pass pass, const char* name, const Tensor& t,
                    const Tensor& weight, const Sizes& geometry) {
  const DtypeIndex dtype = dtype_index(op, name, t);
  const Layout4d layout = layout_of(op, t);
  check(layout.channels_last, op, ": ", name, " must be channels_last, got strides ", strides_of(t),
        " for shape ", shape_of(t));
  check(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, op,
        ": weight must be float32 of shape (K, C / groups, R, S), got ",
        name_of(weight.scalar_type()), " of shape ", shape_of(weight));
  check(has_kernel_layout(weight), op, ": weight must be contiguous or channels_last, got strides ",
        strides_of(weight));
  const ConvShape c = conv_shape(op, 0, 0, 0, sizes_of(weight), geometry);
  const int64_t channels = pass == Pass::kConvolution ? c.C : c.K;
  check(layout.C == channels, op, ": ", name, " must have ", channels, " channels, got ", layout.C);
  const char* reason = training_reason(pass, dtype, sizes_of(weight), geometry);
  check(!reason, op, ": ", reason ? reason : "", ", got ", name_of(t.scalar_type()), " ", name,
        " and weight of shape ", shape_of(weight));
}

// The checked operands of an input gradient; weight becomes that of the merged groups.
ConvShape input_gradient_of(const char* op, const Tensor& dy, Tensor& weight, int64_t H, int64_t W,
                            const Sizes& geometry) {
  check_operands(op, Pass::kInputGradient, "dy", dy, weight, geometry);
  const ConvShape c = conv_shape(op, dy.size(0), H, W, sizes_of(weight), geometry);
  check(dy.size(2) == c.P && dy.size(3) == c.Q, op, ": dy of shape ", shape_of(dy),
        " does not match a ", H, " x ", W, " image convolved with weight ", shape_of(weight));
  ++conv_passes().input_gradients;
  weight = merged_weight(c, weight);
  return c;
}

// The checked operands of a convolution; weight becomes that of the merged groups.
ConvShape convolution_of(const char* op, const Tensor& x, Tensor& weight, const Sizes& geometry) {
  check_operands(op, Pass::kConvolution, "x", x, weight, geometry);
  const ConvShape c = conv_shape(op, x.size(0), x.size(2), x.size(3), sizes_of(weight), geometry);
  check(c.P > 0 && c.Q > 0, op, ": x of size ", c.H, " x ", c.W, " is smaller than the kernel");
  ++conv_passes().convolutions;
  weight = merged_weight(c, weight);
  return c;
}

// Whether there are so few pixels for so many weights that a block of outputs processes all pixels
// at once and the weights are packed block by block in cache: they are then read from memory once
// and not written back.
bool packs_block_by_block(const ConvBnRelu& conv) {
  const int64_t blocks = blocks_of(conv), threads = torch::stable::get_num_threads();
  return conv.N * conv.P * conv.Q <= conv.K * conv.R * conv.S &&
         (blocks % threads == 0 || blocks >= 4 * threads);
}

void run_packing(const ConvBnRelu& conv, const ConvPack& pack, ConvVariant variant) {
  const int64_t tiles = tiles_of(conv), vectors = conv.K / 16;
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

// y (N, K, P, Q): the convolution of x plus `added`, the residual of `epilogue`, with `callback`
// after each tile range if y is large enough. `transposed`: weight is (C, K, R, S) and its taps are
// reversed, and y overwrites `added`.
Convolved convolve(const ConvShape& c, const Tensor& x, const Tensor& weight, bool transposed,
                   const std::optional<Tensor>& added, const TileCallback& callback = {},
                   const Epilogue& epilogue = {}) {
  const auto& [N, C, H, W, K, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, down, right, groups,
               merged] = c;
  const int64_t taps = R * S, run = C / groups;
  const bool overwrite = transposed && added;
  if (added) check_added("convolution", transposed ? "added" : "residual", *added, x, K, P, Q);
  Tensor y = overwrite ? *added : pooled_channels_last(N, K, P, Q, x.scalar_type());
  if (y.numel() == 0) return {y, false};
  const ConvVariant variant = *conv_variant(dtype_index("convolution", "x", x));
  ConvBnRelu conv{};
  static_cast<ConvShape&>(conv) = c;
  static_cast<Epilogue&>(conv) = epilogue;
  const std::vector<int64_t> first_channel = first_channels(c);
  if (c.grouped()) conv.first_channel = first_channel.data();
  conv.run = run;
  conv.pointwise = taps * stride_h * stride_w == 1 && pad_h == 0 && pad_w == 0;
  const int64_t size = operand_bytes(variant);

  conv.winograd_tile = winograd_tile_of_step(conv, variant, kMaxWinogradWeights4);
  const bool winograd = conv.winograd_tile > 0;
  ConvPack pack{};
  const int64_t tap_stride = read_weight(pack, c, weight, transposed);
  for (int64_t tap = 0; tap < taps; ++tap)
    pack.tap_offset[tap] = (transposed ? taps - 1 - tap : tap) * tap_stride;
  pack.variant = variant;
  pack.winograd_tile = conv.winograd_tile;
  std::optional<Scratch> packed, packed_winograd;
  const auto pack_for = [&](bool direct, bool by_winograd) {
    if (direct) packed.emplace(K * run * taps * size);
    if (by_winograd) packed_winograd.emplace(winograd_products(conv.winograd_tile) * K * run * 4);
    pack.direct = direct ? packed->data() : nullptr;
    pack.winograd = by_winograd ? packed_winograd->data() : nullptr;
    Split(K / 16, 1, 1).run([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().conv_pack(pack, begin, end);
    });
    if (direct) conv.weight = pack.direct;
    if (by_winograd) conv.winograd = pack.winograd;
  };
  const std::vector<char> zeros(static_cast<size_t>(C * size), 0);
  if (added) conv.residual = added->const_data_ptr();
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
  pack_for(!winograd || overwrite, winograd);
  const Source source(conv, x, variant);
  const bool callback_done = run_convolution(conv, variant, callback);
  if (skipped_pixels) {
    pack_for(true, false);
    run_convolution(conv, variant);
  }
  return {y, callback_done && !skipped_pixels};
}

}  // namespace

bool has_kernel_layout(const Tensor& weight) {
  const int64_t C = weight.size(1), R = weight.size(2), S = weight.size(3);
  const auto strides_are = [&](int64_t c, int64_t r, int64_t s) {
    return (C <= 1 || weight.stride(1) == c) && (R <= 1 || weight.stride(2) == r) &&
           (S <= 1 || weight.stride(3) == s);
  };
  return is_dense(weight) && (strides_are(1, S * C, C) || strides_are(R * S, S, 1));
}

int64_t read_weight(ConvPack& pack, const ConvShape& c, const Tensor& weight, bool transposed) {
  const int64_t K = weight.size(0), C = weight.size(1), taps = weight.size(2) * weight.size(3);
  const int64_t group_K = K / c.groups;
  const bool adjacent = taps > 1 && weight.stride(1) != 1;
  const int64_t channel = adjacent ? taps : 1;
  pack.weight = weight.const_data_ptr();
  pack.outputs = transposed ? C * c.groups : K, pack.inputs = transposed ? group_K : C;
  pack.group_outputs = transposed ? C : group_K, pack.group_stride = group_K * taps * C;
  // With groups, the kernel computes one vector at a time, so each is a block of its own.
  pack.block_vectors = c.grouped() ? 1 : kBlockChannels / 16;
  pack.taps = taps;
  pack.output_stride = transposed ? channel : taps * C;
  pack.input_stride = transposed ? taps * C : channel;
  pack.adjacent_taps = adjacent ? taps : 0;
  pack.transposed = transposed;
  return adjacent ? 1 : C;
}

ConvShape conv_shape(const char* op, int64_t N, int64_t H, int64_t W,
                     const std::vector<int64_t>& weight_shape, const Sizes& g) {
  check(g.size() == kSizes, op,
        ": geometry must be stride, padding and dilation, two values each, and groups, got ",
        g.size(), " values");
  const int64_t K = weight_shape[0], C = weight_shape[1], R = weight_shape[2], S = weight_shape[3];
  const int64_t groups = g[6];
  check(groups > 0 && K % groups == 0, op, ": geometry must have groups that divide ", K,
        " outputs, got ", groups);
  const int64_t P = out_size(H, R, g[0], g[2], g[4]), Q = out_size(W, S, g[1], g[3], g[5]);
  const int64_t merged = groups_to_merge(K / groups, C, groups);
  return {N,    C * groups,      H,     W, K, P, Q, R, S, g[0], g[1], g[2], g[3], g[4],
          g[5], groups / merged, merged};
}

const char* training_reason(Pass pass, DtypeIndex dtype, const std::vector<int64_t>& weight_shape,
                            const Sizes& geometry) {
  const ConvShape c = conv_shape("training_reason", 0, 0, 0, weight_shape, geometry);
  const bool dilated = c.dilation_h * c.dilation_w != 1;
  if (!conv_supported(dtype)) return "no kernel for this dtype on this processor";
  if (c.groups > 1 && (c.C / c.groups % 16 || c.K / c.groups % 16))
    return "no kernel for groups of which not even four together have multiples of 16 channels";
  if (c.K % 16) return "channels must be multiples of 16";
  if (pass == Pass::kWeightGradient && c.C < 16) {
    // The kernel of cpu/convolution/weight_gradient_narrow_kernels.h
    const bool wide = c.S * c.C >= tile_pixels();
    if (c.R <= kMaxNarrowRows && wide && !dilated) return nullptr;
  }
  if (c.C % 16) return "channels must be multiples of 16";
  if (c.R * c.S > kMaxPackedTaps) return "a kernel may have at most 9 taps";
  if (pass == Pass::kInputGradient && dilated && !turned(c))
    return "no kernel for dilation with stride";
  return nullptr;
}

Tensor convolution(Tensor x, Tensor weight, std::optional<Tensor> residual, Sizes geometry) {
  const ConvShape c = convolution_of("convolution", x, weight, geometry);
  return convolve(c, x, weight, false, residual).y;
}

Tensor convolution_and_epilogue(Tensor x, Tensor weight, std::optional<Tensor> scale,
                                std::optional<Tensor> shift, std::optional<Tensor> residual,
                                int64_t activation, Sizes geometry) {
  constexpr const char* op = "convolution_and_epilogue";
  const ConvShape c = convolution_of(op, x, weight, geometry);
  // (K,), or `otherwise`, padded as the kernels read it
  const auto padded = [&](const char* name, const std::optional<Tensor>& t, float otherwise) {
    std::vector<float> values(static_cast<size_t>(round_up(c.K, kBlockChannels)), otherwise);
    if (!t) return values;
    check_channel_vector(op, name, *t, c.K, ScalarType::Float, x);
    std::copy_n(static_cast<const float*>(t->const_data_ptr()), c.K, values.begin());
    return values;
  };
  const std::vector<float> scales = padded("scale", scale, 1), shifts = padded("shift", shift, 0);
  const Epilogue epilogue{scales.data(), shifts.data(), nullptr, activation_of(op, activation)};
  return convolve(c, x, weight, false, residual, {}, epilogue).y;
}

std::vector<Tensor> epilogue_gradient(Tensor dy, std::optional<Tensor> y, Tensor scale, bool keep) {
  constexpr const char* op = "epilogue_gradient";
  const DtypeIndex dtype = dtype_index(op, "dy", dy);
  const Layout4d layout = layout_of(op, dy);
  const int64_t C = layout.C;
  check(conv_supported(dtype), op, ": no kernel for ", name_of(dy.scalar_type()));
  check(layout.channels_last || C == 1, op, ": dy must be channels_last, got strides ",
        strides_of(dy), " for shape ", shape_of(dy));
  if (y) check_same_layout(op, "y", *y, "dy", dy);
  check_channel_vector(op, "scale", scale, C, ScalarType::Float, dy);
  const auto output = [&] {
    return pooled_channels_last(layout.N, C, dy.size(2), dy.size(3), dy.scalar_type());
  };
  std::vector<Tensor> found{output()};
  if (keep) found.push_back(output());
  void* dz = found[0].mutable_data_ptr();
  void* g = keep ? found[1].mutable_data_ptr() : nullptr;
  const void* mask = y ? y->const_data_ptr() : nullptr;
  Split(layout.N * layout.HW, 1, kMinTaskElements / std::max<int64_t>(C, 1))
      .run([&](int64_t, int64_t begin, int64_t end) {
        cpu_kernels().epilogue_gradient[dtype](dy.const_data_ptr(), mask, scale.const_data_ptr(), g,
                                               dz, C, begin, end);
      });
  return found;
}

std::tuple<Tensor, Tensor> convolution_and_statistics(Tensor x, Tensor weight, Sizes geometry) {
  constexpr const char* op = "convolution_and_statistics";
  const ConvShape c = convolution_of(op, x, weight, geometry);
  // The statistics are accumulated while y is in cache, which saves one read of y from memory.
  RowStatistics sums(c.K, dtype_index(op, "x", x), torch::stable::get_num_threads());
  const auto [y, callback_done] = convolve(
      c, x, weight, false, {}, [&](int64_t task, const char* y_rows, int64_t begin, int64_t end) {
        sums.add(task, y_rows, end - begin);
      });
  const auto found = callback_done ? sums.finish() : std::nullopt;
  return {y, found ? to_rows(y, {&found->mean, &found->var}, c.K) : bn_statistics(y)};
}

Tensor input_gradient(Tensor dy, Tensor weight, int64_t H, int64_t W, std::optional<Tensor> added,
                      Sizes geometry) {
  constexpr const char* op = "input_gradient";
  const ConvShape c = input_gradient_of(op, dy, weight, H, W, geometry);
  if (added) check_added(op, "added", *added, dy, c.C, H, W);
  const auto direct = turned(c);
  return direct ? convolve(*direct, dy, weight, true, added).y
                : strided_input_gradient(c, dy, weight, added);
}

std::tuple<Tensor, Tensor> input_gradient_and_sums(Tensor dy, Tensor weight, Sizes geometry,
                                                   Tensor x, Tensor stats,
                                                   std::optional<Tensor> norm_weight,
                                                   std::optional<Tensor> norm_bias, double eps) {
  constexpr const char* op = "input_gradient_and_sums";
  layout_of(op, x);
  const ConvShape c = input_gradient_of(op, dy, weight, x.size(2), x.size(3), geometry);
  check_added(op, "x", x, dy, c.C, c.H, c.W);
  const auto summed = [&](const Tensor& dx) {
    return std::get<0>(
        bn_reduce(dx, {}, x, stats, norm_weight, norm_bias, eps, true, {}, {}, false));
  };
  const auto direct = turned(c);
  if (!direct) {
    const Tensor dx = strided_input_gradient(c, dy, weight, {});
    return {dx, summed(dx)};
  }
  const Norm norm = norm_of<float>(op, stats, norm_weight, norm_bias, eps, x.size(1), x);
  RowGradientSums sums(x, norm, torch::stable::get_num_threads());
  const auto [dx, callback_done] =
      convolve(*direct, dy, weight, true, {},
               [&](int64_t task, const char* dx_rows, int64_t begin, int64_t end) {
                 sums.add(task, dx_rows, begin, end);
               });
  if (!callback_done) return {dx, summed(dx)};
  const GradientSums found = sums.finish();
  return {dx, to_rows(x, {&found[0], &found[1], &found[2]}, x.size(1))};
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def("convolution(Tensor x, Tensor weight, Tensor? residual, int[] geometry) -> Tensor");
  m.def(
      "convolution_and_epilogue(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
      "Tensor? residual, int activation, int[] geometry) -> Tensor");
  m.def("epilogue_gradient(Tensor dy, Tensor? y, Tensor scale, bool keep) -> Tensor[]");
  m.def("convolution_and_statistics(Tensor x, Tensor weight, int[] geometry) -> (Tensor, Tensor)");
  m.def(
      "input_gradient(Tensor dy, Tensor weight, int H, int W, Tensor? added, int[] geometry) -> "
      "Tensor");
  m.def(
      "input_gradient_and_sums(Tensor dy, Tensor weight, int[] geometry, Tensor x, Tensor stats, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("convolution", TORCH_BOX(fused_resnet::convolution));
  m.impl("convolution_and_epilogue", TORCH_BOX(fused_resnet::convolution_and_epilogue));
  m.impl("epilogue_gradient", TORCH_BOX(fused_resnet::epilogue_gradient));
  m.impl("convolution_and_statistics", TORCH_BOX(fused_resnet::convolution_and_statistics));
  m.impl("input_gradient", TORCH_BOX(fused_resnet::input_gradient));
  m.impl("input_gradient_and_sums", TORCH_BOX(fused_resnet::input_gradient_and_sums));
}
