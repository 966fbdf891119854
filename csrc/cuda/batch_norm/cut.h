// How the CUDA kernels of bn_add_relu cut a tensor x (N, C, H, W) into blocks and threads: plain
// integers, for host and device. No torch, no CUDA headers of its own.
//
// A packet is what a thread takes in one access: 16 bytes, or one element where addresses or sizes
// do not allow more. A slab is the channels that a block owns, and a row is what a slab has side by
// side in memory:
//   channels_last: a row is `columns` packets of one pixel's channels; N*H*W rows;
//   contiguous: a slab is one channel, a row one packet of one of its planes; N*H*W / packet rows.
// A part is a stretch of rows; block number = part * slabs + slab, so that blocks which run at the
// same time read neighbouring slabs of the same rows. A block's threads stand in groups of
// `columns`: a thread stays in its column and takes every groups-th row of the part.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/device/device.cuh"

namespace fused_resnet {

constexpr int kMaxThreads = 512;

struct Cut {
  int64_t C, HW;  // of x
  bool channels_last;
  int packet;    // elements
  int64_t rows;  // of a slab
  int64_t rows_per_part;
  int columns;  // packets of a row, a power of two, at most 32
  int64_t slabs;
  int64_t parts;
  int threads;
  bool kept;  // a part fits in shared memory, and all blocks on the device at once

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
  // Shared memory besides the part itself, in sums: two of every warp, and seven of a block.
  __host__ __device__ int scratch_sums() const { return (threads / 32 * 2 + 7) * channels(); }
};

// A row's place in the tensor, and how far apart two rows are. Contiguous planes: `inner` counts
// inside the plane, and a step that leaves it goes on in the same channel's plane of the next
// image.
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

// What the choice depends on besides the sizes.
struct CutFor {
  int element_bytes;
  bool vectors;  // every pointer is aligned to 16 bytes
  int operands;  // that a block keeps: x, or g and x
  int multiprocessors;
  int shared_bytes;  // that a block may ask for
};

inline int64_t cut_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int sum_bytes(int element_bytes) { return element_bytes == 8 ? 8 : 4; }

inline int shared_bytes_of(const Cut& cut, const CutFor& how) {
  const int64_t kept =
      cut.kept ? cut.packets_per_part() * cut.packet * how.element_bytes * how.operands : 0;
  return static_cast<int>(cut_up(kept, 16) * 16 +
                          cut.scratch_sums() * int64_t{sum_bytes(how.element_bytes)});
}

// Rows of a slab over at most `blocks` blocks; a part is worth a packet for every thread.
inline void cut_rows(Cut& cut, int64_t blocks) {
  constexpr int threads_per_warp = 32, packets_per_thread = 4;
  const int64_t worth_it = cut_up(kMaxThreads, cut.columns);
  const int64_t parts = std::clamp<int64_t>(blocks / cut.slabs, 1, cut_up(cut.rows, worth_it));
  cut.rows_per_part = cut_up(cut.rows, parts);
  cut.parts = cut_up(cut.rows, cut.rows_per_part);
  const int64_t threads = cut_up(cut.packets_per_part(), packets_per_thread);
  cut.threads = static_cast<int>(std::clamp<int64_t>(
      cut_up(threads, threads_per_warp) * threads_per_warp, 2 * threads_per_warp, kMaxThreads));
}

inline void cut_channels(Cut& cut, int columns) {
  cut.columns = columns;
  cut.slabs = cut_up(cut.C, cut.channels());
}

// Every part in shared memory, and no more blocks than multiprocessors where they have to wait for
// one another: a block is alone on its multiprocessor at worst.
inline bool can_keep(const Cut& cut, const CutFor& how) {
  Cut kept = cut;
  kept.kept = true;
  return cut.packets_per_part() < (int64_t{1} << 20) &&
         shared_bytes_of(kept, how) <= how.shared_bytes &&
         (cut.parts == 1 || cut.blocks() <= how.multiprocessors);
}

// x (N, C, H, W) with N*H*W > 0. In order of preference:
// 1. one block per slab, from shared memory, where slabs alone occupy most of the device: no block
//    waits for another. Rows as long as that allows.
// 2. as many parts as there are multiprocessors for, from shared memory, in one launch.
// 3. the same without shared memory, in two launches.
// In 2 and 3 each block adds up the partial sums of its slab, so rows are so short (64 bytes at
// least, two sectors) that they come to few bytes.
inline Cut cut_for(int64_t N, int64_t C, int64_t HW, bool channels_last, const CutFor& how) {
  constexpr int line_bytes = 128, sector_bytes = 32, merged_bytes = 16 * 1024;
  const int vector = 16 / how.element_bytes;
  Cut cut{};
  cut.C = C;
  cut.HW = HW;
  cut.channels_last = channels_last;
  cut.packet =
      how.vectors && how.element_bytes < 8 && (channels_last ? C : HW) % vector == 0 ? vector : 1;
  cut.rows = N * HW / (channels_last ? 1 : cut.packet);
  const int packet_bytes = cut.packet * how.element_bytes;
  int widest = 1;
  while (channels_last && widest < cut_up(C, cut.packet) && widest < 32 &&
         widest * packet_bytes < line_bytes)
    widest *= 2;
  const auto narrowest = [&](int bytes) {
    return std::min(widest, std::max(bytes / packet_bytes, 1));
  };

  for (int columns = widest; columns >= narrowest(sector_bytes); columns /= 2) {
    cut_channels(cut, columns);
    cut_rows(cut, cut.slabs);
    if (4 * cut.slabs >= 3 * how.multiprocessors && can_keep(cut, how)) {
      cut.kept = true;
      return cut;
    }
    if (columns == 1) break;
  }
  for (int columns = widest; columns >= narrowest(2 * sector_bytes); columns /= 2) {
    cut_channels(cut, columns);
    cut_rows(cut, how.multiprocessors);
    const int64_t merged = cut.parts * cut.channels() * 3 * sum_bytes(how.element_bytes);
    if (merged <= merged_bytes || columns == 1) break;
    if (columns / 2 < narrowest(2 * sector_bytes)) break;
  }
  cut.kept = can_keep(cut, how);
  return cut;
}

}  // namespace fused_resnet
