// Index arithmetic of the sm_80 convolution: which tile a block takes, where a pixel's window lies
// in x, how a thread walks over the window, and where values lie in shared memory. All of it runs
// on the host too, where tests/kernels/cuda/test_implicit_gemm.py tries it by itself.
#pragma once

#include "cuda/convolution/tiles.h"
#include "cuda/device/fast_division.h"

namespace fused_resnet {

constexpr int kChunkBytes = 16;                        // what a thread copies at once
constexpr int kStepChunks = kStepBytes / kChunkBytes;  // of a row of a tile
constexpr int kRowsTogether = 8;                       // rows of tiles
constexpr int kOutside = -(1 << 30);                   // a coordinate that is in no image

// --- tiles ---------------------------------------------------------------------------------------

struct TilePlace {
  int row, column, split;
};

// Blocks go through the tiles kRowsTogether rows at a time, column by column, so that those that
// run at once share both operands in L2: so many rows of x, and few columns of weights. A tile's
// splits are a whole pass over the tiles apart.
__host__ __device__ inline TilePlace tile_place(unsigned block, unsigned tiles_m,
                                                unsigned tiles_n) {
  const unsigned tiles = tiles_m * tiles_n;
  const unsigned split = block / tiles, tile = block % tiles;
  const unsigned band = tile / (kRowsTogether * tiles_n);
  const unsigned first = band * kRowsTogether, in_band = tile - first * tiles_n;
  const unsigned rows = tiles_m - first < kRowsTogether ? tiles_m - first : kRowsTogether;
  const unsigned column = in_band / rows;
  return {static_cast<int>(first + in_band - column * rows), static_cast<int>(column),
          static_cast<int>(split)};
}

// Steps [first, last) of a split; a late one may have none.
struct StepRange {
  int first, last;
};
__host__ __device__ inline StepRange split_steps(int steps, int splits, int split) {
  const int each = (steps + splits - 1) / splits;
  const int first = split * each;
  return {first < steps ? first : steps, first + each < steps ? first + each : steps};
}

// --- windows -------------------------------------------------------------------------------------

// The sum over (r, s, c) is taken in chunks of 16 bytes of channels, numbered
// (r * S + s) * chunks + c. A thread takes every kStepChunks-th. Its place is the number in the
// mixed base (R, S, chunks), and to go on is to add the digits of kStepChunks, with carries: no
// division for any C. Addresses are counted in chunks too, modulo 2^32: a window may start before
// x, a chunk that is read lies within the 64 GiB that x may have.
struct Window {
  FastDivision pixels, columns;  // by P * Q and by Q: m -> n, p, q
  FastDivision chunks, taps_w;   // channels of a tap in chunks; S
  int H, W;                      // of x
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int h_end, w_end;                 // R * dilation_h, S * dilation_w
  int step_c, step_h, step_w;       // digits of kStepChunks, those of taps times the dilation
  uint32_t image, row, pixel;       // of x, in chunks
  uint32_t step, carry_c, carry_w;  // what a step and either carry move by, in chunks

  // x (N, H, W, groups * C)
  template <typename Problem>
  __host__ static Window of(const Problem& problem, int element_bytes) {
    Window window{};
    const int chunks = problem.C * element_bytes / kChunkBytes;
    // A kernel of one row has no dilation, whatever the caller says.
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

// Where the window of pixel m of y starts in x; may be in the padding, before x itself.
struct WindowStart {
  int h, w;
  uint32_t at;  // its first chunk
};
__host__ __device__ inline WindowStart window_start(const Window& window, int m) {
  const int n = window.pixels.quotient(m);
  const int in_image = window.pixels.remainder(m, n);
  const int p = window.columns.quotient(in_image), q = window.columns.remainder(in_image, p);
  const int h = p * window.stride_h - window.pad_h, w = q * window.stride_w - window.pad_w;
  return {h, w, n * window.image + window.offset(h, w, 0)};
}

// A thread's place in the window: taps times the dilation, chunk of channels, and all of it in
// chunks.
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
  // Past the last tap there is nothing to read.
  __host__ __device__ bool past_end(const Window& window) const { return h >= window.h_end; }
};

// --- shared memory -------------------------------------------------------------------------------

// Operands: rows of 128 bytes, whose chunks change places by the row, so that eight rows' chunks of
// one column (ldmatrix) lie in different banks, as do the eight of one row (cp.async).
__host__ __device__ inline int operand_offset(int row, int chunk) {
  return row * kStepBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

// Sums: float32 (rows, row_floats). Units of eight floats, a product's columns, change places by
// the row, as a product is written by four rows at once; halves of units change places by unit and
// row, as outputs of 16 bits are read by eight threads, two units of four floats each.
__host__ __device__ inline int sum_offset(int row, int column, int row_floats) {
  const int unit = (column >> 3) ^ (row & 3);
  const int half = ((column >> 2) ^ (column >> 5) ^ row) & 1;
  return (row * row_floats + unit * 8 + half * 4 + (column & 3)) * 4;
}

}  // namespace fused_resnet
