// The head of a network on the CPU as one op: global average pooling and a linear layer. Its
// threads are those of the convolutions before it. The kernels are in cpu/head_kernels.h.
#include "common.h"
#include "cpu/isa/kernels.h"
#include "cpu/memory_pool.h"
#include "cpu/threads.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMinTaskBytes = 131072;  // of x or the weight, that justify another task

void check_operand(const char* argument, const Tensor& t, const Tensor& x, int64_t dims,
                   int64_t last) {
  check(t.is_cpu() && t.scalar_type() == x.scalar_type() && t.dim() == dims &&
            t.size(dims - 1) == last && t.is_contiguous(),
        "mean_linear: ", argument, " must be contiguous, ", name_of(x.scalar_type()),
        " and of last size ", last, " in ", dims, " dimensions, got ", name_of(t.scalar_type()),
        " of shape ", shape_of(t), " and strides ", strides_of(t));
}

// x (N, C, H, W), channels_last; weight (K, C); bias (K,) -> y (N, K), contiguous:
// y = mean(x over H and W) weight^T + bias
Tensor mean_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  constexpr const char* op = "mean_linear";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of(op, x);
  const int64_t N = layout.N, C = layout.C, pixels = layout.HW;
  check(layout.channels_last || C == 1 || pixels == 1, op,
        ": x must be channels_last, got strides ", strides_of(x), " for shape ", shape_of(x));
  check(pixels > 0, op, ": x must have pixels, got shape ", shape_of(x));
  check_operand("weight", weight, x, 2, C);
  const int64_t K = weight.size(0), size = static_cast<int64_t>(x.element_size());
  if (bias) check_operand("bias", *bias, x, 1, K);
  Tensor y = torch::stable::empty({N, K}, x.scalar_type(), std::nullopt, x.device());
  if (y.numel() == 0) return y;
  const Scratch mean(N * C * (dtype == kFloat64 ? 8 : 4));
  const auto* image = static_cast<const char*>(x.const_data_ptr());
  const void* rows = weight.const_data_ptr();
  const void* added = bias ? bias->const_data_ptr() : nullptr;
  void* out = y.mutable_data_ptr();
  const auto& kernels = cpu_kernels();
  const int64_t acc = dtype == kFloat64 ? 8 : 4;
  in_region([&] {
    // Ranges of channels, image after image; a range of them is of one image or of several.
    Split(N * C, 64, kMinTaskBytes / (pixels * size) + 1)
        .run([&](int64_t, int64_t begin, int64_t end) {
          for (int64_t n = begin / C; n * C < end; ++n)
            kernels.mean_pixels[dtype](image + n * C * pixels * size, mean.data() + n * C * acc, C,
                                       pixels, std::max(begin - n * C, int64_t{0}),
                                       std::min(end - n * C, C));
        });
    Split(K, 4, kMinTaskBytes / (C * size) + 1, 4).run([&](int64_t, int64_t begin, int64_t end) {
      kernels.linear[dtype](mean.data(), rows, added, out, N, C, K, begin, end);
    });
  });
  return y;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def("mean_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("mean_linear", TORCH_BOX(fused_resnet::mean_linear));
}
