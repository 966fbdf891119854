// Device code shared by all kernels: types, vector accesses, and one wrapper for each PTX
// instruction, with its section in the PTX ISA. Kernels include this file and no CUDA header, and
// use only 1-D grids and dynamic shared memory, so that they also compile for the host emulator
// (tests/emulator/README.md).
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(FUSED_RESNET_EMULATED)
#include "emulated_device.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fused_resnet {

#if !defined(FUSED_RESNET_EMULATED)

using float16_t = __half;
using bfloat16_t = __nv_bfloat16;

__device__ __forceinline__ float widen(float16_t v) { return __half2float(v); }
__device__ __forceinline__ float widen(bfloat16_t v) { return __bfloat162float(v); }
template <typename T>
__device__ __forceinline__ T narrow_16(float v) {
  if constexpr (std::is_same_v<T, float16_t>)
    return __float2half_rn(v);
  else
    return __float2bfloat16_rn(v);
}
// a * b + c, rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ __forceinline__ double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}

// threadIdx.x, read again by a volatile instruction. The compiler cannot keep values derived from
// it in registers across a main loop that needs all registers.
__device__ __forceinline__ int read_tid() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
// blockIdx.x, for the same reason.
__device__ __forceinline__ unsigned read_ctaid() {
  unsigned block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(16) uint8_t dynamic_shared_memory[];
  return dynamic_shared_memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Barrier for all blocks of a cooperative launch. Writes before it are visible to all blocks after
// it.
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

// --- memory --------------------------------------------------------------------------------------

// V: an element type, uint32_t, uint2 or uint4. p must be aligned to sizeof(V).
template <typename V>
__device__ __forceinline__ V load_global(const void* p) {
  return *static_cast<const V*>(p);
}
// The same, for data that is read only once: not allocated in L1 (ld.global.L1::no_allocate, PTX
// ISA "ld").
template <typename V>
__device__ __forceinline__ V load_global_once(const void* p) {
  if constexpr (sizeof(V) == 16) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
  } else {
    return load_global<V>(p);
  }
}
template <typename V>
__device__ __forceinline__ void store_global(void* p, V v) {
  *static_cast<V*>(p) = v;
}
template <typename V>
__device__ __forceinline__ V load_shared(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
__device__ __forceinline__ void store_shared(void* p, V v) {
  *static_cast<V*>(p) = v;
}

// cp.async (PTX ISA, "cp.async"): copies kBytes from global to shared memory without registers.
// Bytes from valid_bytes on are zero-filled and not read. 16-byte copies bypass L1.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid_bytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kGroupsLeft of this thread's groups are in flight.
template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// --- matrix fragments ----------------------------------------------------------------------------

// ldmatrix (PTX ISA, "ldmatrix"): four 8x8 matrices of 16-bit elements. Lane l passes the address
// of row l % 8 of matrix l / 8. It receives, from each matrix, elements 2 (l % 4) and 2 (l % 4) + 1
// of row l / 4.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
// mma (PTX ISA, "mma.m16n8k16" and "mma.m16n8k8"): D += A B with float32 accumulators. T:
// float16_t, bfloat16_t, or float, whose upper 19 bits are multiplied (TF32). Fragment layouts:
// tests/emulator/emulated_device.h.
template <typename T>
__device__ __forceinline__ void matrix_multiply(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float16_t>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, bfloat16_t>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t float_bits(float v) { return __float_as_uint(v); }
// cvt.rna.tf32 (PTX ISA, "cvt"): rounds float32 bits to TF32, to nearest, ties away from zero.
// Without it, mma truncates its operands: twice the error, and biased.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

#endif  // !FUSED_RESNET_EMULATED

// --- values --------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }

__device__ __forceinline__ float as_float(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// One rounding, to nearest even.
template <typename T, typename A>
__device__ __forceinline__ T narrow(A v) {
  if constexpr (std::is_same_v<T, A>)
    return v;
  else
    return narrow_16<T>(v);
}

// The accumulator type for T.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 16 bytes of T in registers.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

template <typename T>
__device__ __forceinline__ Pack<T> unpack(uint4 bits) {
  return *reinterpret_cast<const Pack<T>*>(&bits);
}
template <typename T>
__device__ __forceinline__ uint4 packed(const Pack<T>& pack) {
  return *reinterpret_cast<const uint4*>(&pack);
}

}  // namespace fused_resnet
