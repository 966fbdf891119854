// What the host code of convolutions on the CPU shares.
#pragma once

#include <functional>
#include <initializer_list>

#include "common.h"
#include "cpu/isa/kernels.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {

constexpr int64_t kBlockChannels = 64;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                        int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

// How convolutions of this dtype are multiplied; nothing where they are not served. bfloat16 goes
// by the processor's dot product where that is the faster way: by AMD's. Intel's takes four times
// as long as a multiply-add of float32, for two products (measured on a Xeon of family 6, model
// 207: 0.78 ns beside 0.19), and earlier processors have none.
std::optional<ConvForm> conv_form(DtypeIndex dtype);
inline bool conv_serves(DtypeIndex dtype) { return conv_form(dtype).has_value(); }

// Of x and packed weights, as they are multiplied.
inline int64_t operand_bytes(ConvForm form) { return form == kBFloatPairs ? 2 : 4; }

// A dense tensor as it is multiplied: itself, or its float32 copy.
class Operand {
 public:
  Operand(const Tensor& t, ConvForm form) : data_(t.const_data_ptr()) {
    if (form != kBFloatWidened) return;
    const auto* from = static_cast<const char*>(data_);
    copy_.emplace(t.numel() * 4);
    auto* to = reinterpret_cast<float*>(copy_->data());
    Split(t.numel(), kLineBytes, 65536).run([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().widen(from + begin * 2, to + begin, end - begin);
    });
    data_ = to;
  }
  const void* data() const { return data_; }

 private:
  std::optional<Scratch> copy_;
  const void* data_;
};

// What `conv` reads as x, for as long as this lives. A pointwise convolution's pixels are read once
// each, and widened while they are in a cache.
class Source {
 public:
  Source(ConvBnRelu& conv, const Tensor& x, ConvForm form) {
    if (conv.pointwise && form == kBFloatWidened) {
      conv.narrow = x.const_data_ptr();
    } else {
      operand_.emplace(x, form);
      conv.x = operand_->data();
    }
  }

 private:
  std::optional<Operand> operand_;
};

// Of these tiles' sizes m that of Winograd's form F(m x m, 3x3) that multiplies least, or 0 where
// nothing is saved: (m + 2)^2 products per tile, and a fifth more for the transforms, to 9 per
// pixel, of which the dot product does two at once. All go by tiles of the kernel.
int64_t winograd_tile(const ConvBnRelu& c, ConvForm form, std::initializer_list<int64_t> tiles);

// The same for a pass of a training step over up to so many weights (outputs * inputs), of F(4x4,
// 3x3) `most` of them.
int64_t winograd_tile_of_step(const ConvBnRelu& c, ConvForm form, int64_t most);

// Above, what the transformed weights of a layer with few pixels cost is more than is saved: they
// are 16/9 and 4 times the weights, and packed anew at every step.
constexpr int64_t kMostWinogradWeights = 256 * 256, kMostWinogradWeights4 = 128 * 128;

// All of y, by whichever of the two kernels pays.
void run_convolution(const ConvBnRelu& conv, ConvForm form);

// Told by a task of y's pixels [begin, end), all channels, as soon as it has written them, while
// they are in its cache. Tasks are fewer than threads.
using Written = std::function<void(int64_t task, int64_t begin, int64_t end)>;

// The same, pixel for pixel, with `written` told of all of y; false, with nothing done, where there
// is too little of it to be shared out by pixels.
bool run_convolution_watched(const ConvBnRelu& conv, ConvForm form, const Written& written);

// Several of the same x by the direct kernel, every thread a share of each.
void run_direct(const ConvBnRelu* convs, size_t count, ConvForm form);

}  // namespace fused_resnet
