// Code shared by the forward and backward kernels of bn_add_relu: packets of values, the rows of a
// thread, sums over a block and over the parts of a slab.
#pragma once

#include "cuda/batch_norm/bn_add_relu.h"

namespace fused_resnet {

// together: sums and output in one launch, the part stays in shared memory in between. given:
// output from statistics that are inputs.
enum class Phase { together, sums, output, given };

template <typename T, int kPacket>
using Bits = std::conditional_t<kPacket == 1, T, uint4>;
template <typename T, int kPacket>
struct Values {
  Accumulate<T> v[kPacket];
};

template <typename T, int kPacket>
__device__ __forceinline__ Values<T, kPacket> widened(const Bits<T, kPacket>& bits) {
  Values<T, kPacket> out;
  if constexpr (kPacket == 1) {
    out.v[0] = widen(bits);
  } else {
    const Pack<T> pack = unpack<T>(bits);
#pragma unroll
    for (int k = 0; k < kPacket; ++k) out.v[k] = widen(pack.values[k]);
  }
  return out;
}
template <typename T, int kPacket>
__device__ __forceinline__ Accumulate<T> value_of(const Bits<T, kPacket>& bits, int k) {
  if constexpr (kPacket == 1)
    return widen(bits);
  else
    return widen(unpack<T>(bits).values[k]);
}
template <typename T, int kPacket>
__device__ __forceinline__ Bits<T, kPacket> narrowed(const Values<T, kPacket>& values) {
  if constexpr (kPacket == 1) {
    return narrow<T>(values.v[0]);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < kPacket; ++k) pack.values[k] = narrow<T>(values.v[k]);
    return packed(pack);
  }
}

// The rows of a thread: every groups-th row of [first, end), in one column.
template <bool kChannelsLast, int kPacket>
struct Share {
  static constexpr int channels = kChannelsLast ? kPacket : 1;  // per column
  int64_t part, slab_channel, channel;                          // first of the slab, of the column
  int64_t begin, first, end;
  int column, groups;

  __device__ explicit Share(const Cut& cut) {
    const int64_t slab = blockIdx.x % cut.slabs;
    part = blockIdx.x / cut.slabs;
    column = static_cast<int>(threadIdx.x) % cut.columns;
    groups = cut.threads / cut.columns;
    slab_channel = slab * cut.channels();
    channel = slab_channel + column * channels;
    begin = cut.begin(part);
    first = begin + static_cast<int>(threadIdx.x) / cut.columns;
    end = channel < cut.C ? cut.end(part) : begin;  // no rows past the last channel
  }
  // Index of a packet among those in shared memory.
  __device__ int kept_at(const Cut& cut, int64_t row) const {
    return static_cast<int>(row - begin) * cut.columns + column;
  }
};

// Processes a thread's rows in batches of kUnroll: calls load(offset, row) for all rows of a batch,
// then start(loaded, rows loaded), then use(loaded, offset, row) for each row. kReverse: the last
// batch first.
template <bool kChannelsLast, int kPacket, int kUnroll, bool kReverse, typename Load,
          typename Start, typename Use>
__device__ __forceinline__ void for_rows(const Cut& cut, const Share<kChannelsLast, kPacket>& share,
                                         const Load& load, const Start& start, const Use& use) {
  const int64_t groups = share.groups, batch = groups * kUnroll;
  if (share.first >= share.end) return;
  int64_t row = share.first;
  if constexpr (kReverse) row += (share.end - 1 - share.first) / batch * batch;
  Place place = place_of(cut, share.channel, row);
  const Place step = step_of(cut, groups), jump = step_of(cut, batch);
  for (;;) {
    decltype(load(int64_t{}, int64_t{})) loaded[kUnroll];
    Place at = place;
    int rows = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (row + u * groups < share.end) {
        loaded[u] = load(at.offset, row + u * groups);
        ++rows;
      }
      step_forward<kChannelsLast>(cut, at, step);
    }
    start(loaded, rows);
    at = place;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u < rows) use(loaded[u], at.offset, row + u * groups);
      step_forward<kChannelsLast>(cut, at, step);
    }
    if constexpr (kReverse) {
      row -= batch;
      if (row < share.first) return;
      step_back<kChannelsLast>(cut, place, jump);
    } else {
      row += batch;
      if (row >= share.end) return;
      step_forward<kChannelsLast>(cut, place, jump);
    }
  }
}

// Sums over the threads of the block that have the same key = thread % width (width: a power of
// two). Each thread has kSums sums of kCount values, values[sum * kCount + k]; results go to
// result[(sum * width + key) * kCount + k]. scratch: warps * min(width, 32) * kSums * kCount.
template <int kSums, int kCount, typename A>
__device__ void sum_over_block(A (&values)[kSums * kCount], int width, A* scratch, A* result) {
  constexpr int each = kSums * kCount;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, keys = width < 32 ? width : 32;
  for (int delta = 16; delta >= width; delta /= 2) {
#pragma unroll
    for (int i = 0; i < each; ++i)
      values[i] += __shfl_down_sync(0xffffffffu, values[i], static_cast<unsigned>(delta));
  }
  if (lane < keys) {
#pragma unroll
    for (int i = 0; i < each; ++i) scratch[(warp * keys + lane) * each + i] = values[i];
  }
  __syncthreads();
  for (int j = thread; j < width * each; j += threads) {
    const int key = j / kCount % width, i = j / kCount / width * kCount + j % kCount;
    A sum = 0;
    for (int w = key / 32; w < threads / 32; w += width < 32 ? 1 : width / 32)
      sum += scratch[(w * keys + key % 32) * each + i];
    result[j] = sum;
  }
  __syncthreads();
}

// kSums sums over the parts, for each channel of the slab. term(sums, part, channel) adds the
// values of one part. Results go to result[sum * channels + channel].
template <int kSums, typename A, typename Term>
__device__ void sum_over_parts(const Cut& cut, A* scratch, A* result, const Term& term) {
  const int channels = cut.channels(), thread = static_cast<int>(threadIdx.x);
  const int stride = cut.threads / channels;
  A sums[kSums] = {};
  if (thread / channels < stride)
    for (int64_t part = thread / channels; part < cut.parts; part += stride)
      term(sums, part, thread % channels);
  sum_over_block<kSums, 1>(sums, channels, scratch, result);
}

template <typename A>
__device__ __forceinline__ bool is_finite(A v) {
  return v - v == 0;
}

}  // namespace fused_resnet
