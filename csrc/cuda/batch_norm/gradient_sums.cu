// Reduces the partial sums of a batch norm gradient that a convolution computed tile by tile, on
// CUDA devices.
//   sums (parts, 2, C) -> (ceil(parts / 128), 2, C), each the sum of up to 128 parts
// Layout: a block reduces kChannels channels of kMaxSumParts parts. A warp reads neighbouring
// channels, the warps process the parts round-robin, then the block adds up its warps. The order is
// fixed, so results are reproducible bit by bit. The gradient kernel itself adds up the remaining
// parts, at most 128, as it does for bn_add_relu (cuda/batch_norm/backward.cuh). More than 128^2
// parts need a second launch.
// Memory traffic: 8 bytes per part and channel, read once: 8 / (128 * 4) of the traffic of reading
// dx and x in 16 bits, with tiles of 128 pixels. Constraints: none. Speed: not yet measured.
#include "cuda/batch_norm/gradient_sums.h"
#include "cuda/batch_norm/rows.cuh"

namespace fused_resnet {
namespace {

constexpr int kChannels = 32, kSumWarps = 16;

struct SumParts {
  const float* parts;  // (count, 2, C)
  int64_t count, C;
  int64_t blocks;  // per range of kChannels channels
  float* sums;     // (blocks, 2, C)
};

__global__ void __launch_bounds__(kSumWarps * 32) bn_add_sums_kernel(const SumParts p) {
  auto* const scratch = reinterpret_cast<float*>(shared_memory());  // (warps, channels, 2)
  float* const result = scratch + 2 * kSumWarps * kChannels;        // (2, channels)
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t slab = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks;
  const int64_t c = slab * kChannels + lane, first = block * kMaxSumParts;
  const int64_t end = first + kMaxSumParts < p.count ? first + kMaxSumParts : p.count;
  float sums[2] = {};
  for (int64_t part = first + warp; c < p.C && part < end; part += kSumWarps) {
    const float* const of = p.parts + part * 2 * p.C + c;
    sums[0] += of[0];
    sums[1] += of[p.C];
  }
  sum_over_block<2, 1>(sums, 32, scratch, result);
  if (warp != 0 || c >= p.C) return;
  p.sums[block * 2 * p.C + c] = result[lane];
  p.sums[(block * 2 + 1) * p.C + c] = result[kChannels + lane];
}

}  // namespace

Tensor reduce_sums(const DeviceScope& scope, Tensor sums) {
  const int64_t C = sums.size(2);
  while (sums.size(0) > kMaxSumParts) {
    const int64_t blocks = ceil_div(sums.size(0), kMaxSumParts);
    Tensor fewer = torch::stable::new_empty(sums, {blocks, 2, C});
    const SumParts parts{static_cast<const float*>(sums.const_data_ptr()), sums.size(0), C, blocks,
                         static_cast<float*>(fewer.mutable_data_ptr())};
    constexpr int shared_bytes = (2 * kSumWarps + 2) * kChannels * 4;
    scope.launch({ceil_div(C, kChannels) * blocks, kSumWarps * 32, shared_bytes},
                 bn_add_sums_kernel, parts);
    sums = fewer;
  }
  return sums;
}

void list_bn_gradient_sums_kernels(std::vector<CudaKernel>& list, bool gpu) {
  describe_kernel(list, "bn_add_sums", bn_add_sums_kernel, gpu);
}

}  // namespace fused_resnet
