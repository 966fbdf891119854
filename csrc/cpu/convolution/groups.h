// Grouped convolutions of a training step. The kernels compute groups whose inputs and outputs are
// multiples of 16, each 16 outputs with the inputs of their group. Smaller ones are merged: the
// weights of a merged group are those of its groups in diagonal blocks, with zeros elsewhere. 8
// channels per group then cost twice the products, 4 four times; below, merging would not pay.
#pragma once

#include "common.h"
#include "cpu/isa/kernels.h"

namespace fused_resnet {

// Of `groups` with C inputs and K outputs each: how many to merge into one whose inputs and outputs
// are multiples of 16; 1 if no number up to 4 is enough.
int64_t groups_to_merge(int64_t K, int64_t C, int64_t groups);

// weight, (K, C, R, S), contiguous or channels_last, of c before its groups were merged -> that of
// the merged groups, (K, c.merged * C, R, S): weight itself if none were.
Tensor merged_weight(const ConvShape& c, const Tensor& weight);

// The inverse for a gradient in memory: (K, R, S, C / groups) of the merged groups -> to, the same
// of the layer's own.
void take_own_groups(const ConvShape& c, const float* merged, float* to);

// The first input channel of every 16 outputs, of which the kernel reads four at a time; empty for
// one group that was not merged.
std::vector<int64_t> first_channels(const ConvShape& c);

}  // namespace fused_resnet
