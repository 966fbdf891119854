// Host counterpart of csrc/cuda/device/device.cuh: the CUDA keywords and built-ins that the kernels
// use, and every PTX wrapper, with the register layouts that the PTX ISA documents.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__
#define threadIdx (::emulated::thread_index())
#define blockIdx (::emulated::block_index())
#define blockDim (::emulated::block_size())
#define gridDim (::emulated::grid_size())

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};

inline void __syncthreads() { ::emulated::sync_threads(); }
inline void __syncwarp() {
  ::emulated::collective("__syncwarp", nullptr, [](void**) {});
}
inline void __threadfence() {}

template <typename T>
T emulated_shuffle(const char* name, T value, unsigned source_lane) {
  struct Lane {
    T in, out;
    unsigned source;
  } mine{value, value, source_lane};
  ::emulated::collective(name, &mine, [](void** lanes) {
    for (int i = 0; i < 32; ++i) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      if (lane.source < 32) lane.out = static_cast<Lane*>(lanes[lane.source])->in;
    }
  });
  return mine.out;
}
inline unsigned emulated_lane() { return threadIdx.x % 32; }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated_shuffle("__shfl_sync", value, static_cast<unsigned>(lane) % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated_shuffle("__shfl_xor_sync", value, emulated_lane() ^ static_cast<unsigned>(mask));
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return emulated_shuffle("__shfl_down_sync", value, emulated_lane() + delta);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  struct Lane {
    bool in;
    unsigned out;
  } mine{predicate, 0};
  ::emulated::collective("__ballot_sync", &mine, [](void** lanes) {
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned{static_cast<Lane*>(lanes[i])->in} << i;
    for (int i = 0; i < 32; ++i) static_cast<Lane*>(lanes[i])->out = bits;
  });
  return mine.out;
}
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  const unsigned old = *p;
  *p += value;
  return old;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt(double v) { return 1.0 / std::sqrt(v); }

namespace fused_resnet {

using float16_t = torch::headeronly::Half;
using bfloat16_t = torch::headeronly::BFloat16;

inline float widen(float16_t v) { return static_cast<float>(v); }
inline float widen(bfloat16_t v) { return static_cast<float>(v); }
template <typename T>
T narrow_16(float v) {
  return static_cast<T>(v);
}
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

inline int read_tid() { return static_cast<int>(threadIdx.x); }
inline unsigned read_ctaid() { return blockIdx.x; }

inline uint8_t* shared_memory() { return ::emulated::shared_memory(); }
inline void sync_grid() { ::emulated::grid_sync(); }

// --- memory --------------------------------------------------------------------------------------

inline void emulated_check_aligned(const char* what, const void* p, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    ::emulated::fault(std::string(what) + ": the address is not a multiple of " +
                      std::to_string(bytes));
}
template <typename V>
V load_global(const void* p) {
  emulated_check_aligned("load_global", p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
V load_global_once(const void* p) {
  return load_global<V>(p);
}
template <typename V>
void store_global(void* p, V v) {
  emulated_check_aligned("store_global", p, sizeof(V));
  std::memcpy(p, &v, sizeof v);
}
template <typename V>
V load_shared(const void* p) {
  ::emulated::record(::emulated::Access::load, p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
void store_shared(void* p, V v) {
  ::emulated::record(::emulated::Access::store, p, sizeof(V));
  std::memcpy(p, &v, sizeof v);
}

template <int kBytes>
void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4);
  ::emulated::record(::emulated::Access::async_store, shared, kBytes);
  if (valid_bytes < 0 || valid_bytes > kBytes) ::emulated::fault("copy_async: valid_bytes");
  if (valid_bytes > 0) emulated_check_aligned("copy_async", global, kBytes);
  ::emulated::start(::emulated::Queue::cp_async, [=] {
    std::memset(shared, 0, kBytes);
    if (valid_bytes > 0) std::memcpy(shared, global, static_cast<size_t>(valid_bytes));
  });
}
inline void copy_async_commit() { ::emulated::commit(::emulated::Queue::cp_async); }
template <int kGroupsLeft>
void copy_async_wait() {
  ::emulated::finish(::emulated::Queue::cp_async, kGroupsLeft);
}

// --- matrix fragments ----------------------------------------------------------------------------

// PTX ISA, ldmatrix: lane l passes row l % 8 of matrix l / 8. It receives, from each matrix,
// elements 2 (l % 4) and 2 (l % 4) + 1 (16 bits each) of row l / 4.
inline void load_matrix_x4(uint32_t (&out)[4], const void* row) {
  struct Lane {
    uint32_t* out;
    const uint8_t* row;
  } mine{out, static_cast<const uint8_t*>(row)};
  ::emulated::record(::emulated::Access::ldmatrix, row, 16);
  ::emulated::collective("ldmatrix", &mine, [](void** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m)
        std::memcpy(static_cast<Lane*>(lanes[l])->out + m,
                    static_cast<Lane*>(lanes[8 * m + l / 4])->row + 4 * (l % 4), 4);
  });
}
// PTX ISA, stmatrix: the store counterpart.
inline void store_matrix_x4(void* row, const uint32_t (&in)[4]) {
  struct Lane {
    const uint32_t* in;
    uint8_t* row;
  } mine{in, static_cast<uint8_t*>(row)};
  ::emulated::record(::emulated::Access::stmatrix, row, 16);
  ::emulated::collective("stmatrix", &mine, [](void** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m)
        std::memcpy(static_cast<Lane*>(lanes[8 * m + l / 4])->row + 4 * (l % 4),
                    static_cast<Lane*>(lanes[l])->in + m, 4);
  });
}

template <typename T>
float emulated_unpack(uint32_t pair, int which) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * which));
  T v;
  std::memcpy(&v, &bits, 2);
  return widen(v);
}
// The bits of a float32 that tensor cores use: sign, exponent and 10 bits of mantissa.
inline float emulated_tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }
inline uint32_t float_bits(float v) { return std::bit_cast<uint32_t>(v); }
// PTX ISA, cvt.rna.tf32.f32: to nearest, ties away from zero; NaN stays NaN.
inline uint32_t round_to_tf32(uint32_t bits) {
  return std::isnan(std::bit_cast<float>(bits)) ? 0x7fffffffu : (bits + 0x1000u) & 0xffffe000u;
}

// PTX ISA, mma.m16n8k16 (.f16, .bf16): with g = lane / 4, t = lane % 4,
//   A: registers 0 to 3 hold rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8 (and + 1)
//   B: registers 0, 1 hold rows 2t, 2t + 8 (and + 1) of column g
//   D: 0 to 3 are (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// mma.m16n8k8 (.tf32): A: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); B: (t, g), (t + 4, g).
template <typename T>
void matrix_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  ::emulated::collective("mma", &mine, [](void** lanes) {
    constexpr int k = std::is_same_v<T, float> ? 8 : 16;
    float A[16][k], B[k][8];
    for (int l = 0; l < 32; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; ++r) {
        const int row = g + 8 * (r % 2);
        if constexpr (std::is_same_v<T, float>) {
          A[row][t + 4 * (r / 2)] = emulated_tf32(lane.a[r]);
        } else {
          for (int h = 0; h < 2; ++h)
            A[row][2 * t + 8 * (r / 2) + h] = emulated_unpack<T>(lane.a[r], h);
        }
      }
      for (int r = 0; r < 2; ++r) {
        if constexpr (std::is_same_v<T, float>) {
          B[t + 4 * r][g] = emulated_tf32(lane.b[r]);
        } else {
          for (int h = 0; h < 2; ++h) B[2 * t + 8 * r + h][g] = emulated_unpack<T>(lane.b[r], h);
        }
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < 4; ++r) {
        const int row = l / 4 + 8 * (r / 2), column = 2 * (l % 4) + r % 2;
        float sum = 0;
        for (int i = 0; i < k; ++i) sum += A[row][i] * B[i][column];
        static_cast<Lane*>(lanes[l])->d[r] += sum;
      }
  });
}

}  // namespace fused_resnet
