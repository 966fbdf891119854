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
#include "cpu/convolution/groups.h"
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
void clear(char* dx, int64_t bytes, const ConvShape& c, const Phase& rows, const Phase& columns) {
  Split(c.N * rows.size, 1, 65536 / (columns.size * bytes))
      .run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t h = rows.first + i % rows.size * c.stride_h;
          char* row = dx + (i / rows.size * c.H + h) * c.W * bytes;
          for (int64_t w = columns.first; w < c.W; w += c.stride_w)
            std::fill_n(row + w * bytes, bytes, 0);
        }
      });
}

}  // namespace

Tensor strided_input_gradient(const ConvShape& c, const Tensor& dy, const Tensor& weight,
                              const std::optional<Tensor>& added) {
  const auto& [N, C, H, W, K, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, down, right, groups,
               merged] = c;
  Tensor dx = added ? *added : pooled_channels_last(N, C, H, W, dy.scalar_type());
  if (dx.numel() == 0) return dx;
  const ConvVariant variant = *conv_variant(dtype_index("input_gradient", "dy", dy));
  const auto size = static_cast<int64_t>(dy.element_size());
  const int64_t operand_size = operand_bytes(variant);
  const Operand source(dy, variant);
  auto* dx_ptr = static_cast<char*>(dx.mutable_data_ptr());

  // Per tap, K * C / groups weights in the order in which the phases read them.
  const int64_t tap_weights = K * C / groups;
  const Scratch packed(R * S * tap_weights * operand_size);
  const std::vector<char> zeros(static_cast<size_t>(K * operand_size), 0);
  std::vector<ConvPack> packs;
  std::vector<ConvBnRelu> convs;
  std::vector<int64_t> first_channel;
  int64_t taps_before = 0;
  for (int64_t a = 0; a < stride_h; ++a)
    for (int64_t b = 0; b < stride_w; ++b) {
      const Phase rows(a, H, R, stride_h, pad_h), columns(b, W, S, stride_w, pad_w);
      if (rows.size == 0 || columns.size == 0) continue;
      if (rows.taps == 0 || columns.taps == 0) {
        if (!added) clear(dx_ptr, C * size, c, rows, columns);
        continue;
      }
      ConvPack& pack = packs.emplace_back();
      const int64_t tap_stride = read_weight(pack, c, weight, true);
      pack.direct = packed.data() + taps_before * tap_weights * operand_size;
      pack.taps = rows.taps * columns.taps;
      for (int64_t r = 0; r < rows.taps; ++r)
        for (int64_t s = 0; s < columns.taps; ++s)
          pack.tap_offset[r * columns.taps + s] =
              ((rows.last_tap - r * stride_h) * S + columns.last_tap - s * stride_w) * tap_stride;
      pack.variant = variant;
      taps_before += pack.taps;

      ConvBnRelu& conv = convs.emplace_back();
      conv.x = source.data(), conv.weight = pack.direct, conv.zeros = zeros.data();
      conv.y = dx_ptr + (a * W + b) * C * size;
      if (added) conv.residual = conv.y;
      static_cast<ConvShape&>(conv) = {
          N, K, P,        Q,           C, rows.size, columns.size, rows.taps, columns.taps,
          1, 1, rows.pad, columns.pad, 1, 1,         groups,       merged};
      if (first_channel.empty()) first_channel = first_channels(conv);
      if (c.grouped()) conv.first_channel = first_channel.data();
      conv.run = K / groups, conv.y_image = H * W, conv.y_row = stride_h * W,
      conv.y_column = stride_w;
    }
  Split(C / 16, 1, 1).run([&](int64_t, int64_t begin, int64_t end) {
    for (const ConvPack& pack : packs) cpu_kernels().conv_pack(pack, begin, end);
  });
  run_direct(convs.data(), convs.size(), variant);
  return dx;
}

}  // namespace fused_resnet
