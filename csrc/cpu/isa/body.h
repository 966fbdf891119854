// The body of cpu/isa/avx512.cpp, cpu/isa/avx2.cpp and cpu/isa/generic.cpp: every CPU kernel,
// compiled for the instruction set FR_ISA with vectors of FR_VECTOR_BYTES. FR_TARGET, if defined,
// lists instruction set extensions. They are enabled after the system's headers, so that nothing
// from those is compiled for a machine that may lack them.

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa/kernels.h"

#define FR_STRING(x) #x
#if defined(FR_TARGET) && defined(__clang__)
#define FR_PRAGMA(x) _Pragma(FR_STRING(x))
FR_PRAGMA(clang attribute push(__attribute__((target(FR_TARGET))), apply_to = function))
#elif defined(FR_TARGET)
#define FR_PRAGMA(x) _Pragma(FR_STRING(x))
FR_PRAGMA(GCC target(FR_TARGET))
#endif

namespace fused_resnet {
namespace FR_ISA {
namespace {

#include "cpu/add_relu_kernels.h"
#include "cpu/batch_norm/bn_add_relu_kernels.h"
#include "cpu/batch_norm/bn_pool_kernels.h"
#include "cpu/head_kernels.h"
#include "cpu/pooling/max_pool2d_kernels.h"
#if FR_VECTOR_BYTES >= 32
#include "cpu/convolution/direct_kernels.h"
#include "cpu/convolution/pack_kernels.h"
#include "cpu/convolution/weight_gradient_kernels.h"
#include "cpu/convolution/weight_gradient_narrow_kernels.h"
#include "cpu/convolution/weight_gradient_winograd_kernels.h"
#include "cpu/convolution/winograd_kernels.h"
#endif
#if FR_VECTOR_BYTES == 64
#include "cpu/convolution/winograd_16_kernels.h"
#endif

}  // namespace

#define FR_ALL_DTYPES(kernel, ...)                                                          \
  {kernel<Float32 __VA_OPT__(, ) __VA_ARGS__>, kernel<BFloat16 __VA_OPT__(, ) __VA_ARGS__>, \
   kernel<Float16 __VA_OPT__(, ) __VA_ARGS__>, kernel<Float64 __VA_OPT__(, ) __VA_ARGS__>}

#if FR_VECTOR_BYTES == 64
#define FR_PAIRS(kernel) kernel<DotBFloat16>
#else
#define FR_PAIRS(kernel) nullptr
#endif
#define FR_WIDENED(kernel) kernel<DotWidenedBFloat16>, kernel<DotWidenedFloat16>
#define FR_CONV_VARIANTS(kernel) {kernel<DotFloat32>, FR_PAIRS(kernel), FR_WIDENED(kernel)}

extern const CpuKernels kernels;
const CpuKernels kernels = {
    FR_ISA_NAME,
    FR_ALL_DTYPES(add_relu),
    FR_ALL_DTYPES(add_relu_backward),
    FR_ALL_DTYPES(add),
    FR_ALL_DTYPES(epilogue_gradient),
    FR_ALL_DTYPES(bn_stats_rows),
    FR_ALL_DTYPES(bn_stats_planes),
    FR_ALL_DTYPES(bn_stats_double, true),
    FR_ALL_DTYPES(bn_stats_double, false),
    FR_ALL_DTYPES(bn_apply, true),
    FR_ALL_DTYPES(bn_apply, false),
    FR_ALL_DTYPES(bn_reduce_rows),
    FR_ALL_DTYPES(bn_reduce_planes),
    FR_ALL_DTYPES(bn_backward, true),
    FR_ALL_DTYPES(bn_backward, false),
    FR_ALL_DTYPES(max_pool2d),
    FR_ALL_DTYPES(bn_pool),
    FR_ALL_DTYPES(bn_pool_gradient),
    FR_ALL_DTYPES(abs_max),
    FR_ALL_DTYPES(mean_pixels),
    FR_ALL_DTYPES(linear),
#if FR_VECTOR_BYTES >= 32
    kTilePixels,
    {gradient_chain(1), gradient_chain(2), gradient_chain(1), gradient_chain(1)},
    {nullptr, nullptr, FR_WIDENED(widen)},
    FR_CONV_VARIANTS(conv_bn_relu),
    conv_pack,
    transpose,
    FR_CONV_VARIANTS(conv_weight_gradient),
    FR_CONV_VARIANTS(weight_gradient_scratch),
    {narrow_gradient<DotFloat32>, FR_PAIRS(narrow_gradient)},
    narrow_gradient_scratch,
    FR_CONV_VARIANTS(winograd_gradient),
    winograd_gradient_output,
    winograd_gradient_scratch,
    FR_CONV_VARIANTS(conv_bn_relu_winograd),
#endif
#if FR_VECTOR_BYTES == 64
    {conv_winograd_16<DotFloat32>, nullptr, FR_WIDENED(conv_winograd_16)},
    winograd_gradient_16,
#endif
};

}  // namespace FR_ISA
}  // namespace fused_resnet

#if defined(FR_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
