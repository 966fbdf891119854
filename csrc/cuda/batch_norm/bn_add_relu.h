// What the ops bn_add_relu and bn_add_relu_backward hand to the CUDA kernels' launchers, one
// translation unit per dtype T. Sums and per-channel numbers are of A: float, double for double.
#pragma once

#include "cuda/batch_norm/cut.h"
#include "cuda/device/launch.h"

namespace fused_resnet {

template <typename T>
struct BnForward {
  using A = Accumulate<T>;
  Cut cut;
  const T* x;         // (N, C, H, W)
  const T* residual;  // as x, or null
  T* y;               // as x
  const A* weight;    // (C,) or null
  const A* bias;      // (C,) or null
  A* mean;            // (C,), written; read where the statistics are given
  A* var;             // (C,), likewise
  const A* rest;      // (C,), given: what the mean's rounding took off; else null
  A* partial;         // (parts, 3, C): centre, sum of x - centre, squares about the part's mean
  A eps;
  bool relu;
};

template <typename T>
struct BnBackward {
  using A = Accumulate<T>;
  Cut cut;
  const T* dy;   // (N, C, H, W)
  const T* x;    // as dy
  const T* y;    // as dy, or null: no mask
  T* dx;         // as dy, or null
  T* dresidual;  // as dy, or null
  // A byte for each packet, a bit for each element: !(y <= 0). Read where it is not null; new_mask,
  // where it is not null, is written by a launch that makes the sums and nothing else.
  const uint8_t* mask;
  uint8_t* new_mask;
  const A* weight;  // (C,) or null
  const A* mean;    // (C,)
  const A* var;     // (C,)
  A* dweight;       // (C,)
  A* dbias;         // (C,)
  A* partial;       // (parts, 2, C): sum of g, sum of g * (x - mean)
  int64_t parts;    // the cut's, or of a convolution that took the sums
                    // (cuda/batch_norm/gradient_sums.cu)
  A eps;
};

// shared_bytes: shared_bytes_of(bn.cut, ...).
template <typename T>
void launch_bn_forward(const DeviceScope& scope, const BnForward<T>& bn, int shared_bytes);
// y alone, by statistics that are given; the cut keeps nothing.
template <typename T>
void launch_bn_normalise(const DeviceScope& scope, const BnForward<T>& bn, int shared_bytes);
template <typename T>
void launch_bn_backward(const DeviceScope& scope, const BnBackward<T>& bn, int shared_bytes);
// dx, dweight and dbias, where dy is g and the sums are given; the cut keeps nothing.
template <typename T>
void launch_bn_gradient(const DeviceScope& scope, const BnBackward<T>& bn, int shared_bytes);
template <typename T>
void list_bn_kernels(std::vector<CudaKernel>& list, const std::string& dtype, bool gpu);

}  // namespace fused_resnet
