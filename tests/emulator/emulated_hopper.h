// Host counterpart of csrc/cuda/device/hopper.cuh: tensor maps and TMA as documented by the CUDA
// driver API and the PTX ISA ("Tensors", "Tiled Mode", "Im2col mode", "Swizzling Modes"),
// mbarriers, and wgmma from shared-memory descriptors ("Asynchronous Warpgroup Level Matrix
// Instructions"). Written from those documents, not from the kernels.
#pragma once

#include <array>
#include <vector>

#include "emulated_device.h"

namespace fused_resnet {

// --- tensor maps ---------------------------------------------------------------------------------

// Map of 16-bit elements with SWIZZLE_128B and zero fill outside. Innermost dimension first.
struct TensorMap {
  int rank = 0;
  bool im2col = false;
  const uint8_t* data = nullptr;
  std::array<int64_t, 5> sizes{};
  std::array<int64_t, 5> strides{};     // bytes; [0] is the element size
  std::array<int, 5> box{};             // tiled
  std::array<int, 3> lower{}, upper{};  // im2col: dimensions 1 to rank - 2
  std::array<int, 3> steps{};
  int channels = 0, pixels = 0;

  int box_bytes() const {
    if (im2col) return 2 * channels * pixels;
    int elements = 1;
    for (int d = 0; d < rank; ++d) elements *= box[static_cast<size_t>(d)];
    return 2 * elements;
  }
};

// The driver's checks: faults where the driver returns CUDA_ERROR_INVALID_VALUE.
inline void emulated_require(bool condition, const char* what) {
  if (!condition) ::emulated::fault(std::string("tensor map: ") + what);
}
inline TensorMap emulated_map(int rank, const void* data, const uint64_t* sizes,
                              const uint64_t* strides) {
  TensorMap map;
  map.rank = rank;
  map.data = static_cast<const uint8_t*>(data);
  emulated_require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "address not aligned to 16 bytes");
  map.strides[0] = 2;
  for (size_t d = 0; d < static_cast<size_t>(rank); ++d) {
    emulated_require(sizes[d] >= 1 && sizes[d] <= uint64_t{1} << 32, "size");
    map.sizes[d] = static_cast<int64_t>(sizes[d]);
    if (d == 0) continue;
    emulated_require(strides[d - 1] % 16 == 0 && strides[d - 1] < uint64_t{1} << 40, "stride");
    map.strides[d] = static_cast<int64_t>(strides[d - 1]);
    emulated_require(map.strides[d] % map.strides[d - 1] == 0,
                     "stride is not a multiple of the previous stride");
  }
  return map;
}
inline TensorMap emulated_tiled_map(int rank, const void* data, const uint64_t* sizes,
                                    const uint64_t* strides, const uint32_t* box) {
  emulated_require(rank >= 1 && rank <= 5, "rank");
  TensorMap map = emulated_map(rank, data, sizes, strides);
  for (size_t d = 0; d < static_cast<size_t>(rank); ++d) {
    emulated_require(box[d] >= 1 && box[d] <= 256, "box");
    map.box[d] = static_cast<int>(box[d]);
  }
  emulated_require(box[0] * 2 % 16 == 0 && box[0] * 2 <= 128, "innermost box size");
  return map;
}
inline TensorMap emulated_im2col_map(int rank, const void* data, const uint64_t* sizes,
                                     const uint64_t* strides, const int* lower, const int* upper,
                                     const int* counts, const uint32_t* steps, uint32_t channels,
                                     uint32_t pixels) {
  emulated_require(rank >= 3 && rank <= 5, "rank");
  TensorMap map = emulated_map(rank, data, sizes, strides);
  map.im2col = true;
  const int min_corner = rank == 3 ? -32768 : rank == 4 ? -128 : -16;
  for (size_t d = 0; d < static_cast<size_t>(rank) - 2; ++d) {
    emulated_require(lower[d] >= min_corner && lower[d] < -min_corner, "lower corner");
    emulated_require(upper[d] >= min_corner && upper[d] < -min_corner, "upper corner");
    emulated_require(lower[d] <= map.sizes[d + 1] - 1 + upper[d], "empty bounding box");
    emulated_require(steps[d] >= 1 && steps[d] <= 8, "traversal stride");
    // No check of the driver's: where the traversal ends is documented only for this case.
    emulated_require(map.sizes[d + 1] - 1 + upper[d] - lower[d] ==
                         int64_t{counts[d] - 1} * static_cast<int64_t>(steps[d]),
                     "the window does not end at the last of its pixels");
    map.lower[d] = lower[d];
    map.upper[d] = upper[d];
    map.steps[d] = static_cast<int>(steps[d]);
  }
  emulated_require(channels * 2 % 16 == 0 && channels * 2 <= 128, "channels per pixel");
  emulated_require(pixels >= 1 && pixels <= 1024, "pixels per column");
  map.channels = static_cast<int>(channels);
  map.pixels = static_cast<int>(pixels);
  return map;
}

// Swizzle: address bits 4 to 6 ^= bits 7 to 9.
inline uint8_t* emulated_swizzled(uint8_t* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return p + static_cast<intptr_t>(at ^ (at >> 3 & 0x70)) - static_cast<intptr_t>(at);
}

using EmulatedPoint = std::array<int64_t, 5>;

// The element at a point of the tensor, or null if outside.
inline const uint8_t* emulated_element(const TensorMap& map, const EmulatedPoint& at) {
  const uint8_t* p = map.data;
  for (size_t d = 0; d < static_cast<size_t>(map.rank); ++d) {
    if (at[d] < 0 || at[d] >= map.sizes[d]) return nullptr;
    p += at[d] * map.strides[d];
  }
  return p;
}

// Calls visit(element of the box, point) for every element of a tiled box at `first`, innermost
// dimension fastest.
template <typename Visit>
void emulated_visit_box(const TensorMap& map, const EmulatedPoint& first, const Visit& visit) {
  EmulatedPoint step{};
  for (int64_t element = 0; element < map.box_bytes() / 2; ++element) {
    EmulatedPoint at = first;
    for (size_t d = 0; d < 5; ++d) at[d] += step[d];
    visit(element, at);
    for (size_t d = 0; d < static_cast<size_t>(map.rank); ++d) {
      if (++step[d] < map.box[d]) break;
      step[d] = 0;
    }
  }
}
// The same for an im2col column. The bounding box is [lower, size - 1 + upper] in each pixel
// dimension. The traversal starts at `first` and advances by the traversal strides; at the end of a
// dimension it returns to the lower corner and advances the next dimension, and after the last it
// advances to the next image. The offsets shift every pixel, but not the bounding box.
template <typename Visit>
void emulated_visit_column(const TensorMap& map, const EmulatedPoint& first,
                           const std::array<int, 3>& offsets, const Visit& visit) {
  const auto pixel_dims = static_cast<size_t>(map.rank) - 2;
  EmulatedPoint pixel = first;
  for (size_t d = 0; d < pixel_dims; ++d)
    if (pixel[d + 1] < map.lower[d] || pixel[d + 1] > map.sizes[d + 1] - 1 + map.upper[d])
      ::emulated::fault("im2col: the first pixel is outside the bounding box");
  for (int64_t p = 0; p < map.pixels; ++p) {
    EmulatedPoint at = pixel;
    for (size_t d = 0; d < pixel_dims; ++d) at[d + 1] += offsets[d];
    for (int64_t c = 0; c < map.channels; ++c, ++at[0]) visit(p * map.channels + c, at);
    size_t d = 0;
    for (; d < pixel_dims; ++d) {
      pixel[d + 1] += map.steps[d];
      if (pixel[d + 1] <= map.sizes[d + 1] - 1 + map.upper[d]) break;
      pixel[d + 1] = map.lower[d];
    }
    if (d == pixel_dims) ++pixel[d + 1];
  }
}

// --- mbarriers, fences ---------------------------------------------------------------------------

using ::emulated::mbarrier_arrive;
using ::emulated::mbarrier_init;
using ::emulated::mbarrier_wait;
inline void mbarrier_arrive_expect(uint64_t* bar, uint32_t bytes) {
  ::emulated::mbarrier_expect(bar, bytes);
  ::emulated::mbarrier_arrive(bar);
}
inline void fence_mbarrier_init() {}
inline void fence_proxy_async() { ::emulated::proxy_fence(); }

// --- TMA -----------------------------------------------------------------------------------------

inline void emulated_check_tile(const void* shared, int bytes) {
  ::emulated::shared_offset(shared);
  ::emulated::shared_offset(static_cast<const uint8_t*>(shared) + bytes - 1);
  // The swizzle pattern must start at the tile.
  emulated_check_aligned("a swizzled TMA tile", shared, 1024);
}
inline void prefetch_map(const TensorMap&) {}

// sources(visit) enumerates the elements of a box or column. All reads take place at the time of
// the copy.
template <typename Sources>
void emulated_load(void* shared, const TensorMap& map, uint64_t* bar, Sources sources) {
  const int bytes = map.box_bytes();
  emulated_check_tile(shared, bytes);
  ::emulated::start_unordered([=] {
    sources([&](int64_t element, const EmulatedPoint& at) {
      uint8_t* to = emulated_swizzled(static_cast<uint8_t*>(shared) + 2 * element);
      const uint8_t* from = emulated_element(map, at);
      if (from != nullptr)
        std::memcpy(to, from, 2);
      else
        std::memset(to, 0, 2);
    });
    ::emulated::mbarrier_complete(bar, static_cast<unsigned>(bytes));
  });
}
inline void load_box(void* shared, const TensorMap& map, uint64_t* bar, int c0, int c1, int c2) {
  if (map.im2col || map.rank != 3) ::emulated::fault("load_box: not a tiled map of rank 3");
  emulated_load(shared, map, bar,
                [=](const auto& visit) { emulated_visit_box(map, {c0, c1, c2}, visit); });
}
inline void load_im2col(void* shared, const TensorMap& map, uint64_t* bar, int c, int w, int h,
                        int n, uint16_t offset_w, uint16_t offset_h) {
  if (!map.im2col || map.rank != 4) ::emulated::fault("load_im2col: not an im2col map of rank 4");
  if (offset_w > 255 || offset_h > 255) ::emulated::fault("load_im2col: an offset above 255");
  emulated_load(shared, map, bar, [=](const auto& visit) {
    emulated_visit_column(map, {c, w, h, n}, {offset_w, offset_h}, visit);
  });
}
inline void store_box(const TensorMap& map, const void* shared, int c0, int c1, int c2) {
  if (map.im2col || map.rank != 3) ::emulated::fault("store_box: not a tiled map of rank 3");
  emulated_check_tile(shared, map.box_bytes());
  ::emulated::check_fenced(shared, static_cast<unsigned>(map.box_bytes()));
  ::emulated::start(::emulated::Queue::tma_stores, [=] {
    emulated_visit_box(map, {c0, c1, c2}, [&](int64_t element, const EmulatedPoint& at) {
      auto* from = const_cast<uint8_t*>(static_cast<const uint8_t*>(shared)) + 2 * element;
      auto* to = const_cast<uint8_t*>(emulated_element(map, at));
      if (to != nullptr) std::memcpy(to, emulated_swizzled(from), 2);
    });
  });
}
inline void store_commit() { ::emulated::commit(::emulated::Queue::tma_stores); }
inline void store_wait_read() { ::emulated::finish(::emulated::Queue::tma_stores, 0); }

// --- warpgroups ----------------------------------------------------------------------------------

inline void barrier_sync(uint32_t id, uint32_t threads) { ::emulated::barrier(id, threads); }
// Any lane, the same each time: here lane 23.
inline bool elect_lane() {
  ::emulated::collective("elect.sync", nullptr, [](void**) {});
  return threadIdx.x % 32 == 23;
}
template <int kRegisters>
void setmaxnreg_dec() {
  ::emulated::collective("setmaxnreg", nullptr, [](void**) {});
}
template <int kRegisters>
void setmaxnreg_inc() {
  ::emulated::collective("setmaxnreg", nullptr, [](void**) {});
}

// Shared memory starts at an address that is 128 modulo 1024, as does its host address.
inline uint32_t shared_address(const void* p) { return 128 + ::emulated::shared_offset(p); }

// --- wgmma ---------------------------------------------------------------------------------------

// The warps of a warpgroup proceed independently, each with the 16 rows of the product that it
// holds. On the hardware too, wgmma does not synchronise them.

inline void wgmma_fence() { ::emulated::wgmma_fence(); }
inline void wgmma_commit() {
  ::emulated::collective("wgmma.commit_group", nullptr,
                         [](void**) { ::emulated::commit(::emulated::Queue::wgmma); });
}
template <int kGroupsLeft>
void wgmma_wait() {
  ::emulated::finish(::emulated::Queue::wgmma, kGroupsLeft);
}
template <int kCount>
void wgmma_fence_operand(float (&)[kCount]) {}

// Reads elements (row, k) of a K-major operand in shared memory (PTX ISA, "Matrix Descriptor
// Format", "Strides"): core matrices of 8 rows, `stride byte offset` apart; within one, rows of 128
// bytes with swizzled addresses.
template <typename T>
std::vector<float> emulated_operand(uint8_t* shared, uint64_t descriptor, int rows) {
  const auto start = static_cast<unsigned>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<unsigned>(descriptor >> 32 & 0x3fff) << 4;
  std::vector<float> values(static_cast<size_t>(rows) * 16);
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < 16; ++k) {
      const unsigned at = start + static_cast<unsigned>(row / 8) * stride +
                          static_cast<unsigned>(row % 8 * 128 + 2 * k);
      const uint8_t* p = emulated_swizzled(shared + at - 128);
      T v;
      std::memcpy(&v, p, 2);
      values[static_cast<size_t>(row * 16 + k)] = widen(v);
    }
  return values;
}

inline void emulated_check_descriptor(uint64_t descriptor, int rows) {
  if (descriptor >> 62 != 1) ::emulated::fault("wgmma: a descriptor without the 128-byte swizzle");
  if ((descriptor >> 49 & 7) != 0) ::emulated::fault("wgmma: a non-zero base offset");
  const auto start = static_cast<unsigned>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<unsigned>(descriptor >> 32 & 0x3fff) << 4;
  if (start < 128) ::emulated::fault("wgmma: an address before shared memory");
  const unsigned last = start - 128 + static_cast<unsigned>(rows / 8 - 1) * stride + 7 * 128;
  ::emulated::shared_offset(::emulated::shared_at(last + 31));
  // Check whole rows, because the swizzle permutes chunks within a row.
  const unsigned first = (start - 128) / 128 * 128;
  ::emulated::check_fenced(::emulated::shared_at(first), last / 128 * 128 + 128 - first);
}

template <typename T, int kN>
void warpgroup_multiply(float (&d)[kN / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                        bool accumulate) {
  struct Thread {
    float* d;
    uint64_t a, b;
    bool accumulate;
  } mine{d, a_descriptor, b_descriptor, accumulate};
  ::emulated::check_wgmma_fenced();
  ::emulated::collective("wgmma.mma_async", &mine, [](void** threads) {
    const Thread first = *static_cast<Thread*>(threads[0]);
    std::array<float*, 32> sums;
    for (size_t t = 0; t < 32; ++t) {
      const Thread& thread = *static_cast<Thread*>(threads[t]);
      if (thread.a != first.a || thread.b != first.b || thread.accumulate != first.accumulate)
        ::emulated::fault("wgmma: the threads of a warp passed different arguments");
      sums[t] = thread.d;
    }
    emulated_check_descriptor(first.a, 64);
    emulated_check_descriptor(first.b, kN);
    uint8_t* shared = ::emulated::shared_memory();
    const size_t first_row = threadIdx.x % 128 / 32 * 16;
    ::emulated::start(::emulated::Queue::wgmma, [=] {
      const std::vector<float> a = emulated_operand<T>(shared, first.a, 64);
      const std::vector<float> b = emulated_operand<T>(shared, first.b, kN);
      std::vector<float> columns(b.size());  // (16, kN)
      for (size_t n = 0; n < kN; ++n)
        for (size_t k = 0; k < 16; ++k) columns[k * kN + n] = b[n * 16 + k];
      std::array<float, kN> row_sums;
      for (size_t row = 0; row < 16; ++row) {
        row_sums.fill(0);
        for (size_t k = 0; k < 16; ++k)
          for (size_t n = 0; n < kN; ++n)
            row_sums[n] += a[(first_row + row) * 16 + k] * columns[k * kN + n];
        for (size_t n = 0; n < kN; ++n) {
          const size_t thread = row % 8 * 4 + n % 8 / 2;
          float& sum = sums[thread][n / 8 * 4 + row / 8 * 2 + n % 2];
          sum = first.accumulate ? sum + row_sums[n] : row_sums[n];
        }
      }
    });
  });
}

// --- values --------------------------------------------------------------------------------------

inline float max_nan(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) return std::nanf("");
  return a > b || (a == b && !std::signbit(a)) ? a : b;  // +0 is greater than -0
}
template <typename T>
uint32_t narrow_pair(float low, float high) {
  const T values[2] = {narrow_16<T>(low), narrow_16<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, values, 4);
  return bits;
}
template <typename T>
float2 widen_pair(uint32_t bits) {
  return {emulated_unpack<T>(bits, 0), emulated_unpack<T>(bits, 1)};
}

}  // namespace fused_resnet
