// Schemas of the ops that are implemented for CUDA only.
#include "common.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "implicit_gemm(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
      "Tensor(a!) y, int activation, int[] stride, int[] padding, int[] dilation, int groups, int "
      "tile, "
      "int splits) -> ()");
  m.def(
      "convolution_statistics(Tensor x, Tensor weight, Tensor(a!) z, int[] stride, int[] padding, "
      "int[] dilation, int groups, int tile, int splits) -> (Tensor, int)");
  m.def(
      "normalised_convolution_statistics(Tensor x, Tensor mean, Tensor var, Tensor rest, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor(a!) z, int tile) "
      "-> "
      "(Tensor, int)");
  m.def(
      "bn_merge_statistics(Tensor statistics, int pixels, int part_pixels) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "bn_normalise(Tensor x, Tensor mean, Tensor var, Tensor rest, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, int activation) -> Tensor");
  m.def(
      "convolution_gradient_sums(Tensor dy, Tensor weight, Tensor(a!) g, Tensor x, Tensor mean, "
      "Tensor var, Tensor rest, Tensor? norm_weight, Tensor? norm_bias, float eps, int[] padding, "
      "int[] dilation, int groups, int tile, int splits) -> Tensor");
  m.def(
      "bn_gradient_by_sums(Tensor g, Tensor x, Tensor sums, Tensor? weight, Tensor mean, "
      "Tensor var, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, bool pool) -> Tensor");
}
