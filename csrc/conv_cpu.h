// What the host code of convolutions on the CPU shares.
#pragma once

#include <functional>

#include "common.h"
#include "cpu_kernels.h"

namespace fused_resnet {

constexpr int64_t kBlockChannels = 64;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                        int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

// The kernels are AVX-512's; for bfloat16 they need that extension's dot product too.
bool conv_serves(DtypeIndex dtype);

// Whether Winograd's form multiplies less: 16 products per tile, and a fifth more for the
// transforms, to 9 per pixel; both go by sevens.
bool winograd_pays(const ConvBnRelu& c);

// Above, the transformed weights of a layer with few pixels cost more than is saved.
constexpr int64_t kMostWinogradWeights = 256 * 256;

// All of y, by whichever of the two kernels pays.
void run_convolution(const ConvBnRelu& conv, DtypeIndex dtype, int64_t element_bytes);

// Told by a task of y's pixels [begin, end), all channels, as soon as it has written them, while
// they are in its cache. Tasks are fewer than threads.
using Written = std::function<void(int64_t task, int64_t begin, int64_t end)>;

// The same, pixel for pixel, with `written` told of all of y; false, with nothing done, where there
// is too little of it to be shared out by pixels.
bool run_convolution_watched(const ConvBnRelu& conv, DtypeIndex dtype, int64_t element_bytes,
                             const Written& written);

// Several of the same x by the direct kernel, every thread a share of each.
void run_direct(const ConvBnRelu* convs, size_t count, DtypeIndex dtype, int64_t element_bytes);

}  // namespace fused_resnet
