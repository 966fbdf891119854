// Training batch normalisation, + residual, + ReLU, forward and backward, on CUDA devices.
//   mean[c] = sum x[:, c] / M,  var[c] = sum (x[:, c] - mean[c])^2 / M,  M = N*H*W
//   y = relu((x - mean[c]) * scale[c] + bias[c] + residual),  scale[c] = weight[c] / sqrt(var[c] +
//   eps) g = dy * !(y <= 0),  dbias[c] = sum g,  dweight[c] = sum g * (x - mean[c]) / sqrt(var[c] +
//   eps) dx = scale[c] * (g - dbias[c] / M - (x - mean[c]) * slope[c]),  dresidual = g
// Layout: channels_last or contiguous; bn_add_relu_cut.h says what a block and a thread own.
// A thread sums the rows of its column in registers (float; double for double), kUnroll rows' loads
// in flight; forward: x - centre and its square, the centre being the mean of the thread's first
// rows, so that nothing cancels however large the mean. A block adds up its threads, first the sums
// and then the squares about the block's own mean (Chan, Golub and LeVeque 1983), and blocks add up
// the parts of their slab likewise: always in one order, with no atomics, so the bits repeat.
// Where the parts fit in the multiprocessors' shared memory (x; backward g and x), a block keeps
// its part there from the sums to the output, and all is one launch, cooperative where a slab has
// more than one part. Else one launch sums and a second adds up the parts and makes the output,
// last rows first: those are in L2.
// Bytes per element, in elements: forward x read once (twice in two launches), residual read once,
// y written once; backward dy, x, y read once (twice), dx and dresidual written once.
// Constraints: none on sizes; 16-byte packets where addresses and sizes are multiples of it.
// Speed: not yet measured.
// Rejected: the last block of a slab adds up its parts (a counter needs zeroed memory, which is one
// more launch or shared between streams, and the second launch waits for that block: every block
// adding up a few kilobytes by itself needs neither); asynchronous copies into shared memory (plain
// loads keep as many bytes in flight, and serve packets of one element too).
#pragma once

#include <cmath>

#include "bn_add_relu_cuda.h"

namespace fused_resnet {

// Together: sums and output in one launch, the part in shared memory in between.
enum class Phase { together, sums, output };

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

// What a thread owns: of rows [first, end) every groups-th one, in one column.
template <bool kChannelsLast, int kPacket>
struct Share {
  static constexpr int channels = kChannelsLast ? kPacket : 1;  // of the column
  int64_t part, slab_channel, channel;                          // the first of slab and column
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
    end = channel < cut.C ? cut.end(part) : begin;  // nothing beyond the last channel
  }
  // The place of a packet among those that the block keeps.
  __device__ int kept_at(const Cut& cut, int64_t row) const {
    return static_cast<int>(row - begin) * cut.columns + column;
  }
};

// Takes a thread's rows in batches of kUnroll: loads all of a batch, load(offset, row), then
// start(loaded, rows loaded), then use(loaded, offset, row) for each. The last batch comes first
// where kReverse.
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

// The block's sums over the threads of one key, key = thread % width (a power of two): kSums sums
// of kCount values each, values[sum * kCount + k], to result[(sum * width + key) * kCount + k].
// scratch: warps * min(width, 32) * kSums * kCount.
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

// kSums sums over the parts, term(sums, part, channel) adding a part's, for each channel of the
// slab: to result[sum * channels + channel].
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

// --- forward -------------------------------------------------------------------------------------

// Per channel of a slab, in shared memory.
template <typename A>
struct ForwardScratch {
  A *centre, *guess, *squares, *total, *mean, *scale, *shift, *sums;
  __device__ ForwardScratch(A* p, int channels)
      : centre(p),
        guess(centre + channels),
        squares(guess + channels),
        total(squares + channels),
        mean(total + channels),
        scale(mean + channels),
        shift(scale + channels),
        sums(shift + channels) {}
};

// A centre as near to the mean as one number can be: from here on only small numbers are added up.
template <typename A>
__device__ __forceinline__ A nearer(A centre, A distance) {
  const A moved = centre + distance;
  return is_finite(moved) ? moved : centre;
}

// The part's centre, sum of x - centre, and sum of squares about its mean, into scratch.
template <typename T, bool kChannelsLast, int kPacket, bool kKeep>
__device__ __forceinline__ void sum_forward(const BnForward<T>& bn,
                                            const Share<kChannelsLast, kPacket>& share,
                                            Bits<T, kPacket>* kept,
                                            const ForwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  using Row = Bits<T, kPacket>;
  constexpr int channels = Share<kChannelsLast, kPacket>::channels;
  constexpr int unroll = 8;
  A centre[channels] = {}, s1[kPacket] = {}, s2[kPacket] = {};
  int64_t seen = 0;
  for_rows<kChannelsLast, kPacket, unroll, false>(
      bn.cut, share, [&](int64_t offset, int64_t) { return load_global<Row>(bn.x + offset); },
      [&](const Row(&loaded)[unroll], int rows) {
        if (seen == 0) {
      // A mean of eight, so that small integers stay exact; the first row stands in for others.
#pragma unroll
          for (int u = 0; u < unroll; ++u) {
            Row row = loaded[0];
            if (u < rows) row = loaded[u];
            const auto x = widened<T, kPacket>(row);
#pragma unroll
            for (int k = 0; k < kPacket; ++k)
              centre[k % channels] += x.v[k] * (A{channels} / (unroll * kPacket));
          }
#pragma unroll
          for (int k = 0; k < channels; ++k)
            if (!is_finite(centre[k])) centre[k] = 0;
        }
        seen += rows;
    // A batch by itself first: fewer roundings at the size of the whole sum.
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
          A t1 = 0, t2 = 0;
#pragma unroll
          for (int u = 0; u < unroll; ++u) {
            if (u < rows) {
              const A d = value_of<T, kPacket>(loaded[u], k) - centre[k % channels];
              t1 += d;
              t2 += d * d;
            }
          }
          s1[k] += t1;
          s2[k] += t2;
        }
      },
      [&](const Row& loaded, int64_t, int64_t row) {
        if constexpr (kKeep) store_shared<Row>(kept + share.kept_at(bn.cut, row), loaded);
      });
#pragma unroll
  for (int k = channels; k < kPacket; ++k) {
    s1[0] += s1[k];
    s2[0] += s2[k];
  }
  const int column = share.column * channels;
  if (threadIdx.x < static_cast<unsigned>(bn.cut.columns)) {
#pragma unroll
    for (int k = 0; k < channels; ++k) scratch.centre[column + k] = centre[k];
  }
  __syncthreads();
  const A n = static_cast<A>(bn.cut.values(seen));
  const A one_nth = n > 0 ? 1 / n : 0;
  A sums[channels], both[2 * channels];
#pragma unroll
  for (int k = 0; k < channels; ++k) sums[k] = s1[k] + n * (centre[k] - scratch.centre[column + k]);
  sum_over_block<1, channels>(sums, bn.cut.columns, scratch.sums, scratch.guess);
  const A block_nth = 1 / static_cast<A>(bn.cut.values(bn.cut.end(share.part) - share.begin));
#pragma unroll
  for (int k = 0; k < channels; ++k) {
    const int j = column + k;
    const A apart = centre[k] - nearer(scratch.centre[j], scratch.guess[j] * block_nth);
    const A from_mean = apart + s1[k] * one_nth;
    // An infinite sum of squares stays infinite instead of Inf - Inf.
    A within = is_finite(s2[k]) ? s2[k] - s1[k] * (s1[k] * one_nth) : s2[k];
    within = within < 0 ? A{0} : within;
    both[k] = within + n * (from_mean * from_mean);
    both[channels + k] = s1[k] + n * apart;
  }
  sum_over_block<2, channels>(both, bn.cut.columns, scratch.sums, scratch.squares);
  for (int j = threadIdx.x; j < bn.cut.channels(); j += bn.cut.threads)
    scratch.centre[j] = nearer(scratch.centre[j], scratch.guess[j] * block_nth);
  __syncthreads();
}

// The same three numbers of the whole slab, from those of its parts.
template <typename T>
__device__ __forceinline__ void merge_forward(const BnForward<T>& bn, int64_t slab_channel,
                                              const ForwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  const Cut& cut = bn.cut;
  const auto partial = [&](int64_t part, int which, int j) {
    const int64_t c = slab_channel + j;
    return c < cut.C ? bn.partial[(part * 3 + which) * cut.C + c] : A{0};
  };
  const auto count = [&](int64_t part) {
    return static_cast<A>(cut.values(cut.end(part) - cut.begin(part)));
  };
  sum_over_parts<1>(cut, scratch.sums, scratch.guess, [&](A(&sums)[1], int64_t part, int j) {
    sums[0] += partial(part, 1, j) + count(part) * (partial(part, 0, j) - partial(0, 0, j));
  });
  const A one_mth = 1 / static_cast<A>(cut.values(cut.rows));
  for (int j = threadIdx.x; j < cut.channels(); j += cut.threads)
    scratch.centre[j] = nearer(partial(0, 0, j), scratch.guess[j] * one_mth);
  __syncthreads();
  sum_over_parts<2>(cut, scratch.sums, scratch.squares, [&](A(&sums)[2], int64_t part, int j) {
    const A n = count(part), apart = partial(part, 0, j) - scratch.centre[j];
    const A from_mean = apart + partial(part, 1, j) / n;
    sums[0] += partial(part, 2, j) + n * (from_mean * from_mean);
    sums[1] += partial(part, 1, j) + n * apart;
  });
}

// y = (x - mean) * scale + shift. The mean is one rounded number, near which x - mean is exact;
// what its rounding took off is in the shift.
template <typename T>
__device__ __forceinline__ void fold_forward(const BnForward<T>& bn, int64_t slab_channel,
                                             bool write,
                                             const ForwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  const Cut& cut = bn.cut;
  const A m = static_cast<A>(cut.values(cut.rows));
  for (int j = threadIdx.x; j < cut.channels(); j += cut.threads) {
    const int64_t c = slab_channel + j;
    const A centre = scratch.centre[j], offset = scratch.total[j] / m;
    const A mean = centre + offset, back = mean - centre;
    A lost = (centre - (mean - back)) + (offset - back);
    if (!is_finite(mean)) lost = 0;
    // Inf in x: the variance is NaN.
    const A var = scratch.squares[j] / m + (mean - mean);
    const A weight = bn.weight && c < cut.C ? bn.weight[c] : A{1};
    const A bias = bn.bias && c < cut.C ? bn.bias[c] : A{0};
    const A scale = weight / std::sqrt(var + bn.eps);
    scratch.mean[j] = mean;
    scratch.scale[j] = scale;
    scratch.shift[j] = bias - lost * scale;
    if (write && c < cut.C) {
      bn.mean[c] = mean;
      bn.var[c] = var;
    }
  }
  __syncthreads();
}

template <typename T, bool kChannelsLast, int kPacket, bool kKept>
__device__ __forceinline__ void output_forward(const BnForward<T>& bn,
                                               const Share<kChannelsLast, kPacket>& share,
                                               const Bits<T, kPacket>* kept,
                                               const ForwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  using Row = Bits<T, kPacket>;
  constexpr int channels = Share<kChannelsLast, kPacket>::channels;
  constexpr int unroll = 4;
  struct Rows {
    Row x, residual;
  };
  A mean[channels], scale[channels], shift[channels];
#pragma unroll
  for (int k = 0; k < channels; ++k) {
    const int j = share.column * channels + k;
    mean[k] = scratch.mean[j];
    scale[k] = scratch.scale[j];
    shift[k] = scratch.shift[j];
  }
  for_rows<kChannelsLast, kPacket, unroll, true>(
      bn.cut, share,
      [&](int64_t offset, int64_t row) {
        Rows rows;
        if constexpr (kKept)
          rows.x = load_shared<Row>(kept + share.kept_at(bn.cut, row));
        else
          rows.x = load_global<Row>(bn.x + offset);
        if (bn.residual) rows.residual = load_global_once<Row>(bn.residual + offset);
        return rows;
      },
      [](const Rows(&)[unroll], int) {},
      [&](const Rows& rows, int64_t offset, int64_t) {
        Values<T, kPacket> y = widened<T, kPacket>(rows.x);
#pragma unroll
        for (int k = 0; k < kPacket; ++k)
          y.v[k] = (y.v[k] - mean[k % channels]) * scale[k % channels] + shift[k % channels];
        if (bn.residual) {
          const auto residual = widened<T, kPacket>(rows.residual);
#pragma unroll
          for (int k = 0; k < kPacket; ++k) y.v[k] += residual.v[k];
        }
        if (bn.relu) {
#pragma unroll
          for (int k = 0; k < kPacket; ++k) y.v[k] = y.v[k] <= 0 ? A{0} : y.v[k];
        }
        store_global<Row>(bn.y + offset, narrowed<T, kPacket>(y));
      });
}

template <typename T, bool kChannelsLast, int kPacket, Phase kPhase>
__global__ void __launch_bounds__(kMaxThreads) bn_forward_kernel(const BnForward<T> bn) {
  using A = Accumulate<T>;
  using Row = Bits<T, kPacket>;
  constexpr bool keep = kPhase == Phase::together;
  const Cut& cut = bn.cut;
  const Share<kChannelsLast, kPacket> share(cut);
  const int64_t kept_bytes = keep ? cut.packets_per_part() * int64_t{sizeof(Row)} : 0;
  auto* kept = reinterpret_cast<Row*>(shared_memory());
  const ForwardScratch<A> scratch(
      reinterpret_cast<A*>(shared_memory() + (kept_bytes + 15) / 16 * 16), cut.channels());
  if constexpr (kPhase != Phase::output) {
    sum_forward<T, kChannelsLast, kPacket, keep>(bn, share, kept, scratch);
    if (!keep || cut.parts > 1) {
      for (int j = threadIdx.x; j < cut.channels(); j += cut.threads) {
        const int64_t c = share.slab_channel + j;
        A* partial = bn.partial + share.part * 3 * cut.C + c;
        if (c < cut.C) {
          partial[0] = scratch.centre[j];
          partial[cut.C] = scratch.total[j];
          partial[2 * cut.C] = scratch.squares[j];
        }
      }
    }
  }
  if constexpr (kPhase != Phase::sums) {
    if (keep && cut.parts > 1) sync_grid();
    if (!keep || cut.parts > 1) merge_forward(bn, share.slab_channel, scratch);
    fold_forward(bn, share.slab_channel, share.part == 0, scratch);
    output_forward<T, kChannelsLast, kPacket, keep>(bn, share, kept, scratch);
  }
}

// --- backward ------------------------------------------------------------------------------------

// Per channel of a slab, in shared memory.
template <typename A>
struct BackwardScratch {
  A *sum_g, *sum_gx, *mean, *g_mean, *slope, *scale, *sums;
  __device__ BackwardScratch(A* p, int channels)
      : sum_g(p),
        sum_gx(sum_g + channels),
        mean(sum_gx + channels),
        g_mean(mean + channels),
        slope(g_mean + channels),
        scale(slope + channels),
        sums(scale + channels) {}
};

template <typename T, int kPacket>
struct BackwardRow {
  Bits<T, kPacket> dy, x, y;
};

template <typename T, int kPacket>
__device__ __forceinline__ BackwardRow<T, kPacket> load_backward(const BnBackward<T>& bn,
                                                                 int64_t offset) {
  using Row = Bits<T, kPacket>;
  BackwardRow<T, kPacket> rows;
  rows.dy = load_global<Row>(bn.dy + offset);
  rows.x = load_global<Row>(bn.x + offset);
  if (bn.y) rows.y = load_global<Row>(bn.y + offset);
  return rows;
}

template <typename T, int kPacket>
__device__ __forceinline__ Values<T, kPacket> masked(const BnBackward<T>& bn,
                                                     const BackwardRow<T, kPacket>& rows) {
  Values<T, kPacket> g = widened<T, kPacket>(rows.dy);
  if (bn.y) {
    const auto y = widened<T, kPacket>(rows.y);
#pragma unroll
    for (int k = 0; k < kPacket; ++k) g.v[k] = y.v[k] <= 0 ? Accumulate<T>{0} : g.v[k];
  }
  return g;
}

// The part's sums of g and of g * (x - mean), into scratch; kept: g and x.
template <typename T, bool kChannelsLast, int kPacket, bool kKeep>
__device__ __forceinline__ void sum_backward(const BnBackward<T>& bn,
                                             const Share<kChannelsLast, kPacket>& share,
                                             Bits<T, kPacket>* kept_g, Bits<T, kPacket>* kept_x,
                                             const BackwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  using Row = Bits<T, kPacket>;
  using Rows = BackwardRow<T, kPacket>;
  constexpr int channels = Share<kChannelsLast, kPacket>::channels;
  constexpr int unroll = 4;
  A mean[channels], sum_g[kPacket] = {}, sum_gx[kPacket] = {};
#pragma unroll
  for (int k = 0; k < channels; ++k)
    mean[k] = share.channel + k < bn.cut.C ? bn.mean[share.channel + k] : A{0};
  for_rows<kChannelsLast, kPacket, unroll, false>(
      bn.cut, share, [&](int64_t offset, int64_t) { return load_backward<T, kPacket>(bn, offset); },
      [](const Rows(&)[unroll], int) {},
      [&](const Rows& rows, int64_t, int64_t row) {
        const auto g = masked<T, kPacket>(bn, rows);
        const auto x = widened<T, kPacket>(rows.x);
        if constexpr (kKeep) {
          const int at = share.kept_at(bn.cut, row);
          store_shared<Row>(kept_g + at, narrowed<T, kPacket>(g));
          store_shared<Row>(kept_x + at, rows.x);
        }
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
          sum_g[k] += g.v[k];
          sum_gx[k] += g.v[k] * (x.v[k] - mean[k % channels]);
        }
      });
  A both[2 * channels] = {};
#pragma unroll
  for (int k = 0; k < kPacket; ++k) {
    both[k % channels] += sum_g[k];
    both[channels + k % channels] += sum_gx[k];
  }
  sum_over_block<2, channels>(both, bn.cut.columns, scratch.sums, scratch.sum_g);
}

template <typename T>
__device__ __forceinline__ void merge_backward(const BnBackward<T>& bn, int64_t slab_channel,
                                               const BackwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  const auto partial = [&](int64_t part, int which, int j) {
    const int64_t c = slab_channel + j;
    return c < bn.cut.C ? bn.partial[(part * 2 + which) * bn.cut.C + c] : A{0};
  };
  sum_over_parts<2>(bn.cut, scratch.sums, scratch.sum_g, [&](A(&sums)[2], int64_t part, int j) {
    sums[0] += partial(part, 0, j);
    sums[1] += partial(part, 1, j);
  });
}

template <typename T>
__device__ __forceinline__ void fold_backward(const BnBackward<T>& bn, int64_t slab_channel,
                                              bool write,
                                              const BackwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  const Cut& cut = bn.cut;
  const A m = static_cast<A>(cut.values(cut.rows));
  for (int j = threadIdx.x; j < cut.channels(); j += cut.threads) {
    const int64_t c = slab_channel + j;
    if (c >= cut.C) continue;
    const A invstd = 1 / std::sqrt(bn.var[c] + bn.eps);
    const A dbias = scratch.sum_g[j], dweight = scratch.sum_gx[j] * invstd;
    scratch.mean[j] = bn.mean[c];
    scratch.g_mean[j] = dbias / m;
    scratch.slope[j] = dweight * invstd / m;
    scratch.scale[j] = bn.weight ? bn.weight[c] * invstd : invstd;
    if (write) {
      bn.dweight[c] = dweight;
      bn.dbias[c] = dbias;
    }
  }
  __syncthreads();
}

// The differences come first, since they nearly cancel for small batches.
template <typename T, bool kChannelsLast, int kPacket, bool kKept>
__device__ __forceinline__ void output_backward(const BnBackward<T>& bn,
                                                const Share<kChannelsLast, kPacket>& share,
                                                const Bits<T, kPacket>* kept_g,
                                                const Bits<T, kPacket>* kept_x,
                                                const BackwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  using Row = Bits<T, kPacket>;
  using Rows = BackwardRow<T, kPacket>;
  constexpr int channels = Share<kChannelsLast, kPacket>::channels;
  constexpr int unroll = 4;
  if (share.first >= share.end) return;
  A mean[channels], g_mean[channels], slope[channels], scale[channels];
#pragma unroll
  for (int k = 0; k < channels; ++k) {
    const int j = share.column * channels + k;
    mean[k] = scratch.mean[j];
    g_mean[k] = scratch.g_mean[j];
    slope[k] = scratch.slope[j];
    scale[k] = scratch.scale[j];
  }
  for_rows<kChannelsLast, kPacket, unroll, true>(
      bn.cut, share,
      [&](int64_t offset, int64_t row) {
        if constexpr (kKept) {
          Rows rows;
          const int at = share.kept_at(bn.cut, row);
          rows.dy = load_shared<Row>(kept_g + at);
          rows.x = load_shared<Row>(kept_x + at);
          return rows;
        } else {
          return load_backward<T, kPacket>(bn, offset);
        }
      },
      [](const Rows(&)[unroll], int) {},
      [&](const Rows& rows, int64_t offset, int64_t) {
        Values<T, kPacket> g;
        if constexpr (kKept)
          g = widened<T, kPacket>(rows.dy);
        else
          g = masked<T, kPacket>(bn, rows);
        if (bn.dresidual) store_global<Row>(bn.dresidual + offset, narrowed<T, kPacket>(g));
        if (!bn.dx) return;
        const auto x = widened<T, kPacket>(rows.x);
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
          const int c = k % channels;
          g.v[k] = scale[c] * ((g.v[k] - g_mean[c]) - slope[c] * (x.v[k] - mean[c]));
        }
        store_global<Row>(bn.dx + offset, narrowed<T, kPacket>(g));
      });
}

template <typename T, bool kChannelsLast, int kPacket, Phase kPhase>
__global__ void __launch_bounds__(kMaxThreads) bn_backward_kernel(const BnBackward<T> bn) {
  using A = Accumulate<T>;
  using Row = Bits<T, kPacket>;
  constexpr bool keep = kPhase == Phase::together;
  const Cut& cut = bn.cut;
  const Share<kChannelsLast, kPacket> share(cut);
  const int64_t kept_packets = keep ? cut.packets_per_part() : 0;
  const int64_t kept_bytes = 2 * kept_packets * int64_t{sizeof(Row)};
  auto* kept_g = reinterpret_cast<Row*>(shared_memory());
  Row* kept_x = kept_g + kept_packets;
  const BackwardScratch<A> scratch(
      reinterpret_cast<A*>(shared_memory() + (kept_bytes + 15) / 16 * 16), cut.channels());
  if constexpr (kPhase != Phase::output) {
    sum_backward<T, kChannelsLast, kPacket, keep>(bn, share, kept_g, kept_x, scratch);
    if (!keep || cut.parts > 1) {
      for (int j = threadIdx.x; j < cut.channels(); j += cut.threads) {
        const int64_t c = share.slab_channel + j;
        A* partial = bn.partial + share.part * 2 * cut.C + c;
        if (c < cut.C) {
          partial[0] = scratch.sum_g[j];
          partial[cut.C] = scratch.sum_gx[j];
        }
      }
    }
  }
  if constexpr (kPhase != Phase::sums) {
    if (keep && cut.parts > 1) sync_grid();
    if (!keep || cut.parts > 1) merge_backward(bn, share.slab_channel, scratch);
    fold_backward(bn, share.slab_channel, share.part == 0, scratch);
    if (bn.dx || bn.dresidual)
      output_backward<T, kChannelsLast, kPacket, keep>(bn, share, kept_g, kept_x, scratch);
  }
}

// --- launches ------------------------------------------------------------------------------------

// body(channels_last, packet) with the cut's two numbers as constants.
template <typename T, typename Body>
void with_constants(const Cut& cut, const Body& body) {
  const auto with_packet = [&](auto channels_last) {
    if constexpr (!std::is_same_v<T, double>) {
      if (cut.packet > 1) {
        body(channels_last, std::integral_constant<int, 16 / sizeof(T)>{});
        return;
      }
    }
    body(channels_last, std::integral_constant<int, 1>{});
  };
  if (cut.channels_last)
    with_packet(std::true_type{});
  else
    with_packet(std::false_type{});
}

template <typename T>
void launch_bn_forward(const DeviceScope& scope, const BnForward<T>& bn, int shared_bytes) {
  const Cut& cut = bn.cut;
  const Grid grid{cut.blocks(), cut.threads, shared_bytes, cut.kept && cut.parts > 1};
  with_constants<T>(cut, [&](auto channels_last, auto packet) {
    constexpr bool last = channels_last;
    if (cut.kept) {
      scope.launch(grid, bn_forward_kernel<T, last, packet, Phase::together>, bn);
    } else {
      scope.launch(grid, bn_forward_kernel<T, last, packet, Phase::sums>, bn);
      scope.launch(grid, bn_forward_kernel<T, last, packet, Phase::output>, bn);
    }
  });
}

template <typename T>
void launch_bn_backward(const DeviceScope& scope, const BnBackward<T>& bn, int shared_bytes) {
  const Cut& cut = bn.cut;
  const Grid grid{cut.blocks(), cut.threads, shared_bytes, cut.kept && cut.parts > 1};
  Grid second = grid;
  if (!bn.dx && !bn.dresidual) second.blocks = cut.slabs;  // nothing but adding up
  with_constants<T>(cut, [&](auto channels_last, auto packet) {
    constexpr bool last = channels_last;
    if (cut.kept) {
      scope.launch(grid, bn_backward_kernel<T, last, packet, Phase::together>, bn);
    } else {
      scope.launch(grid, bn_backward_kernel<T, last, packet, Phase::sums>, bn);
      scope.launch(second, bn_backward_kernel<T, last, packet, Phase::output>, bn);
    }
  });
}

template <typename T>
void list_bn_kernels(std::vector<CudaKernel>& list, const std::string& dtype, bool gpu) {
  for (const bool channels_last : {true, false})
    for (const int packet : {16 / static_cast<int>(sizeof(T)), 1}) {
      if (std::is_same_v<T, double> && packet > 1) continue;
      Cut cut{};
      cut.channels_last = channels_last;
      cut.packet = packet;
      const std::string suffix = std::string(channels_last ? "_channels_last_" : "_contiguous_") +
                                 (packet > 1 ? "" : "scalar_") + dtype;
      with_constants<T>(cut, [&](auto last, auto size) {
        constexpr bool L = last;
        constexpr int P = size;
        describe_kernel(list, "bn_add_relu_together" + suffix,
                        bn_forward_kernel<T, L, P, Phase::together>, gpu);
        describe_kernel(list, "bn_add_relu_sums" + suffix, bn_forward_kernel<T, L, P, Phase::sums>,
                        gpu);
        describe_kernel(list, "bn_add_relu_output" + suffix,
                        bn_forward_kernel<T, L, P, Phase::output>, gpu);
        describe_kernel(list, "bn_add_relu_backward_together" + suffix,
                        bn_backward_kernel<T, L, P, Phase::together>, gpu);
        describe_kernel(list, "bn_add_relu_backward_sums" + suffix,
                        bn_backward_kernel<T, L, P, Phase::sums>, gpu);
        describe_kernel(list, "bn_add_relu_backward_output" + suffix,
                        bn_backward_kernel<T, L, P, Phase::output>, gpu);
      });
    }
}

#define FUSED_RESNET_BN_KERNELS(T)                                                 \
  template void launch_bn_forward(const DeviceScope&, const BnForward<T>&, int);   \
  template void launch_bn_backward(const DeviceScope&, const BnBackward<T>&, int); \
  template void list_bn_kernels<T>(std::vector<CudaKernel>&, const std::string&, bool);

}  // namespace fused_resnet
