// Training batch normalisation, + residual, + ReLU, forward and backward, on CUDA devices.
//   mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
//   y = relu((x - mean[c]) * scale[c] + bias[c] + residual)
//   g = dy * !(y <= 0),   dbias[c] = sum g,   dweight[c] = invstd[c] * sum g * (x - mean[c])
//   dx = scale[c] * (g - dbias[c] / M - (x - mean[c]) * invstd[c] * dweight[c] / M)
//   dresidual = g,   invstd[c] = 1 / sqrt(var[c] + eps),   scale[c] = weight[c] * invstd[c]
// Layout: channels_last or contiguous; cuda/batch_norm/cut.h says what a block and a thread own.
// A thread sums the rows of its column in registers (float; double for double), kUnroll rows' loads
// in flight; forward: x - centre and its square, the centre being the mean of the thread's first
// rows, so that nothing cancels however large the mean. A block adds up its threads, first the sums
// and then the squares about the block's own mean (Chan, Golub and LeVeque 1983), and blocks add up
// the parts of their slab likewise: always in one order, with no atomics, so the bits repeat.
// Where the parts fit in the multiprocessors' shared memory (x; backward g and x), a block keeps
// its part there from the sums to the output, and all is one launch, cooperative where a slab has
// more than one part. Else one launch sums and a second adds up the parts and makes the output,
// last rows first: those are in L2.
// Bytes per element, in elements: forward x read once (twice in two launches), residual read once,
// y written once; backward dy, x and y read once, dx and dresidual written once. Backward in two
// launches: the first writes dresidual, or where none is wanted the ReLU's mask, a bit an element;
// the second reads that, and x again, in y's place: 7 elements instead of 8 with dresidual, 6 and
// two bits instead of 7 without. Where a convolution took the sums and stored g
// (cuda/convolution/gradient.cuh), the second launch alone, 3 elements.
// Constraints: none on sizes; 16-byte packets where addresses and sizes are multiples of it.
// Speed: not yet measured.
// Rejected: the last block of a slab adds up its parts (a counter needs zeroed memory, which is one
// more launch or shared between streams, and the second launch waits for that block: every block
// adding up a few kilobytes by itself needs neither); asynchronous copies into shared memory (plain
// loads keep as many bytes in flight, and serve packets of one element too).
#pragma once

#include "cuda/batch_norm/backward.cuh"
#include "cuda/batch_norm/forward.cuh"

namespace fused_resnet {

// body(channels_last, packet) with the cut's two numbers as constants.
template <typename T, typename Body>
void with_constants(const Cut& cut, const Body& body) {
  const auto with_packet = [&](auto channels_last) {
    if constexpr (!std::is_same_v<T, double>) {
      if (cut.packet > 1) {
        body(channels_last, std::integral_constant<int, 16 / sizeof(T)>{});
        return;
      }
    }
    body(channels_last, std::integral_constant<int, 1>{});
  };
  if (cut.channels_last)
    with_packet(std::true_type{});
  else
    with_packet(std::false_type{});
}

template <typename T>
void launch_bn_forward(const DeviceScope& scope, const BnForward<T>& bn, int shared_bytes) {
  const Cut& cut = bn.cut;
  const Grid grid{cut.blocks(), cut.threads, shared_bytes, cut.kept && cut.parts > 1};
  with_constants<T>(cut, [&](auto channels_last, auto packet) {
    constexpr bool last = channels_last;
    if (cut.kept) {
      scope.launch(grid, bn_forward_kernel<T, last, packet, Phase::together>, bn);
    } else {
      scope.launch(grid, bn_forward_kernel<T, last, packet, Phase::sums>, bn);
      scope.launch(grid, bn_forward_kernel<T, last, packet, Phase::output>, bn);
    }
  });
}

template <typename T>
void launch_bn_normalise(const DeviceScope& scope, const BnForward<T>& bn, int shared_bytes) {
  with_constants<T>(bn.cut, [&](auto channels_last, auto packet) {
    constexpr bool last = channels_last;
    scope.launch({bn.cut.blocks(), bn.cut.threads, shared_bytes},
                 bn_forward_kernel<T, last, packet, Phase::given>, bn);
  });
}

// What the output reads after a launch that made the sums, and dresidual or the mask as well: one
// of these in place of dy and y, or of y.
template <typename T>
BnBackward<T> after_sums(BnBackward<T> bn) {
  if (bn.dresidual) {
    bn.dy = bn.dresidual;
    bn.y = nullptr;
  } else if (bn.new_mask) {
    bn.mask = bn.new_mask;
    bn.y = nullptr;
  }
  bn.dresidual = nullptr;
  return bn;
}

template <typename T>
void launch_bn_backward(const DeviceScope& scope, const BnBackward<T>& bn, int shared_bytes) {
  const Cut& cut = bn.cut;
  const Grid grid{cut.blocks(), cut.threads, shared_bytes, cut.kept && cut.parts > 1};
  Grid second = grid;
  if (!bn.dx) second.blocks = cut.slabs;  // nothing but adding up
  with_constants<T>(cut, [&](auto channels_last, auto packet) {
    constexpr bool last = channels_last;
    if (cut.kept) {
      scope.launch(grid, bn_backward_kernel<T, last, packet, Phase::together>, bn);
    } else {
      scope.launch(grid, bn_backward_kernel<T, last, packet, Phase::sums>, bn);
      scope.launch(second, bn_backward_kernel<T, last, packet, Phase::output>, after_sums(bn));
    }
  });
}

template <typename T>
void launch_bn_gradient(const DeviceScope& scope, const BnBackward<T>& bn, int shared_bytes) {
  with_constants<T>(bn.cut, [&](auto channels_last, auto packet) {
    constexpr bool last = channels_last;
    scope.launch({bn.cut.blocks(), bn.cut.threads, shared_bytes},
                 bn_backward_kernel<T, last, packet, Phase::output>, bn);
  });
}

template <typename T>
void list_bn_kernels(std::vector<CudaKernel>& list, const std::string& dtype, bool gpu) {
  for (const bool channels_last : {true, false})
    for (const int packet : {16 / static_cast<int>(sizeof(T)), 1}) {
      if (std::is_same_v<T, double> && packet > 1) continue;
      Cut cut{};
      cut.channels_last = channels_last;
      cut.packet = packet;
      const std::string suffix = std::string(channels_last ? "_channels_last_" : "_contiguous_") +
                                 (packet > 1 ? "" : "scalar_") + dtype;
      with_constants<T>(cut, [&](auto last, auto size) {
        constexpr bool L = last;
        constexpr int P = size;
        describe_kernel(list, "bn_add_relu_together" + suffix,
                        bn_forward_kernel<T, L, P, Phase::together>, gpu);
        describe_kernel(list, "bn_add_relu_sums" + suffix, bn_forward_kernel<T, L, P, Phase::sums>,
                        gpu);
        describe_kernel(list, "bn_add_relu_output" + suffix,
                        bn_forward_kernel<T, L, P, Phase::output>, gpu);
        describe_kernel(list, "bn_add_relu_given" + suffix,
                        bn_forward_kernel<T, L, P, Phase::given>, gpu);
        describe_kernel(list, "bn_add_relu_backward_together" + suffix,
                        bn_backward_kernel<T, L, P, Phase::together>, gpu);
        describe_kernel(list, "bn_add_relu_backward_sums" + suffix,
                        bn_backward_kernel<T, L, P, Phase::sums>, gpu);
        describe_kernel(list, "bn_add_relu_backward_output" + suffix,
                        bn_backward_kernel<T, L, P, Phase::output>, gpu);
      });
    }
}

#define FUSED_RESNET_BN_KERNELS(T)                                                 \
  template void launch_bn_forward(const DeviceScope&, const BnForward<T>&, int);   \
  template void launch_bn_normalise(const DeviceScope&, const BnForward<T>&, int); \
  template void launch_bn_backward(const DeviceScope&, const BnBackward<T>&, int); \
  template void launch_bn_gradient(const DeviceScope&, const BnBackward<T>&, int); \
  template void list_bn_kernels<T>(std::vector<CudaKernel>&, const std::string&, bool);

}  // namespace fused_resnet
