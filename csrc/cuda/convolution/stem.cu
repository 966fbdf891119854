// The stem of a ResNet on CUDA devices, sm_80 and later: 7x7 convolution of stride 2 on three
// channels, batch norm as a multiply-add, ReLU, and 3x3 max pooling of stride 2.
//   y = max over a window of relu(scale[k] * conv(x, weight) + shift[k])
// Layout: x (N, 3, H, W) with any strides, float32 or the dtype of the weights; y channels last.
// 16-bit operands, float32 accumulators, one rounding before the pooling, which commutes with it.
// A block computes a patch of 8x8 pooled pixels: 17x17 pixels of the convolution (13% of them are
// computed twice) and 39x39 of x, which are held in shared memory with a fourth channel of zeros. A
// row of taps is then 28 consecutive values, read as 32, and ldmatrix reads the rows of the matrix
// product directly from the patch: no im2col. The weights stay in shared memory for all patches of
// a block. A warp computes 32 pixels by 64 outputs: 6 ldmatrix for 16 mma in each of 14 steps of
// 16.
// Shared memory layout without bank conflicts: even and odd rows of the patch are separate, so that
// neighbouring pixels are 16 bytes apart (modulo 128) also from one row of pixels to the next.
// Memory traffic: x once (1.06 times with patch borders), y once; the convolution's output, 4 times
// the size of y, is not stored. Speed: not yet measured.
#include "cuda/device/launch.h"

namespace fused_resnet {
namespace {

constexpr const char* kOp = "stem";
constexpr int kWarps = 10;
constexpr int kThreads = 32 * kWarps;
constexpr int kOutputs = 64;
constexpr int kTaps = 7;
constexpr int kRun = 32;                // values of a row of taps: 8 pixels of 4 channels
constexpr int kPooled = 8;              // pooled pixels of a patch, per dimension
constexpr int kConv = 2 * kPooled + 1;  // pixels of the convolution, per dimension
constexpr int kPixels = kConv * kConv;
constexpr int kSide = 2 * (kConv - 1) + kTaps;  // pixels of x, per dimension
constexpr int kHalfRows = (kSide + 1) / 2;      // even rows; there is one odd row less
constexpr int kRowBytes = 400;                  // 40 pixels of 8 bytes, and 16 * (1 mod 8)
constexpr int kWeightRowBytes = 2 * kTaps * kRun + 16;
constexpr int kOutRowBytes = 2 * kOutputs + 16;
constexpr int kPatchBytes = 2 * kHalfRows * kRowBytes;
constexpr int kWeightBytes = kOutputs * kWeightRowBytes;
constexpr int kVectorBytes = 2 * 4 * kOutputs;  // scale and shift
constexpr int kSharedBytes = kPatchBytes + kWeightBytes + kVectorBytes + kPixels * kOutRowBytes;
static_assert(kWarps * 32 >= kPixels, "each warp computes two tiles of 16 pixels");

struct Stem {
  int64_t N;
  int H, W, P, Q;    // of x and of the convolution
  int out_h, out_w;  // of y
  int tiles_h, tiles_w;
  int64_t x_n, x_c, x_h, x_w;
};

// Row h of the patch.
__device__ __forceinline__ uint8_t* patch_row(uint8_t* patch, int h) {
  return patch + ((h & 1) * kHalfRows + (h >> 1)) * kRowBytes;
}

// Start of a patch: its first pooled pixel, and pixel of the convolution. Without pooling, patches
// are 17x17 and do not overlap.
template <bool kPool>
struct Place {
  int64_t n;
  int out_h, out_w, conv_h, conv_w;
  __device__ Place(const Stem& s, int64_t tile) {
    const int64_t row = tile / s.tiles_w;
    out_w = static_cast<int>(tile - row * s.tiles_w) * (kPool ? kPooled : kConv);
    n = row / s.tiles_h;
    out_h = static_cast<int>(row - n * s.tiles_h) * (kPool ? kPooled : kConv);
    conv_h = kPool ? 2 * out_h - 1 : out_h;
    conv_w = kPool ? 2 * out_w - 1 : out_w;
  }
};

// x (N, 3, H, W) -> the patch: 4 values per pixel, zeros outside x and in the fourth channel.
template <typename T, typename X, bool kPool>
__device__ void load_patch(uint8_t* patch, const X* x_ptr, const Stem& s, const Place<kPool>& at) {
  const int first_h = 2 * at.conv_h - 3, first_w = 2 * at.conv_w - 3;
  const X* image = x_ptr + at.n * s.x_n;
  constexpr int columns = kSide + 1;  // the last column is read but unused: zeros
  constexpr int rounds = (kSide * columns + kThreads - 1) / kThreads;
  const int thread = read_tid();
  // Issue all loads before the first value is used.
  X values[rounds][3];
#pragma unroll
  for (int u = 0; u < rounds; ++u) {
    const int i = thread + u * kThreads, row = i / columns, column = i % columns;
    const int h = first_h + row, w = first_w + column;
    const bool inside = row < kSide && column < kSide && h >= 0 && h < s.H && w >= 0 && w < s.W;
    const X* from = image + h * s.x_h + w * s.x_w;
#pragma unroll
    for (int c = 0; c < 3; ++c) values[u][c] = inside ? from[c * s.x_c] : narrow<X>(0.0f);
  }
#pragma unroll
  for (int u = 0; u < rounds; ++u) {
    const int i = thread + u * kThreads, row = i / columns, column = i % columns;
    struct alignas(8) {
      T channel[4];
    } pixel{{narrow<T>(widen(values[u][0])), narrow<T>(widen(values[u][1])),
             narrow<T>(widen(values[u][2])), narrow<T>(0.0f)}};
    if (row < kSide)
      store_shared<uint2>(patch_row(patch, row) + 8 * column, *reinterpret_cast<uint2*>(&pixel));
  }
}

// weight (64, 7, 8, 4) -> rows of kWeightRowBytes; scale, shift (64,) -> vectors. scale and shift
// are in shared memory too, because the compiler would load all of them from global memory at once,
// and spill.
template <typename T>
__device__ void load_weights(uint8_t* rows, float* vectors, const T* weight_ptr,
                             const float* scale_ptr, const float* shift_ptr) {
  for (int k = threadIdx.x; k < kOutputs; k += kThreads) {
    store_shared<float>(vectors + k, scale_ptr[k]);
    store_shared<float>(vectors + kOutputs + k, shift_ptr[k]);
  }
  constexpr int packs = kTaps * kRun / Pack<T>::size;
#pragma unroll 1
  for (int i = threadIdx.x; i < kOutputs * packs; i += kThreads)
    store_shared<uint4>(rows + i / packs * kWeightRowBytes + i % packs * 16,
                        load_global<uint4>(weight_ptr + i * Pack<T>::size));
}

// The warp's two tiles of 16 pixels, times 64 outputs.
template <typename T>
__device__ void multiply(float (&sums)[2][8][4], uint8_t* patch, const uint8_t* weights) {
  const int thread = read_tid(), lane = thread % 32, warp = thread / 32;
  const uint8_t* pixel[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    // Rows past the last pixel repeat it; they are not stored.
    const int row = (2 * warp + i) * 16 + lane % 16;
    const int number = row < kPixels ? row : kPixels - 1;
    pixel[i] = patch_row(patch, 2 * (number / kConv)) + 16 * (number % kConv) + lane / 16 * 16;
  }
  const uint8_t* weight_row =
      weights + (lane % 8 + lane / 16 * 8) * kWeightRowBytes + lane / 8 % 2 * 16;
#pragma unroll 1
  for (int r = 0; r < kTaps; ++r) {
    const int row = (r % 2 * kHalfRows + r / 2) * kRowBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_x4(a[i], pixel[i] + row + half * 32);
        // Values 28 to 31 belong to an eighth tap: its weight is zero, but x there may be Inf or
        // NaN.
        if (half == 1 && lane % 4 >= 2) a[i][2] = a[i][3] = 0;
      }
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        load_matrix_x4(b, weight_row + n * 8 * kWeightRowBytes + (2 * r + half) * 32);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          matrix_multiply<T>(sums[i][n], a[i], first);
          matrix_multiply<T>(sums[i][n + 1], a[i], second);
        }
      }
    }
  }
}

template <typename T>
__device__ void finish(const float (&sums)[2][8][4], uint8_t* out, const float* vectors) {
  const int thread = read_tid(), lane = thread % 32, warp = thread / 32;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int k = n * 8 + lane % 4 * 2;
    const auto scale = load_shared<uint2>(vectors + k);
    const auto shift = load_shared<uint2>(vectors + kOutputs + k);
    const float scales[2] = {as_float(scale.x), as_float(scale.y)};
    const float shifts[2] = {as_float(shift.x), as_float(shift.y)};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const int pixel = (2 * warp + i) * 16 + lane / 4 + 8 * upper;
        struct alignas(4) {
          T value[2];
        } pair;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float y = sums[i][n][2 * upper + j] * scales[j] + shifts[j];
          pair.value[j] = narrow<T>(y <= 0 ? 0.0f : y);
        }
        if (pixel < kPixels)
          store_shared<uint32_t>(out + pixel * kOutRowBytes + 2 * k,
                                 *reinterpret_cast<uint32_t*>(&pair));
      }
  }
}

template <typename T>
__device__ __forceinline__ bool greater_or_nan(T a, T b) {
  const float wide = widen(a);
  return wide > widen(b) || wide != wide;
}

// y (N, out_h, out_w, 64): pooled, or the convolution's pixels.
template <typename T, bool kPool>
__device__ void store_patch(T* y_ptr, const uint8_t* out, const Stem& s, const Place<kPool>& at) {
  constexpr int side = kPool ? kPooled : kConv;
  constexpr int packs = kOutputs / Pack<T>::size;
#pragma unroll 1
  for (int i = read_tid(); i < side * side * packs; i += kThreads) {
    const int pack = i % packs, w = i / packs % side, h = i / packs / side;
    if (at.out_h + h >= s.out_h || at.out_w + w >= s.out_w) continue;
    const auto pixel = [&](int conv_h, int conv_w) {
      return unpack<T>(
          load_shared<uint4>(out + (conv_h * kConv + conv_w) * kOutRowBytes + 16 * pack));
    };
    Pack<T> best;
    if constexpr (kPool) {
      bool any = false;
#pragma unroll
      for (int r = 0; r < 3; ++r)
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          const int conv_h = 2 * h + r, conv_w = 2 * w + c;
          const int in_h = at.conv_h + conv_h, in_w = at.conv_w + conv_w;
          if (in_h < 0 || in_h >= s.P || in_w < 0 || in_w >= s.Q) continue;
          const Pack<T> value = pixel(conv_h, conv_w);
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k)
            if (!any || greater_or_nan(value.values[k], best.values[k]))
              best.values[k] = value.values[k];
          any = true;
        }
    } else {
      best = pixel(h, w);
    }
    const int64_t at_y = ((at.n * s.out_h + at.out_h + h) * s.out_w + at.out_w + w) * kOutputs;
    store_global<uint4>(y_ptr + at_y + pack * Pack<T>::size, packed(best));
  }
}

template <typename T, typename X, bool kPool>
__global__ void __launch_bounds__(kThreads, kPool ? 2 : 1)  // without pooling, 2 would spill
    stem_kernel(const X* x_ptr, const T* weight_ptr, const float* scale_ptr, const float* shift_ptr,
                T* y_ptr, Stem s) {
  uint8_t* patch = shared_memory();
  uint8_t* weights = patch + kPatchBytes;
  auto* vectors = reinterpret_cast<float*>(weights + kWeightBytes);
  uint8_t* out = weights + kWeightBytes + kVectorBytes;
  const int64_t tiles = s.N * s.tiles_h * s.tiles_w;
  int64_t tile = blockIdx.x;
  load_weights(weights, vectors, weight_ptr, scale_ptr, shift_ptr);
  load_patch<T>(patch, x_ptr, s, Place<kPool>(s, tile));
  __syncthreads();
  for (; tile < tiles; tile += gridDim.x) {
    float sums[2][8][4] = {};
    multiply<T>(sums, patch, weights);
    finish<T>(sums, out, vectors);
    __syncthreads();
    // Load the next patch while this one is pooled.
    if (tile + gridDim.x < tiles) load_patch<T>(patch, x_ptr, s, Place<kPool>(s, tile + gridDim.x));
    store_patch<T>(y_ptr, out, s, Place<kPool>(s, tile));
    __syncthreads();
  }
}

template <typename T, typename X, bool kPool>
void launch_stem(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                 const Tensor& y) {
  const DeviceScope scope(x);
  const auto conv = [](int64_t size) { return static_cast<int>((size - 1) / 2 + 1); };
  Stem s{x.size(0),
         static_cast<int>(x.size(2)),
         static_cast<int>(x.size(3)),
         conv(x.size(2)),
         conv(x.size(3)),
         static_cast<int>(y.size(2)),
         static_cast<int>(y.size(3)),
         0,
         0,
         x.stride(0),
         x.stride(1),
         x.stride(2),
         x.stride(3)};
  constexpr int side = kPool ? kPooled : kConv;
  s.tiles_h = static_cast<int>(ceil_div(s.out_h, side));
  s.tiles_w = static_cast<int>(ceil_div(s.out_w, side));
  const int64_t tiles = s.N * s.tiles_h * s.tiles_w;
  const auto kernel = stem_kernel<T, X, kPool>;
  const int64_t resident =
      int64_t{scope.multiprocessors()} * scope.resident_blocks(kernel, kThreads, kSharedBytes);
  scope.launch(
      {std::min(tiles, resident), kThreads, kSharedBytes}, kernel,
      static_cast<const X*>(x.const_data_ptr()), static_cast<const T*>(weight.const_data_ptr()),
      static_cast<const float*>(scale.const_data_ptr()),
      static_cast<const float*>(shift.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), s);
}

template <typename T>
void run_stem(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
              const Tensor& y, bool pool) {
  const bool wide = x.scalar_type() == ScalarType::Float;
  if (wide)
    (pool ? launch_stem<T, float, true> : launch_stem<T, float, false>)(x, weight, scale, shift, y);
  else
    (pool ? launch_stem<T, T, true> : launch_stem<T, T, false>)(x, weight, scale, shift, y);
}

// x (N, 3, H, W) with any strides, float32 or of weight's dtype; weight (64, 7, 8, 4) contiguous,
// with zeros in the eighth tap and the fourth channel; scale, shift (64,) float32 -> y (N, 64, P,
// Q), channels_last: the convolution's output, or with `pool` its 3x3 max pooling with stride 2 and
// padding 1.
Tensor stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, bool pool) {
  const DtypeIndex dtype = dtype_index(kOp, "weight", weight);
  check(dtype == kFloat16 || dtype == kBFloat16, kOp, ": weight must be float16 or bfloat16, got ",
        name_of(weight.scalar_type()));
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == weight.scalar_type(), kOp,
        ": x must be float32 or of weight's dtype, got ", name_of(x.scalar_type()));
  check(x.dim() == 4 && x.size(1) == 3, kOp, ": x must have shape (N, 3, H, W), got ", shape_of(x));
  check(weight.dim() == 4 && weight.size(0) == kOutputs && weight.size(1) == kTaps &&
            weight.size(2) == 8 && weight.size(3) == 4,
        kOp, ": weight must have shape (64, 7, 8, 4), got ", shape_of(weight));
  check(weight.is_cuda() == x.is_cuda() && weight.get_device_index() == x.get_device_index(), kOp,
        ": weight must be on x's device");
  check(weight.stride(0) == kTaps * kRun && weight.stride(1) == kRun && weight.stride(2) == 4 &&
            weight.stride(3) == 1 && aligned16(weight.const_data_ptr()),
        kOp, ": weight must be contiguous and aligned to 16 bytes");
  check_channel_vector(kOp, "scale", scale, kOutputs, ScalarType::Float, x);
  check_channel_vector(kOp, "shift", shift, kOutputs, ScalarType::Float, x);
  const int64_t N = x.size(0), H = x.size(2), W = x.size(3);
  check(H > 0 && W > 0 && H < (1 << 30) && W < (1 << 30), kOp,
        ": H and W of x must be from 1 to 2^30 - 1, got ", shape_of(x));
  const auto out = [&](int64_t size) {
    const int64_t conv = (size - 1) / 2 + 1;
    return pool ? (conv - 1) / 2 + 1 : conv;
  };
  Tensor rows = torch::stable::new_empty(weight, {N, out(H), out(W), kOutputs});
  Tensor y = torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
  if (y.numel() == 0) return y;
  if (dtype == kFloat16)
    run_stem<float16_t>(x, weight, scale, shift, y, pool);
  else
    run_stem<bfloat16_t>(x, weight, scale, shift, y, pool);
  return y;
}

}  // namespace

void list_stem_kernels(std::vector<CudaKernel>& list, bool gpu) {
  describe_kernel(list, "stem_bfloat16", stem_kernel<bfloat16_t, bfloat16_t, true>, gpu);
  describe_kernel(list, "stem_float16", stem_kernel<float16_t, float16_t, true>, gpu);
  describe_kernel(list, "stem_bfloat16_from_float32", stem_kernel<bfloat16_t, float, true>, gpu);
  describe_kernel(list, "stem_float16_from_float32", stem_kernel<float16_t, float, true>, gpu);
}

}  // namespace fused_resnet

FUSED_RESNET_CUDA_OPS(m) { m.impl("stem", TORCH_BOX(fused_resnet::stem)); }
