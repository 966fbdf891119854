// Host code shared by the CPU convolutions.
#pragma once

#include <functional>
#include <initializer_list>

#include "common.h"
#include "cpu/isa/kernels.h"
#include "cpu/memory_pool.h"
#include "cpu/threads.h"

namespace fused_resnet {

constexpr int64_t kBlockChannels = 64;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                        int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

inline int64_t tile_pixels() { return cpu_kernels().tile_pixels; }
inline int64_t tiles_of(const ConvShape& conv) {
  return (conv.N * conv.P * conv.Q + tile_pixels() - 1) / tile_pixels();
}
inline int64_t blocks_of(const ConvShape& conv) {
  return (conv.K + kBlockChannels - 1) / kBlockChannels;
}

// Checks that t has x's dtype and shape (N, C, H, W), and is channels_last.
inline void check_added(const char* op, const char* name, const Tensor& t, const Tensor& x,
                        int64_t C, int64_t H, int64_t W) {
  const Layout4d layout = layout_of(op, t);
  check(t.scalar_type() == x.scalar_type() && layout.N == x.size(0) && layout.C == C &&
            t.size(2) == H && t.size(3) == W && (layout.channels_last || C == 1),
        op, ": ", name, " must be ", name_of(x.scalar_type()), " of shape (", x.size(0), ", ", C,
        ", ", H, ", ", W, ") and channels_last, got ", name_of(t.scalar_type()), " of shape ",
        shape_of(t), " and strides ", strides_of(t));
}

// How convolutions of this dtype are computed; nullopt if unsupported. bfloat16 uses the
// processor's dot product if that is faster: on AMD. Intel's takes four times as long as a float32
// multiply-add, for two products (measured on a Xeon of family 6, model 207: 0.78 ns against 0.19),
// and earlier processors have none.
std::optional<ConvVariant> conv_variant(DtypeIndex dtype);
inline bool conv_supported(DtypeIndex dtype) { return conv_variant(dtype).has_value(); }

// Of x and packed weights in the multiplication.
inline int64_t operand_bytes(ConvVariant variant) { return variant == kBFloatPairs ? 2 : 4; }

// The first cache line in `memory`, which is made large enough for `bytes` from there on.
inline char* aligned(std::vector<char>& memory, int64_t bytes) {
  memory.resize(std::max(memory.size(), static_cast<size_t>(bytes + kLineBytes)));
  return memory.data() + (kLineBytes - reinterpret_cast<uintptr_t>(memory.data()) % kLineBytes);
}

// A dense tensor in the dtype of the multiplication: itself, or a float32 copy.
class Operand {
 public:
  Operand(const Tensor& t, ConvVariant variant) : data_(t.const_data_ptr()) {
    if (!is_widened(variant)) return;
    const auto* from = static_cast<const char*>(data_);
    copy_.emplace(t.numel() * 4);
    auto* to = reinterpret_cast<float*>(copy_->data());
    Split(t.numel(), kLineBytes, 65536).run([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().widen[variant](from + begin * 2, to + begin, end - begin);
    });
    data_ = to;
  }
  const void* data() const { return data_; }

 private:
  std::optional<Scratch> copy_;
  const void* data_;
};

// Sets the x of `conv` and owns its memory. The pixels of a pointwise convolution are read once
// each, and are widened later, in cache.
class Source : Operand {
 public:
  Source(ConvBnRelu& conv, const Tensor& x, ConvVariant variant)
      : Operand(x, conv.pointwise ? kFloat : variant) {
    (conv.pointwise && is_widened(variant) ? conv.narrow : conv.x) = data();
  }
};

// Of these tile sizes m, that of the Winograd algorithm F(m x m, 3x3) with the fewest products, or
// 0 if none saves any: (m + 2)^2 products per tile, plus a fifth for the transforms, against 9 per
// pixel, of which the dot product does two at once. All are rounded up to tiles of the kernel.
int64_t winograd_tile(const ConvShape& c, ConvVariant variant,
                      std::initializer_list<int64_t> tiles);

// The largest m of F(m x m, 3x3) for which to transform the weights of a convolution: its geometry,
// C and K allow it, and it has at most kMaxWinogradWeights weights (C * K), with m = 4 at most
// `max_weights_4` and not few channels, with which the transforms outweigh the products. Else 0.
int64_t largest_winograd_tile(const ConvShape& c, ConvVariant variant, int64_t max_weights_4);

// For a pass of a training step: the m up to that with the fewest products.
int64_t winograd_tile_of_step(const ConvShape& c, ConvVariant variant, int64_t max_weights_4);

// Above these, transforming the weights of a layer with few pixels, or reading them for every
// image, costs more than it saves: they are 16/9 and 4 times the weights, 8 times in bfloat16.
// A dilated layer has as many pixels as one with a quarter of its weights.
constexpr int64_t kMaxWinogradWeights = 256 * 256, kMaxWinogradWeights4 = 128 * 128;
constexpr int64_t kMaxWinogradWeightsDilated = 512 * 512;

// Callback after each tile range: a task calls it with y's pixels [begin, end), all channels, the
// first of which is at `y`, as soon as they are written, while they are in its cache. `task` is
// less than the number of threads.
using TileCallback = std::function<void(int64_t task, const char* y, int64_t begin, int64_t end)>;

// All of y, by the faster of the two kernels. Returns whether `callback`, if given, was called for
// all pixels of y: not if y is too small to be split by pixels.
bool run_convolution(const ConvBnRelu& conv, ConvVariant variant,
                     const TileCallback& callback = {});

// Several convolutions of the same x by the direct kernel; every thread computes a share of each.
void run_direct(const ConvBnRelu* convs, size_t count, ConvVariant variant);

}  // namespace fused_resnet
