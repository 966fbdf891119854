// The input gradient of a strided convolution, on the CPU:
//
//   dx[n, h, w, c] = sum over r, s, k of dy[n, (h + pad - r) / stride, ..., k] * weight[k, r, s, c]
//
// over the taps for which the division is exact. They are the same for every stride-th row and
// column: a phase of dx, which is a convolution of dy with stride 1, by the direct kernel. A 3x3 of
// stride 2 has phases of 1, 2, 2 and 4 taps, with no more products than the forward convolution.
//
// Bytes: dy read once per phase, from cache if a thread's share fits; dx (and `added`) once: pixels
// are whole cache lines, so skipping the neighbours costs nothing.
#include "cpu/convolution/host.h"
#include "cpu/convolution/train.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {
namespace {

// One dimension of a phase: dx's rows (or columns) first, first + stride, ..., `size` of them. Row
// i reads dy's rows i - pad, ... with the taps last_tap, last_tap - stride, ..., `taps` of them.
struct Phase {
  int64_t first, size, taps, last_tap, pad;
  Phase(int64_t first, int64_t size, int64_t kernel, int64_t stride, int64_t padding)
      : first(first), size(first < size ? (size - first - 1) / stride + 1 : 0) {
    const int64_t tap = (first + padding) % stride;
    taps = tap < kernel ? (kernel - tap - 1) / stride + 1 : 0;
    last_tap = tap + (taps - 1) * stride;
    pad = taps - 1 - (first + padding) / stride;
  }
};

// Zeroes the phase's pixels of dx (N, H, W, C), of `bytes` bytes each.
void clear(char* dx, int64_t bytes, int64_t N, int64_t H, int64_t W, const Phase& rows,
           const Phase& columns, const std::vector<int64_t>& stride) {
  Split(N * rows.size, 1, std::max<int64_t>(65536 / (columns.size * bytes), 1))
      .run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t h = rows.first + i % rows.size * stride[0];
          char* row = dx + (i / rows.size * H + h) * W * bytes;
          for (int64_t w = columns.first; w < W; w += stride[1])
            std::fill_n(row + w * bytes, bytes, 0);
        }
      });
}

}  // namespace

Tensor strided_input_gradient(Tensor dy, Tensor weight, int64_t H, int64_t W,
                              std::optional<Tensor> added, std::vector<int64_t> stride,
                              std::vector<int64_t> padding) {
  constexpr const char* op = "strided_input_gradient";
  const DtypeIndex dtype = dtype_index(op, "dy", dy);
  check(conv_supported(dtype), op, ": no kernel for ", name_of(dy.scalar_type()),
        " on this processor");
  const Layout4d from = layout_of(op, dy);
  check(from.channels_last, op, ": dy must be channels_last, got strides ", strides_of(dy),
        " for shape ", shape_of(dy));
  check(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float, op,
        ": weight must be float32 of shape (K, C, R, S), got ", name_of(weight.scalar_type()),
        " of shape ", shape_of(weight));
  const int64_t N = dy.size(0), P = dy.size(2), Q = dy.size(3);
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  check(is_dense(weight) && (C <= 1 || weight.stride(1) == 1) &&
            (R * S == 1 || R == 1 || weight.stride(2) == S * C),
        op, ": weight must be channels_last, got strides ", strides_of(weight));
  check(C % 16 == 0 && K % 16 == 0 && R * S <= kMaxPackedTaps, op,
        ": channels must be multiples of 16 and taps at most ", kMaxPackedTaps,
        ", got weight of shape ", shape_of(weight));
  check(stride.size() == 2 && padding.size() == 2, op, ": stride and padding must be pairs");
  check(from.C == K && P == out_size(H, R, stride[0], padding[0], 1) &&
            Q == out_size(W, S, stride[1], padding[1], 1),
        op, ": dy of shape ", shape_of(dy), " does not match a ", H, " x ", W,
        " image convolved with weight ", shape_of(weight));
  if (added) {
    const Layout4d other = layout_of(op, *added);
    check(added->scalar_type() == dy.scalar_type() && other.N == N && other.C == C &&
              added->size(2) == H && added->size(3) == W && other.channels_last,
          op, ": added must be ", name_of(dy.scalar_type()), " of shape (", N, ", ", C, ", ", H,
          ", ", W, ") and channels_last, got ", name_of(added->scalar_type()), " of shape ",
          shape_of(*added));
  }
  Tensor dx = added ? *added : pooled_channels_last(N, C, H, W, dy.scalar_type());
  if (dx.numel() == 0) return dx;
  ++conv_passes().input_gradients;
  const ConvVariant variant = *conv_variant(dtype);
  const auto size = static_cast<int64_t>(dy.element_size());
  const int64_t operand_size = operand_bytes(variant);
  const Operand source(dy, variant);
  auto* dx_ptr = static_cast<char*>(dx.mutable_data_ptr());

  // Per tap, K * C weights in the order in which the phases read them.
  const Scratch packed(R * S * K * C * operand_size);
  const std::vector<char> zeros(static_cast<size_t>(K * operand_size), 0);
  std::vector<ConvPack> packs;
  std::vector<ConvBnRelu> convs;
  int64_t taps_before = 0;
  for (int64_t a = 0; a < stride[0]; ++a)
    for (int64_t b = 0; b < stride[1]; ++b) {
      const Phase rows(a, H, R, stride[0], padding[0]), columns(b, W, S, stride[1], padding[1]);
      if (rows.size == 0 || columns.size == 0) continue;
      if (rows.taps == 0 || columns.taps == 0) {
        if (!added) clear(dx_ptr, C * size, N, H, W, rows, columns, stride);
        continue;
      }
      ConvPack& pack = packs.emplace_back();
      pack.weight = weight.const_data_ptr();
      pack.direct = packed.data() + taps_before * K * C * operand_size;
      pack.outputs = C, pack.inputs = K, pack.taps = rows.taps * columns.taps;
      pack.output_stride = 1, pack.input_stride = R * S * C;
      for (int64_t r = 0; r < rows.taps; ++r)
        for (int64_t s = 0; s < columns.taps; ++s)
          pack.tap_offset[r * columns.taps + s] =
              ((rows.last_tap - r * stride[0]) * S + columns.last_tap - s * stride[1]) * C;
      pack.transposed = true;
      pack.variant = variant;
      taps_before += pack.taps;

      ConvBnRelu& conv = convs.emplace_back();
      conv.x = source.data(), conv.weight = pack.direct, conv.zeros = zeros.data();
      conv.y = dx_ptr + (a * W + b) * C * size;
      if (added) conv.residual = conv.y;
      conv.N = N, conv.C = K, conv.H = P, conv.W = Q, conv.K = C, conv.run = K;
      conv.P = rows.size, conv.Q = columns.size, conv.R = rows.taps, conv.S = columns.taps;
      conv.stride_h = conv.stride_w = conv.dilation_h = conv.dilation_w = 1;
      conv.pad_h = rows.pad, conv.pad_w = columns.pad;
      conv.y_image = H * W, conv.y_row = stride[0] * W, conv.y_column = stride[1];
    }
  Split(C / 16, 1, 1).run([&](int64_t, int64_t begin, int64_t end) {
    for (const ConvPack& pack : packs) cpu_kernels().conv_pack(pack, begin, end);
  });
  run_direct(convs.data(), convs.size(), variant);
  return dx;
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "strided_input_gradient(Tensor dy, Tensor weight, int H, int W, Tensor? added, int[] stride, "
      "int[] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("strided_input_gradient", TORCH_BOX(fused_resnet::strided_input_gradient));
}
