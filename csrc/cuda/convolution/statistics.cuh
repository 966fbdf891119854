// What training's batch norm needs to know of a convolution's output z, taken while z is written,
// so that nobody reads z once more for it. Of every part of M, a stretch of n pixels
// (GemmTile::part_pixels, kMergedPixels), and every output:
//   centre  = the part's mean, or nearly: one float32
//   sum     = sum over the part of z - centre
//   squares = sum over the part of (z - the part's mean)^2
// of z as it is rounded to its dtype, in float32, in one fixed order. They are what bn_add_relu's
// own parts are, and are merged likewise (cuda/batch_norm/statistics.cu). A thread keeps its pixels
// in registers from the output to the sums: first of z - the part's first pixel, which gives the
// mean, then of z - mean and its square (Chan, Golub and LeVeque 1983). So nothing cancels, however
// large the mean and however far off the first pixel. Rejected: one pass, about the part's first
// pixel: where that is far from all others, a variance loses 7 bits of 24, and the project's
// tolerance.
#pragma once

#include "cuda/convolution/problem.h"

namespace fused_resnet {

// Threads that take a part's statistics together: a whole block.
struct BlockThreads {
  __device__ __forceinline__ static int index() { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ static void sync() { __syncthreads(); }
};

// A thread's share: of a tile whose rows are kColumns columns of 16 bytes one column, of every
// (kThreads / kColumns)th of its pixels, kPacks at most. Threads: kThreads of them, whole warps.
template <typename T, int kColumns, int kThreads, int kPacks, class Threads = BlockThreads>
struct PartStatistics {
  static constexpr int kSize = Pack<T>::size, kWarps = kThreads / 32;
  static constexpr int kRow = kSize * kColumns;  // numbers, one for each of a tile's outputs
  // Two rows of every warp; then the first sum, the centre, the second sum and the squares.
  static constexpr int kScratchBytes = (kWarps * 2 + 4) * kRow * 4;
  static_assert(kColumns <= 32 && 32 % kColumns == 0 && kThreads % 32 == 0);

  uint8_t* scratch;  // kScratchBytes of shared memory, aligned to 4, that nobody uses
  Threads threads;

  __device__ __forceinline__ uint8_t* place(int row, int i, int column) const {
    return scratch + (row * kRow + i * kColumns + column) * 4;
  }
  // The sums over the threads, to rows `result`, ... of what comes after the warps' rows.
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
  // All threads. pixels: the first `mine` of them are there; first: this column of the part's first
  // one; count: the part's pixels. To part (3, outputs), of which the tile has `width`.
  __device__ __forceinline__ void write(const uint4 (&pixels)[kPacks], int mine, uint4 first,
                                        int count, float* part, int64_t outputs, int width) const {
    const int thread = threads.index(), column = thread % kColumns;
    const float n = static_cast<float>(count);
    const Pack<T> start = unpack<T>(first);
    float centre[kSize], sums[kSize] = {}, both[2 * kSize] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      centre[i] = widen(start.values[i]);
      if (centre[i] - centre[i] != 0) centre[i] = 0;  // no finite number
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
      // The centre is the mean but for a rounding. An infinite sum of squares stays infinite
      // instead of Inf - Inf.
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
