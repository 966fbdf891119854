// BN-apply and ReLU in the prologue of a training step's 1x1 convolution.
//   z = conv(a, weight),   a = relu((x - mean) * scale + shift), rounded to x's dtype
// x is the convolution before; a is never in memory. Same arithmetic as bn_normalise's
// (cuda/batch_norm/channel.cuh), same product: the same bits as the one after the other, statistics
// included. A kernel of 16-bit operands whose steps of A lie in shared memory as rows of 128 bytes:
// each chunk of 16 bytes that has come is read, normalised and written back where it lies. A thread
// has one column of chunks of the step, eight channels, and their 24 numbers from a table that L1
// holds, on their way while it waits for the step. Chunks past the last channel stay the zeros that
// they came as: weights are zero there too, but zero times what a norm makes of zero need not be.
// Rows past the last pixel are normalised like others, and nobody reads what comes of them.
// Bytes from memory: x read, instead of x read, a written and a read: 2 of an element instead of 6,
// where L2 holds what tiles share. Of a block and step: 256 from and to shared memory for every
// row, and 96 from L1 for every thread.
//
// Predicted, of a step of an sm_80 tile of 128x128 by 8 warps, whose products take 1024 cycles:
//   where it lies: 4 chunks a thread, 46 instructions each, 380 issued by each of the four
//   schedulers; 256 cycles of shared memory and 192 of L1, beside 1024 for the operands.
//   in registers, after ldmatrix: 16 fragments of 8 elements a thread, each element by all four
//   warps of its rows: 1430 issued; 384 cycles of L1, none of shared memory.
// In registers four times the instructions or, with warps of 64x64, twice: more than the products
// leave free. So it is done where it lies, by the thread that copied the chunk (sm_80: no barrier
// more), or by the warpgroup that owns the row (sm_90: a barrier of the warpgroup, and a proxy
// fence). On Hopper a step of 128x128 has 256 cycles of products, and 256 of shared memory and 96
// of L1 are added: hidden where memory is the limit (K of 256 and 512), not where products are;
// and every tile of outputs does it anew. bn_normalise costs 0.27 cycles of a multiprocessor an
// element (4 bytes of 15 a cycle), this 0.04 for every 128 outputs where nothing hides it: from
// about K = 1024 on it may lose. Fragments of A in registers (wgmma's other form) would save 128
// cycles of writing and 128 of wgmma's reading, for 128 more of L1.
// Compiled (nvcc 13.0): sm_80's of 128x128 by 8 warps has 144 instructions more than without, and
// 128 registers as before; by 4 warps 252, 128x64 163, 64x128 161, 64x64 120; no spills anywhere.
// Speed: not yet measured.
// Rejected before measuring: the table in shared memory (a stage of Hopper's ring, and a third
// block on a multiprocessor of sm_80's 128x64, for what L1 holds); the division and the root in
// every block (a launch of C threads does them once, in bn_normalise's launch's stead).
#pragma once

#include "cuda/batch_norm/channel.cuh"
#include "cuda/convolution/index.h"
#include "cuda/convolution/prologue.h"

namespace fused_resnet {

// A thread's column of chunks of a step: kRows of them, kApart rows apart, that have one swizzle.
template <typename T, int kRows, int kApart>
struct NormPrologue {
  static constexpr int kSize = Pack<T>::size;
  static_assert(kSize == 8 && kApart % 8 == 0);

  const float* table;
  int chunks, column;  // of x; this thread's among a step's
  float mean[kSize], scale[kSize], shift[kSize];
  bool inside;

  __device__ __forceinline__ NormPrologue(const float* table, int chunks, int column)
      : table(table), chunks(chunks), column(column) {}

  __device__ __forceinline__ void read(int number, int chunk, float (&numbers)[kSize]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto four =
          unpack<float>(load_global<uint4>(table + norm_place(number, half, chunk, chunks)));
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[half * 4 + i] = four.values[i];
    }
  }
  // The numbers of a step's channels.
  __device__ __forceinline__ void load(int step) {
    const int chunk = step * kStepChunks + column;
    inside = chunk < chunks;
    const int at = inside ? chunk : 0;
    read(0, at, mean);
    read(1, at, scale);
    read(2, at, shift);
  }
  // first: the thread's first chunk of that step.
  __device__ __forceinline__ void apply(uint8_t* first) const {
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      uint8_t* const place = first + i * kApart * kStepBytes;
      Pack<T> pack = unpack<T>(load_shared<uint4>(place));
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float y = normalised(widen(pack.values[j]), mean[j], scale[j], shift[j]);
        pack.values[j] = narrow<T>(rectified(y));
      }
      store_shared<uint4>(place, packed(pack));
    }
  }
};

}  // namespace fused_resnet
