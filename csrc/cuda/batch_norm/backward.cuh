// The backward kernel of bn_add_relu. The algorithm is described in cuda/batch_norm/launch.cuh.
#pragma once

#include <cmath>

#include "cuda/batch_norm/rows.cuh"

namespace fused_resnet {

// Scratch in shared memory: one value per channel of the slab in each array.
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
  uint8_t bits;  // of the mask
};

template <typename T, int kPacket>
__device__ __forceinline__ BackwardRow<T, kPacket> load_backward(const BnBackward<T>& bn,
                                                                 int64_t offset) {
  using Row = Bits<T, kPacket>;
  BackwardRow<T, kPacket> rows;
  rows.dy = load_global<Row>(bn.dy + offset);
  rows.x = load_global<Row>(bn.x + offset);
  if (bn.y) rows.y = load_global<Row>(bn.y + offset);
  if (bn.mask) rows.bits = bn.mask[offset / kPacket];
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
  if (bn.mask) {
#pragma unroll
    for (int k = 0; k < kPacket; ++k) g.v[k] = rows.bits >> k & 1 ? g.v[k] : Accumulate<T>{0};
  }
  return g;
}

// The ReLU mask of a packet, one bit per value.
template <typename T, int kPacket>
__device__ __forceinline__ uint8_t bits_of(const BackwardRow<T, kPacket>& rows) {
  const auto y = widened<T, kPacket>(rows.y);
  uint32_t bits = 0;
#pragma unroll
  for (int k = 0; k < kPacket; ++k) bits |= (y.v[k] <= 0 ? 0u : 1u) << k;
  return static_cast<uint8_t>(bits);
}

// Computes the part's sums of g and of g * (x - mean), into scratch. kKeep: also stores g and x in
// shared memory.
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
      [&](const Rows& rows, int64_t offset, int64_t row) {
        const auto g = masked<T, kPacket>(bn, rows);
        const auto x = widened<T, kPacket>(rows.x);
        if constexpr (kKeep) {
          const int at = share.kept_at(bn.cut, row);
          store_shared<Row>(kept_g + at, narrowed<T, kPacket>(g));
          store_shared<Row>(kept_x + at, rows.x);
        } else if (bn.dresidual) {
          store_global<Row>(bn.dresidual + offset, narrowed<T, kPacket>(g));
        } else if (bn.new_mask) {
          bn.new_mask[offset / kPacket] = bits_of<T, kPacket>(rows);
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
  Cut cut = bn.cut;
  cut.parts = bn.parts;
  sum_over_parts<2>(cut, scratch.sums, scratch.sum_g, [&](A(&sums)[2], int64_t part, int j) {
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

// Computes the differences before scaling, since they nearly cancel for small batches.
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
__global__ void __launch_bounds__(kMaxThreads, 1) bn_backward_kernel(const BnBackward<T> bn) {
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

}  // namespace fused_resnet
