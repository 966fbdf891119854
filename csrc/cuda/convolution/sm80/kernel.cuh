// The convolution as an implicit GEMM by mma.sync, on sm_80 and later.
//   y[m, k] = activation(scale[k] * sum over (r, s, c) of x[pixel of m at (r, s), c] * weight[k, r,
//   s, c]
//                  + shift[k] + residual[m, k])
// Layout: x (N, H, W, groups * C), weight (groups * K, R, S, C), y (N, P, Q, groups * K). Operands
// of 16 bits (m16n8k16) or TF32 (m16n8k8; x and weight are rounded to nearest TF32 in registers),
// float32 accumulators, one rounding at the end.
// A block computes a tile of block_m pixels by block_n outputs of one group, over the whole sum or
// one of `splits` ranges of it. A step covers 128 bytes of every row. cp.async copies steps into a
// ring of `stages` stages, 16 bytes at a time, zero-filled for the padding and past every end. A
// thread copies one column of 16 bytes of the step, for several rows of each operand. A warp
// computes 64x64, 64x32 or 32x32 of the tile, with ldmatrix; the fragments of a quarter of a step
// are loaded while those of the previous quarter are multiplied. The accumulators then pass through
// shared memory in float32, so that residual and y are accessed 16 bytes at a time.
// Memory traffic: x and weight once, if L2 holds what tiles share, residual once, y once. Splits
// write float32 sums and a second kernel adds them in a fixed order, so results are reproducible
// bit by bit.
// In training, y is the plain convolution, and the epilogue also computes the tile's statistics for
// the following batch norm, 12 bytes per output and block_m pixels
// (cuda/convolution/statistics.cuh). Or y is an input gradient, which is masked by the ReLU, with
// the sums of the batch norm gradient, 8 bytes (cuda/convolution/gradient.cuh): the input of the
// batch norm is loaded like the residual, 16 bytes at a time, and the folded channels are stored
// after the accumulators in shared memory, 12 bytes each.
// Constraints: C and K multiples of 16 bytes, operands aligned to 16 bytes, M < 2^31.
//
// Predicted balance. A multiprocessor with 1024 multiply-adds of 16 bits per cycle (sm_80) takes
// block_m * block_n / 16 cycles for a step. Shared memory, at 128 bytes per cycle, takes one cycle
// per row of a step written and four per ldmatrix. TF32 has half the multiply-adds in a step, at
// half the rate.
//   tile                  128x128/8  128x128/4  128x64/4  64x128/4  64x64/4  128x32/4  32x64/2
//   tile of a warp          64x32      64x64     64x32     64x32     32x32    32x32     32x32
//   ldmatrix per mma        0.375      0.25      0.375     0.375     0.5      0.5       0.5
//   cycles of mma           1024       1024      512       512       256      256       128
//   of shared memory        1024       768       576       576       384      416       224
//   bytes per multiply-add  0.125      0.094     0.141     0.141     0.188    0.203     0.219
// Speed: not yet measured.
// Rejected before measuring: padded instead of swizzled rows (one ninth more shared memory, one
// stage less); dividing for (r, s, c) at every step (adding digits with carries needs no division);
// 16-bit accumulators in shared memory in the epilogue (a rounding before the residual is added).
#pragma once

#include "cuda/convolution/gradient.cuh"
#include "cuda/convolution/index.h"
#include "cuda/convolution/problem.h"
#include "cuda/convolution/prologue.h"
#include "cuda/convolution/statistics.cuh"
#include "cuda/device/activation.cuh"

namespace fused_resnet {

// Kernel arguments, passed by value.
struct GemmArguments {
  const uint8_t* x;         // (N, H, W, groups * C)
  const uint8_t* weight;    // (groups * K, R, S, C)
  const float* scale;       // (groups * K,)
  const float* shift;       // (groups * K,)
  const uint8_t* residual;  // (M, groups * K) or null
  uint8_t* y;               // (M, groups * K)
  float* partial;           // (splits, M, groups * K) or null
  float* statistics;        // (parts, 3, groups * K) or null; if not null, scale and shift are null
  const float* norm;        // (3, 2, C / 8, 4): table of the prologue
  NormInput mask;           // mask.x null: none; otherwise scale and shift are null
  Window window;
  int M, K, groups;
  uint32_t chunks, pixel_chunks;  // in units of 16 bytes: a filter; a pixel of x
  int steps, splits;
  int tiles_m, tiles_n, tiles_per_group;
  Activation activation;
};

template <int kTile>
struct TileShape {
  static constexpr int kBlockM = kGemmTiles[kTile].block_m, kBlockN = kGemmTiles[kTile].block_n;
  static constexpr int kWarps = kGemmTiles[kTile].warps, kStages = kGemmTiles[kTile].stages;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpN = kBlockM * kBlockN / kWarps >= 64 * 64 ? 64 : 32;
  static constexpr int kWarpM = kBlockM * kBlockN / kWarps / kWarpN;
  static constexpr int kWarpsM = kBlockM / kWarpM;
  static constexpr int kABytes = kBlockM * kStepBytes;
  static constexpr int kStageBytes = kABytes + kBlockN * kStepBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Per multiprocessor of Hopper; it limits the registers per thread.
  static constexpr int kBlocksPerSm = 227 * 1024 / (kSharedBytes + 1024);
  static constexpr int kCopyRows = kThreads / kStepChunks;  // rows that the block copies at once

  static_assert(kWarpsM * kWarpM == kBlockM && kBlockN % kWarpN == 0);
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
  static_assert(kCopyRows % 8 == 0,
                "a thread's rows are equal modulo 8, so they share one swizzle");
  static_assert(kBlockM % kCopyRows == 0 && kBlockN % kCopyRows == 0);
  static_assert(kBlockM * kBlockN * 4 <= kSharedBytes, "the accumulators reuse the ring's memory");
};

__device__ __forceinline__ const uint8_t* chunk_at(const uint8_t* tensor, uint32_t number) {
  return tensor + uint64_t{number} * kChunkBytes;
}

// Copies one column of 16 bytes of a matrix's steps, for kRows rows that are kCopyRows apart.
template <int kRows, int kCopyRows>
struct MatrixReader {
  uint32_t at, row_chunks;     // this thread's chunk, from the start of the tensor; row stride
  int rows_left, chunks_left;  // in the matrix, from the current position

  __device__ __forceinline__ void copy(const GemmArguments&, const uint8_t* tensor,
                                       uint8_t* shared) const {
    const int rows = chunks_left > 0 ? rows_left : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      copy_async<kChunkBytes>(shared + i * kCopyRows * kStepBytes,
                              chunk_at(tensor, at + i * kCopyRows * row_chunks),
                              i * kCopyRows < rows ? kChunkBytes : 0);
  }
  __device__ __forceinline__ void advance(const GemmArguments&) {
    at += kStepChunks;
    chunks_left -= kStepChunks;
  }
};

// The same for x, whose rows are the windows of pixels of y.
template <int kRows, int kCopyRows>
struct WindowReader {
  WindowStart start[kRows];  // including the offset of the group
  WindowPlace place;

  __device__ __forceinline__ WindowReader(const GemmArguments& a, int group, int row, int chunk)
      : place(WindowPlace::of(a.window, chunk)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = row + i * kCopyRows;
      start[i] = window_start(a.window, m < a.M ? m : a.M - 1);
      start[i].at += group * a.window.chunks.divisor;
      if (m >= a.M) start[i].h = kOutside;
    }
  }
  __device__ __forceinline__ void copy(const GemmArguments& a, const uint8_t* tensor,
                                       uint8_t* shared) const {
    const int h = place.past_end(a.window) ? kOutside : place.h;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool inside =
          static_cast<unsigned>(start[i].h + h) < static_cast<unsigned>(a.window.H) &&
          static_cast<unsigned>(start[i].w + place.w) < static_cast<unsigned>(a.window.W);
      copy_async<kChunkBytes>(shared + i * kCopyRows * kStepBytes,
                              chunk_at(tensor, start[i].at + place.at), inside ? kChunkBytes : 0);
    }
  }
  __device__ __forceinline__ void advance(const GemmArguments& a) { place.advance(a.window); }
};

// The fragments of a quarter of a step, 32 bytes of every row.
template <class Shape>
struct Fragments {
  uint32_t a[Shape::kWarpM / 16][4];
  uint32_t b[Shape::kWarpN / 8][2];

  // a_offset, b_offset: this lane's row and chunk of the warp's first 16 rows. A quarter has two
  // chunks.
  template <typename T>
  __device__ __forceinline__ void load(const uint8_t* stage, int a_offset, int b_offset,
                                       int quarter) {
    const int turn = quarter * 2 * kChunkBytes;  // chunk ^ 2 * quarter, valid for swizzled rows
#pragma unroll
    for (int i = 0; i < Shape::kWarpM / 16; ++i)
      load_matrix_x4(a[i], stage + (a_offset ^ turn) + i * 16 * kStepBytes);
#pragma unroll
    for (int j = 0; j < Shape::kWarpN / 16; ++j) {
      uint32_t pair[4];
      load_matrix_x4(pair, stage + Shape::kABytes + (b_offset ^ turn) + j * 16 * kStepBytes);
      b[2 * j][0] = pair[0], b[2 * j][1] = pair[1];
      b[2 * j + 1][0] = pair[2], b[2 * j + 1][1] = pair[3];
    }
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (auto& fragment : a)
#pragma unroll
        for (uint32_t& bits : fragment) bits = round_to_tf32(bits);
#pragma unroll
      for (auto& fragment : b)
#pragma unroll
        for (uint32_t& bits : fragment) bits = round_to_tf32(bits);
    }
  }
};

// 16 bytes of y of one row. residual: used only if `add`.
template <typename T>
__device__ __forceinline__ uint4 finished(const float (&sums)[Pack<T>::size],
                                          const float (&scale)[Pack<T>::size],
                                          const float (&shift)[Pack<T>::size], bool add,
                                          uint4 residual, Activation activation) {
  const Pack<T> added = unpack<T>(residual);
  Pack<T> y;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) {
    float v = sums[i] * scale[i] + shift[i];
    v = add ? v + widen(added.values[i]) : v;
    y.values[i] = narrow<T>(activated(activation, v));
  }
  return packed(y);
}

// Epilogue: accumulators in shared memory -> y, or the split's range of `partial`. The constructor
// issues the loads from global memory, which are in flight while the accumulators are written to
// shared memory. first_m: the tile's first pixel; first_n: its first output within the group.
// Epilogue::statistics: stores the accumulators and computes the tile's statistics; gradient: masks
// them and computes the tile's sums.
template <typename T, class Shape, Epilogue kEpilogue>
struct Finish {
  static constexpr int kSize = Pack<T>::size;
  static constexpr int kRowPacks = Shape::kBlockN / kSize;
  static constexpr int kRows =
      Shape::kThreads / kRowPacks;                        // rows that the block processes at once
  static constexpr int kPacks = Shape::kBlockM / kRows;   // per thread, in one column
  static constexpr int kAhead = kPacks < 4 ? kPacks : 4;  // loads of `extra` in flight
  using Statistics = PartStatistics<T, kRowPacks, Shape::kThreads, kPacks>;
  static_assert(Statistics::kScratchBytes <= Shape::kSharedBytes);
  static constexpr int kSumBytes = Shape::kBlockM * Shape::kBlockN * 4;
  static_assert(Shape::kThreads % kRowPacks == 0 && Shape::kBlockM % kRows == 0);

  const GemmArguments& a;
  int column, row, rows;     // the thread's first element; rows of the tile inside y
  int k;                     // output index within a row of y
  int64_t first, step;       // in elements of y: the thread's first one, and its stride
  uint4 extra[kAhead] = {};  // of the residual, or of the batch norm's input
  float scale[kSize], shift[kSize];
  NormParameters channel = {};  // of the batch norm, folded by this thread

  __device__ __forceinline__ Finish(const GemmArguments& arguments, int first_m, int group,
                                    int first_n)
      : a(arguments),
        column(static_cast<int>(threadIdx.x) % kRowPacks * kSize),
        row(static_cast<int>(threadIdx.x) / kRowPacks),
        rows(first_n + column < a.K ? a.M - first_m : 0),
        k(group * a.K + first_n + column) {
    const int64_t outputs = int64_t{a.groups} * a.K;
    first = (int64_t{first_m} + row) * outputs + k;
    step = kRows * outputs;
    if constexpr (kEpilogue != Epilogue::statistics) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_extra(i);
    }
    if constexpr (kEpilogue == Epilogue::gradient) {
      const int thread = read_tid(), n = first_n + FoldedChannels<kRowPacks>::of_thread(thread);
      if (thread < Shape::kBlockN && n < a.K)
        channel = NormParameters::load(a.mask, group * a.K + n);
    }
    if constexpr (kEpilogue == Epilogue::scale) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        scale[j] = rows > 0 ? a.scale[k + j] : 0.0f;
        shift[j] = rows > 0 ? a.shift[k + j] : 0.0f;
      }
    }
  }
  __device__ __forceinline__ bool inside(int i) const { return row + i * kRows < rows; }
  __device__ __forceinline__ void load_extra(int i) {
    constexpr bool masked = kEpilogue == Epilogue::gradient;
    const auto* const from = masked ? static_cast<const uint8_t*>(a.mask.x) : a.residual;
    if ((masked || from != nullptr) && inside(i))
      extra[i % kAhead] = load_global_once<uint4>(from + (first + i * step) * sizeof(T));
  }
  __device__ __forceinline__ void load_sums(const uint8_t* shared, int i,
                                            float (&sums)[kSize]) const {
    load_row(shared, row + i * kRows, sums);
  }
  __device__ __forceinline__ void load_row(const uint8_t* shared, int row_of_tile,
                                           float (&sums)[kSize]) const {
#pragma unroll
    for (int part = 0; part < kSize / 4; ++part) {
      const int offset = sum_offset(row_of_tile, column + part * 4, Shape::kBlockN);
      const auto four = unpack<float>(load_shared<uint4>(shared + offset));
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[part * 4 + j] = four.values[j];
    }
  }
  __device__ __forceinline__ void write_partial(const uint8_t* shared, int split) const {
    float* part = a.partial + split * (int64_t{a.M} * a.groups * a.K);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float sums[kSize];
      load_sums(shared, i, sums);
#pragma unroll
      for (int j = 0; j < kSize; j += 4)
        if (inside(i))
          store_global<uint4>(part + first + i * step + j,
                              packed(Pack<float>{sums[j], sums[j + 1], sums[j + 2], sums[j + 3]}));
    }
  }
  __device__ __forceinline__ void write(const uint8_t* shared) {
    if (rows <= 0) return;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float sums[kSize];
      load_sums(shared, i, sums);
      const uint4 y =
          finished<T>(sums, scale, shift, a.residual != nullptr, extra[i % kAhead], a.activation);
      if (i + kAhead < kPacks) load_extra(i + kAhead);
      if (inside(i)) store_global<uint4>(a.y + (first + i * step) * sizeof(T), y);
    }
  }
  // Stores the accumulators to y and computes the tile's statistics. Called by all threads.
  __device__ __forceinline__ void write_with_statistics(uint8_t* shared, int first_m, int group,
                                                        int first_n) {
    uint4 pixels[kPacks];
    float sums[kSize];
    load_row(shared, 0, sums);
    const uint4 first_pixel = rounded<T>(sums);
    int mine = 0;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      load_sums(shared, i, sums);
      pixels[i] = rounded<T>(sums);
      if (!inside(i)) continue;
      store_global<uint4>(a.y + (first + i * step) * sizeof(T), pixels[i]);
      ++mine;
    }
    __syncthreads();  // all accumulators have been read; reuse their memory
    const int left = a.M - first_m;
    const int64_t outputs = int64_t{a.groups} * a.K;
    const Statistics statistics{shared, {}};
    statistics.write(pixels, mine, first_pixel, left < Shape::kBlockM ? left : Shape::kBlockM,
                     a.statistics + first_m / Shape::kBlockM * 3 * outputs + group * a.K + first_n,
                     outputs, a.K - first_n);
  }
  // Stores the folded channel after the accumulators. Called by all threads, after they have stored
  // their accumulators.
  __device__ __forceinline__ void store_channel(uint8_t* shared) const {
    static_assert(Shape::kBlockN <= Shape::kThreads);
    const int thread = read_tid();
    if (thread < Shape::kBlockN)
      FoldedChannels<kRowPacks>{shared + kSumBytes}.store(thread, channel.folded(a.mask.eps));
  }
  // Stores the masked accumulators to y and computes the tile's sums. Called by all threads.
  __device__ __forceinline__ void write_gradient(uint8_t* shared, int first_m, int group,
                                                 int first_n) {
    using Channels = FoldedChannels<kRowPacks>;
    static_assert(kSumBytes + Channels::kBytes + Statistics::kScratchBytes <= Shape::kSharedBytes);
    GradientColumn<T> gradient;
    Channels{shared + kSumBytes}.load(column / kSize, gradient.channels);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float sums[kSize];
      load_sums(shared, i, sums);
      if (inside(i)) {
        const uint4 g = gradient.add(rounded<T>(sums), extra[i % kAhead]);
        store_global<uint4>(a.y + (first + i * step) * sizeof(T), g);
      }
      if (i + kAhead < kPacks) load_extra(i + kAhead);
    }
    const int64_t outputs = int64_t{a.groups} * a.K;
    gradient.template write<kRowPacks, Shape::kThreads>(
        shared + kSumBytes + Channels::kBytes, BlockThreads{},
        a.mask.sums + first_m / Shape::kBlockM * 2 * outputs + group * a.K + first_n, outputs,
        a.K - first_n);
  }
};

// Prologue: processes a step of x when it has arrived (cuda/convolution/prologue.h).
template <typename T, int kTile, bool kPointwise, Epilogue kEpilogue, class Prologue = NoPrologue>
__global__ void __launch_bounds__(TileShape<kTile>::kThreads, TileShape<kTile>::kBlocksPerSm)
    implicit_gemm_sm80_kernel(const GemmArguments a) {
  using Shape = TileShape<kTile>;
  using Pixels = MatrixReader<Shape::kBlockM / Shape::kCopyRows, Shape::kCopyRows>;
  using Windows = WindowReader<Shape::kBlockM / Shape::kCopyRows, Shape::kCopyRows>;
  using Weights = MatrixReader<Shape::kBlockN / Shape::kCopyRows, Shape::kCopyRows>;
  constexpr int kProducts = Shape::kWarpN / 8;  // mma per row of the warp's tile

  uint8_t* const shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const auto place = [&](unsigned block) {
    return tile_place(block, static_cast<unsigned>(a.tiles_m), static_cast<unsigned>(a.tiles_n));
  };
  TilePlace tile = place(blockIdx.x);
  int group = tile.column / a.tiles_per_group;
  int first_m = tile.row * Shape::kBlockM;
  int first_n = (tile.column - group * a.tiles_per_group) * Shape::kBlockN;
  const StepRange steps = split_steps(a.steps, a.splits, tile.split);

  // Copies of this thread.
  const int copy_row = thread / kStepChunks;
  const int copy_offset = operand_offset(copy_row, thread % kStepChunks);
  const int chunk = steps.first * kStepChunks + thread % kStepChunks;
  auto pixels = [&] {
    if constexpr (kPointwise)
      return Pixels{(first_m + copy_row) * a.pixel_chunks + group * a.chunks + chunk,
                    a.pixel_chunks, a.M - first_m - copy_row, static_cast<int>(a.chunks) - chunk};
    else
      return Windows(a, group, first_m + copy_row, chunk);
  }();
  Weights weights{(group * a.K + first_n + copy_row) * a.chunks + chunk, a.chunks,
                  a.K - first_n - copy_row, static_cast<int>(a.chunks) - chunk};
  const auto copy_step = [&](int slot) {
    uint8_t* stage = shared + slot * Shape::kStageBytes + copy_offset;
    pixels.copy(a, a.x, stage);
    weights.copy(a, a.weight, stage + Shape::kABytes);
    pixels.advance(a);
    weights.advance(a);
  };

  // Operands of this warp. ldmatrix: matrices 0 and 1 are rows 0 to 7 and 8 to 15 of A, or the
  // first and second chunk of rows 0 to 7 of B; matrices 2 and 3 are the second chunk of A, or rows
  // 8 to 15 of B.
  const int warp_m = warp % Shape::kWarpsM * Shape::kWarpM;
  const int warp_n = warp / Shape::kWarpsM * Shape::kWarpN;
  const int a_offset = operand_offset(warp_m + lane % 16, lane / 16);
  const int b_offset = operand_offset(warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  float sums[Shape::kWarpM / 16][kProducts][4] = {};
  Fragments<Shape> fragments[2];
  Prologue prologue(a.norm, static_cast<int>(a.chunks), thread % kStepChunks);

#pragma unroll
  for (int i = 0; i < Shape::kStages - 1; ++i) {
    if (steps.first + i < steps.last) copy_step(i);
    copy_async_commit();
  }
  int read_slot = 0, write_slot = Shape::kStages - 1;
  for (int step = steps.first; step < steps.last; ++step) {
    prologue.load(step);
    // After the barrier, the step has arrived for every thread, and every thread has read the
    // previous step, whose slot is written next.
    copy_async_wait<Shape::kStages - 2>();
    prologue.apply(shared + read_slot * Shape::kStageBytes + copy_offset);
    __syncthreads();
    const uint8_t* stage = shared + read_slot * Shape::kStageBytes;
    fragments[0].template load<T>(stage, a_offset, b_offset, 0);
    if (step + Shape::kStages - 1 < steps.last) copy_step(write_slot);
    copy_async_commit();
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (quarter < 3)
        fragments[(quarter + 1) % 2].template load<T>(stage, a_offset, b_offset, quarter + 1);
      const Fragments<Shape>& now = fragments[quarter % 2];
#pragma unroll
      for (int i = 0; i < Shape::kWarpM / 16; ++i)
#pragma unroll
        for (int j = 0; j < kProducts; ++j) matrix_multiply<T>(sums[i][j], now.a[i], now.b[j]);
    }
    read_slot = read_slot + 1 < Shape::kStages ? read_slot + 1 : 0;
    write_slot = write_slot + 1 < Shape::kStages ? write_slot + 1 : 0;
  }

  if constexpr (kEpilogue == Epilogue::gradient) {
    // Recomputed: the loop has no registers to spare for these values.
    tile = place(read_ctaid());
    group = tile.column / a.tiles_per_group;
    first_m = tile.row * Shape::kBlockM;
    first_n = (tile.column - group * a.tiles_per_group) * Shape::kBlockN;
  }
  Finish<T, Shape, kEpilogue> finish(a, first_m, group, first_n);
  copy_async_wait<0>();
  __syncthreads();  // the ring has been read; reuse its memory
#pragma unroll
  for (int i = 0; i < Shape::kWarpM / 16; ++i)
#pragma unroll
    for (int j = 0; j < kProducts; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m + i * 16 + half * 8 + lane / 4;
        const int column = warp_n + j * 8 + lane % 4 * 2;
        const float* pair = &sums[i][j][2 * half];
        store_shared<uint2>(shared + sum_offset(row, column, Shape::kBlockN),
                            {float_bits(pair[0]), float_bits(pair[1])});
      }
  if constexpr (kEpilogue == Epilogue::gradient) finish.store_channel(shared);
  __syncthreads();
  if constexpr (kEpilogue == Epilogue::statistics)
    finish.write_with_statistics(shared, first_m, group, first_n);
  else if constexpr (kEpilogue == Epilogue::gradient)
    finish.write_gradient(shared, first_m, group, first_n);
  else if (a.partial != nullptr)
    finish.write_partial(shared, tile.split);
  else
    finish.write(shared);
}

constexpr int kMergeThreads = 256;

// Adds the sums of all splits, in order, for 16 bytes of y.
template <typename T>
__device__ __forceinline__ void add_splits(const GemmArguments& a, int64_t pack, int64_t packs,
                                           float (&sums)[Pack<T>::size]) {
  constexpr int size = Pack<T>::size;
  for (int split = 0; split < a.splits; ++split) {
    const float* part = a.partial + (split * packs + pack) * size;
#pragma unroll
    for (int j = 0; j < size; j += 4) {
      const auto four = unpack<float>(load_global_once<uint4>(part + j));
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j + i] += four.values[i];
    }
  }
}

// partial (splits, M, groups * K) -> y: a thread adds the splits of 16 bytes of y, in order.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    implicit_gemm_merge_kernel(const GemmArguments a, FastDivision row_packs, int packs) {
  constexpr int size = Pack<T>::size;
  const int64_t pack = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (pack >= packs) return;
  const int m = row_packs.quotient(static_cast<int>(pack));
  const int k = row_packs.remainder(static_cast<int>(pack), m) * size;
  uint4 residual{};
  if (a.residual != nullptr) residual = load_global_once<uint4>(a.residual + pack * 16);
  float sums[size] = {}, scale[size], shift[size];
  add_splits<T>(a, pack, packs, sums);
#pragma unroll
  for (int j = 0; j < size; ++j) scale[j] = a.scale[k + j], shift[j] = a.shift[k + j];
  store_global<uint4>(a.y + pack * 16, finished<T>(sums, scale, shift, a.residual != nullptr,
                                                   residual, a.activation));
}

constexpr int kMergeColumns = 8;  // columns of 16 bytes of a block, for kMergedPixels pixels
constexpr int kMergePacks = kMergedPixels * kMergeColumns / kMergeThreads;

// The same without scale, shift and residual, and with the part's statistics.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    implicit_gemm_merge_statistics_kernel(const GemmArguments a, int row_packs, int slabs) {
  constexpr int size = Pack<T>::size, pixels = kMergeThreads / kMergeColumns, each = kMergePacks;
  using Statistics = PartStatistics<T, kMergeColumns, kMergeThreads, each>;
  uint8_t* const shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x);
  const int part = static_cast<int>(blockIdx.x) / slabs;
  const int first_pack = (static_cast<int>(blockIdx.x) - part * slabs) * kMergeColumns;
  const int first_m = part * kMergedPixels;
  const int left = a.M - first_m < kMergedPixels ? a.M - first_m : kMergedPixels;
  const int column = thread % kMergeColumns, row = thread / kMergeColumns;
  const int rows = first_pack + column < row_packs ? left : 0;
  uint4 y[each] = {};
  int mine = 0;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    if (row + i * pixels >= rows) continue;
    const int64_t pack = int64_t{first_m + row + i * pixels} * row_packs + first_pack + column;
    float sums[size] = {};
    add_splits<T>(a, pack, int64_t{a.M} * row_packs, sums);
    y[i] = rounded<T>(sums);
    store_global<uint4>(a.y + pack * 16, y[i]);
    ++mine;
  }
  if (row == 0) store_shared<uint4>(shared + column * 16, y[0]);
  __syncthreads();
  const auto first_pixel = load_shared<uint4>(shared + column * 16);
  __syncthreads();
  const int64_t outputs = int64_t{row_packs} * size;
  const int first = first_pack * size;
  const Statistics statistics{shared, {}};
  statistics.write(y, mine, first_pixel, left, a.statistics + part * 3 * outputs + first, outputs,
                   static_cast<int>(outputs) - first);
}

}  // namespace fused_resnet
