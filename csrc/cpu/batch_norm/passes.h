// Training batch norm as separate passes (cpu/batch_norm/passes.cpp).
#pragma once

#include "common.h"

namespace fused_resnet {

Tensor bn_statistics(Tensor x);

Tensor bn_apply(Tensor x, Tensor stats, std::optional<Tensor> weight, std::optional<Tensor> bias,
                double eps, std::optional<Tensor> residual, std::optional<Tensor> residual_stats,
                std::optional<Tensor> residual_weight, std::optional<Tensor> residual_bias,
                double residual_eps, int64_t activation);

std::tuple<Tensor, Tensor> bn_reduce(Tensor dy, std::optional<Tensor> y, Tensor x, Tensor stats,
                                     std::optional<Tensor> weight, std::optional<Tensor> bias,
                                     double eps, bool recompute_mask, std::optional<Tensor> x2,
                                     std::optional<Tensor> stats2, bool masked);

Tensor bn_gradient(Tensor dy, std::optional<Tensor> y, Tensor x, Tensor stats, Tensor sums,
                   int64_t row, double count, std::optional<Tensor> weight,
                   std::optional<Tensor> bias, double eps, bool recompute_mask);

std::tuple<Tensor, Tensor> bn_parameter_gradients(Tensor sums, int64_t row, Tensor stats,
                                                  double eps, bool wide);

}  // namespace fused_resnet
