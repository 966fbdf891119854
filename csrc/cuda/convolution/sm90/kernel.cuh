// conv_bn_relu on Hopper: an implicit GEMM by TMA and wgmma.
//   y[m, k] = activation(scale[k] * sum over (r, s, c) of x[pixel of m at (r, s), c] * weight[k, r,
//   s, c]
//                  + shift[k] + residual[m, k])            (cuda/convolution/problem.h)
// Layout: x, residual, y channels last, weight (groups * K, R, S, C); float16 or bfloat16. In
// shared memory every tile consists of rows of 128 bytes, swizzled. Accumulators: float32, one
// rounding.
// The kernel is persistent: a block processes the tiles blockIdx.x + i * gridDim.x. One thread of
// the first warpgroup (the producer) issues the copies: for each step (a tap, 64 channels) block_m
// pixels by im2col and block_n rows of weights. Two consumer warpgroups multiply. With four warps
// per tile, the warpgroups process different tiles in alternation, so that one multiplies while the
// other runs its epilogue. With eight warps per tile, each warpgroup computes half of the tile's
// rows; the copies of the next tile still overlap. A thread has block_m / warps * block_n / 32
// accumulators. TMA loads the residual into the output buffer while the tile is multiplied; the
// epilogue replaces each value in place, and TMA stores the buffer.
// In training, y is the plain convolution, and a warpgroup computes the statistics of its rows for
// the following batch norm (cuda/convolution/statistics.cuh): it reads the rounded rows back, 16
// bytes at a time, while TMA reads them too, and reduces them in the same buffer after TMA has read
// it. Or y is an input gradient, masked by the ReLU, with the sums of the batch norm gradient
// (cuda/convolution/gradient.cuh): a warpgroup reads its rounded rows back and masks them in place,
// using the batch norm's input, which is loaded from global memory 16 bytes at a time; then TMA
// stores them.
// Memory traffic: x R * S / (stride_h * stride_w) times and weights once per tile of pixels, from
// L2 except the first time; residual and y once. Constraints: covers_sm90; 227 KiB of shared
// memory, one block per multiprocessor. Speed: not yet measured.
// Rejected before measuring: statistics of the accumulators in registers (three shuffles per output
// of a thread and per sum; columns of 16 bytes need at most two for eight outputs); separate memory
// for the reductions (costs a pipeline stage); the batch norm's input by TMA, like the residual (it
// would need the buffer that holds the rounded rows, and is read again for its sums, which do not
// fit in a thread's registers before the rows are read back); folding the batch norm's channels
// cooperatively, in shared memory (none is left, and a thread folds its eight channels while its
// loads are in flight).
// Rejected: scale and shift in shared memory (costs a pipeline stage, for data that L1 holds).
// Weights as (groups * K, R * S * C) (a step past a tap's last channel would read the next tap).
// Groups as a fifth dimension of x, for im2col on groups that end within a step (their stride would
// be less than that of a pixel, while the driver's manual requires each stride to contain the
// previous one; and narrow groups fill little of a tile of 64 outputs or more).
#pragma once

#include "cuda/convolution/gradient.cuh"
#include "cuda/convolution/prologue.h"
#include "cuda/convolution/sm90/kernel.h"
#include "cuda/convolution/statistics.cuh"

namespace fused_resnet {

constexpr int kSm90Threads = 384;  // one producer warpgroup, two consumers
constexpr int kSm90CopyRegisters = 40, kSm90MultiplyRegisters = 232;

// Shared memory layout of a block: stages, output buffers, mbarriers, starting at an address
// rounded up to 1024 bytes.
template <int kTile>
struct Sm90Shape {
  static constexpr GemmTile tile = kGemmTiles[kTile];
  static constexpr int block_m = tile.block_m, block_n = tile.block_n, stages = tile.stages;
  static constexpr bool halves = tile.warps == 8;  // each warpgroup computes half of a tile
  static constexpr int rows = tile.part_pixels();  // per warpgroup
  static constexpr int row_blocks = rows / 64;
  static constexpr int x_bytes = block_m * kSwizzleRowBytes;
  static constexpr int stage_bytes = x_bytes + block_n * kSwizzleRowBytes;
  static constexpr int chunk_bytes = rows * kSwizzleRowBytes;  // 64 outputs of all rows
  static constexpr int output_bytes = block_n / 64 * chunk_bytes;
  static constexpr int barriers = 2 * stages + 4;
  static constexpr int shared_bytes = (kSwizzleAtomBytes - 16) + stages * stage_bytes +
                                      2 * output_bytes + barriers * int{sizeof(uint64_t)};
  static_assert(tile.architecture == 90 && (tile.warps == 4 || tile.warps == 8));
  static_assert(rows % 64 == 0 && block_m <= 256 && block_n <= 256);
  static_assert(row_blocks * block_n / 2 <= 128, "accumulators per thread");
  static_assert(shared_bytes <= 227 * 1024);
};

#if FUSED_RESNET_HOPPER

template <int kTile>
struct Sm90Block {
  using Shape = Sm90Shape<kTile>;
  uint8_t* stages;
  uint8_t* outputs;
  uint64_t* full;          // a stage's copies have arrived
  uint64_t* empty;         // a stage's wgmma are complete
  uint64_t* output_ready;  // a warpgroup's buffer is writable and holds the residual, if any
  uint64_t* turn;          // all copies of the other warpgroup's tile have arrived

  __device__ static Sm90Block make() {
    uint8_t* base = shared_memory();
    base += (kSwizzleAtomBytes - shared_address(base) % kSwizzleAtomBytes) % kSwizzleAtomBytes;
    uint8_t* outputs = base + Shape::stages * Shape::stage_bytes;
    auto* full = reinterpret_cast<uint64_t*>(outputs + 2 * Shape::output_bytes);
    uint64_t* output_ready = full + 2 * Shape::stages;
    return {base, outputs, full, full + Shape::stages, output_ready, output_ready + 2};
  }
  __device__ uint8_t* stage(int number) const { return stages + number * Shape::stage_bytes; }
};

// One thread: issues the copies of every step of this block's tiles, as stages become free.
template <int kTile>
__device__ __forceinline__ void copy_tiles(const Sm90Block<kTile>& block, const TensorMap& x_map,
                                           const TensorMap& weight_map, const GemmSm90& gemm) {
  using Shape = Sm90Shape<kTile>;
  StageRing<Shape::stages> ring;
  const auto blocks = static_cast<int>(gridDim.x);
  for (int tile = static_cast<int>(blockIdx.x); tile < gemm.tiles; tile += blocks) {
    const TileStart start = tile_start(gemm, tile, Shape::block_m, Shape::block_n);
    const InputStart from = input_start(gemm, start.m);
    for (int tap = 0, r = 0, s = 0; tap < gemm.R * gemm.S; ++tap) {
      const auto offset_h = static_cast<uint16_t>(r * gemm.dilation_h);
      const auto offset_w = static_cast<uint16_t>(s * gemm.dilation_w);
      for (int c = 0; c < gemm.C; c += kStepChannels) {
        uint8_t* x_tile = block.stage(ring.stage);
        uint64_t* full = block.full + ring.stage;
        mbarrier_wait(block.empty + ring.stage, ring.parity ^ 1);
        mbarrier_arrive_expect(full, Shape::stage_bytes);
        if (gemm.input == Sm90Input::kMatrix)
          load_box(x_tile, x_map, full, c, start.group, start.m);
        else
          load_im2col(x_tile, x_map, full, start.group * gemm.C + c, from.w, from.h, from.n,
                      offset_w, offset_h);
        load_box(x_tile + Shape::x_bytes, weight_map, full, c, tap, start.group * gemm.K + start.k);
        ring.next();
      }
      if (++s == gemm.S) {
        s = 0;
        ++r;
      }
    }
  }
}

// Sets the accumulators to zero, so that their old values are dead. The assembler treats the first
// wgmma of a tile as reading its accumulators, and would otherwise keep their registers allocated
// from one tile to the next, across the epilogue.
template <int kBlocks, int kCount>
__device__ __forceinline__ void mark_dead(float (&sums)[kBlocks][kCount]) {
#pragma unroll
  for (auto& block : sums)
#pragma unroll
    for (float& sum : block) sum = 0;
}

// One warpgroup: computes the accumulators (rows, block_n) of one tile. Returns after releasing all
// its stages. If `next_turn` is not null, it signals the other warpgroup once all copies of its own
// tile have arrived: parity alone cannot distinguish a step from the one two phases earlier. Every
// warp must arrive: with one step per tile, the others could enter the next phase while a late warp
// still waits for this one, whose parity it would never see.
// prologue: processes the warpgroup's rows of a step of x when it has arrived.
template <typename T, int kTile, class Prologue>
__device__ __forceinline__ void multiply_tile(
    const Sm90Block<kTile>& block, StageRing<Sm90Shape<kTile>::stages>& ring, int first_row,
    int steps, uint64_t* next_turn, Prologue& prologue,
    float (&sums)[Sm90Shape<kTile>::row_blocks][Sm90Shape<kTile>::block_n / 2]) {
  using Shape = Sm90Shape<kTile>;
  const bool first_lane = threadIdx.x % 32 == 0;
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    prologue.load(step);
    mbarrier_wait(block.full + ring.stage, ring.parity);
    prologue.apply(block.stage(ring.stage) + first_row * kSwizzleRowBytes);
    const uint32_t stage = shared_address(block.stage(ring.stage));
    const uint32_t x_tile = stage + first_row * kSwizzleRowBytes;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStepBytes; k += 32)  // 16 channels
#pragma unroll
      for (int i = 0; i < Shape::row_blocks; ++i)
        warpgroup_multiply<T, Shape::block_n>(
            sums[i], tile_descriptor(x_tile, i * 64 * kSwizzleRowBytes + k),
            tile_descriptor(stage, Shape::x_bytes + k), step > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<1>();  // those of the previous step are complete
    if (step > 0 && first_lane) mbarrier_arrive(block.empty + previous);
    previous = ring.stage;
    ring.next();
  }
  if (next_turn != nullptr && first_lane) mbarrier_arrive(next_turn);
  __syncwarp();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < Shape::row_blocks; ++i) wgmma_fence_operand(sums[i]);
  if (first_lane) mbarrier_arrive(block.empty + previous);
}

// Scale and shift of a thread's four outputs out of 16: two of the first eight, two of the second.
struct ChannelPairs {
  float2 scale[2], shift[2];

  // k: the first of the 16 outputs within the group. The number of outputs of a group is a multiple
  // of 8 (checked by the op). Outputs past the last get the values of others and are not stored.
  __device__ __forceinline__ static ChannelPairs load(const GemmSm90& gemm, int group, int k) {
    const int lane = static_cast<int>(threadIdx.x % 4) * 2;
    ChannelPairs pairs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = group * gemm.K + (k + 8 * half < gemm.K ? k + 8 * half : 0) + lane;
      pairs.scale[half] = load_global<float2>(gemm.scale + at);
      pairs.shift[half] = load_global<float2>(gemm.shift + at);
    }
    return pairs;
  }
};

// One warpgroup: converts accumulators to outputs in its buffer, in place of the residual. The
// training epilogues store the accumulators as they are.
template <typename T, int kTile, Epilogue kEpilogue>
__device__ __forceinline__ void finish_tile(
    const GemmSm90& gemm, const TileStart& start, uint8_t* output,
    const float (&sums)[Sm90Shape<kTile>::row_blocks][Sm90Shape<kTile>::block_n / 2]) {
  using Shape = Sm90Shape<kTile>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32 % 4);
  constexpr bool scaled = kEpilogue == Epilogue::scale;
  const float floor = gemm.activation == kRelu ? 0.0f : -INFINITY;
  ChannelPairs next{};
  if constexpr (scaled) next = ChannelPairs::load(gemm, start.group, start.k);
#pragma unroll
  for (int column = 0; column < Shape::block_n; column += 16) {
    const ChannelPairs pairs = next;  // loaded during the previous 16 columns
    if constexpr (scaled)
      if (column + 16 < Shape::block_n)
        next = ChannelPairs::load(gemm, start.group, start.k + column + 16);
#pragma unroll
    for (int i = 0; i < Shape::row_blocks; ++i) {
      // Lanes 0 to 15: rows of the first eight columns; 16 to 31: of the second eight.
      uint8_t* place = output + column / 64 * Shape::chunk_bytes +
                       swizzled_offset(i * 64 + warp * 16 + lane % 16, column % 64 / 8 + lane / 16);
      uint32_t added[4] = {}, out[4];
      if (scaled && gemm.residual) load_matrix_x4(added, place);
#pragma unroll
      for (int matrix = 0; matrix < 4; ++matrix) {
        const float* pair = &sums[i][column / 2 + 2 * matrix];
        if constexpr (!scaled) {
          out[matrix] = narrow_pair<T>(pair[0], pair[1]);
        } else {
          const float2 a = pairs.scale[matrix / 2], b = pairs.shift[matrix / 2];
          const float2 r = widen_pair<T>(added[matrix]);
          const float low = pair[0] * a.x + b.x + r.x;
          const float high = pair[1] * a.y + b.y + r.y;
          out[matrix] = narrow_pair<T>(max_nan(low, floor), max_nan(high, floor));
        }
      }
      store_matrix_x4(place, out);
    }
  }
}

// The 128 threads of a warpgroup.
struct WarpgroupThreads {
  int warpgroup;
  __device__ __forceinline__ static int index() { return read_tid() % 128; }
  __device__ __forceinline__ void sync() const {
    __syncwarp();  // reconverge: the barrier requires whole warps
    barrier_sync(1 + static_cast<uint32_t>(warpgroup), 128);
  }
};

// One warpgroup: computes the statistics of its rows of a tile, from its buffer, which TMA reads
// too. m: the first row, less than gemm.M; leader: the thread that waits for TMA. On return the
// buffer is free.
template <typename T, int kTile>
__device__ __forceinline__ void write_statistics(const GemmSm90& gemm, const TileStart& start,
                                                 int m, uint8_t* output, int warpgroup,
                                                 bool leader) {
  using Shape = Sm90Shape<kTile>;
  constexpr int columns = Shape::block_n / Pack<T>::size, rows = 128 / columns;
  constexpr int packs = Shape::rows / rows;
  using Statistics = PartStatistics<T, columns, 128, packs, WarpgroupThreads>;
  static_assert(Statistics::kScratchBytes <= Shape::output_bytes);
  const WarpgroupThreads threads{warpgroup};
  const int column = threads.index() % columns, row = threads.index() / columns;
  const int left = gemm.M - m, count = left < Shape::rows ? left : Shape::rows;
  const uint8_t* chunk = output + column / 8 * Shape::chunk_bytes;
  const auto first = load_shared<uint4>(chunk + swizzled_offset(0, column % 8));
  uint4 pixels[packs];
  int mine = 0;
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    pixels[i] = load_shared<uint4>(chunk + swizzled_offset(row + i * rows, column % 8));
    mine += row + i * rows < count;
  }
  if (leader) store_wait_read();
  threads.sync();  // all threads have read the buffer; reuse its memory
  const int64_t outputs = int64_t{gemm.groups} * gemm.K;
  const Statistics statistics{output, threads};
  statistics.write(pixels, mine, first, count,
                   gemm.statistics + m / Shape::rows * 3 * outputs + start.group * gemm.K + start.k,
                   outputs, gemm.K - start.k);
  threads.sync();  // the sums have been read
}

// One warpgroup: masks its rows of a tile and computes their sums.
template <typename T, int kTile>
struct MaskedRows {
  using Shape = Sm90Shape<kTile>;
  static constexpr int columns = Shape::block_n / Pack<T>::size, step = 128 / columns;
  static constexpr int packs = Shape::rows / step;
  static constexpr int ahead = packs < 8 ? packs : 8;  // loads of the batch norm's input in flight

  const GemmSm90& gemm;
  const TileStart& start;
  int m;  // the first row; gemm.M or more if there are no rows
  uint8_t* output;
  WarpgroupThreads threads;
  GradientColumn<T> gradient;

  // Masks the rows in the buffer, after all threads of the warpgroup have stored their accumulators
  // there.
  __device__ __forceinline__ void mask() {
    const int column = threads.index() % columns, row = threads.index() / columns;
    const int k = start.k + column * Pack<T>::size;
    const int left = k < gemm.K ? gemm.M - m : 0;
    const int64_t outputs = int64_t{gemm.groups} * gemm.K, c = start.group * gemm.K + k;
    const auto* x =
        static_cast<const uint8_t*>(gemm.mask.x) + ((int64_t{m} + row) * outputs + c) * sizeof(T);
    uint4 loaded[ahead];
    const auto load = [&](int i) {
      if (row + i * step < left)
        loaded[i % ahead] = load_global_once<uint4>(x + i * step * outputs * int64_t{sizeof(T)});
    };
#pragma unroll
    for (int i = 0; i < ahead; ++i) load(i);
    if (left > 0) {
#pragma unroll
      for (int i = 0; i < Pack<T>::size; ++i)
        gradient.channels[i] = NormParameters::load(gemm.mask, c + i).folded(gemm.mask.eps);
    }
    threads.sync();
    uint8_t* const chunk = output + column / 8 * Shape::chunk_bytes;
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (row + i * step >= left) continue;
      uint8_t* const place = chunk + swizzled_offset(row + i * step, column % 8);
      store_shared<uint4>(place, gradient.add(load_shared<uint4>(place), loaded[i % ahead]));
      if (i + ahead < packs) load(i + ahead);
    }
  }
  // leader: the thread that waits for TMA. On return the buffer is free.
  __device__ __forceinline__ void write_sums(bool leader) {
    static_assert(PartStatistics<T, columns, 128, 1, WarpgroupThreads>::kScratchBytes <=
                  Shape::output_bytes);
    if (leader) store_wait_read();
    threads.sync();  // TMA has read the rows; reuse their memory
    const int64_t outputs = int64_t{gemm.groups} * gemm.K;
    gradient.template write<columns, 128>(
        output, threads,
        gemm.mask.sums + m / Shape::rows * 2 * outputs + start.group * gemm.K + start.k, outputs,
        gemm.K - start.k);
    threads.sync();  // the sums have been read
  }
};

// A consumer warpgroup: processes its tiles one after the other.
template <typename T, int kTile, Epilogue kEpilogue, class Prologue>
__device__ __forceinline__ void multiply_tiles(const Sm90Block<kTile>& block,
                                               const TensorMap& residual_map,
                                               const TensorMap& y_map, const GemmSm90& gemm,
                                               int warpgroup) {
  using Shape = Sm90Shape<kTile>;
  const bool leader =
      threadIdx.x % 128 < 32 && elect_lane();  // issues the TMA copies of the output buffer
  const int steps = gemm.steps();
  const int first_row = Shape::halves ? warpgroup * Shape::rows : 0;
  uint8_t* output = block.outputs + warpgroup * Shape::output_bytes;
  uint64_t* output_ready = block.output_ready + warpgroup;
  uint32_t output_parity = 0, turn_parity = warpgroup == 0;  // warpgroup 0 starts
  StageRing<Shape::stages> ring;
  Prologue prologue(gemm.norm, gemm.C / 8, warpgroup);
  const auto blocks = static_cast<int>(gridDim.x);
  int tile = static_cast<int>(blockIdx.x);
  if (!Shape::halves && warpgroup == 1) {
    tile += blocks;
    ring.advance(steps);
  }
  for (; tile < gemm.tiles; tile += Shape::halves ? blocks : 2 * blocks) {
    const TileStart start = tile_start(gemm, tile, Shape::block_m, Shape::block_n);
    const int m = start.m + first_row;
    const int needed_chunks = (gemm.K - start.k + 63) / 64;
    const int chunks = needed_chunks < Shape::block_n / 64 ? needed_chunks : Shape::block_n / 64;
    if (gemm.residual && leader) {
      store_wait_read();
      mbarrier_arrive_expect(output_ready, static_cast<uint32_t>(chunks * Shape::chunk_bytes));
      for (int i = 0; i < chunks; ++i)
        load_box(output + i * Shape::chunk_bytes, residual_map, output_ready, start.k + i * 64,
                 start.group, m);
    }
    __syncwarp();
    float sums[Shape::row_blocks][Shape::block_n / 2];
    if constexpr (kEpilogue != Epilogue::scale) mark_dead(sums);
    if constexpr (Shape::halves) {
      multiply_tile<T, kTile>(block, ring, first_row, steps, nullptr, prologue, sums);
    } else {
      mbarrier_wait(block.turn + warpgroup, turn_parity);
      turn_parity ^= 1;
      multiply_tile<T, kTile>(block, ring, first_row, steps, block.turn + (1 - warpgroup), prologue,
                              sums);
      ring.advance(steps);  // skip the steps of the other warpgroup
    }
    if (!gemm.residual && leader) {
      store_wait_read();
      mbarrier_arrive(output_ready);
    }
    mbarrier_wait(output_ready, output_parity);
    output_parity ^= 1;
    __syncwarp();
    finish_tile<T, kTile, kEpilogue>(gemm, start, output, sums);
    MaskedRows<T, kTile> masked{gemm, start, m, output, {warpgroup}, {}};
    if constexpr (kEpilogue == Epilogue::gradient) masked.mask();
    fence_proxy_async();
    barrier_sync(1 + static_cast<uint32_t>(warpgroup), 128);
    if (leader) {
      for (int i = 0; i < chunks; ++i)
        store_box(y_map, output + i * Shape::chunk_bytes, start.k + i * 64, start.group, m);
      store_commit();
    }
    __syncwarp();
    if constexpr (kEpilogue == Epilogue::statistics)
      if (m < gemm.M) write_statistics<T, kTile>(gemm, start, m, output, warpgroup, leader);
    if constexpr (kEpilogue == Epilogue::gradient)
      if (m < gemm.M) masked.write_sums(leader);
  }
  if (leader) store_wait_read();  // shared memory must outlive the stores
}

#endif  // FUSED_RESNET_HOPPER

// x_map: from input_map; weight_map (C, R * S, groups * K); residual_map, y_map (K, groups, M)
template <typename T, int kTile, Epilogue kEpilogue, class Prologue = NoPrologue>
__global__ void __launch_bounds__(kSm90Threads, 1)
    implicit_gemm_sm90_kernel(const __grid_constant__ TensorMap x_map,
                              const __grid_constant__ TensorMap weight_map,
                              const __grid_constant__ TensorMap residual_map,
                              const __grid_constant__ TensorMap y_map,
                              const __grid_constant__ GemmSm90 gemm) {
#if FUSED_RESNET_HOPPER
  using Shape = Sm90Shape<kTile>;
  const auto block = Sm90Block<kTile>::make();
  if (threadIdx.x == 0) {
    prefetch_map(x_map);
    prefetch_map(weight_map);
    prefetch_map(residual_map);
    prefetch_map(y_map);
    for (int i = 0; i < Shape::stages; ++i) {
      mbarrier_init(block.full + i, 1);
      mbarrier_init(block.empty + i, Shape::halves ? 8 : 4);  // warps that read a stage
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(block.output_ready + i, 1);
      mbarrier_init(block.turn + i, 4);  // warps of the other warpgroup
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<kSm90CopyRegisters>();
    if (threadIdx.x < 32 && elect_lane()) copy_tiles<kTile>(block, x_map, weight_map, gemm);
  } else {
    setmaxnreg_inc<kSm90MultiplyRegisters>();
    // Broadcast from lane 0, so that the compiler knows it is warp-uniform.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128) - 1, 0);
    multiply_tiles<T, kTile, kEpilogue, Prologue>(block, residual_map, y_map, gemm, warpgroup);
  }
#else
  __trap();
#endif
}

// Calls f(std::integral_constant<int, i>) for every sm_90 tile i of kGemmTiles.
template <int kTile = 0, typename F>
void for_each_sm90_tile(const F& f) {
  if constexpr (kTile < kGemmTileCount) {
    if constexpr (kGemmTiles[kTile].architecture == 90) f(std::integral_constant<int, kTile>{});
    for_each_sm90_tile<kTile + 1>(f);
  }
}

template <typename T>
void Sm90Kernels<T>::launch(const DeviceScope& scope, int tile, const Sm90Maps& maps,
                            const GemmSm90& gemm, Epilogue epilogue) {
  bool found = false;
  for_each_sm90_tile([&](auto number) {
    constexpr int kTile = decltype(number)::value;
    if (kTile != tile) return;
    found = true;
    const int64_t blocks = std::min(gemm.tiles, scope.multiprocessors());
    scope.launch({blocks, kSm90Threads, Sm90Shape<kTile>::shared_bytes},
                 epilogue == Epilogue::scale ? implicit_gemm_sm90_kernel<T, kTile, Epilogue::scale>
                 : epilogue == Epilogue::statistics
                     ? implicit_gemm_sm90_kernel<T, kTile, Epilogue::statistics>
                     : implicit_gemm_sm90_kernel<T, kTile, Epilogue::gradient>,
                 maps.x, maps.weight, maps.residual, maps.y, gemm);
  });
  check(found, "implicit_gemm: no Hopper kernel for tile ", tile);
}

template <typename T>
void Sm90Kernels<T>::list(std::vector<CudaKernel>& list, bool gpu) {
  for_each_sm90_tile([&](auto number) {
    constexpr int kTile = decltype(number)::value;
    const GemmTile& tile = kGemmTiles[kTile];
    const std::string name = std::string("implicit_gemm_sm90_") +
                             (std::is_same_v<T, float16_t> ? "float16_" : "bfloat16_") +
                             std::to_string(tile.block_m) + "x" + std::to_string(tile.block_n);
    describe_kernel(list, name, implicit_gemm_sm90_kernel<T, kTile, Epilogue::scale>, gpu);
    describe_kernel(list, name + "_statistics",
                    implicit_gemm_sm90_kernel<T, kTile, Epilogue::statistics>, gpu);
    describe_kernel(list, name + "_gradient",
                    implicit_gemm_sm90_kernel<T, kTile, Epilogue::gradient>, gpu);
  });
}

}  // namespace fused_resnet
