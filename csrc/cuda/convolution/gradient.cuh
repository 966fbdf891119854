// Training epilogue: ReLU mask and batch norm gradient sums of an input gradient, computed while it
// is written. The input gradient of a convolution of stride 1 is again such a convolution, of dy by
// the weights with reversed taps (in terms of cuda/convolution/problem.h: x is dy, and the outputs
// are the channels of the forward convolution's input). If the forward convolution read y =
// relu(norm(x)), then for every pixel and channel
//   g = dy * !(y <= 0)   is stored in place of dy,
// where y is recomputed from x with the same bits as in the forward pass, and for every channel and
// every part of M, a range of GemmTile::part_pixels or kMergedPixels pixels, the epilogue computes
//   sum of g,   sum of g * (x - mean).
// These are the sums that bn_add_relu's backward computes from dy, x and y in a separate pass, in
// float32 and in a fixed order; bn_gradient_by_sums computes dx from them. dy is rounded to its
// dtype before it is masked, so g is what that pass would store. A thread masks 16 bytes at a time
// and accumulates the sums of its column of eight channels in 16 registers.
// Memory traffic: x read once, g written once, 8 bytes per part and channel. The pass that is saved
// reads dy and x and writes one bit per element. Predicted for a step of ResNet-50 with 256 images,
// where 29 convolutions have such a gradient: dy is 1.3 GB, 0.3 ms at 4.3 TB/s, and the same again
// for x where the convolution is compute-bound and hides the read of x.
// Constraints: 16-bit x. Speed: not yet measured.
// Rejected: the mask from the stored y: one more tensor to read, which at most levels of
// fused_resnet/fusion/training/activation_memory.py would have to be recomputed first.
#pragma once

#include "cuda/batch_norm/channel.cuh"
#include "cuda/convolution/statistics.cuh"

namespace fused_resnet {

// The coefficients of the channels of a tile of kColumns columns of 16 bytes, in shared memory.
// Each thread folds one channel. Layout: in groups of four, the first four channels of every column
// before the second four, so that neither writes nor reads have bank conflicts.
template <int kColumns>
struct FoldedChannels {
  static constexpr int kCount = kColumns * 8, kBytes = 3 * kCount * int{sizeof(float)};

  uint8_t* shared;

  // The channel within the tile that this thread folds.
  __device__ __forceinline__ static int of_thread(int thread) {
    constexpr int kHalf = kCount / 2;
    return thread % kHalf / 4 * 8 + thread / kHalf * 4 + thread % 4;
  }
  __device__ __forceinline__ void store(int thread, const NormChannel<float>& channel) const {
    store_shared<float>(shared + thread * 4, channel.mean);
    store_shared<float>(shared + (kCount + thread) * 4, channel.scale);
    store_shared<float>(shared + (2 * kCount + thread) * 4, channel.shift);
  }
  __device__ __forceinline__ void load(int column, NormChannel<float> (&channels)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto four = [&](int which) {
        const int place = which * kCount + (half * kColumns + column) * 4;
        return unpack<float>(load_shared<uint4>(shared + place * 4));
      };
      const Pack<float> mean = four(0), scale = four(1), shift = four(2);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        channels[half * 4 + i] = {mean.values[i], scale.values[i], shift.values[i]};
    }
  }
};

// A thread's column of a part.
template <typename T>
struct GradientColumn {
  static constexpr int kSize = Pack<T>::size;
  static_assert(kSize == 8);

  NormChannel<float> channels[kSize];
  float sums[2 * kSize] = {};  // of g, then of g * (x - mean)

  // 16 bytes of dy and of x of one pixel -> 16 bytes of g, which are added to the sums.
  __device__ __forceinline__ uint4 add(uint4 dy, uint4 x) {
    const Pack<T> gradient = unpack<T>(dy), input = unpack<T>(x);
    Pack<T> g;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float v = widen(input.values[i]);
      const NormChannel<float>& by = channels[i];
      const T y = narrow<T>(normalised(v, by.mean, by.scale, by.shift));  // may round to zero
      g.values[i] = widen(y) <= 0 ? narrow<T>(0.0f) : gradient.values[i];
      sums[i] += widen(g.values[i]);
      sums[kSize + i] += widen(g.values[i]) * (v - by.mean);
    }
    return packed(g);
  }
  // Called by all threads. Writes the sums over the threads to part (2, outputs), of which the tile
  // covers `width`. scratch: as in PartStatistics.
  template <int kColumns, int kThreads, class Threads>
  __device__ __forceinline__ void write(uint8_t* scratch, const Threads& threads, float* part,
                                        int64_t outputs, int width) {
    using Sums = PartStatistics<T, kColumns, kThreads, 1, Threads>;
    const Sums over{scratch, threads};
    over.template add_up<2>(sums, 0);
    for (int j = threads.index(); j < Sums::kRow; j += kThreads) {
      const int k = j % kColumns * kSize + j / kColumns;
      if (k >= width) continue;
      part[k] = load_shared<float>(over.place(2 * Sums::kWarps, 0, j));
      part[outputs + k] = load_shared<float>(over.place(2 * Sums::kWarps + 1, 0, j));
    }
  }
};

}  // namespace fused_resnet
