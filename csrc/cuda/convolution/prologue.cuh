// Batch norm and ReLU in the prologue of a training step's 1x1 convolution.
//   z = conv(a, weight),   a = relu((x - mean) * scale + shift), rounded to x's dtype
// x is the output of the preceding convolution; a is never stored. The arithmetic is that of
// bn_normalise (cuda/batch_norm/channel.cuh) and the matrix product is unchanged, so results,
// including statistics, have the same bits as with separate kernels. For kernels of 16-bit operands
// that hold the steps of A in shared memory as rows of 128 bytes: each 16-byte chunk that has
// arrived is read, normalised and written back in place. A thread processes one column of chunks of
// the step, eight channels. It loads their 24 values from a table in L1 while it waits for the
// step. Chunks past the last channel stay zero: the weights there are zero too, but the batch norm
// of zero may be non-finite, and zero times that is NaN. Rows past the last pixel are normalised
// too; the results are unused.
// Memory traffic: x read once instead of x read, a written and a read: 2 bytes per element instead
// of 6, if L2 holds what tiles share. Per block and step: 256 bytes of shared memory traffic per
// row, and 96 bytes from L1 per thread.
//
// Predicted for a step of an sm_80 tile of 128x128 with 8 warps, whose mma take 1024 cycles:
//   in shared memory: 4 chunks per thread, 46 instructions each, 380 issued by each of the four
//   schedulers; 256 cycles of shared memory and 192 of L1, in addition to 1024 for the operands.
//   in registers, after ldmatrix: 16 fragments of 8 elements per thread, each element by all four
//   warps of its rows: 1430 issued; 384 cycles of L1, none of shared memory.
// The register variant issues four times the instructions or, with warps of 64x64, twice: more than
// the mma leave free. So x is normalised in shared memory, by the thread that copied the chunk
// (sm_80: no additional barrier), or by the warpgroup that owns the row (sm_90: a warpgroup barrier
// and a proxy fence). On Hopper, a step of 128x128 has 256 cycles of wgmma, and this adds 256
// cycles of shared memory and 96 of L1: hidden if the convolution is memory-bound (K of 256 and
// 512), not if it is compute-bound; and every tile of outputs repeats it. bn_normalise costs 0.27
// cycles of a multiprocessor per element (4 bytes at 15 per cycle), this 0.04 per 128 outputs if
// nothing hides it: from about K = 1024 it may be slower. Fragments of A in registers (the other
// variant of wgmma) would save 128 cycles of writes and 128 of wgmma's reads, for 128 more of L1.
// Compiled (nvcc 13.0): the sm_80 kernel of 128x128 with 8 warps has 144 more instructions than
// without a prologue, and 128 registers as before; with 4 warps 252 more, 128x64 163, 64x128 161,
// 64x64 120; no spills.
// Speed: not yet measured.
// Rejected before measuring: the table in shared memory (costs a stage of Hopper's ring, and a
// third block per multiprocessor with sm_80's 128x64, for data that L1 holds); the division and the
// square root in every block (a launch of C threads computes them once, and replaces bn_normalise's
// launch).
#pragma once

#include "cuda/batch_norm/channel.cuh"
#include "cuda/convolution/index.h"
#include "cuda/convolution/prologue.h"

namespace fused_resnet {

// A thread's column of chunks of a step: kRows chunks, kRowStride rows apart, with the same
// swizzle.
template <typename T, int kRows, int kRowStride>
struct NormPrologue {
  static constexpr int kSize = Pack<T>::size;
  static_assert(kSize == 8 && kRowStride % 8 == 0);

  const float* table;
  int chunks, column;  // chunks of x; this thread's chunk of a step
  float mean[kSize], scale[kSize], shift[kSize];
  bool inside;

  __device__ __forceinline__ NormPrologue(const float* table, int chunks, int column)
      : table(table), chunks(chunks), column(column) {}

  __device__ __forceinline__ void read(int row, int chunk, float (&values)[kSize]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto four =
          unpack<float>(load_global<uint4>(table + norm_table_index(row, half, chunk, chunks)));
#pragma unroll
      for (int i = 0; i < 4; ++i) values[half * 4 + i] = four.values[i];
    }
  }
  // Loads the coefficients of a step's channels.
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
      uint8_t* const place = first + i * kRowStride * kStepBytes;
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
