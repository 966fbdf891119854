// Packs the weights of a convolution for inference, once for all input sizes, as
// cpu/convolution/direct_kernels.h and cpu/convolution/winograd_kernels.h read them. A training
// step packs at every step, by cpu/convolution/pack_kernels.h.
#include "cpu/convolution/conv_bn_relu.h"
#include "cpu/convolution/host.h"

namespace fused_resnet {
namespace {

// A convolution as conv_bn_relu reads it; winograd and first_channel are empty if unused.
struct PackedConvolution {
  Tensor weight, winograd, scale, shift, first_channel;
  std::vector<int64_t> geometry;
};

// With fewer channels, single taps are too short: a row of taps is read as one contiguous run.
constexpr int64_t kFewChannels = 16;

bool reads_rows_of_taps(int64_t C, const std::vector<int64_t>& dilation, int64_t groups) {
  return groups == 1 && C < kFewChannels && dilation[1] == 1;
}

// G of cpu/convolution/winograd_kernels.h
constexpr double kG2[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
constexpr double kG4[6][3] = {{1.0 / 4, 0, 0},
                              {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                              {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                              {1.0 / 24, 1.0 / 12, 1.0 / 6},
                              {1.0 / 24, -1.0 / 12, 1.0 / 6},
                              {0, 0, 1}};

// The sum of values(i) * factors[i]. Factors of zero are skipped: their value may be Inf.
template <typename Values>
double combine(const double (&factors)[3], const Values& values) {
  double sum = -0.0;
  for (int i = 0; i < 3; ++i)
    if (factors[i] != 0) sum += values(i) * factors[i];
  return sum;
}

// u (size, size) <- G g G^T of the taps g(r, s), in float64
template <int size, typename Taps>
void winograd_weight(const double (&G)[size][3], const Taps& g, float* u) {
  for (int i = 0; i < size; ++i) {
    double row[3];
    for (int s = 0; s < 3; ++s) row[s] = combine(G[i], [&](int r) { return g(r, s); });
    for (int j = 0; j < size; ++j)
      u[i * size + j] = static_cast<float>(combine(G[j], [&](int s) { return row[s]; }));
  }
}

// value(k, i, tap) of all outputs, inputs of a run and taps: (blocks of outputs, taps, run / pair,
// vectors, 16, pair) in memory, flat. A block has `block_vectors` vectors of 16 outputs, the last
// one those that remain. value is 0 for outputs from K on.
template <typename T, typename Value>
Tensor packed(const Tensor& like, ScalarType dtype, int64_t pair, int64_t K, int64_t run,
              int64_t taps, int64_t block_vectors, const Value& value) {
  const int64_t vectors = (K + 15) / 16;
  Tensor result = torch::stable::new_empty(like, {vectors * 16 * run * taps}, dtype);
  auto* to = static_cast<T*>(result.mutable_data_ptr());
  Split((vectors + block_vectors - 1) / block_vectors, 1, 1)
      .run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t first = begin * block_vectors; first < std::min(end * block_vectors, vectors);
             first += block_vectors) {
          const int64_t outputs = 16 * std::min(block_vectors, vectors - first);
          for (int64_t i = 0; i < run; i += pair)
            for (int64_t tap = 0; tap < taps; ++tap) {
              T* at = to + first * 16 * run * taps + (tap * run + i) * outputs;
              for (int64_t k = first * 16; k < first * 16 + outputs; ++k)
                for (int64_t p = 0; p < pair; ++p)
                  *at++ = static_cast<T>(k < K ? value(k, i + p, tap) : 0.0f);
            }
        }
      });
  return result;
}

// v (K,) float32, padded with zeros to whole blocks of channels
Tensor padded_vector(const Tensor& v, int64_t K) {
  Tensor result = torch::stable::new_zeros(v, {round_up(K, kBlockChannels)});
  std::copy_n(static_cast<const float*>(v.const_data_ptr()), K,
              static_cast<float*>(result.mutable_data_ptr()));
  return result;
}

template <typename T>
PackedConvolution pack(const Tensor& weight, const Tensor& scale, const Tensor& shift,
                       ConvVariant variant, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                       int64_t groups) {
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  const int64_t k_step = weight.stride(0), c_step = weight.stride(1), r_step = weight.stride(2),
                s_step = weight.stride(3);
  const T* weight_ptr = static_cast<const T*>(weight.const_data_ptr());
  const auto at = [&](int64_t k, int64_t c, int64_t r, int64_t s) {
    return static_cast<float>(weight_ptr[k * k_step + c * c_step + r * r_step + s * s_step]);
  };
  const auto pack_direct = [&](int64_t run, int64_t taps, const auto& value) {
    // With groups, the kernel processes one vector at a time, so each is a block of its own.
    const int64_t block_vectors = groups == 1 ? kBlockChannels / 16 : 1;
    return variant == kBFloatPairs
               ? packed<torch::headeronly::BFloat16>(weight, ScalarType::BFloat16, 2, K, run, taps,
                                                     block_vectors, value)
               : packed<float>(weight, ScalarType::Float, 1, K, run, taps, block_vectors, value);
  };
  PackedConvolution conv{
      weight,
      torch::stable::new_empty(scale, {0}),
      padded_vector(scale, K),
      padded_vector(shift, K),
      torch::stable::new_empty(scale, {0}, ScalarType::Long),
      {R, S, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], K, C, 0}};
  const int64_t pair = variant == kBFloatPairs ? 2 : 1;
  if (reads_rows_of_taps(C, dilation, groups)) {
    const int64_t channels = S * C >= pair * kChainSteps ? round_up(C, pair) : C;
    const int64_t run = S * channels;
    conv.geometry[kS] = 1, conv.geometry[kRun] = run, conv.geometry[kCopiedChannels] = channels;
    conv.weight = pack_direct(round_up(run, pair), R, [&](int64_t k, int64_t i, int64_t r) {
      // The last value of an odd run is multiplied twice by half of its weight.
      const int64_t last = std::min(i, run - 1), c = last % channels;
      const float value = c < C ? at(k, c, r, last / channels) : 0.0f;
      return run % pair && i >= run - 1 ? value / 2 : value;
    });
    return conv;
  }
  conv.weight = pack_direct(
      C, R * S, [&](int64_t k, int64_t c, int64_t tap) { return at(k, c, tap / S, tap % S); });
  if (groups > 1) {
    conv.first_channel =
        torch::stable::new_zeros(conv.first_channel, {round_up(K, kBlockChannels) / 16});
    auto* first_channel = static_cast<int64_t*>(conv.first_channel.mutable_data_ptr());
    for (int64_t k = 0; k < K; k += 16) first_channel[k / 16] = k / (K / groups) * C;
    return conv;
  }
  const ConvShape shape{0, C,         0,         0,          K,          0,           0,          R,
                        S, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  const int64_t m = largest_winograd_tile(shape, variant, kMaxWinogradWeights4);
  if (m == 0) return conv;
  const int64_t products = winograd_products(m);
  std::vector<float> transformed(static_cast<size_t>(K * C * products));
  Split(K * C, 1, 4096).run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto taps = [&](int r, int s) { return static_cast<double>(at(i / C, i % C, r, s)); };
      float* u = transformed.data() + i * products;
      m == 2 ? winograd_weight(kG2, taps, u) : winograd_weight(kG4, taps, u);
    }
  });
  conv.winograd = packed<float>(
      scale, ScalarType::Float, 1, K, C, products, kBlockChannels / 16,
      [&](int64_t k, int64_t c, int64_t i) { return transformed[(k * C + c) * products + i]; });
  return conv;
}

// weight (K, C / groups, R, S), float32 or bfloat16, the dtype of the tensors to be convolved;
// scale, shift (K,) float32 -> the operands of conv_bn_relu
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<int64_t>> pack_convolution(
    Tensor weight, Tensor scale, Tensor shift, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  constexpr const char* op = "pack_convolution";
  check(weight.dim() == 4 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
        ": weight must have shape (K, C, R, S), and stride, padding and dilation must be pairs, "
        "got weight of shape ",
        shape_of(weight));
  const DtypeIndex dtype = dtype_index(op, "weight", weight);
  const int64_t K = weight.size(0);
  const char* reason = convolution_reason(
      dtype, {K, weight.size(1), weight.size(2), weight.size(3)}, dilation, groups);
  check(!reason, op, ": ", reason ? reason : "");
  check_channel_vector(op, "scale", scale, K, ScalarType::Float, weight);
  check_channel_vector(op, "shift", shift, K, ScalarType::Float, weight);
  const auto run = [&](auto element) {
    return pack<decltype(element)>(weight, scale, shift, *conv_variant(dtype), stride, padding,
                                   dilation, groups);
  };
  auto conv = dtype == kFloat32 ? run(float{}) : run(torch::headeronly::BFloat16{});
  return {conv.weight, conv.winograd, conv.scale, conv.shift, conv.first_channel, conv.geometry};
}

}  // namespace

const char* convolution_reason(DtypeIndex dtype, const std::vector<int64_t>& weight_shape,
                               const std::vector<int64_t>& dilation, int64_t groups) {
  const std::optional<ConvVariant> variant = conv_variant(dtype);
  const int64_t K = weight_shape[0], C = weight_shape[1];
  if (!variant) return "no kernel for this dtype on this processor";
  if (dtype == kFloat16) return "float16 is computed in float32: as fast, and more accurate";
  if (weight_shape[2] * weight_shape[3] > kMaxTaps) return "more than 128 taps";
  if (groups > 1 && K / groups % 16) return "groups whose outputs are not a multiple of 16";
  if (*variant == kBFloatPairs && C % 2 && !reads_rows_of_taps(C, dilation, groups))
    return "an odd number of channels, of which the bfloat16 dot product takes two";
  return nullptr;
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "pack_convolution(Tensor weight, Tensor scale, Tensor shift, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor, int[])");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("pack_convolution", TORCH_BOX(fused_resnet::pack_convolution));
}
