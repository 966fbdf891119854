// Partition of a tensor x (N, C, H, W) into blocks and threads for the CUDA kernels of bn_add_relu.
// Integer arithmetic for host and device. Includes no torch headers, and CUDA headers only through
// device.cuh.
//
// A packet is the unit of one memory access: 16 bytes, or one element where addresses or sizes do
// not allow that. A slab is the range of channels that a block processes. A row is a contiguous run
// of a slab in memory:
//   channels_last: a row is `columns` packets of the channels of one pixel; N*H*W rows;
//   contiguous: a slab is one channel, a row is one packet of one of its planes; N*H*W / packet
//   rows.
// A part is a range of rows. Block number = part * slabs + slab, so that concurrent blocks read
// neighbouring slabs of the same rows. The threads of a block form groups of `columns` threads. A
// thread processes one column of every groups-th row of the part.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device/device.cuh"

namespace fused_resnet {

constexpr int kMaxThreads = 512;

struct Cut {
  int64_t C, HW;  // of x
  bool channels_last;
  int packet;    // in elements
  int64_t rows;  // of a slab
  int64_t rows_per_part;
  int columns;  // packets per row, a power of two, at most 32
  int64_t slabs;
  int64_t parts;
  int threads;
  bool kept;  // each part stays in shared memory, and all blocks are resident at once

  __host__ __device__ int channels() const { return channels_last ? columns * packet : 1; }
  __host__ __device__ int64_t blocks() const { return slabs * parts; }
  __host__ __device__ int64_t begin(int64_t part) const { return part * rows_per_part; }
  __host__ __device__ int64_t end(int64_t part) const {
    const int64_t end = (part + 1) * rows_per_part;
    return end < rows ? end : rows;
  }
  __host__ __device__ int64_t values(int64_t rows) const {  // per channel
    return channels_last ? rows : rows * packet;
  }
  __host__ __device__ int64_t packets_per_part() const { return rows_per_part * columns; }
  // Size of the scratch in shared memory, in accumulators: two per warp and seven per block, for
  // each channel.
  __host__ __device__ int scratch_sums() const { return (threads / 32 * 2 + 7) * channels(); }
};

// The position of a row in the tensor, or the distance between two rows. For contiguous planes
// `inner` is the index within the plane; a step past its end continues in the same channel's plane
// of the next image.
struct Place {
  int64_t offset, inner;
};

__host__ __device__ inline Place place_of(const Cut& cut, int64_t channel, int64_t row) {
  if (cut.channels_last) return {row * cut.C + channel, 0};
  const int64_t i = row * cut.packet;
  return {(i / cut.HW * cut.C + channel) * cut.HW + i % cut.HW, i % cut.HW};
}
__host__ __device__ inline Place step_of(const Cut& cut, int64_t rows) {
  return place_of(cut, 0, rows);
}
template <bool kChannelsLast>
__host__ __device__ inline void step_forward(const Cut& cut, Place& place, const Place& step) {
  place.offset += step.offset;
  if constexpr (!kChannelsLast) {
    place.inner += step.inner;
    if (place.inner >= cut.HW) {
      place.inner -= cut.HW;
      place.offset += (cut.C - 1) * cut.HW;
    }
  }
}
template <bool kChannelsLast>
__host__ __device__ inline void step_back(const Cut& cut, Place& place, const Place& step) {
  place.offset -= step.offset;
  if constexpr (!kChannelsLast) {
    place.inner -= step.inner;
    if (place.inner < 0) {
      place.inner += cut.HW;
      place.offset -= (cut.C - 1) * cut.HW;
    }
  }
}

// Inputs of cut_for in addition to the sizes of x.
struct CutOptions {
  int element_bytes;
  bool vectors;  // every pointer is aligned to 16 bytes
  int operands;  // kept in shared memory: 1 for x, 2 for g and x
  int multiprocessors;
  int shared_bytes;  // maximum per block
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int sum_bytes(int element_bytes) { return element_bytes == 8 ? 8 : 4; }

inline int shared_bytes_of(const Cut& cut, const CutOptions& options) {
  const int64_t kept =
      cut.kept ? cut.packets_per_part() * cut.packet * options.element_bytes * options.operands : 0;
  return static_cast<int>(divide_up(kept, 16) * 16 +
                          cut.scratch_sums() * int64_t{sum_bytes(options.element_bytes)});
}

// Splits the rows of a slab into at most blocks / slabs parts. A part has at least one packet per
// thread.
inline void cut_rows(Cut& cut, int64_t blocks) {
  constexpr int threads_per_warp = 32, packets_per_thread = 4;
  const int64_t min_rows = divide_up(kMaxThreads, cut.columns);
  const int64_t parts = std::clamp<int64_t>(blocks / cut.slabs, 1, divide_up(cut.rows, min_rows));
  cut.rows_per_part = divide_up(cut.rows, parts);
  cut.parts = divide_up(cut.rows, cut.rows_per_part);
  const int64_t threads = divide_up(cut.packets_per_part(), packets_per_thread);
  cut.threads = static_cast<int>(std::clamp<int64_t>(
      divide_up(threads, threads_per_warp) * threads_per_warp, 2 * threads_per_warp, kMaxThreads));
}

inline void cut_channels(Cut& cut, int columns) {
  cut.columns = columns;
  cut.slabs = divide_up(cut.C, cut.channels());
}

// Whether every part fits in shared memory. If a slab has more than one part, its blocks
// synchronise, so all blocks must be resident: at most one per multiprocessor, because shared
// memory may not hold two.
inline bool can_keep(const Cut& cut, const CutOptions& options) {
  Cut kept = cut;
  kept.kept = true;
  return cut.packets_per_part() < (int64_t{1} << 20) &&
         shared_bytes_of(kept, options) <= options.shared_bytes &&
         (cut.parts == 1 || cut.blocks() <= options.multiprocessors);
}

// Partition of x (N, C, H, W) with N*H*W > 0. In order of preference:
// 1. One block per slab, data kept in shared memory, if the slabs alone occupy most of the device:
// no synchronisation between blocks. Uses the longest rows that allow this.
// 2. As many parts as multiprocessors, data kept in shared memory, one launch.
// 3. The same without keeping data in shared memory, in two launches.
// In 2 and 3 every block adds up the partial sums of its slab. Rows are shortened (to no less than
// 64 bytes, two sectors) to limit the bytes of these partial sums.
inline Cut cut_for(int64_t N, int64_t C, int64_t HW, bool channels_last,
                   const CutOptions& options) {
  constexpr int line_bytes = 128, sector_bytes = 32, merged_bytes = 16 * 1024;
  const int vector = 16 / options.element_bytes;
  Cut cut{};
  cut.C = C;
  cut.HW = HW;
  cut.channels_last = channels_last;
  cut.packet =
      options.vectors && options.element_bytes < 8 && (channels_last ? C : HW) % vector == 0
          ? vector
          : 1;
  cut.rows = N * HW / (channels_last ? 1 : cut.packet);
  const int packet_bytes = cut.packet * options.element_bytes;
  int widest = 1;
  while (channels_last && widest < divide_up(C, cut.packet) && widest < 32 &&
         widest * packet_bytes < line_bytes)
    widest *= 2;
  const auto narrowest = [&](int bytes) {
    return std::min(widest, std::max(bytes / packet_bytes, 1));
  };

  for (int columns = widest; columns >= narrowest(sector_bytes); columns /= 2) {
    cut_channels(cut, columns);
    cut_rows(cut, cut.slabs);
    if (4 * cut.slabs >= 3 * options.multiprocessors && can_keep(cut, options)) {
      cut.kept = true;
      return cut;
    }
    if (columns == 1) break;
  }
  for (int columns = widest; columns >= narrowest(2 * sector_bytes); columns /= 2) {
    cut_channels(cut, columns);
    cut_rows(cut, options.multiprocessors);
    const int64_t merged = cut.parts * cut.channels() * 3 * sum_bytes(options.element_bytes);
    if (merged <= merged_bytes || columns == 1) break;
    if (columns / 2 < narrowest(2 * sector_bytes)) break;
  }
  cut.kept = can_keep(cut, options);
  return cut;
}

}  // namespace fused_resnet
