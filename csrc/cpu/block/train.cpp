// A residual block's training step on the CPU, forward and backward as one op each: the passes of
// fused_resnet/fusion/training/block.py, without the Python interpreter between them, which takes a
// third of a step on the narrow, small feature maps of very deep networks.
//
// The passes are the same functions, so the results are bitwise equal.
//
// A block is a chain of convolutions with norm and ReLU after each, or before each (norm_first):
//
//   y = relu(norm_n(conv_n(... relu(norm_1(conv_1(x))))) + shortcut(x))
//   y = conv_n(relu(norm_n(... conv_1(relu(norm_1(x)))))) + shortcut
//
// With norms first, a projection shortcut has no norm, and the shortcut reads x or, if `shared`,
// the first ReLU's output. Below, z[j] is the input of norm j and h[j] the output of its ReLU.
#include "cpu/convolution/train.h"

#include <cstring>

#include "cpu/batch_norm/passes.h"
#include "cpu/block/block.h"
#include "cpu/isa/kernels.h"
#include "cpu/memory_pool.h"
#include "cpu/threads.h"

namespace fused_resnet {

constexpr int64_t kMinTaskElements = 16384;  // elements that justify another task

Tensor padded(const Tensor& x, int64_t channels, int64_t stride) {
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t P = (H - 1) / stride + 1, Q = (W - 1) / stride + 1;
  const auto size = static_cast<int64_t>(x.element_size());
  Tensor y = pooled_channels_last(N, channels, P, Q, x.scalar_type());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  Split(N * P, 1, kMinTaskElements / (Q * channels)).run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t pixel = (row / P * H + row % P * stride) * W + q * stride;
        char* at = to + (row * Q + q) * channels * size;
        std::memcpy(at, from + pixel * C * size, static_cast<size_t>(C * size));
        std::memset(at + C * size, 0, static_cast<size_t>((channels - C) * size));
      }
  });
  return y;
}

namespace {

struct Conv {
  Tensor weight;  // (K, C / groups, R, S) float32, contiguous or channels_last
  Sizes geometry;

  Tensor run(const Tensor& x, const std::optional<Tensor>& residual = {}) const {
    return convolution(x, weight, residual, geometry);
  }

  // (N, C, H, W) of x's shape, plus `added`, which it overwrites
  Tensor input_gradient(const Tensor& dy, const Tensor& x,
                        const std::optional<Tensor>& added = {}) const {
    return fused_resnet::input_gradient(dy, weight, x.size(2), x.size(3), added, geometry);
  }
};

struct Parameters {  // of a batch norm: (C,) float32
  Tensor weight, bias;
  double eps;
};

struct Normed {  // input x (N, C, H, W) of a batch norm with statistics (2, C) float64
  Tensor x, statistics;
  const Parameters* norm;

  double count() const { return static_cast<double>(x.numel() / x.size(1)); }
};

Tensor normalised(const Normed& n, const std::optional<Tensor>& residual = {}) {
  return bn_apply(n.x, n.statistics, n.norm->weight, n.norm->bias, n.norm->eps, residual, {}, {},
                  {}, 0, kRelu);
}

Tensor normalised(const Normed& n, const Normed& residual) {
  return bn_apply(n.x, n.statistics, n.norm->weight, n.norm->bias, n.norm->eps, residual.x,
                  residual.statistics, residual.norm->weight, residual.norm->bias,
                  residual.norm->eps, kRelu);
}

struct NormGradients {
  Tensor dx, dweight, dbias;
};

// From the sums of bn_reduce, (3, C), of which `row` is this norm's. dy is masked by y or, with
// recompute_mask, by relu(norm(x)), which is recomputed.
NormGradients norm_gradients_from_sums(const Tensor& sums, int64_t row, const Tensor& dy,
                                       const std::optional<Tensor>& y, const Normed& n,
                                       bool recompute_mask) {
  Tensor dx = bn_gradient(dy, y, n.x, n.statistics, sums, row, n.count(), n.norm->weight,
                          n.norm->bias, n.norm->eps, recompute_mask);
  auto [dweight, dbias] = bn_parameter_gradients(sums, row, n.statistics, n.norm->eps, false);
  return {dx, dweight, dbias};
}

// Gradients of `before`, whose ReLU's output is the input of `conv`; dy is the gradient of the
// output of `conv`.
NormGradients norm_gradients_through(const Conv& conv, Tensor dy, const Normed& before) {
  // Moved, so that the memory of dy is free for later passes.
  const auto [dx, sums] = input_gradient_and_sums(std::move(dy), conv.weight, conv.geometry,
                                                  before.x, before.statistics, before.norm->weight,
                                                  before.norm->bias, before.norm->eps);
  return norm_gradients_from_sums(sums, 1, dx, {}, before, true);
}

// Gradients of y = relu(norm(x) + other + residual): of n, of other, and, if `masked` or if there
// is other, g, dy masked by the ReLU. y: nullopt where nothing was added: the mask is then
// recomputed.
std::tuple<NormGradients, std::optional<NormGradients>, std::optional<Tensor>> norm_gradients(
    Tensor dy, std::optional<Tensor> y, const Normed& n, const Normed* other, bool masked) {
  masked = masked || other;
  const bool recompute_mask = !y;
  std::optional<Tensor> x2, statistics2;
  if (other) x2 = other->x, statistics2 = other->statistics;
  auto [sums, g] = bn_reduce(dy, y, n.x, n.statistics, n.norm->weight, n.norm->bias, n.norm->eps,
                             recompute_mask, x2, statistics2, masked);
  if (masked) dy = g, y.reset();
  std::optional<NormGradients> second;
  if (other) second = norm_gradients_from_sums(sums, 2, dy, y, *other, recompute_mask);
  NormGradients first = norm_gradients_from_sums(sums, 1, dy, y, n, recompute_mask);
  return {first, second, masked ? std::optional<Tensor>(dy) : std::nullopt};
}

// dx[:, :, ::stride, ::stride] += dy[:, :C], in place: the gradient of `padded`, and of the
// identity where stride is 1 and K = C. dx (N, C, H, W), dy (N, K, P, Q)
void add_shortcut_gradient(Tensor& dx, const Tensor& dy, int64_t stride) {
  const int64_t N = dx.size(0), C = dx.size(1), H = dx.size(2), W = dx.size(3);
  const int64_t K = dy.size(1), P = dy.size(2), Q = dy.size(3);
  const int64_t run = stride == 1 && C == K ? Q : 1;  // adjacent pixels in both
  const DtypeIndex dtype = dtype_index("block_backward", "x", dx);
  const auto size = static_cast<int64_t>(dx.element_size());
  auto* to = static_cast<char*>(dx.mutable_data_ptr());
  const auto* from = static_cast<const char*>(dy.const_data_ptr());
  Split(N * P, 1, kMinTaskElements / (Q * C)).run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t q = 0; q < Q; q += run) {
        const int64_t pixel = (row / P * H + row % P * stride) * W + q * stride;
        cpu_kernels().add[dtype](from + (row * Q + q) * K * size, to + pixel * C * size, run * C);
      }
  });
}

// weight in a layout that the convolutions read.
Tensor readable(const Tensor& weight) {
  if (weight.dim() != 4 || has_kernel_layout(weight))
    return weight;  // or the convolution reports it
  return torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast);
}

// A block without its activations, from the ops' arguments. operands: weight, norm weight and norm
// bias of every convolution, or only the weight for a convolution without a norm. geometry: the
// Sizes of every convolution. The shortcut's come last. keep:
// 1 for z of every norm, then for h of the residual branch's, where they are saved for backward.
struct Block {
  std::vector<Conv> convs;
  std::vector<Parameters> norms;
  Shortcut shortcut;
  int64_t pad_stride;  // of a shortcut that pads
  bool norm_first, shared;
  size_t main;  // convolutions of the residual branch

  Block(const char* op, const std::vector<Tensor>& operands, const std::vector<int64_t>& geometry,
        const std::vector<double>& eps, int64_t kind, int64_t pad_stride, bool norm_first,
        bool shared, const std::vector<int64_t>& keep)
      : shortcut(static_cast<Shortcut>(kind)),
        pad_stride(pad_stride),
        norm_first(norm_first),
        shared(shared) {
    const size_t n = geometry.size() / kSizes;
    check(kind >= kNone && kind <= kPad, op, ": no such shortcut: ", kind);
    main = n - (shortcut == kProjection ? 1 : 0);
    check(geometry.size() % kSizes == 0 && main >= 1 && n <= 64 &&
              eps.size() == (norm_first ? main : n) && operands.size() == n + 2 * eps.size() &&
              (norm_first || !shared),
          op, ": got ", operands.size(), " operands, ", geometry.size(), " sizes and ", eps.size(),
          " eps, which do not describe a block");
    check(keep.size() == eps.size() + main, op, ": keep must have ", eps.size() + main,
          " values, got ", keep.size());
    for (size_t i = 0; i < n; ++i) {
      const auto sizes = geometry.begin() + static_cast<int64_t>(kSizes * i);
      convs.push_back({readable(operands[3 * i]), {sizes, sizes + kSizes}});
      if (i < eps.size()) norms.push_back({operands[3 * i + 1], operands[3 * i + 2], eps[i]});
    }
  }

  // The norm whose ReLU's output convolution i reads; nullopt: it reads x.
  std::optional<size_t> norm_before(size_t i) const {
    if (i == main) return shared ? std::optional<size_t>(0) : std::nullopt;
    if (norm_first) return i;
    return i > 0 ? std::optional<size_t>(i - 1) : std::nullopt;
  }

  // The convolution that computes z[j]; z[0] of norm_first is x.
  size_t conv_before(size_t j) const { return norm_first ? j - 1 : j; }
};

// The activations of one step. Each is computed from those before it when it is first asked for: in
// forward, and in backward if it was not saved.
struct Activations {
  const Block& block;
  const Tensor x;
  std::vector<int64_t> keep;                // whether z, h stay after the next one is computed
  std::vector<std::optional<Tensor>> z, h;  // the last h, if norms come last, is y
  std::vector<std::optional<Tensor>> statistics;  // of norms; if absent, computed with z

  Activations(const Block& block, const Tensor& x, const std::vector<int64_t>& flags)
      : block(block), x(x), keep(flags), z(block.norms.size()), h(z), statistics(z) {
    if (block.norm_first) z[0] = x, keep[0] = 1;
  }

  // The input of convolution i.
  Tensor input(size_t i) {
    const auto j = block.norm_before(i);
    return j ? relu(*j) : x;
  }

  Normed normed(size_t j) {
    if (!z[j]) {
      const size_t i = block.conv_before(j);
      const Conv& conv = block.convs[i];
      const auto before = block.norm_before(i);
      const Tensor source = input(i);
      if (statistics[j])
        z[j] = conv.run(source);
      else
        std::tie(z[j], statistics[j]) =
            convolution_and_statistics(source, conv.weight, conv.geometry);
      if (before && !keep[z.size() + *before]) h[*before].reset();
    }
    return {*z[j], *statistics[j], &block.norms[j]};
  }

  // h[j]
  Tensor relu(size_t j) {
    if (h[j]) return *h[j];
    const Normed n = normed(j);
    if (block.norm_first || j + 1 < block.main)
      h[j] = normalised(n);
    else
      h[j] = block.shortcut == kProjection ? normalised(n, normed(block.main))
                                           : normalised(n, shortcut());
    if (!keep[j]) z[j].reset();
    return *h[j];
  }

  // The output (N, K, P, Q) of a shortcut without a norm.
  std::optional<Tensor> shortcut() {
    const size_t main = block.main;
    if (block.shortcut == kNone) return {};
    const Tensor source = input(main);
    if (block.shortcut == kProjection) return block.convs[main].run(source);
    if (block.shortcut == kIdentity) return source;
    return padded(source, block.convs[main - 1].weight.size(0), block.pad_stride);
  }

  // Of convolution i. An input that was not saved is recomputed range by range.
  Tensor weight_gradient(size_t i, const Tensor& dy) {
    const auto& [weight, geometry] = block.convs[i];
    const int64_t R = weight.size(2), S = weight.size(3);
    const bool contiguous = weight.stride(1) != 1;
    const auto j = block.norm_before(i);
    if (!j || h[*j]) return fused_resnet::weight_gradient(dy, input(i), R, S, geometry, contiguous);
    const Normed n = normed(*j);
    return weight_gradient_of_normed(dy, n.x, R, S, geometry, n.statistics, n.norm->weight,
                                     n.norm->bias, n.norm->eps, contiguous);
  }

  void release(size_t j) { z[j].reset(), h[j].reset(); }
};

// x (N, C, H, W) channels_last, float32, bfloat16 or float16 -> the statistics of every norm, (2,
// C) float64, the kept z and h except y, then y.
std::vector<Tensor> block_forward(Tensor x, std::vector<Tensor> operands,
                                  std::vector<int64_t> geometry, std::vector<double> eps,
                                  int64_t shortcut, int64_t pad_stride, bool norm_first,
                                  bool shared, std::vector<int64_t> keep) {
  const Block block("block_forward", operands, geometry, eps, shortcut, pad_stride, norm_first,
                    shared, keep);
  Activations step(block, x, keep);
  const size_t n = block.norms.size(), last = block.main - 1;
  std::vector<Tensor> found;
  std::optional<Tensor> y;
  if (norm_first) {
    step.statistics[0] = bn_statistics(x);
    if (shared) step.keep[n] = 1;  // the shortcut reads it
    const Tensor h = step.input(last);
    y = block.convs[last].run(h, step.shortcut());
  } else {
    y = step.relu(last);
  }
  for (const auto& s : step.statistics) found.push_back(*s);
  for (size_t j = 0; j < n; ++j)
    if (keep[j]) found.push_back(*step.z[j]);
  for (size_t j = 0; j < last + norm_first; ++j)
    if (keep[n + j]) found.push_back(*step.h[j]);
  found.push_back(*y);
  return found;
}

// dy (N, K, P, Q), x (N, C, H, W), channels_last; kept: the outputs of block_forward without y,
// then y if it was kept -> the required gradients, in the order of x and operands.
std::vector<Tensor> block_backward(Tensor dy, Tensor x, std::vector<Tensor> operands,
                                   std::vector<Tensor> kept, std::vector<int64_t> geometry,
                                   std::vector<double> eps, int64_t shortcut, int64_t pad_stride,
                                   bool norm_first, bool shared, std::vector<int64_t> keep,
                                   std::vector<int64_t> needs) {
  constexpr const char* op = "block_backward";
  const Block block(op, operands, geometry, eps, shortcut, pad_stride, norm_first, shared, keep);
  // What is recomputed stays until it is released.
  Activations step(block, x, std::vector<int64_t>(keep.size(), 1));
  const size_t n = block.norms.size(), main = block.main;
  check(needs.size() == operands.size() + 1, op, ": needs must have ", operands.size() + 1,
        " values, got ", needs.size());
  const size_t count = n + static_cast<size_t>(std::count(keep.begin(), keep.end(), 1));
  check(kept.size() == count, op, ": got ", kept.size(), " saved tensors instead of ", count);
  size_t next = 0;
  for (auto& s : step.statistics) s = kept[next++];
  for (size_t j = 0; j < keep.size(); ++j)
    if (keep[j]) (j < n ? step.z[j] : step.h[j - n]) = kept[next++];

  std::vector<std::optional<Tensor>> grads(needs.size());  // of x, then of every operand
  const auto set = [&](size_t i, const Tensor& t) {
    if (needs[i]) grads[i] = t;
  };
  const auto set_norm = [&](size_t j, const NormGradients& found) {
    set(3 * j + 2, found.dweight), set(3 * j + 3, found.dbias);
  };
  Tensor dz = dy;                 // of the output of convolution i below
  std::optional<Tensor> ds = dy;  // of the shortcut's output
  std::optional<Tensor> added;    // to the input gradient of the first convolution
  if (!norm_first) {
    const size_t last = main - 1;
    std::optional<Tensor> y;
    if (block.shortcut != kNone) y = step.relu(last);
    std::optional<Normed> other;
    if (block.shortcut == kProjection) other = step.normed(main);
    const auto [first, second, g] = norm_gradients(
        dy, y, step.normed(last), other ? &*other : nullptr, block.shortcut != kNone && needs[0]);
    set_norm(last, first);
    dz = first.dx, ds = g;
    step.release(last);
    if (second) {
      set_norm(main, *second);
      ds = second->dx;
      step.release(main);
    }
    if (block.shortcut == kIdentity) added.swap(ds);
  }
  if (block.shortcut == kProjection && needs[3 * main + 1])
    grads[3 * main + 1] = step.weight_gradient(main, *ds);
  const auto with_shortcut = [&](Tensor dx) {
    if (!ds || block.shortcut == kNone) return dx;
    if (block.shortcut == kProjection) return block.convs[main].input_gradient(*ds, x, dx);
    add_shortcut_gradient(dx, *ds, block.shortcut == kPad ? pad_stride : 1);
    return dx;
  };
  for (size_t i = main; i-- > 0;) {
    const Conv& conv = block.convs[i];
    if (needs[3 * i + 1]) grads[3 * i + 1] = step.weight_gradient(i, dz);
    // Stops where nothing before requires a gradient.
    const bool own_norm = norm_first && (needs[3 * i + 2] || needs[3 * i + 3]);
    const auto end = needs.begin() + static_cast<int64_t>(3 * i + 1);
    if (!own_norm && std::find(needs.begin(), end, 1) == end) break;
    const auto j = block.norm_before(i);
    if (!j) {
      dz = conv.input_gradient(dz, x, added);
      continue;
    }
    std::optional<NormGradients> found;
    if (shared && i == 0) {
      dz = with_shortcut(conv.input_gradient(dz, x));
      ds.reset();
      found = std::get<0>(norm_gradients(dz, {}, step.normed(0), nullptr, false));
    } else {
      found = norm_gradients_through(conv, std::move(dz), step.normed(*j));
    }
    set_norm(*j, *found);
    dz = found->dx;
    step.release(*j);
  }
  if (needs[0]) grads[0] = with_shortcut(dz);
  std::vector<Tensor> required;
  for (size_t i = 0; i < needs.size(); ++i)
    if (needs[i]) required.push_back(grads[i].value());
  return required;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "block_forward(Tensor x, Tensor[] operands, int[] geometry, float[] eps, int shortcut, "
      "int pad_stride, bool norm_first, bool shared, int[] keep) -> Tensor[]");
  m.def(
      "block_backward(Tensor dy, Tensor x, Tensor[] operands, Tensor[] kept, int[] geometry, "
      "float[] eps, int shortcut, int pad_stride, bool norm_first, bool shared, int[] keep, "
      "int[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("block_forward", TORCH_BOX(fused_resnet::block_forward));
  m.impl("block_backward", TORCH_BOX(fused_resnet::block_backward));
}
