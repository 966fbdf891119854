// Training epilogue: the statistics of a convolution's output z that batch norm needs, computed
// while z is written, so that no separate pass reads z. For every part of M, a range of n pixels
// (GemmTile::part_pixels, kMergedPixels), and every output:
//   centre  = the part's mean, approximately: one float32
//   sum     = sum over the part of z - centre
//   squares = sum over the part of (z - the part's mean)^2
// of z as rounded to its dtype, in float32, in a fixed order. They have the format of bn_add_relu's
// partial sums and are merged in the same way (cuda/batch_norm/statistics.cu). A thread keeps its
// pixels in registers and sums twice: first z - the part's first pixel, which gives the mean, then
// z - mean and its square (Chan, Golub and LeVeque 1983). So there is no cancellation, however
// large the mean and however far the first pixel is from it. Rejected: one pass relative to the
// part's first pixel: if that pixel is far from all others, the variance loses 7 bits of 24, more
// than the project's tolerance.
#pragma once

#include "cuda/convolution/problem.h"

namespace fused_resnet {

// The threads that compute a part's statistics: a whole block.
struct BlockThreads {
  __device__ __forceinline__ static int index() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static void sync() { __syncthreads(); }
};

// A thread processes one column of a tile whose rows have kColumns columns of 16 bytes, and every
// (kThreads / kColumns)th pixel of it, at most kPacks. Threads: kThreads threads, in whole warps.
template <typename T, int kColumns, int kThreads, int kPacks, class Threads = BlockThreads>
struct PartStatistics {
  static constexpr int kSize = Pack<T>::size, kWarps = kThreads / 32;
  static constexpr int kRow = kSize * kColumns;  // values, one per output of the tile
  // Two rows per warp; then the first sum, the centre, the second sum and the squares.
  static constexpr int kScratchBytes = (kWarps * 2 + 4) * kRow * 4;
  static_assert(kColumns <= 32 && 32 % kColumns == 0 && kThreads % 32 == 0);

  uint8_t* scratch;  // kScratchBytes of unused shared memory, aligned to 4
  Threads threads;

  __device__ __forceinline__ uint8_t* place(int row, int i, int column) const {
    return scratch + (row * kRow + i * kColumns + column) * 4;
  }
  // Sums over the threads. The results go to the rows from `result` on, counted after the rows of
  // the warps.
  template <int kSums>
  __device__ __forceinline__ void add_up(float (&values)[kSums * kSize], int result) const {
    const int thread = threads.index(), lane = thread % 32, warp = thread / 32;
#pragma unroll
    for (int delta = 16; delta >= kColumns; delta /= 2)
#pragma unroll
      for (float& value : values)
        value += __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(delta));
    if (lane < kColumns) {
#pragma unroll
      for (int i = 0; i < kSums * kSize; ++i)
        store_shared<float>(place(kSums * warp, i, lane), values[i]);
    }
    threads.sync();
    for (int j = thread; j < kSums * kRow; j += kThreads) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += load_shared<float>(place(kSums * w, 0, j));
      store_shared<float>(place(2 * kWarps + result, 0, j), sum);
    }
    threads.sync();
  }
  // Called by all threads. pixels: the first `mine` are valid; first: this column of the part's
  // first pixel; count: the number of pixels of the part. Writes to part (3, outputs), of which the
  // tile covers `width`.
  __device__ __forceinline__ void write(const uint4 (&pixels)[kPacks], int mine, uint4 first,
                                        int count, float* part, int64_t outputs, int width) const {
    const int thread = threads.index(), column = thread % kColumns;
    const float n = static_cast<float>(count);
    const Pack<T> start = unpack<T>(first);
    float centre[kSize], sums[kSize] = {}, both[2 * kSize] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      centre[i] = widen(start.values[i]);
      if (centre[i] - centre[i] != 0) centre[i] = 0;  // non-finite
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const Pack<T> z = unpack<T>(pixels[p]);
      if (p < mine) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) sums[i] += widen(z.values[i]) - centre[i];
      }
    }
    add_up<1>(sums, 0);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float moved = centre[i] + load_shared<float>(place(2 * kWarps, i, column)) / n;
      centre[i] = moved - moved == 0 ? moved : centre[i];
      if (thread < kColumns) store_shared<float>(place(2 * kWarps + 1, i, column), centre[i]);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const Pack<T> z = unpack<T>(pixels[p]);
      if (p < mine) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const float d = widen(z.values[i]) - centre[i];
          both[i] += d;
          both[kSize + i] += d * d;
        }
      }
    }
    add_up<2>(both, 2);
    for (int j = thread; j < kRow; j += kThreads) {
      const int k = j % kColumns * kSize + j / kColumns;
      if (k >= width) continue;
      const float sum = load_shared<float>(place(2 * kWarps + 2, 0, j));
      const float squares = load_shared<float>(place(2 * kWarps + 3, 0, j));
      // The centre differs from the mean by rounding only. An infinite sum of squares stays
      // infinite instead of Inf - Inf.
      const float within = squares - squares == 0 ? squares - sum * (sum / n) : squares;
      part[k] = load_shared<float>(place(2 * kWarps + 1, 0, j));
      part[outputs + k] = sum;
      part[2 * outputs + k] = within < 0 ? 0.0f : within;
    }
  }
};

// 16 bytes of z of one pixel.
template <typename T>
__device__ __forceinline__ uint4 rounded(const float (&sums)[Pack<T>::size]) {
  Pack<T> z;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) z.values[i] = narrow<T>(sums[i]);
  return packed(z);
}

}  // namespace fused_resnet
