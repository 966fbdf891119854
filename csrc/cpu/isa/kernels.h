// Table of the CPU kernels: plain functions on ranges of memory, compiled once per instruction set
// (cpu/isa/avx512.cpp, cpu/isa/avx2.cpp, cpu/isa/generic.cpp) and selected at run time. They use
// neither torch nor threads; the host code in the .cpp files checks arguments, allocates and splits
// the work.
#pragma once

#include <stdint.h>

#include "activation.h"

namespace fused_resnet {

// Partition of a dense (N, C, H, W) tensor for a kernel. Rows (channels_last): row i holds `period`
// values from first + i * period on, column j is a channel. Planes (contiguous): every (n, c) plane
// of `plane` values is split into `segments` segments of `segment` values (the last may be
// shorter); item i is segment i % segments of plane i / segments, whose channel is (i / segments) %
// period.
struct Walk {
  int64_t period = 0;    // rows: values per row; planes: C
  int64_t first = 0;     // rows only
  int64_t plane = 0;     // planes only: H*W
  int64_t segments = 0;  // planes only
  int64_t segment = 0;   // planes only
};

// Training batch norm, all shapes in elements: x, residual, y (N, C, H, W); per-channel arrays
// (period,), padded with zeros to a multiple of 16. `acc` is float, or double for float64 data.
struct BnForward {
  Walk walk;
  const void* x;
  const void* residual;  // or null
  void* y;
  const void* mean;   // acc (period,)
  const void* scale;  // acc (period,): weight * invstd
  const void* shift;  // acc (period,): bias, minus the mean's rounding error times scale
  const void* mean2;  // acc (period,): of the residual's batch norm, or null
  const void* scale2;
  Activation activation;
  bool stream;  // non-temporal stores; y, rows and segments are aligned to 64 bytes
};

struct BnBackward {
  Walk walk;
  const void* dy;
  const void* x;
  const void* y;     // null without a mask, or if it is recomputed
  const void* x2;    // reduction: another normalised tensor, or null
  void* dresidual;   // reduction: where g = masked dy goes, or null
  void* dx;          // apply
  const void* mean;  // acc (period,)
  const void* mean2;
  // acc (period,), or null: y = relu((x - mean) * mask_scale + mask_shift) is recomputed instead of
  // read, by the same operations as forward
  const void* mask_scale;
  const void* mask_shift;
  // apply, acc (period,): dx = scale * ((g - g_mean) - slope * (x - mean))
  const void* g_mean;
  const void* slope;
  const void* scale;
  bool stream;
};

struct MaxPool {
  const void* x;  // (N, H, W, C) in memory
  void* y;        // (N, P, Q, C) in memory
  void* lines;    // W * C values and one vector, per thread
  int64_t C, H, W, P, Q;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

// A stem's batch norm, ReLU and pooling: `window` of x and y, index (N, P, Q, C) in memory.
struct BnPool {
  MaxPool window;
  uint8_t* index;
  const void* mean;   // acc (C,), padded with zeros to a multiple of 16, as scale and shift are
  const void* scale;  // y = relu((x - mean) * scale + shift), pooled
  const void* shift;
  const void* dy;  // (N, P, Q, C) in memory
  void* dx;        // (N, H, W, C) in memory
};

// How the products of a convolution are computed (cpu/convolution/direct_kernels.h): float32;
// bfloat16 by the processor's dot product of pairs; bfloat16 and float16 in float32.
enum ConvVariant : int { kFloat, kBFloatPairs, kBFloatWidened, kHalfWidened };
constexpr int kConvVariants = 4;
constexpr bool is_widened(ConvVariant v) { return v == kBFloatWidened || v == kHalfWidened; }

// Winograd algorithm F(m x m, 3x3): products per tile of m x m outputs, and the variants that
// support it. In float32 m = 4 would lose digits; in 16 bits the dtype's rounding hides that loss,
// and m = 4 needs a quarter of the direct products, m = 2 four ninths.
constexpr int64_t winograd_products(int64_t m) { return (m + 2) * (m + 2); }
constexpr bool winograd_supported(ConvVariant variant, int64_t m) {
  return m == 2 ? variant != kBFloatPairs : variant != kFloat;
}

// The sizes of a convolution: x (N, C, H, W), weight (K, C / groups, R, S), y (N, K, P, Q).
struct ConvShape {
  int64_t N, C, H, W, K, P, Q, R, S;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  // As the kernels compute them: with multiples of 16 inputs and outputs each in training, for
  // which each may consist of so many of the layer's own (cpu/convolution/groups.h).
  int64_t groups = 1, merged = 1;

  constexpr bool grouped() const { return groups * merged > 1; }
};

// The tiles of the Winograd algorithm in one dimension of y: m pixels each, `dilation` apart. Tiles
// i * dilation ... (i + 1) * dilation - 1 interleave, and cover m * dilation adjacent pixels.
// Kernels ask for every tile: the division by a variable would take 4% of the time of 32 channels.
constexpr int64_t winograd_tiles_along(int64_t size, int64_t m, int64_t dilation) {
  return dilation == 1 ? (size + m - 1) / m : (size + m * dilation - 1) / (m * dilation) * dilation;
}
constexpr int64_t winograd_tiles(const ConvShape& c, int64_t m) {
  return c.N * winograd_tiles_along(c.P, m, c.dilation_h) *
         winograd_tiles_along(c.Q, m, c.dilation_w);
}

// What is applied to a convolution's sums as they are stored:
//   y = activation(sum * scale[k] + shift[k] + residual)
struct Epilogue {
  const float* scale;    // (K,), zero-padded to a multiple of 64, or null: 1, no shift
  const float* shift;    // as scale
  const void* residual;  // (N, P, Q, K) in memory, or null; may be y
  Activation activation;
};

// Memory that is read next, to be prefetched.
struct Upcoming {
  const char* at;
  int64_t bytes;
};

struct ConvBnRelu : ConvShape, Epilogue {
  const void* x;          // (N, H, W, C) in memory; widened: float32
  const void* weight;     // packed, see cpu/convolution/direct_kernels.h; null: see skipped_pixels
  const void* winograd;   // packed, see cpu/convolution/winograd_kernels.h, or null
  int64_t winograd_tile;  // m of F(m x m, 3x3), of `winograd`
  bool* skipped_pixels;   // without weight: set if non-finite pixels were skipped
  const int64_t* first_channel;  // grouped: first input channel of every 16 outputs, else null
  void* y;                       // (N, P, Q, K) in memory
  const void* zeros;             // C zeros of x's dtype
  const void* narrow;            // pointwise: 16-bit x, yet to be widened to x, else null
  // Pixels between the images, rows and columns of y (and the residual) inside a larger tensor; all
  // 0 if y is dense.
  int64_t y_image, y_row, y_column;
  int64_t run;     // input channels that a tap reads
  bool pointwise;  // 1x1, stride 1, no padding: pixel i of y reads pixel i of x
  Upcoming after;  // what is read after a range of tiles
};

constexpr int64_t kMaxTaps = 128;      // maximum R * S
constexpr int64_t kMaxPackedTaps = 9;  // R * S of weights that conv_pack packs
constexpr int64_t kChainSteps = 256;   // steps in one chain of additions

// Weights to pack: inputs and outputs of the convolution that reads them, both multiples of 16, and
// their strides in floats, one of which is 1. Tap i begins at tap_offset[i] floats.
struct ConvPack {
  const void* weight;
  void* direct;    // (outputs * inputs * taps) float32, or bfloat16 in pairs, or null
  void* winograd;  // (winograd_products(winograd_tile) * outputs * inputs), or null
  int64_t winograd_tile;
  int64_t outputs, inputs, taps;
  int64_t output_stride, input_stride;
  // Of a grouped convolution: outputs of a group, `inputs` are those of one; floats from group to
  // group. Else all outputs.
  int64_t group_outputs, group_stride;
  int64_t block_vectors;  // vectors of 16 outputs that are packed as one block
  int64_t tap_offset[kMaxPackedTaps];
  // 0, or: the weight is contiguous, with so many taps, of which these are. One of the strides is
  // then the number of taps instead of 1.
  int64_t adjacent_taps;
  bool transposed;  // outputs are contiguous, else inputs are
  ConvVariant variant;
};

// Operands of a weight gradient. The pixels of a pointwise convolution are given as rows of Q of
// one image: P rows, H = P, W = Q, of which the last may be shorter.
struct WeightGradient : ConvShape {
  const void* x;             // (N, H, W, C) in memory
  const void* dy;            // (N, P, Q, K) in memory
  const void* zeros;         // C zeros
  int64_t pixels, x_pixels;  // of dy and x
  int64_t winograd_tile;     // m of F(m x m, 3x3), or 0: direct
  // Null, or: x (dy if `recomputes_dy`) is the input of this function, which computes the operand
  // for pixels [begin, end). Returns where pixel 0 would be, valid until this thread's next call.
  const void* (*recompute)(const void* context, int64_t begin, int64_t end);
  const void* context;
  bool recomputes_dy;
};
// Pixels (pairs for bfloat16) laid out at a time: 64 channels of them take 128 KiB, so that their
// source also stays in the second-level cache (0.92 of the time of 512 KiB for 64 -> 256 channels
// at 56 x 56). bfloat16 reads half as much for the same products, and blocks this short cost narrow
// layers 2%.
constexpr int64_t gradient_pixels(int64_t pair) { return pair == 2 ? 2048 : 512; }
constexpr int64_t kMaxNarrowRows = 16;  // R of a convolution with few channels
// The same for the Winograd algorithms, in tiles.
constexpr int64_t gradient_tiles(int64_t m) { return m == 2 ? 224 : 196; }

// Groups of tiles that the Winograd algorithm processes at a time: a group's transformed input and
// its sums of 64 outputs fit into three quarters of a second-level cache of 1 MiB; and their size.
constexpr int64_t winograd_group_bytes(int64_t m, int64_t tile_pixels, int64_t C) {
  return tile_pixels * winograd_products(m) * 4 * (C + 64);
}
constexpr int64_t winograd_groups(int64_t m, int64_t tile_pixels, int64_t C) {
  const int64_t bytes = winograd_group_bytes(m, tile_pixels, C);
  return bytes < 768 * 1024 ? 768 * 1024 / bytes : 1;
}
constexpr int64_t winograd_scratch_bytes(int64_t m, int64_t tile_pixels, int64_t C) {
  return winograd_groups(m, tile_pixels, C) * winograd_group_bytes(m, tile_pixels, C);
}

// Tiles that the Winograd kernels for 16 input and output channels process at a time.
constexpr int64_t kTilesOf16 = 16;

// One column per dtype, in the order of DtypeIndex: float32, bfloat16, float16, float64.
struct CpuKernels {
  const char* isa;
  void (*add_relu[4])(const void* x, const void* residual, void* y, int64_t n, bool stream);
  void (*add_relu_backward[4])(const void* dy, const void* y, void* dx, int64_t n, bool stream);
  void (*add[4])(const void* x, void* y, int64_t n);  // y += x
  // Rows [begin, end) of C values: g = dy masked by the ReLU's output y (null: dy), stored unless
  // null, and dz = g * scale, float (C,), double for float64. dz may be dy.
  void (*epilogue_gradient[4])(const void* dy, const void* y, const void* scale, void* g, void* dz,
                               int64_t C, int64_t begin, int64_t end);
  // s1 += sum(x - centre), s2 += sum((x - centre)^2), all double (period,)
  void (*bn_stats_rows[4])(const Walk&, const void* x, int64_t begin, int64_t end,
                           const double* centre, double* s1, double* s2);
  void (*bn_stats_planes[4])(const Walk&, const void* x, int64_t begin, int64_t end,
                             const double* centre, double* s1, double* s2);
  // The same in double arithmetic: for float64, and where float32 sums overflowed.
  void (*bn_stats_rows_double[4])(const Walk&, const void* x, int64_t begin, int64_t end,
                                  const double* centre, double* s1, double* s2);
  void (*bn_stats_planes_double[4])(const Walk&, const void* x, int64_t begin, int64_t end,
                                    const double* centre, double* s1, double* s2);
  void (*bn_apply_rows[4])(const BnForward&, int64_t begin, int64_t end);
  void (*bn_apply_planes[4])(const BnForward&, int64_t begin, int64_t end);
  // sum_g += sum(g), sum_gx += sum(g * (x - mean)), likewise sum_gx2 for x2; double (period,)
  void (*bn_reduce_rows[4])(const BnBackward&, int64_t begin, int64_t end, double* sum_g,
                            double* sum_gx, double* sum_gx2);
  void (*bn_reduce_planes[4])(const BnBackward&, int64_t begin, int64_t end, double* sum_g,
                              double* sum_gx, double* sum_gx2);
  void (*bn_backward_rows[4])(const BnBackward&, int64_t begin, int64_t end);
  void (*bn_backward_planes[4])(const BnBackward&, int64_t begin, int64_t end);
  // rows [begin, end) of the N*P rows of output pixels
  void (*max_pool2d[4])(const MaxPool&, int64_t begin, int64_t end);
  // rows [begin, end) of the N*P rows of y, of the N*H rows of x
  void (*bn_pool[4])(const BnPool&, int64_t begin, int64_t end);
  void (*bn_pool_gradient[4])(const BnPool&, int64_t begin, int64_t end);
  double (*abs_max[4])(const void* x, int64_t n);
  // cpu/head_kernels.h
  void (*mean_pixels[4])(const void* x, void* mean, int64_t C, int64_t pixels, int64_t begin,
                         int64_t end);
  void (*linear[4])(const void* mean, const void* weight, const void* bias, void* y, int64_t N,
                    int64_t C, int64_t K, int64_t begin, int64_t end);
  // Convolutions; null if the instruction set has none.
  int64_t tile_pixels = 0;                     // pixels of a tile; Winograd: tiles of a group
  int64_t gradient_chain[kConvVariants] = {};  // cpu/convolution/weight_gradient_kernels.h
  // By ConvVariant, if widened: 16 bits -> float32
  void (*widen[kConvVariants])(const void* from, float* to, int64_t n) = {};
  // By ConvVariant: y's channels [64 block, 64 block + 64) of the pixels of tiles [begin, end)
  void (*conv_bn_relu[kConvVariants])(const ConvBnRelu&, int64_t block, int64_t begin,
                                      int64_t end) = {};
  // vectors of 16 outputs [begin, end)
  void (*conv_pack)(const ConvPack&, int64_t begin, int64_t end) = {};
  // transposes 16 rows of 16 floats; from_row, to_row: floats between rows
  void (*transpose)(const float* from, int64_t from_row, float* to, int64_t to_row) = {};
  // out (k_end - k_begin, R, S, C), float32: dweight of outputs [k_begin, k_end), summed over
  // output rows [begin, end) of the N*P; weight_gradient_scratch: bytes of scratch for a number of
  // outputs
  void (*conv_weight_gradient[kConvVariants])(const WeightGradient&, char* scratch, int64_t begin,
                                              int64_t end, int64_t k_begin, int64_t k_end,
                                              float* out) = {};
  int64_t (*weight_gradient_scratch[kConvVariants])(const WeightGradient&, int64_t outputs) = {};
  // The same for few input channels, dilation 1: out (R, S C, K) over output rows [begin, end)
  void (*narrow_gradient[kConvVariants])(const WeightGradient&, char* scratch, int64_t begin,
                                         int64_t end, float* out) = {};
  int64_t (*narrow_gradient_scratch)(const WeightGradient&) = {};
  // The same by the Winograd algorithm F(m x m, 3x3), m = winograd_tile, for 3x3, stride 1: sums
  // (k_end - k_begin, winograd_products(m), C) over tiles [begin, end) of m x m pixels of dy;
  // winograd_gradient_output: dweight from the total of `parts` sums, `part` floats apart, false if
  // a result is non-finite.
  void (*winograd_gradient[kConvVariants])(const WeightGradient&, char* scratch, int64_t begin,
                                           int64_t end, int64_t k_begin, int64_t k_end,
                                           float* sums) = {};
  bool (*winograd_gradient_output)(int64_t m, const float* sums, int64_t parts, int64_t part,
                                   int64_t outputs, int64_t C, float* out) = {};
  int64_t (*winograd_gradient_scratch)(const WeightGradient&, int64_t outputs) = {};
  // 3x3, stride 1, by ConvVariant: y's channels of blocks [block_begin, block_end) in groups
  // [begin, end) of tile_pixels tiles of winograd_tile x winograd_tile pixels
  void (*conv_bn_relu_winograd[kConvVariants])(const ConvBnRelu&, void* scratch,
                                               int64_t block_begin, int64_t block_end,
                                               int64_t begin, int64_t end) = {};
  // The forward and gradient kernels for C = K = 16: all of y, and the sums, of tiles [begin, end)
  void (*conv_winograd_16[kConvVariants])(const ConvBnRelu&, int64_t begin, int64_t end) = {};
  void (*winograd_gradient_16)(const WeightGradient&, int64_t begin, int64_t end, float* sums) = {};
};

// Whether bfloat16 convolutions are computed in float32 (cpu/convolution/host.h).
bool widens_bfloat16();
// For later calls. 1: yes; 0: no, if the dot product is available; -1: if that is faster.
void widen_bfloat16(int choice);

// The table for this machine, selected on the first call.
const CpuKernels& cpu_kernels();

}  // namespace fused_resnet
