// Index arithmetic of the sm_80 convolution: the tile of a block, the position of a pixel's window
// in x, a thread's iteration over the window, and the layout of shared memory. All of it also
// compiles for the host, where tests/kernels/cuda/test_implicit_gemm.py tests it.
#pragma once

#include "cuda/convolution/tiles.h"
#include "cuda/device/fast_division.h"

namespace fused_resnet {

constexpr int kChunkBytes = 16;                        // size of a thread's copy
constexpr int kStepChunks = kStepBytes / kChunkBytes;  // per row of a tile
constexpr int kBandRows = 8;                           // rows of tiles in a band
constexpr int kOutside = -(1 << 30);                   // a coordinate outside every image

// --- tiles ---------------------------------------------------------------------------------------

struct TilePlace {
  int row, column, split;
};

// Blocks process the tiles in bands of kBandRows rows, column by column, so that concurrent blocks
// share both operands in L2: a few rows of x and few columns of weights. Consecutive splits of a
// tile are a full pass over all tiles apart.
__host__ __device__ inline TilePlace tile_place(unsigned block, unsigned tiles_m,
                                                unsigned tiles_n) {
  const unsigned tiles = tiles_m * tiles_n;
  const unsigned split = block / tiles, tile = block % tiles;
  const unsigned band = tile / (kBandRows * tiles_n);
  const unsigned first = band * kBandRows, in_band = tile - first * tiles_n;
  const unsigned rows = tiles_m - first < kBandRows ? tiles_m - first : kBandRows;
  const unsigned column = in_band / rows;
  return {static_cast<int>(first + in_band - column * rows), static_cast<int>(column),
          static_cast<int>(split)};
}

// Steps [first, last) of a split. The last splits may be empty.
struct StepRange {
  int first, last;
};
__host__ __device__ inline StepRange split_steps(int steps, int splits, int split) {
  const int each = (steps + splits - 1) / splits;
  const int first = split * each;
  return {first < steps ? first : steps, first + each < steps ? first + each : steps};
}

// --- windows -------------------------------------------------------------------------------------

// The sum over (r, s, c) is divided into chunks of 16 bytes of channels, numbered (r * S + s) *
// chunks + c. A thread processes every kStepChunks-th chunk. Its position is the chunk number in
// the mixed radix (R, S, chunks); advancing adds the digits of kStepChunks with carries, which
// needs no division for any C. Addresses are in chunks too, modulo 2^32: a window may start before
// x, but every chunk that is read lies within the 64 GiB limit of x.
struct Window {
  FastDivision pixels, columns;  // by P * Q and by Q: m -> n, p, q
  FastDivision chunks, taps_w;   // channels of a tap in chunks; S
  int H, W;                      // of x
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int h_end, w_end;                 // R * dilation_h, S * dilation_w
  int step_c, step_h, step_w;       // digits of kStepChunks; those of taps times the dilation
  uint32_t image, row, pixel;       // strides of x, in chunks
  uint32_t step, carry_c, carry_w;  // offsets of a step and of the carries, in chunks

  // x (N, H, W, groups * C)
  template <typename Problem>
  __host__ static Window of(const Problem& problem, int element_bytes) {
    Window window{};
    const int chunks = problem.C * element_bytes / kChunkBytes;
    // Dilation has no effect on a kernel of size 1.
    window.dilation_h = problem.R > 1 ? problem.dilation_h : 1;
    window.dilation_w = problem.S > 1 ? problem.dilation_w : 1;
    window.pixels = FastDivision::by(problem.P * problem.Q);
    window.columns = FastDivision::by(problem.Q);
    window.chunks = FastDivision::by(chunks);
    window.taps_w = FastDivision::by(problem.S);
    window.H = problem.H, window.W = problem.W;
    window.stride_h = problem.stride_h, window.stride_w = problem.stride_w;
    window.pad_h = problem.pad_h, window.pad_w = problem.pad_w;
    window.h_end = problem.R * window.dilation_h, window.w_end = problem.S * window.dilation_w;
    const int step_taps = kStepChunks / chunks;
    window.step_c = kStepChunks % chunks;
    window.step_w = step_taps % problem.S * window.dilation_w;
    window.step_h = step_taps / problem.S * window.dilation_h;
    window.pixel = static_cast<uint32_t>(problem.groups * chunks);
    window.row = problem.W * window.pixel;
    window.image = problem.H * window.row;
    window.step = window.offset(window.step_h, window.step_w, window.step_c);
    window.carry_c = window.offset(0, window.dilation_w, -chunks);
    window.carry_w = window.offset(window.dilation_h, -window.w_end, 0);
    return window;
  }
  __host__ __device__ uint32_t offset(int h, int w, int c) const { return h * row + w * pixel + c; }
};

// Start of the window of pixel m of y in x. It may lie in the padding, before x.
struct WindowStart {
  int h, w;
  uint32_t at;  // first chunk
};
__host__ __device__ inline WindowStart window_start(const Window& window, int m) {
  const int n = window.pixels.quotient(m);
  const int in_image = window.pixels.remainder(m, n);
  const int p = window.columns.quotient(in_image), q = window.columns.remainder(in_image, p);
  const int h = p * window.stride_h - window.pad_h, w = q * window.stride_w - window.pad_w;
  return {h, w, n * window.image + window.offset(h, w, 0)};
}

// A thread's position in the window: tap coordinates times the dilation, chunk of channels, and the
// offset in chunks.
struct WindowPlace {
  int h, w, c;
  uint32_t at;

  __host__ __device__ static WindowPlace of(const Window& window, int chunk) {
    const int tap = window.chunks.quotient(chunk), r = window.taps_w.quotient(tap);
    const int s = window.taps_w.remainder(tap, r), c = window.chunks.remainder(chunk, tap);
    const int h = r * window.dilation_h, w = s * window.dilation_w;
    return {h, w, c, window.offset(h, w, c)};
  }
  __host__ __device__ void advance(const Window& window) {
    h += window.step_h, w += window.step_w, c += window.step_c;
    at += window.step;
    const int chunks = static_cast<int>(window.chunks.divisor);
    if (c >= chunks) c -= chunks, w += window.dilation_w, at += window.carry_c;
    if (w >= window.w_end) w -= window.w_end, h += window.dilation_h, at += window.carry_w;
  }
  // Whether the position is past the last tap.
  __host__ __device__ bool past_end(const Window& window) const { return h >= window.h_end; }
};

// --- shared memory -------------------------------------------------------------------------------

// Operands: rows of 128 bytes. The chunk index is XORed with the row, so that eight rows of one
// chunk column (ldmatrix) and the eight chunks of one row (cp.async) lie in different banks.
__host__ __device__ inline int operand_offset(int row, int chunk) {
  return row * kStepBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// Accumulators: float32 (rows, row_floats). Units of eight floats, the columns of an mma, are
// permuted by the row, because four rows write an mma's result at the same time. The halves of a
// unit are swapped by unit and row, because eight threads read 16-bit outputs as two groups of four
// floats each.
__host__ __device__ inline int sum_offset(int row, int column, int row_floats) {
  const int unit = (column >> 3) ^ (row & 3);
  const int half = ((column >> 2) ^ (column >> 5) ^ row) & 1;
  return (row * row_floats + unit * 8 + half * 4 + (column & 3)) * 4;
}

}  // namespace fused_resnet
