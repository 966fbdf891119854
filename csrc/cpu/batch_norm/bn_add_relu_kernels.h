// Training batch norm, + residual, + ReLU, forward and backward, over rows (channels_last) or
// planes (contiguous). Walk in cpu/isa/kernels.h defines how a tensor is partitioned.
//
// Statistics: sums of (x - pivot) and (x - pivot)^2 over blocks short enough for float32. `pivot`
// is a value close to the mean (rows: the mean of the previous block; planes: of a few values
// spread over the segment, without the largest and the smallest), so nothing cancels however large
// the mean is. Each block is then moved to the tensor's common centre c and added up in double,
// where plain sums are safe:
//   sum(x - c) = s1 + n d,  sum((x - c)^2) = s2 + 2 d s1 + n d^2,  d = pivot - c.
// An outlier in `pivot` costs only digits that are small against its own part of the variance.
// A constant channel has a variance of exactly 0.
//
// Bytes per element of x, in elements: statistics 1 read; forward apply 1 read, 1 written, plus the
// residual's read; backward reduction 2 or 3 read (dy, x, y for the mask), 1 written if the
// residual's gradient is requested; backward apply 2 or 3 read, 1 written. After a reduction that
// wrote g, the apply pass reads g instead of dy and y.
#pragma once

#include "cpu/isa/vec.h"

// Rows are read one at a time, end to end: four at a time saves loads and stores of the running
// sums but defeats hardware prefetching, and took 1.5 times as long.

constexpr int64_t kBlockRows = 32;  // rows added up in float32 before they are added in double
constexpr int64_t kPrefetchDistance = 2048;  // in values
constexpr int64_t kTile = 2048;   // columns whose running sums stay in the first-level cache
constexpr int64_t kSamples = 16;  // values of a segment averaged for `pivot`

struct Segment {
  int64_t channel, offset, length;
};
template <bool rows>
FR_INLINE Segment segment_of(const Walk& walk, int64_t item) {
  if (rows) return {0, walk.first + item * walk.period, walk.period};
  const int64_t plane = item / walk.segments;
  const int64_t begin = (item % walk.segments) * walk.segment;
  const int64_t left = walk.plane - begin;
  return {plane % walk.period, plane * walk.plane + begin,
          left < walk.segment ? left : walk.segment};
}

// A per-channel array as the vectors of one item read it: from column `channel` on, or the
// channel's value in all lanes.
template <typename D, bool rows>
struct PerChannel {
  const typename D::A* values;
  typename D::V value;

  FR_INLINE PerChannel of(const void* array, int64_t channel) {
    PerChannel found{static_cast<const typename D::A*>(array), {}};
    if (array) found.values += channel;
    if (array && !rows) found.value = D::splat(*found.values);
    return found;
  }
  inline __attribute__((always_inline)) typename D::V at(int64_t j) const {
    return rows ? load_any<typename D::V>(values + j) : value;
  }
};

FR_INLINE void move_centre(double n, double d, double s1, double s2, double* __restrict out1,
                           double* __restrict out2) {
  *out1 += s1 + n * d;
  *out2 += s2 + d * (2 * s1 + n * d);
}

template <typename D>
void bn_stats_rows(const Walk& walk, const void* x_ptr, int64_t begin, int64_t end,
                   const double* __restrict centre, double* __restrict s1, double* __restrict s2) {
  typedef typename D::A A;
  typedef typename D::V V;
  const auto* x = static_cast<const typename D::T*>(x_ptr) + walk.first;
  const int64_t C = walk.period;
  A pivot[kTile], t1[kTile], t2[kTile];
  for (int64_t tile = 0; tile < C; tile += kTile) {
    const int64_t columns = C - tile < kTile ? C - tile : kTile;
    // The last, shorter vector is also read as a whole.
    for (int64_t j = 0; j < columns + D::lanes && j < kTile; ++j) pivot[j] = 0;
    for (int64_t j = 0; j < columns; ++j) pivot[j] = static_cast<A>(centre[tile + j]);
    for (int64_t block = begin; block < end; block += kBlockRows) {
      const int64_t rows = end - block < kBlockRows ? end - block : kBlockRows;
      for_groups<D>(columns, [&](int64_t j, auto memory, auto group) FR_LAMBDA {
        constexpr int count = decltype(group)::count;
        V sum[count] = {}, squares[count] = {};
        for (int64_t row = block; row < block + rows; ++row) {
          const auto* p = x + row * C + tile + j;
#pragma GCC unroll 4
          for (int v = 0; v < count; ++v) {
            if (v * D::lanes * static_cast<int64_t>(sizeof(*p)) % 64 == 0)
              __builtin_prefetch(p + kBlockRows * C + v * D::lanes, 0, 2);
            const V d = memory.load(p + v * D::lanes) - load_any<V>(pivot + j + v * D::lanes);
            sum[v] += d;
            squares[v] += d * d;
          }
        }
        for (int v = 0; v < count; ++v) {
          store_any(t1 + j + v * D::lanes, sum[v]);
          store_any(t2 + j + v * D::lanes, squares[v]);
        }
      });
      const double n = rows;
      const A one_nth = A{1} / rows;
      for (int64_t j = 0; j < columns; ++j) {
        move_centre(n, pivot[j] - centre[tile + j], t1[j], t2[j], s1 + tile + j, s2 + tile + j);
        pivot[j] += t1[j] * one_nth;
      }
    }
  }
}

template <typename D>
void bn_stats_planes(const Walk& walk, const void* x_ptr, int64_t begin, int64_t end,
                     const double* centre, double* s1, double* s2) {
  typedef typename D::V V;
  constexpr int64_t L = D::lanes;
  const auto* x = static_cast<const typename D::T*>(x_ptr);
  for (int64_t item = begin; item < end; ++item) {
    const Segment segment = segment_of<false>(walk, item);
    const auto* p = x + segment.offset;
    // Spread over the segment, so that no single region or outlier dominates. Their number is a
    // power of two, so that the mean of integers is exact.
    int64_t averaged = kSamples;
    while (averaged > 1 && averaged + 2 > segment.length) averaged /= 2;
    const int64_t sampled = averaged + 2 > segment.length ? 1 : averaged + 2;
    double sample = 0, least = D::get(p), most = least;
    for (int64_t i = 0; i < sampled; ++i) {
      const double value = D::get(p + i * segment.length / sampled);
      sample += value;
      least = value < least ? value : least, most = value > most ? value : most;
    }
    if (sampled > 1) sample -= least + most;
    const auto pivot = static_cast<typename D::A>(sample / averaged);
    const V m = D::splat(pivot);
    V a1[4] = {}, a2[4] = {};
    int64_t i = 0;
    for (; i + 4 * L <= segment.length; i += 4 * L)
      for (int k = 0; k < 4; ++k) {
        const V d = D::load(p + i + k * L) - m;
        a1[k] += d;
        a2[k] += d * d;
      }
    for_vectors<D>(segment.length - i, [&](int64_t j, auto memory) FR_LAMBDA {
      const V d = memory.keep(memory.load(p + i + j) - m);
      a1[0] += d;
      a2[0] += d * d;
    });
    const int64_t c = segment.channel;
    move_centre(segment.length, pivot - centre[c], sum_lanes<D>((a1[0] + a1[1]) + (a1[2] + a1[3])),
                sum_lanes<D>((a2[0] + a2[1]) + (a2[2] + a2[3])), s1 + c, s2 + c);
  }
}

// The same sums, one value at a time in double: for float64 data with its exact mean as centre, and
// for float32 data whose squares overflow. Slower, without cancellation.
template <typename D, bool rows>
void bn_stats_double(const Walk& walk, const void* x_ptr, int64_t begin, int64_t end,
                     const double* centre, double* s1, double* s2) {
  for (int64_t item = begin; item < end; ++item) {
    const auto [channel, offset, length] = segment_of<rows>(walk, item);
    const auto* x = static_cast<const typename D::T*>(x_ptr) + offset;
    double a1 = 0, a2 = 0;
    for (int64_t i = 0; i < length; ++i) {
      const double d = D::get(x + i) - centre[rows ? i : channel];
      (rows ? s1[i] : a1) += d;
      (rows ? s2[i] : a2) += d * d;
    }
    if (!rows) s1[channel] += a1, s2[channel] += a2;
  }
}

// y = activation((x - mean) * scale + shift + residual). With scale2, the residual's term is
// (residual - mean2) * scale2, and `shift` includes its shift.
template <typename D, bool rows>
void bn_apply(const BnForward& operands, int64_t begin, int64_t end) {
  typedef typename D::T T;
  typedef typename D::V V;
  typedef PerChannel<D, rows> Channels;
  const BnForward bn = operands;  // not reloaded after every store
  for (int64_t item = begin; item < end; ++item) {
    const auto [channel, offset, length] = segment_of<rows>(bn.walk, item);
    const T* x = static_cast<const T*>(bn.x) + offset;
    const T* residual = bn.residual ? static_cast<const T*>(bn.residual) + offset : nullptr;
    T* y = static_cast<T*>(bn.y) + offset;
    const auto mean = Channels::of(bn.mean, channel), scale = Channels::of(bn.scale, channel);
    const auto shift = Channels::of(bn.shift, channel);
    const bool normalised = bn.scale2 != nullptr;
    const auto mean2 = Channels::of(bn.mean2, channel), scale2 = Channels::of(bn.scale2, channel);
    for_vectors<D>(length, [&](int64_t j, auto memory) FR_LAMBDA {
      V v = (memory.load(x + j) - mean.at(j)) * scale.at(j) + shift.at(j);
      if (normalised)
        v += (memory.load(residual + j) - mean2.at(j)) * scale2.at(j);
      else if (residual)
        v += memory.load(residual + j);
      memory.store(y + j, activated(bn.activation, v), bn.stream);
    });
  }
}

// g = dy * !(y <= 0); sums of g, g * (x - mean) and, with x2, g * (x2 - mean2). g is written to
// dresidual unless that is null.
template <typename D>
void bn_reduce_rows(const BnBackward& bn, int64_t begin, int64_t end, double* __restrict sum_g,
                    double* __restrict sum_gx, double* __restrict sum_gx2) {
  typedef typename D::T T;
  typedef typename D::A A;
  typedef typename D::V V;
  const int64_t C = bn.walk.period;
  A t1[kTile], t2[kTile], t3[kTile];
  for (int64_t block = begin; block < end; block += kBlockRows) {
    const int64_t rows = end - block < kBlockRows ? end - block : kBlockRows;
    for (int64_t tile = 0; tile < C; tile += kTile) {
      const int64_t columns = C - tile < kTile ? C - tile : kTile;
      const auto* mean = static_cast<const A*>(bn.mean) + tile;
      const auto* mean2 = bn.x2 ? static_cast<const A*>(bn.mean2) + tile : nullptr;
      const auto* mask_scale =
          bn.mask_scale ? static_cast<const A*>(bn.mask_scale) + tile : nullptr;
      const auto* mask_shift =
          bn.mask_scale ? static_cast<const A*>(bn.mask_shift) + tile : nullptr;
      for (int64_t j = 0; j < columns + D::lanes && j < kTile; ++j) t1[j] = t2[j] = t3[j] = 0;
      for (int64_t row = block; row < block + rows; ++row) {
        const int64_t base = bn.walk.first + row * C + tile;
        const T* dy = static_cast<const T*>(bn.dy) + base;
        const T* x = static_cast<const T*>(bn.x) + base;
        const T* y = bn.y ? static_cast<const T*>(bn.y) + base : nullptr;
        const T* x2 = bn.x2 ? static_cast<const T*>(bn.x2) + base : nullptr;
        T* dresidual = bn.dresidual ? static_cast<T*>(bn.dresidual) + base : nullptr;
        for_vectors<D>(columns, [&](int64_t j, auto memory) FR_LAMBDA {
          // With non-temporal stores, which use the same fill buffers, prefetching took 2.5 times
          // as long.
          if (!dresidual) {
            __builtin_prefetch(dy + j + kPrefetchDistance, 0, 2);
            __builtin_prefetch(x + j + kPrefetchDistance, 0, 2);
          }
          V g = memory.load(dy + j);
          const V centred = memory.load(x + j) - load_any<V>(mean + j);
          if (mask_scale)
            g = masked_by(g, centred * load_any<V>(mask_scale + j) + load_any<V>(mask_shift + j),
                          D::zero);
          else if (y)
            g = masked_by(g, memory.load(y + j));
          if (dresidual) memory.store(dresidual + j, g, bn.stream);
          store_any(t1 + j, load_any<V>(t1 + j) + g);
          store_any(t2 + j, load_any<V>(t2 + j) + g * centred);
          if (x2) {
            const V centred2 = memory.load(x2 + j) - load_any<V>(mean2 + j);
            store_any(t3 + j, load_any<V>(t3 + j) + g * centred2);
          }
        });
      }
      for (int64_t j = 0; j < columns; ++j) {
        sum_g[tile + j] += t1[j];
        sum_gx[tile + j] += t2[j];
        if (bn.x2) sum_gx2[tile + j] += t3[j];
      }
    }
  }
}

template <typename D>
void bn_reduce_planes(const BnBackward& bn, int64_t begin, int64_t end, double* sum_g,
                      double* sum_gx, double* sum_gx2) {
  typedef typename D::T T;
  typedef typename D::V V;
  for (int64_t item = begin; item < end; ++item) {
    const Segment segment = segment_of<false>(bn.walk, item);
    const T* dy = static_cast<const T*>(bn.dy) + segment.offset;
    const T* x = static_cast<const T*>(bn.x) + segment.offset;
    const T* x2 = bn.x2 ? static_cast<const T*>(bn.x2) + segment.offset : nullptr;
    T* dresidual = bn.dresidual ? static_cast<T*>(bn.dresidual) + segment.offset : nullptr;
    const T* y = bn.y ? static_cast<const T*>(bn.y) + segment.offset : nullptr;
    const auto of_channel = [&](const void* array) FR_LAMBDA {
      return PerChannel<D, false>::of(array, segment.channel).value;
    };
    const bool recompute_mask = bn.mask_scale != nullptr;
    const V mean = of_channel(bn.mean), mean2 = of_channel(bn.mean2);
    const V mask_scale = of_channel(bn.mask_scale), mask_shift = of_channel(bn.mask_shift);
    V t1[4] = {}, t2[4] = {}, t3[4] = {};
    const auto add = [&](int64_t i, int k, auto memory) FR_LAMBDA {
      V g = memory.load(dy + i);
      const V centred = memory.keep(memory.load(x + i) - mean);
      if (recompute_mask)
        g = masked_by(g, centred * mask_scale + mask_shift, D::zero);
      else if (y)
        g = masked_by(g, memory.load(y + i));
      if (dresidual) memory.store(dresidual + i, g, bn.stream);
      t1[k] += g;
      t2[k] += g * centred;
      if (x2) t3[k] += g * memory.keep(memory.load(x2 + i) - mean2);
    };
    constexpr int64_t L = D::lanes;
    int64_t i = 0;
    for (; i + 4 * L <= segment.length; i += 4 * L)
      for (int k = 0; k < 4; ++k) add(i + k * L, k, FullVector<D>{});
    for_vectors<D>(segment.length - i,
                   [&](int64_t j, auto memory) FR_LAMBDA { add(i + j, 0, memory); });
    sum_g[segment.channel] += sum_lanes<D>((t1[0] + t1[1]) + (t1[2] + t1[3]));
    sum_gx[segment.channel] += sum_lanes<D>((t2[0] + t2[1]) + (t2[2] + t2[3]));
    if (x2) sum_gx2[segment.channel] += sum_lanes<D>((t3[0] + t3[1]) + (t3[2] + t3[3]));
  }
}

// dx = scale * ((g - g_mean) - slope * (x - mean)): the differences first, since they nearly cancel
// for small batches
template <typename D, bool rows>
void bn_backward(const BnBackward& operands, int64_t begin, int64_t end) {
  typedef typename D::T T;
  typedef typename D::V V;
  typedef PerChannel<D, rows> Channels;
  const BnBackward bn = operands;  // not reloaded after every store
  for (int64_t item = begin; item < end; ++item) {
    const auto [channel, offset, length] = segment_of<rows>(bn.walk, item);
    const T* dy = static_cast<const T*>(bn.dy) + offset;
    const T* x = static_cast<const T*>(bn.x) + offset;
    T* dx = static_cast<T*>(bn.dx) + offset;
    const T* y = bn.y ? static_cast<const T*>(bn.y) + offset : nullptr;
    const bool recompute_mask = bn.mask_scale != nullptr;
    const auto mask_scale = Channels::of(bn.mask_scale, channel);
    const auto mask_shift = Channels::of(bn.mask_shift, channel);
    const auto mean = Channels::of(bn.mean, channel), g_mean = Channels::of(bn.g_mean, channel);
    const auto slope = Channels::of(bn.slope, channel), scale = Channels::of(bn.scale, channel);
    for_vectors<D>(length, [&](int64_t j, auto memory) FR_LAMBDA {
      V g = memory.load(dy + j);
      const V centred = memory.load(x + j) - mean.at(j);
      if (recompute_mask)
        g = masked_by(g, centred * mask_scale.at(j) + mask_shift.at(j), D::zero);
      else if (y)
        g = masked_by(g, memory.load(y + j));
      g = (g - g_mean.at(j)) - slope.at(j) * centred;
      memory.store(dx + j, scale.at(j) * g, bn.stream);
    });
  }
}
