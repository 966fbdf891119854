// One wrapper for each sm_90a PTX instruction that the kernels use, with its section in the PTX
// ISA. Complements cuda/device/device.cuh. The host counterpart is
// tests/emulator/emulated_hopper.h.
#pragma once

#include "cuda/device/device.cuh"

#if defined(FUSED_RESNET_EMULATED)
#include "emulated_hopper.h"
#else
#include <cuda.h>
#endif

// Whether the current compilation target supports these instructions.
#if defined(FUSED_RESNET_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FUSED_RESNET_HOPPER 1
#else
#define FUSED_RESNET_HOPPER 0
#endif

namespace fused_resnet {

// --- index arithmetic ----------------------------------------------------------------------------

constexpr int kSwizzleRowBytes = 128;    // a row of a swizzled tile
constexpr int kSwizzleAtomBytes = 1024;  // 8 rows, after which the pattern repeats

// Byte offset of the 16-byte chunk `chunk` (0 to 7) of a row in a tile with SWIZZLE_128B. The tile
// starts at a multiple of 1024 (PTX ISA, "Swizzling Modes": address bits 4 to 6 ^= bits 7 to 9).
__host__ __device__ __forceinline__ int swizzled_offset(int row, int chunk) {
  return row * kSwizzleRowBytes + ((chunk ^ (row & 7)) << 4);
}

// wgmma descriptor of such a tile as a K-major operand (PTX ISA, "Matrix Descriptor Format"): bits
// 0-13 address / 16, bits 32-45 byte offset between groups of 8 rows / 16, bits 62-63 the swizzle,
// 1 = 128 bytes. Bits 16-29 are ignored for a swizzled K-major tile. `further`: byte offset of the
// operand from `address`; the total must be below 2^18. Adding a constant changes only the lower
// word.
__host__ __device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, int further) {
  constexpr uint32_t high = kSwizzleAtomBytes >> 4 | 1u << 30;
  const uint32_t low = ((address & 0x3ffff) >> 4) + (static_cast<uint32_t>(further) >> 4);
  return uint64_t{high} << 32 | low;
}

#if !defined(FUSED_RESNET_EMULATED)

// Kernel parameters of this type must be declared `const __grid_constant__`.
using TensorMap = CUtensorMap;

// --- mbarriers: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier" -----

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count)
               : "memory");
}
// Must follow mbarrier_init, so that TMA sees the barriers ("fence.mbarrier_init").
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives and adds `bytes` to the TMA bytes that the current phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
// Waits until the phase with this parity has completed. Parity 0 is the first phase of a new
// barrier; parity 1 returns immediately on a new barrier.
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}

// Orders this thread's shared memory accesses before accesses by TMA and wgmma (the async proxy)
// that follow a barrier (PTX ISA, "membar / fence": fence.proxy.async).
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- TMA: PTX ISA, "cp.async.bulk.tensor" --------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
// Loads the map's box at (c0, c1, c2) into shared memory. Elements outside the tensor are
// zero-filled. The barrier counts all bytes of the box.
__device__ __forceinline__ void load_box(void* shared, const TensorMap& map, uint64_t* bar, int c0,
                                         int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(bar)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// Loads pixels of an im2col map, starting at (w, h, n), each offset by (offset_w, offset_h), and
// channels starting at c (PTX ISA, "Im2col mode").
__device__ __forceinline__ void load_im2col(void* shared, const TensorMap& map, uint64_t* bar,
                                            int c, int w, int h, int n, uint16_t offset_w,
                                            uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(bar)), "r"(c), "r"(w), "r"(h),
      "r"(n), "h"(offset_w), "h"(offset_h)
      : "memory");
}
// Stores shared memory to the map's box at (c0, c1, c2). Elements outside the tensor are not
// written.
__device__ __forceinline__ void store_box(const TensorMap& map, const void* shared, int c0, int c1,
                                          int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          reinterpret_cast<uint64_t>(&map)),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// Commits this thread's stores as a group ("cp.async.bulk.commit_group").
__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until all of this thread's stores have read shared memory ("cp.async.bulk.wait_group").
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// --- warpgroups ----------------------------------------------------------------------------------

// PTX ISA, "barrier": id 1 to 15 (0 is __syncthreads).
__device__ __forceinline__ void barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// True for one lane of a full warp, always the same one (PTX ISA, "elect.sync"). It tells the
// compiler that a single thread issues the copy.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}
// PTX ISA, "setmaxnreg". Must be executed by every warp of a warpgroup.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// PTX ISA, "stmatrix": the store counterpart of ldmatrix.
__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&in)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
      : "memory");
}

// --- wgmma: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" --------------------------

// Required before the first wgmma and after other code has accessed its registers ("wgmma.fence").
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}
// Compiler barrier: keeps uses of the accumulators after the wait.
template <int kCount>
__device__ __forceinline__ void wgmma_fence_operand(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FR_TEN(tens)                                                                      \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens \
  "6, "                                                                                   \
  "%" #tens "7, %" #tens "8, %" #tens "9"
#define FR_SUMS_8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FR_SUMS_32(i) FR_SUMS_8(i), FR_SUMS_8(i + 8), FR_SUMS_8(i + 16), FR_SUMS_8(i + 24)
// `a`, `b`, `p`: the numbers of the operands that follow the accumulators.
#define FR_WGMMA(n, type, list, a, b, p, ...)                                                  \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #p                       \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list \
               "}, %" #a ", %" #b ", accumulate, 1, 1, 0, 0;\n}"                               \
               : __VA_ARGS__                                                                   \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)))
#define FR_WGMMA_64(type) \
  FR_WGMMA(64, type, FR_TEN() ", " FR_TEN(1) ", " FR_TEN(2) ", %30, %31", 32, 33, 34, FR_SUMS_32(0))
#define FR_WGMMA_128(type)                                                                   \
  FR_WGMMA(128, type,                                                                        \
           FR_TEN() ", " FR_TEN(1) ", " FR_TEN(2) ", " FR_TEN(3) ", " FR_TEN(4) ", " FR_TEN( \
               5) ", %60, %61, %62, %63",                                                    \
           64, 65, 66, FR_SUMS_32(0), FR_SUMS_32(32))
#define FR_WGMMA_256(type) \
  FR_WGMMA(256, type,                                                                            \
           FR_TEN() ", " FR_TEN(1) ", " FR_TEN(2) ", " FR_TEN(3) ", " FR_TEN(4) ", " FR_TEN(5)   \
           ", " FR_TEN(6) ", " FR_TEN(7) ", " FR_TEN(8) ", " FR_TEN(9) ", " FR_TEN(10) ", "      \
           FR_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127",                        \
           128, 129, 130, FR_SUMS_32(0), FR_SUMS_32(32), FR_SUMS_32(64), FR_SUMS_32(96))

// wgmma.mma_async (m64nNk16): D (64, kN) = A (64, 16) B (kN, 16)^T, + D if accumulate. Accumulators
// of thread t of the warpgroup: d[4 j + i] is row 16 (t / 32) + t % 32 / 4 + 8 (i / 2), column 8 j
// + 2 (t % 4) + i % 2.
template <typename T, int kN>
__device__ __forceinline__ void warpgroup_multiply(float (&d)[kN / 2], uint64_t a_descriptor,
                                                   uint64_t b_descriptor, bool accumulate) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  if constexpr (std::is_same_v<T, float16_t>) {
    if constexpr (kN == 64)
      FR_WGMMA_64("f16");
    else if constexpr (kN == 128)
      FR_WGMMA_128("f16");
    else
      FR_WGMMA_256("f16");
  } else {
    static_assert(std::is_same_v<T, bfloat16_t>);
    if constexpr (kN == 64)
      FR_WGMMA_64("bf16");
    else if constexpr (kN == 128)
      FR_WGMMA_128("bf16");
    else
      FR_WGMMA_256("bf16");
  }
}

#undef FR_TEN
#undef FR_SUMS_8
#undef FR_SUMS_32
#undef FR_WGMMA
#undef FR_WGMMA_64
#undef FR_WGMMA_128
#undef FR_WGMMA_256

// Maximum; NaN if either operand is NaN (PTX ISA, "max": .NaN).
__device__ __forceinline__ float max_nan(float a, float b) {
  float greater;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(a), "f"(b));
  return greater;
}
// Packs two values of T into a register, `low` in the lower 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<T, float16_t>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}
template <typename T>
__device__ __forceinline__ float2 widen_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, float16_t>)
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  else
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
}

#endif  // !FUSED_RESNET_EMULATED

}  // namespace fused_resnet
