// Arguments that the ops bn_add_relu and bn_add_relu_backward pass to the launchers of the CUDA
// kernels, which are compiled in one translation unit per dtype T. Sums and per-channel values have
// type A: float, or double for double.
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
  A* mean;            // (C,), output; input of launch_bn_normalise
  A* var;             // (C,), as mean
  const A* rest;      // (C,), rounding error of mean; null unless launch_bn_normalise
  A* partial;  // (parts, 3, C): centre, sum of x - centre, squared deviations from the part's mean
  A eps;
  Activation activation;
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
  // ReLU mask: one byte per packet, one bit per element, !(y <= 0). mask is read if it is not null.
  // new_mask, if it is not null, is written by a launch that computes only the sums.
  const uint8_t* mask;
  uint8_t* new_mask;
  const A* weight;  // (C,) or null
  const A* mean;    // (C,)
  const A* var;     // (C,)
  A* dweight;       // (C,)
  A* dbias;         // (C,)
  A* partial;       // (parts, 2, C): sum of g, sum of g * (x - mean)
  int64_t parts;    // of the cut, or of the convolution that computed the sums
                    // (cuda/batch_norm/gradient_sums.cu)
  A eps;
};

// shared_bytes: shared_bytes_of(bn.cut, ...).
template <typename T>
void launch_bn_forward(const DeviceScope& scope, const BnForward<T>& bn, int shared_bytes);
// Computes y from given statistics. bn.cut.kept must be false.
template <typename T>
void launch_bn_normalise(const DeviceScope& scope, const BnForward<T>& bn, int shared_bytes);
template <typename T>
void launch_bn_backward(const DeviceScope& scope, const BnBackward<T>& bn, int shared_bytes);
// Computes dx, dweight and dbias from given sums; bn.dy is g. bn.cut.kept must be false.
template <typename T>
void launch_bn_gradient(const DeviceScope& scope, const BnBackward<T>& bn, int shared_bytes);
template <typename T>
void list_bn_kernels(std::vector<CudaKernel>& list, const std::string& dtype, bool gpu);

}  // namespace fused_resnet
