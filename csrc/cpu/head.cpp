// Global average pooling on the CPU, alone, as before squeeze-and-excitation, and the head of a
// network as one op: it and a linear layer. Their threads are those of the convolutions before. The
// kernels are in cpu/head_kernels.h.
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

Layout4d layout_of_image(const char* op, const Tensor& x) {
  const Layout4d layout = layout_of(op, x);
  check(layout.channels_last || layout.C == 1 || layout.HW == 1, op,
        ": x must be channels_last, got strides ", strides_of(x), " for shape ", shape_of(x));
  check(layout.HW > 0, op, ": x must have pixels, got shape ", shape_of(x));
  return layout;
}

// means (N, C), in float (double for float64) <- of x over its pixels
void compute_means(const Tensor& x, const Layout4d& layout, DtypeIndex dtype, char* means) {
  const int64_t C = layout.C, pixels = layout.HW, acc = dtype == kFloat64 ? 8 : 4;
  const auto size = static_cast<int64_t>(x.element_size());
  const auto* image = static_cast<const char*>(x.const_data_ptr());
  // Ranges of channels, image after image; a range of them is of one image or of several.
  Split(layout.N * C, 64, kMinTaskBytes / (pixels * size) + 1)
      .run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t n = begin / C; n * C < end; ++n)
          cpu_kernels().mean_pixels[dtype](image + n * C * pixels * size, means + n * C * acc, C,
                                           pixels, std::max(begin - n * C, int64_t{0}),
                                           std::min(end - n * C, C));
      });
}

// x (N, C, H, W), channels_last -> its mean over H and W: (N, C), float32 (float64 for float64)
Tensor mean_pixels(Tensor x) {
  constexpr const char* op = "mean_pixels";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of_image(op, x);
  const ScalarType type = dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor y = torch::stable::empty({layout.N, layout.C}, type, std::nullopt, x.device());
  if (y.numel() == 0) return y;
  auto* means = static_cast<char*>(y.mutable_data_ptr());
  in_region([&] { compute_means(x, layout, dtype, means); });
  return y;
}

// x (N, C, H, W), channels_last; weight (K, C); bias (K,) -> y (N, K), contiguous:
// y = mean(x over H and W) weight^T + bias
Tensor mean_linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  constexpr const char* op = "mean_linear";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d layout = layout_of_image(op, x);
  const int64_t N = layout.N, C = layout.C;
  check_operand("weight", weight, x, 2, C);
  const int64_t K = weight.size(0), size = static_cast<int64_t>(x.element_size());
  if (bias) check_operand("bias", *bias, x, 1, K);
  Tensor y = torch::stable::empty({N, K}, x.scalar_type(), std::nullopt, x.device());
  if (y.numel() == 0) return y;
  const Scratch mean(N * C * (dtype == kFloat64 ? 8 : 4));
  const void* rows = weight.const_data_ptr();
  const void* added = bias ? bias->const_data_ptr() : nullptr;
  void* out = y.mutable_data_ptr();
  in_region([&] {
    compute_means(x, layout, dtype, mean.data());
    Split(K, 4, kMinTaskBytes / (C * size) + 1, 4).run([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().linear[dtype](mean.data(), rows, added, out, N, C, K, begin, end);
    });
  });
  return y;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def("mean_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("mean_pixels(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("mean_linear", TORCH_BOX(fused_resnet::mean_linear));
  m.impl("mean_pixels", TORCH_BOX(fused_resnet::mean_pixels));
}
