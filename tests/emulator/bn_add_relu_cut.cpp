// Exports the index arithmetic of csrc/cuda/batch_norm/cut.h, to test it for sizes that are too
// large to run.
#include "cuda/batch_norm/cut.h"

using namespace fused_resnet;

extern "C" {
// sizes: N, C, HW, channels_last, element_bytes, vectors, operands, multiprocessors, shared_bytes
// -> out: packet, rows, rows_per_part, columns, slabs, parts, threads, kept, shared bytes
__attribute__((visibility("default"))) void bn_add_relu_cut(const int64_t* sizes, int64_t* out) {
  const auto in_int = [&](int i) { return static_cast<int>(sizes[i]); };
  const CutOptions options{in_int(4), sizes[5] != 0, in_int(6), in_int(7), in_int(8)};
  const Cut cut = cut_for(sizes[0], sizes[1], sizes[2], sizes[3] != 0, options);
  const int64_t values[] = {cut.packet,  cut.rows,  cut.rows_per_part,
                            cut.columns, cut.slabs, cut.parts,
                            cut.threads, cut.kept,  shared_bytes_of(cut, options)};
  std::copy(std::begin(values), std::end(values), out);
}

// The offset of row `row` of a channel: computed directly (steps 0), or by starting steps * stride
// rows before it (after it if stride is negative) and taking that many steps.
__attribute__((visibility("default"))) int64_t bn_add_relu_offset(int64_t C, int64_t HW,
                                                                  int channels_last, int packet,
                                                                  int64_t channel, int64_t row,
                                                                  int64_t stride, int steps) {
  Cut cut{};
  cut.C = C;
  cut.HW = HW;
  cut.channels_last = channels_last != 0;
  cut.packet = packet;
  Place place = place_of(cut, channel, row - steps * stride);
  const Place step = step_of(cut, stride < 0 ? -stride : stride);
  const auto walk = [&](auto last) {
    for (int i = 0; i < steps; ++i)
      stride < 0 ? step_back<last>(cut, place, step) : step_forward<last>(cut, place, step);
  };
  if (cut.channels_last)
    walk(std::true_type{});
  else
    walk(std::false_type{});
  return place.offset;
}
}
