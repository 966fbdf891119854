// Training batch norm, + residual, + ReLU, forward and backward, on CUDA devices.
//   mean[c] = sum x[:, c] / M,   var[c] = sum (x[:, c] - mean[c])^2 / M,   M = N*H*W
//   y = relu((x - mean[c]) * scale[c] + bias[c] + residual)
//   g = dy * !(y <= 0),   dbias[c] = sum g,   dweight[c] = invstd[c] * sum g * (x - mean[c])
//   dx = scale[c] * (g - dbias[c] / M - (x - mean[c]) * invstd[c] * dweight[c] / M)
//   dresidual = g,   invstd[c] = 1 / sqrt(var[c] + eps),   scale[c] = weight[c] * invstd[c]
// Layout: channels_last or contiguous; cuda/batch_norm/cut.h defines the partition into blocks and
// threads.
// A thread sums the rows of its column in registers (float; double for double), with the loads of
// kUnroll rows in flight. Forward: it sums x - centre and its square, where the centre is the mean
// of the thread's first rows, so that there is no cancellation for large means. A block reduces its
// threads, first the sums, then the squared deviations from the block's mean (Chan, Golub and
// LeVeque 1983). The parts of a slab are merged in the same way. The order is fixed and there are
// no atomics, so results are reproducible bit by bit.
// If the parts fit in the shared memory of the multiprocessors (x; backward: g and x), a block
// keeps its part there between sums and output, and there is one launch, cooperative if a slab has
// more than one part. Otherwise one launch computes the sums and a second merges the parts and
// computes the output, last rows first because those are in L2.
// Memory traffic, in elements per element: forward reads x once (twice with two launches), reads
// residual once, writes y once. Backward reads dy, x and y once, writes dx and dresidual once.
// Backward with two launches: the first writes dresidual, or if it is not needed the ReLU mask, one
// bit per element; the second reads that instead of y, and x again: 7 elements instead of 8 with
// dresidual, 6 and two bits instead of 7 without. If a convolution computed the sums and stored g
// (cuda/convolution/gradient.cuh), only the second launch is needed: 3 elements.
// Constraints: none on sizes; 16-byte packets require addresses and sizes that are multiples of 16
// bytes. Speed: not yet measured.
// Rejected: the last block of a slab merges its parts (a counter needs zeroed memory, which is one
// more launch or is shared between streams, and the second launch waits for that block; when every
// block merges a few kilobytes itself, neither is needed). Asynchronous copies into shared memory
// (plain loads keep as many bytes in flight, and also support packets of one element).
#pragma once

#include "cuda/batch_norm/backward.cuh"
#include "cuda/batch_norm/forward.cuh"

namespace fused_resnet {

// Calls body(channels_last, packet) with the two values of the cut as constants.
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

// Arguments of the second backward launch. It reads dresidual in place of dy and y, or the mask in
// place of y, whichever the first launch wrote.
template <typename T>
BnBackward<T> output_arguments(BnBackward<T> bn) {
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
  if (!bn.dx) second.blocks = cut.slabs;  // it only merges the parts
  with_constants<T>(cut, [&](auto channels_last, auto packet) {
    constexpr bool last = channels_last;
    if (cut.kept) {
      scope.launch(grid, bn_backward_kernel<T, last, packet, Phase::together>, bn);
    } else {
      scope.launch(grid, bn_backward_kernel<T, last, packet, Phase::sums>, bn);
      scope.launch(second, bn_backward_kernel<T, last, packet, Phase::output>,
                   output_arguments(bn));
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
