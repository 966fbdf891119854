// The forward kernel of bn_add_relu. The algorithm is described in cuda/batch_norm/launch.cuh.
#pragma once

#include "cuda/batch_norm/channel.cuh"
#include "cuda/batch_norm/rows.cuh"

namespace fused_resnet {

// Scratch in shared memory: one value per channel of the slab in each array.
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

// Moves the centre as close to the mean as one value can represent, so that only small deviations
// are summed afterwards.
template <typename A>
__device__ __forceinline__ A refine_centre(A centre, A distance) {
  const A moved = centre + distance;
  return is_finite(moved) ? moved : centre;
}

// Computes the part's centre, the sum of x - centre, and the squared deviations from the part's
// mean, into scratch.
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
      // The mean of eight rows, so that small integers stay exact. The first row replaces missing
      // rows.
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
    // Sum each batch separately first: fewer roundings at the magnitude of the full sum.
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
    const A apart = centre[k] - refine_centre(scratch.centre[j], scratch.guess[j] * block_nth);
    const A from_mean = apart + s1[k] * one_nth;
    // An infinite sum of squares stays infinite instead of Inf - Inf.
    A within = is_finite(s2[k]) ? s2[k] - s1[k] * (s1[k] * one_nth) : s2[k];
    within = within < 0 ? A{0} : within;
    both[k] = within + n * (from_mean * from_mean);
    both[channels + k] = s1[k] + n * apart;
  }
  sum_over_block<2, channels>(both, bn.cut.columns, scratch.sums, scratch.squares);
  for (int j = threadIdx.x; j < bn.cut.channels(); j += bn.cut.threads)
    scratch.centre[j] = refine_centre(scratch.centre[j], scratch.guess[j] * block_nth);
  __syncthreads();
}

// Computes the same three values for the whole slab, from those of its parts.
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
    scratch.centre[j] = refine_centre(partial(0, 0, j), scratch.guess[j] * one_mth);
  __syncthreads();
  sum_over_parts<2>(cut, scratch.sums, scratch.squares, [&](A(&sums)[2], int64_t part, int j) {
    const A n = count(part), apart = partial(part, 0, j) - scratch.centre[j];
    const A from_mean = apart + partial(part, 1, j) / n;
    sums[0] += partial(part, 2, j) + n * (from_mean * from_mean);
    sums[1] += partial(part, 1, j) + n * apart;
  });
}

// The mean as one rounded value and its rounding error, from a centre and the mean of x - centre. x
// - mean is exact for x close to the mean.
template <typename A>
struct Mean {
  A value, rest;
  __device__ Mean(A centre, A offset) {
    value = centre + offset;
    const A back = value - centre;
    rest = (centre - (value - back)) + (offset - back);
    if (!is_finite(value)) rest = 0;
  }
};

// Writes the channel's coefficients (cuda/batch_norm/channel.cuh) to scratch.
template <typename T>
__device__ __forceinline__ void fold_channel(const BnForward<T>& bn, int64_t slab_channel, int j,
                                             Accumulate<T> mean, Accumulate<T> rest,
                                             Accumulate<T> var,
                                             const ForwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  const int64_t c = slab_channel + j;
  const A weight = bn.weight && c < bn.cut.C ? bn.weight[c] : A{1};
  const A bias = bn.bias && c < bn.cut.C ? bn.bias[c] : A{0};
  const auto channel = NormChannel<A>::of(mean, var, rest, weight, bias, bn.eps);
  scratch.mean[j] = channel.mean;
  scratch.scale[j] = channel.scale;
  scratch.shift[j] = channel.shift;
}

template <typename T>
__device__ __forceinline__ void fold_forward(const BnForward<T>& bn, int64_t slab_channel,
                                             bool write,
                                             const ForwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  const Cut& cut = bn.cut;
  const A m = static_cast<A>(cut.values(cut.rows));
  for (int j = threadIdx.x; j < cut.channels(); j += cut.threads) {
    const int64_t c = slab_channel + j;
    const Mean<A> mean(scratch.centre[j], scratch.total[j] / m);
    // NaN if x contains Inf.
    const A var = scratch.squares[j] / m + (mean.value - mean.value);
    fold_channel(bn, slab_channel, j, mean.value, mean.rest, var, scratch);
    if (write && c < cut.C) {
      bn.mean[c] = mean.value;
      bn.var[c] = var;
    }
  }
  __syncthreads();
}

// The same from given statistics.
template <typename T>
__device__ __forceinline__ void fold_given(const BnForward<T>& bn, int64_t slab_channel,
                                           const ForwardScratch<Accumulate<T>>& scratch) {
  using A = Accumulate<T>;
  for (int j = threadIdx.x; j < bn.cut.channels(); j += bn.cut.threads) {
    const int64_t c = slab_channel + j;
    const bool inside = c < bn.cut.C;
    fold_channel(bn, slab_channel, j, inside ? bn.mean[c] : A{0}, inside ? bn.rest[c] : A{0},
                 inside ? bn.var[c] : A{1}, scratch);
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
          y.v[k] = normalised(y.v[k], mean[k % channels], scale[k % channels], shift[k % channels]);
        if (bn.residual) {
          const auto residual = widened<T, kPacket>(rows.residual);
#pragma unroll
          for (int k = 0; k < kPacket; ++k) y.v[k] += residual.v[k];
        }
#pragma unroll
        for (int k = 0; k < kPacket; ++k) y.v[k] = activated(bn.activation, y.v[k]);
        store_global<Row>(bn.y + offset, narrowed<T, kPacket>(y));
      });
}

template <typename T, bool kChannelsLast, int kPacket, Phase kPhase>
__global__ void __launch_bounds__(kMaxThreads, 1) bn_forward_kernel(const BnForward<T> bn) {
  using A = Accumulate<T>;
  using Row = Bits<T, kPacket>;
  constexpr bool keep = kPhase == Phase::together;
  const Cut& cut = bn.cut;
  const Share<kChannelsLast, kPacket> share(cut);
  const int64_t kept_bytes = keep ? cut.packets_per_part() * int64_t{sizeof(Row)} : 0;
  auto* kept = reinterpret_cast<Row*>(shared_memory());
  const ForwardScratch<A> scratch(
      reinterpret_cast<A*>(shared_memory() + (kept_bytes + 15) / 16 * 16), cut.channels());
  if constexpr (kPhase == Phase::given) {
    fold_given(bn, share.slab_channel, scratch);
    output_forward<T, kChannelsLast, kPacket, false>(bn, share, kept, scratch);
    return;
  }
  if constexpr (kPhase == Phase::together || kPhase == Phase::sums) {
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
  if constexpr (kPhase == Phase::together || kPhase == Phase::output) {
    if (keep && cut.parts > 1) sync_grid();
    if (!keep || cut.parts > 1) merge_forward(bn, share.slab_channel, scratch);
    fold_forward(bn, share.slab_channel, share.part == 0, scratch);
    output_forward<T, kChannelsLast, kPacket, keep>(bn, share, kept, scratch);
  }
}

}  // namespace fused_resnet
