// Schemas of the ops that only CUDA files implement.
#include "common.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "implicit_gemm(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
      "Tensor(a!) y, bool relu, int[] stride, int[] padding, int[] dilation, int groups, int tile, "
      "int splits) -> ()");
  m.def("stem(Tensor x, Tensor weight, Tensor scale, Tensor shift, bool pool) -> Tensor");
}
