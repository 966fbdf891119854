// Launches the Hopper convolution: checks its limits, encodes its tensor maps, and selects the
// kernel of the tile and dtype.
#include <limits>

#include "cuda/convolution/sm90/kernel.h"
#include "cuda/device/tensor_map.h"

namespace fused_resnet {
namespace {

Sm90Input input_of(const ConvProblem& p) {
  return p.pointwise() ? Sm90Input::kMatrix : Sm90Input::kIm2col;
}

uint64_t bytes(int64_t elements) { return static_cast<uint64_t>(elements) * 2; }
uint32_t u32(int v) { return static_cast<uint32_t>(v); }

}  // namespace

TensorMap sm90_input_map(const ConvProblem& p, const ConvOperands& operands, int block_m) {
  const int64_t channels = int64_t{p.groups} * p.C;
  const uint64_t pixel = bytes(channels), row = pixel * u32(p.W), image = row * u32(p.H);
  const auto N = static_cast<uint64_t>(p.N);
  if (input_of(p) == Sm90Input::kMatrix)
    return tiled_map<3>({operands.dtype,
                         operands.x,
                         {u32(p.C), u32(p.groups), static_cast<uint64_t>(p.M())},
                         {bytes(p.C), pixel}},
                        {kStepChannels, 1, u32(block_m)});
  return im2col_map<4>({operands.dtype,
                        operands.x,
                        {static_cast<uint64_t>(channels), u32(p.W), u32(p.H), N},
                        {pixel, row, image}},
                       // The pixels of the first tap.
                       {{-p.pad_w, -p.pad_h},
                        {p.Q, p.P},
                        {u32(p.stride_w), u32(p.stride_h)},
                        kStepChannels,
                        u32(block_m)});
}

namespace {

// residual or y (N, P, Q, groups * K) as (M, groups, K)
TensorMap output_map(const ConvProblem& p, DtypeIndex dtype, const void* data, int rows) {
  return tiled_map<3>({dtype,
                       data,
                       {u32(p.K), u32(p.groups), static_cast<uint64_t>(p.M())},
                       {bytes(p.K), bytes(int64_t{p.groups} * p.K)}},
                      {64, 1, u32(rows)});
}

// In a build for sm_90 (without a) or PTX only, the kernels consist of a trap, which would make the
// CUDA context of the process unusable.
#if defined(FUSED_RESNET_EMULATED) || defined(FUSED_RESNET_SM_90A)
constexpr bool kBuiltForHopper = true;
#else
constexpr bool kBuiltForHopper = false;
#endif

}  // namespace

// Limits from: CUDA driver API, cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col; PTX ISA,
// "Im2col mode". Must match reaches() in fused_resnet/kernels/cuda/implicit_gemm.py.
bool covers_sm90(const ConvProblem& p) {
  constexpr int64_t stride_limit = int64_t{1} << 40;
  const int64_t widest = std::max(int64_t{p.groups} * p.C * p.H * p.W, int64_t{p.R} * p.S * p.C);
  if (widest * 2 >= stride_limit) return false;
  if (input_of(p) == Sm90Input::kMatrix) return true;
  if (p.groups > 1 && p.C % kStepChannels != 0) return false;
  constexpr int corner = 128;  // 8 bits, at rank 4
  // The upper corner lies up to stride - 1 before the last position of the window.
  const auto fits = [&](int pad, int kernel, int dilation, int stride) {
    const int64_t reach = int64_t{kernel - 1} * dilation;
    return pad <= corner && pad - reach - (stride - 1) >= -corner && pad - reach < corner &&
           reach < 2 * corner && stride <= 8;
  };
  return fits(p.pad_h, p.R, p.dilation_h, p.stride_h) &&
         fits(p.pad_w, p.S, p.dilation_w, p.stride_w);
}

void launch_implicit_gemm_sm90(const DeviceScope& scope, const ConvProblem& p,
                               const ConvOperands& operands, const GemmTile& tile) {
  check(scope.architecture() == 90, "implicit_gemm: this tile is for Hopper, sm_90, not for sm_",
        scope.architecture());
  check(kBuiltForHopper,
        "implicit_gemm: this tile needs a build for sm_90a: 9.0a in TORCH_CUDA_ARCH_LIST");
  check(operands.dtype == kFloat16 || operands.dtype == kBFloat16,
        "implicit_gemm: Hopper's kernel takes float16 or bfloat16");
  check(covers_sm90(p), "implicit_gemm: Hopper's kernel does not cover a ", p.R, "x", p.S,
        " kernel of stride (", p.stride_h, ", ", p.stride_w, "), padding (", p.pad_h, ", ", p.pad_w,
        "), dilation (", p.dilation_h, ", ", p.dilation_w, ") in ", p.groups, " groups");
  check(reinterpret_cast<uintptr_t>(operands.scale) % sizeof(float2) == 0 &&
            reinterpret_cast<uintptr_t>(operands.shift) % sizeof(float2) == 0,
        "implicit_gemm: scale and shift must be aligned to 8 bytes");
  GemmSm90 gemm{};
  gemm.input = input_of(p);
  gemm.K = p.K;
  gemm.C = p.C;
  gemm.R = p.R;
  gemm.S = p.S;
  gemm.P = p.P;
  gemm.Q = p.Q;
  gemm.stride_h = p.stride_h;
  gemm.stride_w = p.stride_w;
  gemm.pad_h = p.pad_h;
  gemm.pad_w = p.pad_w;
  gemm.dilation_h = p.dilation_h;
  gemm.dilation_w = p.dilation_w;
  gemm.groups = p.groups;
  gemm.n_tiles = static_cast<int>(ceil_div(p.K, tile.block_n));
  const int64_t tiles = ceil_div(p.M(), tile.block_m) * p.groups * gemm.n_tiles;
  check(tiles < std::numeric_limits<int>::max() / 2, "implicit_gemm: ", tiles, " tiles");
  gemm.tiles = static_cast<int>(tiles);
  gemm.channel_blocks = static_cast<int>(ceil_div(p.C, kStepChannels));
  gemm.scale = operands.scale;
  gemm.shift = operands.shift;
  gemm.residual = operands.residual != nullptr;
  gemm.activation = operands.activation;
  gemm.M = static_cast<int>(p.M());
  gemm.statistics = operands.statistics;
  gemm.norm = operands.norm;
  gemm.mask = operands.mask;

  const int rows = tile.part_pixels();  // per warpgroup
  const Sm90Maps maps{
      sm90_input_map(p, operands, tile.block_m),
      tiled_map<3>({operands.dtype,
                    operands.weight,
                    {u32(p.C), u32(p.R * p.S), u32(p.groups) * uint64_t{u32(p.K)}},
                    {bytes(p.C), bytes(int64_t{p.R} * p.S * p.C)}},
                   {kStepChannels, 1, u32(tile.block_n)}),
      output_map(p, operands.dtype, gemm.residual ? operands.residual : operands.y, rows),
      output_map(p, operands.dtype, operands.y, rows)};
  const auto number = static_cast<int>(&tile - kGemmTiles);
  if (gemm.norm != nullptr)
    return (operands.dtype == kFloat16
                ? Sm90Prologues<float16_t>::launch
                : Sm90Prologues<bfloat16_t>::launch)(scope, number, maps, gemm);
  (operands.dtype == kFloat16 ? Sm90Kernels<float16_t>::launch : Sm90Kernels<bfloat16_t>::launch)(
      scope, number, maps, gemm, operands.epilogue());
}

void list_implicit_gemm_sm90_kernels(std::vector<CudaKernel>& list, bool gpu) {
  Sm90Kernels<float16_t>::list(list, gpu);
  Sm90Kernels<bfloat16_t>::list(list, gpu);
  Sm90Prologues<float16_t>::list(list, gpu);
  Sm90Prologues<bfloat16_t>::list(list, gpu);
}

}  // namespace fused_resnet
