// The sm_80 convolution kernels with the gradient epilogue (cuda/convolution/gradient.cuh), for one
// 16-bit dtype: the kernels of the tiles, and the kernel that adds splits.
#pragma once

#include "cuda/convolution/sm80/launch.cuh"

namespace fused_resnet {

// As implicit_gemm_merge_statistics_kernel, for the gradient: masks y and computes the part's sums.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    implicit_gemm_merge_gradient_kernel(const GemmArguments a, int row_packs, int slabs) {
  constexpr int size = Pack<T>::size, pixels = kMergeThreads / kMergeColumns;
  using Channels = FoldedChannels<kMergeColumns>;
  uint8_t* const shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x);
  const int part = static_cast<int>(blockIdx.x) / slabs;
  const int first_pack = (static_cast<int>(blockIdx.x) - part * slabs) * kMergeColumns;
  const int first_m = part * kMergedPixels;
  const int left = a.M - first_m < kMergedPixels ? a.M - first_m : kMergedPixels;
  const int column = thread % kMergeColumns, row = thread / kMergeColumns;
  const int rows = first_pack + column < row_packs ? left : 0;
  const int outputs = row_packs * size, first = first_pack * size;
  if (thread < Channels::kCount) {
    const int k = first + Channels::of_thread(thread);
    Channels{shared}.store(
        thread,
        (k < outputs ? NormParameters::load(a.mask, k) : NormParameters{}).folded(a.mask.eps));
  }
  __syncthreads();
  GradientColumn<T> gradient;
  Channels{shared}.load(column, gradient.channels);
#pragma unroll
  for (int i = 0; i < kMergePacks; ++i) {
    if (row + i * pixels >= rows) continue;
    const int64_t pack = int64_t{first_m + row + i * pixels} * row_packs + first_pack + column;
    const auto x = load_global_once<uint4>(static_cast<const uint8_t*>(a.mask.x) + pack * 16);
    float sums[size] = {};
    add_splits<T>(a, pack, int64_t{a.M} * row_packs, sums);
    store_global<uint4>(a.y + pack * 16, gradient.add(rounded<T>(sums), x));
  }
  gradient.template write<kMergeColumns, kMergeThreads>(
      shared + Channels::kBytes, BlockThreads{}, a.mask.sums + int64_t{part} * 2 * outputs + first,
      outputs, outputs - first);
}

template <typename T>
void Sm80Gradient<T>::launch(const DeviceScope& scope, const GemmTile& tile, bool pointwise,
                             const GemmArguments& arguments) {
  launch_tile_alike<T, Epilogue::gradient>(scope, tile, pointwise, arguments);
}

template <typename T>
void Sm80Gradient<T>::launch_merge(const DeviceScope& scope, const GemmArguments& arguments,
                                   int row_packs) {
  constexpr int shared_bytes =
      FoldedChannels<kMergeColumns>::kBytes +
      PartStatistics<T, kMergeColumns, kMergeThreads, kMergePacks>::kScratchBytes;
  const int64_t slabs = ceil_div(row_packs, kMergeColumns);
  scope.launch({ceil_div(arguments.M, kMergedPixels) * slabs, kMergeThreads, shared_bytes},
               implicit_gemm_merge_gradient_kernel<T>, arguments, row_packs,
               static_cast<int>(slabs));
}

template <typename T>
void Sm80Gradient<T>::list(std::vector<CudaKernel>& list, const char* type, bool gpu) {
  describe_kernel(list, std::string("implicit_gemm_merge_gradient_") + type,
                  implicit_gemm_merge_gradient_kernel<T>, gpu);
  list_tiles<T, Epilogue::gradient>(list, type, "_gradient", gpu);
}

}  // namespace fused_resnet
