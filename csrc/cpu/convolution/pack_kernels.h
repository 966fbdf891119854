// Packs convolution weights as cpu/convolution/direct_kernels.h and
// cpu/convolution/winograd_kernels.h read them, at every training step. weight, (K, R, S, C) or
// (K, C, R, S) in memory, is packed as it is or, for the input gradient, with inputs and outputs
// swapped in each group; all or some of its taps, in any order.
//
// A tile of 16 outputs by 16 inputs of every tap is rearranged into vectors of outputs (a copy if
// outputs are contiguous in memory, else a transposition in registers), then written in the
// requested layouts. Bytes: the weight read once, each layout written once.
#pragma once

#include "cpu/convolution/winograd_kernels.h"

// Transposes 16 rows of 16 floats. load(i, j): the vector of row i from column j on; store(i, j,
// v): the same for the result.
template <typename Load, typename Store>
FR_INLINE void transpose_16x16(const Load& load, const Store& store) {
  for (int64_t row = 0; row < 16; row += kLanes)
    for (int64_t column = 0; column < 16; column += kLanes) {
      vf t[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) t[i] = load(row + i, column);
      transpose_square(t);
      for (int64_t i = 0; i < kLanes; ++i) store(column + i, row, t[i]);
    }
}

void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
  transpose_16x16([&](int64_t i, int64_t j)
                      FR_LAMBDA { return load_any<vf>(from + i * from_row + j); },
                  [&](int64_t i, int64_t j, vf v) FR_LAMBDA { store_any(to + i * to_row + j, v); });
}

// Rounded to bfloat16 (to nearest even) in the upper halves; the lower halves are undefined.
FR_INLINE vu bfloat16_bits(vf x) {
  const vu bits = (vu)x;
  return (vu)(x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u));
}
FR_INLINE vf rounded_to_bfloat16(vf x) { return (vf)(bfloat16_bits(x) & 0xffff0000u); }
// Two vectors rounded, interleaved: a's in the lower halves.
FR_INLINE vu interleave_bfloat16(vf a, vf b) {
  return (bfloat16_bits(a) >> 16) | (bfloat16_bits(b) & 0xffff0000u);
}

FR_INLINE void copy_16(const float* from, float* to) {
  for (int64_t j = 0; j < 16; j += kLanes) store_any(to + j, load_any<vf>(from + j));
}

// G g G^T of 9 vectors of taps, one output's 3x3 per lane.
template <int m>
FR_INLINE void winograd_weight(const vf* g, vf* out) {
  constexpr int size = WinogradTransform<m>::size;
  vf t[size][3];
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
    const vf column[3] = {g[s], g[3 + s], g[6 + s]};
    vf u[size];
    WinogradTransform<m>::weight(column, u);
#pragma GCC unroll 6
    for (int i = 0; i < size; ++i) t[i][s] = u[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < size; ++i) WinogradTransform<m>::weight(t[i], out + size * i);
}

// 16 inputs by 16 outputs, laid out in `tile` by pack_16: to `out`, `inputs` rows of `vectors`
// vectors per product.
template <int m>
FR_INLINE void pack_winograd(const float* tile, int64_t inputs, int64_t vectors, float* out) {
  constexpr int64_t products = winograd_products(m);
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t j = 0; j < 16; j += kLanes) {
      vf g[9], u[products];
      for (int tap = 0; tap < 9; ++tap) g[tap] = load_any<vf>(tile + (tap * 16 + i) * 16 + j);
      winograd_weight<m>(g, u);
      for (int64_t k = 0; k < products; ++k)
        store_any(out + (k * inputs + i) * vectors * 16 + j, u[k]);
    }
}

constexpr int64_t kPrefetchInputs = 32;  // from packed to prefetched inputs

// For adjacent taps: where the vectors of 16 channels' taps belong in (tap, channel, vector).
struct AdjacentTaps {
  int place[kMaxPackedTaps * 16];

  explicit AdjacentTaps(int64_t taps) {
    for (int64_t channel = 0, i = 0; channel < 16; ++channel)
      for (int64_t tap = 0; tap < taps; ++tap, ++i)
        place[i] = static_cast<int>((tap * 16 + channel) * 16);
  }
};

// The tile of pack_16 from a contiguous weight: 16 rows of (channel, tap) are transposed, which
// gives vectors of outputs or, if `transposed`, of inputs; those are transposed tap by tap.
FR_INLINE void load_adjacent_taps(const ConvPack& p, const AdjacentTaps& taps, const float* source,
                                  float* tile) {
  alignas(64) float turned[kMaxPackedTaps * 256];
  float* vectors = p.transposed ? turned : tile;
  const int64_t row = p.transposed ? p.input_stride : p.output_stride;
  for (int64_t first = 0; first < p.adjacent_taps * 16; first += 16) {
    for (int64_t i = 0; i < 16; ++i)
      __builtin_prefetch(source + kPrefetchInputs * p.input_stride + i * row + first, 0, 2);
    transpose_16x16([&](int64_t i, int64_t j)
                        FR_LAMBDA { return load_any<vf>(source + i * row + first + j); },
                    [&](int64_t i, int64_t j, vf v)
                        FR_LAMBDA { store_any(vectors + taps.place[first + i] + j, v); });
  }
  if (p.transposed)
    for (int64_t tap = 0; tap < p.taps; ++tap)
      transpose(turned + p.tap_offset[tap] * 256, 16, tile + tap * 256, 16);
}

// Packs 16 inputs from c on of vector v of outputs; tile: scratch, (tap, input, 16 outputs)
FR_INLINE void pack_16(const ConvPack& p, const AdjacentTaps& adjacent, int64_t v, int64_t c,
                       float* tile) {
  const int64_t K = p.outputs, C = p.inputs;
  const auto* weight = static_cast<const float*>(p.weight);
  const int64_t block = v / p.block_vectors, left = K / 16 - block * p.block_vectors;
  const int64_t vectors = left < p.block_vectors ? left : p.block_vectors;
  const int64_t place = v % p.block_vectors;
  const int64_t first = block * p.block_vectors * 16 * C;  // of this block, in elements of one tap
  const int64_t group = v * 16 / p.group_outputs, output = v * 16 - group * p.group_outputs;
  const float* first_tap =
      weight + group * p.group_stride + output * p.output_stride + c * p.input_stride;
  if (p.adjacent_taps) load_adjacent_taps(p, adjacent, first_tap, tile);
  for (int64_t tap = 0; tap < (p.adjacent_taps ? 0 : p.taps); ++tap) {
    const float* source = first_tap + p.tap_offset[tap];
    float* t = tile + tap * 256;
    const int64_t row = p.transposed ? p.input_stride : p.output_stride;
    for (int64_t i = 0; i < 16; ++i)
      __builtin_prefetch(source + kPrefetchInputs * p.input_stride + i * row, 0, 2);
    if (p.transposed) {
      for (int64_t i = 0; i < 16; ++i) copy_16(source + i * p.input_stride, t + i * 16);
    } else {
      transpose(source, p.output_stride, t, 16);
    }
  }
  if (p.variant == kHalfWidened)
    for (int64_t i = 0; i < p.taps * 256; i += kLanes)
      store_any(tile + i, float16_to_float(float_to_float16(load_any<vf>(tile + i))));
  if (p.variant == kBFloatWidened || (p.variant == kBFloatPairs && p.winograd))
    for (int64_t i = 0; i < p.taps * 256; i += kLanes)
      store_any(tile + i, rounded_to_bfloat16(load_any<vf>(tile + i)));
  if (p.direct && p.variant != kBFloatPairs) {
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      auto* out =
          static_cast<float*>(p.direct) + first * p.taps + ((tap * C + c) * vectors + place) * 16;
      for (int64_t i = 0; i < 16; ++i) copy_16(tile + (tap * 16 + i) * 16, out + i * vectors * 16);
    }
  } else if (p.direct) {
    for (int64_t tap = 0; tap < p.taps; ++tap) {
      auto* out = static_cast<uint16_t*>(p.direct) + first * p.taps +
                  ((tap * C + c) / 2 * vectors + place) * 32;
      for (int64_t i = 0; i < 8; ++i)
        for (int64_t j = 0; j < 16; j += kLanes) {
          const float* pair = tile + (tap * 16 + 2 * i) * 16 + j;
          store_any(out + i * vectors * 32 + 2 * j,
                    interleave_bfloat16(load_any<vf>(pair), load_any<vf>(pair + 16)));
        }
    }
  }
  if (p.winograd) {
    auto* out = static_cast<float*>(p.winograd) + (c * vectors + place) * 16;
    if (p.winograd_tile == 2)
      pack_winograd<2>(tile, C, vectors, out + first * winograd_products(2));
    else
      pack_winograd<4>(tile, C, vectors, out + first * winograd_products(4));
  }
}

// Packs vectors [begin, end) of the K / 16 vectors of outputs. If `transposed`, those of a block
// are packed together: four times as many bytes of every row of weights.
void conv_pack(const ConvPack& p, int64_t begin, int64_t end) {
  alignas(64) float tile[kMaxPackedTaps * 256];
  const AdjacentTaps adjacent(p.adjacent_taps);
  const int64_t together = p.transposed ? 4 : 1;
  for (int64_t v = begin; v < end;) {
    const int64_t next = (v / together + 1) * together, stop = next < end ? next : end;
    for (int64_t c = 0; c < p.inputs; c += 16)
      for (int64_t u = v; u < stop; ++u) pack_16(p, adjacent, u, c, tile);
    v = stop;
  }
}
