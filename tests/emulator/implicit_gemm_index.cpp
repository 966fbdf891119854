// Exports functions of csrc/cuda/convolution/index.h and csrc/cuda/device/fast_division.h for
// tests/kernels/cuda/test_implicit_gemm.py, called through ctypes.
#include "cuda/convolution/index.h"
#include "cuda/convolution/problem.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

uint64_t next_random(uint64_t& state) {  // xorshift64
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state;
}

bool divides(const fused_resnet::FastDivision& by, int64_t n) {
  if (n < 0 || n > 0x7fffffff) return true;
  const int quotient = by.quotient(static_cast<int>(n));
  const auto d = static_cast<int64_t>(by.divisor);
  return quotient == n / d && by.remainder(static_cast<int>(n), quotient) == n % d;
}

}  // namespace

// Counts dividends n with a wrong quotient or remainder, among: the first `first` ones, those next
// to the first and last 1000 multiples of d, the largest one, and `random` others.
EXPORTED int64_t wrong_quotients(int d, int64_t first, int64_t random, uint64_t seed) {
  const auto by = fused_resnet::FastDivision::by(d);
  int64_t wrong = 0;
  for (int64_t n = 0; n < first; ++n) wrong += !divides(by, n);
  const int64_t last = 0x7fffffff / int64_t{d};
  for (int64_t i = 0; i < 1000; ++i)
    for (int64_t offset = -1; offset <= 1; ++offset)
      wrong += !divides(by, i * d + offset) + !divides(by, (last - i) * d + offset);
  wrong += !divides(by, 0x7fffffff);
  for (int64_t i = 0; i < random; ++i)
    wrong += !divides(by, static_cast<int64_t>(next_random(seed) >> 33));
  return wrong;
}

EXPORTED void gemm_tile_place(unsigned block, unsigned tiles_m, unsigned tiles_n, int* place) {
  const auto at = fused_resnet::tile_place(block, tiles_m, tiles_n);
  place[0] = at.row, place[1] = at.column, place[2] = at.split;
}

EXPORTED void gemm_split_steps(int steps, int splits, int split, int* range) {
  const auto found = fused_resnet::split_steps(steps, splits, split);
  range[0] = found.first, range[1] = found.last;
}

// Counts wrong positions when iterating over the window from every chunk of the first two steps,
// compared with division of the chunk number. problem: {H, W, C, R, S, dilation_h, dilation_w,
// groups}, C in elements of two bytes. Also counts wrong window starts of the pixels of image n,
// with stride 2 and padding 1, where more than 2^31 elements may precede it.
EXPORTED int wrong_window_places(const int* problem, int n) {
  using namespace fused_resnet;
  ConvProblem p{};
  p.N = n + 1;
  p.H = problem[0], p.W = problem[1], p.C = problem[2], p.K = 8;
  p.R = problem[3], p.S = problem[4];
  p.dilation_h = problem[5], p.dilation_w = problem[6], p.groups = problem[7];
  p.stride_h = p.stride_w = 2, p.pad_h = p.pad_w = 1;
  p.P = (p.H + 2 - p.dilation_h * (p.R - 1) - 1) / 2 + 1;
  p.Q = (p.W + 2 - p.dilation_w * (p.S - 1) - 1) / 2 + 1;
  const Window window = Window::of(p, 2);
  const int chunks = p.C / 8, all = p.R * p.S * chunks;
  int wrong = 0;
  for (int first = 0; first < 2 * kStepChunks; ++first) {
    WindowPlace place = WindowPlace::of(window, first);
    for (int chunk = first; chunk < all + 2 * kStepChunks; chunk += kStepChunks) {
      const int r = chunk / chunks / p.S, s = chunk / chunks % p.S, c = chunk % chunks;
      const int h = r * window.dilation_h, w = s * window.dilation_w;
      wrong += place.past_end(window) != (chunk >= all);
      const int64_t at = (int64_t{h} * p.W + w) * p.groups * chunks + c;
      wrong += chunk < all && (place.h != h || place.w != w || place.c != c ||
                               place.at != static_cast<uint32_t>(at));
      place.advance(window);
    }
  }
  for (int m = n * p.P * p.Q; m < (n + 1) * p.P * p.Q; ++m) {
    const int h = m / p.Q % p.P * 2 - 1, w = m % p.Q * 2 - 1;
    const int64_t at = ((int64_t{n} * p.H + h) * p.W + w) * p.groups * chunks;
    const WindowStart start = window_start(window, m);
    wrong += start.h != h || start.w != w || start.at != static_cast<uint32_t>(at);
  }
  return wrong;
}

// Counts offsets in a tile of accumulators that are not a permutation of its elements, or that do
// not keep each group of four columns contiguous.
EXPORTED int wrong_sum_offsets(int rows, int columns) {
  std::vector<int> seen(static_cast<size_t>(rows * columns));
  int wrong = 0;
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column) {
      const int at = fused_resnet::sum_offset(row, column, columns);
      if (at < 0 || at >= 4 * rows * columns || at % 4)
        ++wrong;
      else
        wrong += seen[static_cast<size_t>(at / 4)]++;
      wrong += column % 4 && at != fused_resnet::sum_offset(row, column - 1, columns) + 4;
    }
  return wrong;
}
