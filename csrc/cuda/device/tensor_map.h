// Tensor maps (TMA descriptors) of 16-bit tensors, encoded on the host. They are passed by value as
// kernel parameters, so that a captured CUDA graph stores them. The driver's encode functions are
// looked up through the runtime; nothing links libcuda.
#pragma once

#include "cuda/device/hopper.cuh"
#include "cuda/device/launch.h"

namespace fused_resnet {

// Innermost dimension first. strides: in bytes, for the dimensions after the innermost.
template <int kRank>
struct MappedTensor {
  DtypeIndex dtype;  // kFloat16 or kBFloat16
  const void* data;
  std::array<uint64_t, kRank> sizes;
  std::array<uint64_t, kRank - 1> strides;
};

// Additional parameters of an im2col map. For each dimension between the innermost and the
// outermost, innermost first: the position of the first pixel of the traversal (the lower corner),
// the number of pixels, and the traversal stride between them.
template <int kRank>
struct Im2colBox {
  std::array<int, kRank - 2> lower, counts;
  std::array<uint32_t, kRank - 2> steps;
  uint32_t channels, pixels;

  // The upper corner (CUDA driver API, cuTensorMapEncodeIm2col), relative to the last element of a
  // dimension: the last pixel of the traversal. The documents do not say where a traversal ends
  // whose stride leaves a remainder to a corner further out.
  std::array<int, kRank - 2> upper(const std::array<uint64_t, kRank>& sizes) const {
    std::array<int, kRank - 2> corner;
    for (size_t d = 0; d < corner.size(); ++d)
      corner[d] = lower[d] + (counts[d] - 1) * static_cast<int>(steps[d]) -
                  static_cast<int>(sizes[d + 1] - 1);
    return corner;
  }
};

#if defined(FUSED_RESNET_EMULATED)

template <int kRank>
TensorMap tiled_map(const MappedTensor<kRank>& t, const std::array<uint32_t, kRank>& box) {
  return emulated_tiled_map(kRank, t.data, t.sizes.data(), t.strides.data(), box.data());
}
template <int kRank>
TensorMap im2col_map(const MappedTensor<kRank>& t, const Im2colBox<kRank>& box) {
  return emulated_im2col_map(kRank, t.data, t.sizes.data(), t.strides.data(), box.lower.data(),
                             box.upper(t.sizes).data(), box.counts.data(), box.steps.data(),
                             box.channels, box.pixels);
}

#else

// The driver's function of this name, in its CUDA 12.0 version.
template <typename Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
  STD_CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status));
#else
  STD_CUDA_CHECK(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status));
#endif
  check(status == cudaDriverEntryPointSuccess && found != nullptr,
        "implicit_gemm: the CUDA driver does not provide ", name,
        "; the Hopper kernels require CUDA 12.0 or later");
  return reinterpret_cast<Function*>(found);
}

inline CUtensorMapDataType map_dtype(DtypeIndex dtype) {
  return dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// A tiled map with the box size `box`, SWIZZLE_128B and zero fill outside the tensor.
template <int kRank>
TensorMap tiled_map(const MappedTensor<kRank>& t, const std::array<uint32_t, kRank>& box) {
  static const auto encode =
      driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  std::array<uint32_t, kRank> steps;
  steps.fill(1);
  TensorMap map;
  const CUresult result = encode(
      &map, map_dtype(t.dtype), kRank, const_cast<void*>(t.data), t.sizes.data(), t.strides.data(),
      box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "implicit_gemm: cuTensorMapEncodeTiled failed with CUresult ",
        static_cast<int>(result));
  return map;
}
template <int kRank>
TensorMap im2col_map(const MappedTensor<kRank>& t, const Im2colBox<kRank>& box) {
  static const auto encode =
      driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  // The corners also list the innermost dimension first. CUTLASS and Triton pass them in this
  // order, although the driver's manual lists them as {D, H, W}.
  std::array<uint32_t, kRank> steps;
  steps.fill(1);
  std::copy(box.steps.begin(), box.steps.end(), steps.begin() + 1);
  TensorMap map;
  const CUresult result =
      encode(&map, map_dtype(t.dtype), kRank, const_cast<void*>(t.data), t.sizes.data(),
             t.strides.data(), box.lower.data(), box.upper(t.sizes).data(), box.channels,
             box.pixels, steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "implicit_gemm: cuTensorMapEncodeIm2col failed with CUresult ",
        static_cast<int>(result));
  return map;
}

#endif

}  // namespace fused_resnet
