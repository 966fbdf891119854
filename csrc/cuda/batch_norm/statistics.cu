// Merges the batch norm statistics of parts of the values, on CUDA devices.
//   mean[k] = sum z[:, k] / M,   var[k] = sum (z[:, k] - mean[k])^2 / M
// Each part has n values, a centre c, the sum of z - c, and the squared deviations from the part's
// mean. With a first estimate C of the mean (Chan, Golub and LeVeque 1983):
//   sum (z - C) = sum over parts of sum + n (c - C),
//   sum (z - C)^2 = sum over parts of squares + n (c - C + sum / n)^2
// Layout: parts (parts, 3, K) float32. A block merges kChannels outputs of up to kPartsOfBlock
// parts. A warp reads neighbouring channels, the warps process the parts round-robin. The result is
// again a part, which a second launch merges; the last launch, with one block per range of
// channels, writes mean and variance. The order is fixed, so results are reproducible bit by bit.
// Memory traffic: 12 bytes per part and channel, read twice, the second time from L2. Constraints:
// two launches merge at most kPartsOfBlock^2 parts; more need a third. Speed: not yet measured.
// Rejected: merging in the kernel that normalises, as bn_add_relu does with its hundred parts. Here
// there are a thousand parts, and every block would read all of them for its channels.
#include "cuda/batch_norm/forward.cuh"
#include "cuda/kernel_list.h"

namespace fused_resnet {
namespace {

constexpr int kChannels = 32, kMergeWarps = 16;
constexpr int kPartsOfBlock = 128;

struct BnParts {
  const float* parts;  // (count, 3, K)
  int64_t count, K, M;
  int64_t part_pixels;       // per part, except the last
  int64_t blocks;            // per range of kChannels channels
  float* merged;             // (blocks, 3, K), or null: write the following
  float *mean, *var, *rest;  // (K,)

  __host__ __device__ float pixels(int64_t part) const {
    const int64_t left = M - part * part_pixels;
    return static_cast<float>(left < part_pixels ? left : part_pixels);
  }
};

__global__ void __launch_bounds__(kMergeWarps * 32) bn_merge_statistics_kernel(const BnParts bn) {
  auto* const scratch = reinterpret_cast<float*>(shared_memory());  // (2, warps, channels)
  float* const result = scratch + 2 * kMergeWarps * kChannels;      // (2, channels)
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t slab = blockIdx.x / bn.blocks, block = blockIdx.x % bn.blocks;
  const int64_t k = slab * kChannels + lane;
  const int64_t first = block * kPartsOfBlock;
  const int64_t last =
      k < bn.K ? (first + kPartsOfBlock < bn.count ? first + kPartsOfBlock : bn.count) : first;
  const auto of = [&](int64_t part, int which) { return bn.parts[(part * 3 + which) * bn.K + k]; };
  float pixels = 0;
  for (int64_t part = first; part < first + kPartsOfBlock && part < bn.count; ++part)
    pixels += bn.pixels(part);
  const float start = first < last ? of(first, 0) : 0;

  float sums[1] = {}, both[2] = {};
  for (int64_t part = first + warp; part < last; part += kMergeWarps)
    sums[0] += of(part, 1) + bn.pixels(part) * (of(part, 0) - start);
  sum_over_block<1, 1>(sums, 32, scratch, result);
  const float centre = refine_centre(start, result[lane] / pixels);
  __syncthreads();
  for (int64_t part = first + warp; part < last; part += kMergeWarps) {
    const float n = bn.pixels(part), apart = of(part, 0) - centre;
    const float from_mean = apart + of(part, 1) / n;
    both[0] += of(part, 2) + n * (from_mean * from_mean);
    both[1] += of(part, 1) + n * apart;
  }
  sum_over_block<2, 1>(both, 32, scratch, result);
  if (warp != 0 || k >= bn.K) return;
  const float squares = result[lane], sum = result[32 + lane];
  if (bn.merged != nullptr) {
    float* const part = bn.merged + block * 3 * bn.K + k;
    // Squared deviations from the part's mean. The centre differs from it by rounding only.
    const float within = is_finite(squares) ? squares - sum * (sum / pixels) : squares;
    part[0] = centre;
    part[bn.K] = sum;
    part[2 * bn.K] = within < 0 ? 0.0f : within;
    return;
  }
  const Mean<float> mean(centre, sum / pixels);
  bn.mean[k] = mean.value;
  bn.rest[k] = mean.rest;
  bn.var[k] = squares / pixels + (mean.value - mean.value);  // NaN if z contains Inf
}

// statistics (parts, 3, K) of `pixels` pixels, part_pixels per part except the last
//   -> mean, biased variance, and the rounding error of the mean, (K,) float32
std::tuple<Tensor, Tensor, Tensor> bn_merge_statistics(Tensor statistics, int64_t pixels,
                                                       int64_t part_pixels) {
  constexpr const char* op = "bn_merge_statistics";
  check(statistics.dim() == 3 && statistics.size(1) == 3 && statistics.is_contiguous() &&
            statistics.scalar_type() == ScalarType::Float,
        op, ": statistics must be a contiguous float32 (parts, 3, K), got shape ",
        shape_of(statistics));
  check(pixels > 0 && part_pixels > 0 && ceil_div(pixels, part_pixels) == statistics.size(0), op,
        ": ", pixels, " pixels in parts of ", part_pixels, " are not ", statistics.size(0),
        " parts");
  const DeviceScope scope(statistics);
  const int64_t K = statistics.size(2);
  const auto vector = [&] { return torch::stable::new_empty(statistics, {K}); };
  Tensor mean = vector(), var = vector(), rest = vector();
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  Tensor now = statistics;
  for (bool more = true; more;) {
    const int64_t count = now.size(0), blocks = ceil_div(count, kPartsOfBlock);
    more = blocks > 1;
    Tensor merged = torch::stable::new_empty(statistics, {more ? blocks : 0, 3, K});
    const BnParts bn{data(now),
                     count,
                     K,
                     pixels,
                     part_pixels,
                     blocks,
                     more ? data(merged) : nullptr,
                     data(mean),
                     data(var),
                     data(rest)};
    constexpr int shared_bytes = (2 * kMergeWarps + 2) * kChannels * 4;
    scope.launch({ceil_div(K, kChannels) * blocks, kMergeWarps * 32, shared_bytes},
                 bn_merge_statistics_kernel, bn);
    now = merged;
    part_pixels *= kPartsOfBlock;
  }
  return {mean, var, rest};
}

}  // namespace

void list_bn_statistics_kernels(std::vector<CudaKernel>& list, bool gpu) {
  describe_kernel(list, "bn_merge_statistics", bn_merge_statistics_kernel, gpu);
}

}  // namespace fused_resnet

FUSED_RESNET_CUDA_OPS(m) {
  m.impl("bn_merge_statistics", TORCH_BOX(fused_resnet::bn_merge_statistics));
}
