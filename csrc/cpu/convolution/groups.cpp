#include "cpu/convolution/groups.h"

#include "cpu/convolution/host.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {

int64_t groups_to_merge(int64_t K, int64_t C, int64_t groups) {
  for (const int64_t merged : {1, 2, 4})
    if (groups % merged == 0 && merged * C % 16 == 0 && merged * K % 16 == 0) return merged;
  return 1;
}

Tensor merged_weight(const ConvShape& c, const Tensor& weight) {
  if (c.merged == 1) return weight;
  const int64_t C = weight.size(1), taps = c.R * c.S, run = c.merged * C;
  const int64_t outputs = c.K / (c.groups * c.merged);  // of a group of the layer
  const bool adjacent = weight.stride(1) != 1;
  const int64_t channel = adjacent ? taps : 1, tap_step = adjacent ? 1 : C;
  Tensor found = pooled_channels_last(c.K, run, c.R, c.S, ScalarType::Float);
  const auto* from = static_cast<const float*>(weight.const_data_ptr());
  auto* to = static_cast<float*>(found.mutable_data_ptr());
  Split(c.K, 16, 16).run([&](int64_t, int64_t begin, int64_t end) {
    std::fill_n(to + begin * taps * run, (end - begin) * taps * run, 0.0f);
    for (int64_t k = begin; k < end; ++k) {
      float* own = to + k * taps * run + k / outputs % c.merged * C;
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t i = 0; i < C; ++i)
          own[tap * run + i] = from[k * taps * C + tap * tap_step + i * channel];
    }
  });
  return found;
}

void take_own_groups(const ConvShape& c, const float* merged, float* to) {
  const int64_t taps = c.R * c.S, run = c.C / c.groups, C = run / c.merged;
  const int64_t outputs = c.K / (c.groups * c.merged);
  for (int64_t k = 0; k < c.K; ++k)
    for (int64_t tap = 0; tap < taps; ++tap)
      std::copy_n(merged + (k * taps + tap) * run + k / outputs % c.merged * C, C,
                  to + (k * taps + tap) * C);
}

std::vector<int64_t> first_channels(const ConvShape& c) {
  if (!c.grouped()) return {};
  std::vector<int64_t> found(static_cast<size_t>(round_up(c.K, kBlockChannels) / 16), 0);
  const int64_t inputs = c.C / c.groups, outputs = c.K / c.groups;
  for (int64_t k = 0; k < c.K; k += 16) found[k / 16] = k / outputs * inputs;
  return found;
}

}  // namespace fused_resnet
