// A residual block's training step on the CPU, forward and backward as one op each: the passes of
// fused_resnet/fusion/training, without the Python interpreter between them, which takes a third of
// a step on the narrow, small feature maps of very deep networks.
//
// The passes are the same functions, so the results are bitwise equal.
#include "cpu/convolution/train.h"

#include <cstring>

#include "cpu/batch_norm/passes.h"
#include "cpu/block/block.h"
#include "cpu/isa/kernels.h"
#include "cpu/memory_pool.h"

namespace fused_resnet {

Tensor padded(const Tensor& x, int64_t channels, int64_t stride) {
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t P = (H - 1) / stride + 1, Q = (W - 1) / stride + 1;
  const auto size = static_cast<int64_t>(x.element_size());
  Tensor y = pooled_channels_last(N, channels, P, Q, x.scalar_type());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  Split(N * P, 1, std::max<int64_t>(int64_t{16384} / (Q * channels), 1))
      .run([&](int64_t, int64_t begin, int64_t end) {
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

constexpr int64_t kMinTaskElements = 16384;  // elements that justify another task

struct Conv {
  Tensor weight;   // (K, C, R, S) float32, channels_last
  Sizes geometry;  // stride, padding, dilation

  Tensor run(const Tensor& x, const std::optional<Tensor>& residual = {}) const {
    return convolution(x, weight, residual, geometry);
  }

  std::tuple<Tensor, Tensor> run_with_statistics(const Tensor& x) const {
    return convolution_and_statistics(x, weight, geometry);
  }

  Tensor weight_gradient(const Tensor& dy, const Tensor& x) const {
    return fused_resnet::weight_gradient(dy, x, weight.size(2), weight.size(3), geometry);
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
                  {}, 0, true);
}

Tensor normalised(const Normed& n, const Normed& residual) {
  return bn_apply(n.x, n.statistics, n.norm->weight, n.norm->bias, n.norm->eps, residual.x,
                  residual.statistics, residual.norm->weight, residual.norm->bias,
                  residual.norm->eps, true);
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

// Weight gradient of `conv`, whose input relu(norm(x)) of `before` was not saved and is recomputed.
Tensor weight_gradient_through(const Conv& conv, const Tensor& dy, const Normed& before) {
  return weight_gradient_of_normed(dy, before.x, conv.weight.size(2), conv.weight.size(3),
                                   conv.geometry, before.statistics, before.norm->weight,
                                   before.norm->bias, before.norm->eps);
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

struct BlockEndGradients {
  NormGradients main;
  std::optional<NormGradients> other;
  std::optional<Tensor> g;  // dy masked by the ReLU
};

// Gradients of y = relu(norm(x) + other). has_residual: whether anything is added. `masked`: g is
// required. Without either, y is recomputed from x rather than read.
BlockEndGradients norm_gradients(Tensor dy, std::optional<Tensor> y, const Normed& n,
                                 const Normed* other, bool has_residual, bool masked) {
  masked = masked || other;
  const bool recompute_mask = !has_residual && !masked;
  if (recompute_mask) y.reset();
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

// dx[:, :, ::stride, ::stride] += dy[:, :C], in place: the gradient of `padded`. dx (N, C, H, W),
// dy (N, K, P, Q)
void add_padding_gradient(Tensor& dx, const Tensor& dy, int64_t stride, DtypeIndex dtype) {
  const int64_t N = dx.size(0), C = dx.size(1), H = dx.size(2), W = dx.size(3);
  const int64_t K = dy.size(1), P = dy.size(2), Q = dy.size(3);
  const auto size = static_cast<int64_t>(dx.element_size());
  auto* to = static_cast<char*>(dx.mutable_data_ptr());
  const auto* from = static_cast<const char*>(dy.const_data_ptr());
  Split(N * P, 1, std::max<int64_t>(kMinTaskElements / (Q * C), 1))
      .run([&](int64_t, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t q = 0; q < Q; ++q) {
            const int64_t pixel = (row / P * H + row % P * stride) * W + q * stride;
            cpu_kernels().add[dtype](from + (row * Q + q) * K * size, to + pixel * C * size, C);
          }
      });
}

void add_in_place(Tensor& to, const Tensor& from, DtypeIndex dtype) {
  const auto size = static_cast<int64_t>(to.element_size());
  auto* to_ptr = static_cast<char*>(to.mutable_data_ptr());
  const auto* from_ptr = static_cast<const char*>(from.const_data_ptr());
  Split(to.numel(), kLineBytes, kMinTaskElements).run([&](int64_t, int64_t begin, int64_t end) {
    cpu_kernels().add[dtype](from_ptr + begin * size, to_ptr + begin * size, end - begin);
  });
}

// A block's operands, in the order of the ops' arguments. operands: weight, norm weight and norm
// bias of every convolution, or only the weight for a convolution without a norm. geometry: stride,
// padding and dilation, (height, width) each, of every convolution. The shortcut's come last.
struct Block {
  std::vector<Conv> convs;
  std::vector<Parameters> norms;
  Shortcut shortcut;
  int64_t pad_stride;  // of a shortcut that pads
  size_t main;         // convolutions of the residual branch

  Block(const char* op, const std::vector<Tensor>& operands, const std::vector<int64_t>& geometry,
        const std::vector<double>& eps, int64_t kind, int64_t pad_stride)
      : shortcut(static_cast<Shortcut>(kind)), pad_stride(pad_stride) {
    const size_t n = geometry.size() / 6;
    check(kind >= kNone && kind <= kPad, op, ": no such shortcut: ", kind);
    main = n - (shortcut == kProjection ? 1 : 0);
    check(geometry.size() % 6 == 0 && main >= 1 && n <= 64 &&
              (eps.size() == n || eps.size() == main) && operands.size() == n + 2 * eps.size(),
          op, ": got ", operands.size(), " operands, ", geometry.size(), " sizes and ", eps.size(),
          " eps, which do not describe a block");
    for (size_t i = 0; i < n; ++i) {
      const auto sizes = geometry.begin() + static_cast<int64_t>(6 * i);
      convs.push_back({operands[3 * i], {sizes, sizes + 6}});
      if (i < eps.size()) norms.push_back({operands[3 * i + 1], operands[3 * i + 2], eps[i]});
    }
  }

  // A shortcut without parameters, (N, K, P, Q).
  std::optional<Tensor> parameterless_shortcut(const Tensor& x) const {
    if (shortcut == kPad) return padded(x, convs[main - 1].weight.size(0), pad_stride);
    return shortcut == kIdentity ? std::optional<Tensor>(x) : std::nullopt;
  }
};

// The tensors of `from` in order; entries that were not saved stay empty.
std::vector<std::optional<Tensor>> unpack(const std::vector<Tensor>& from, size_t& next,
                                          const std::vector<int64_t>& saved) {
  std::vector<std::optional<Tensor>> found(saved.size());
  for (size_t i = 0; i < saved.size(); ++i)
    if (saved[i]) found[i] = from.at(next++);
  return found;
}

// Tensors that forward saves for backward.
struct Saved {
  std::vector<std::optional<Tensor>> outputs;  // of convolutions
  std::vector<std::optional<Tensor>> inner;    // of ReLUs inside the block
  std::vector<Tensor> statistics;
};

// y, the statistics of every norm, then the outputs of convolutions and ReLUs that `keep` selects:
// one flag per convolution output, then one per ReLU inside the block.
std::vector<Tensor> packed(const Tensor& y, const Saved& saved) {
  std::vector<Tensor> found{y};
  found.insert(found.end(), saved.statistics.begin(), saved.statistics.end());
  for (const auto* tensors : {&saved.outputs, &saved.inner})
    for (const auto& t : *tensors)
      if (t) found.push_back(*t);
  return found;
}

// y = relu(norm_n(conv_n(... relu(norm_1(conv_1(x))))) + shortcut(x)), batch statistics.
// x (N, C, H, W) channels_last, float32 or bfloat16; every convolution has a norm. keep: (2n - 1,)
// or (2n - 2,): n convolutions, and the ReLUs inside the branch.
std::vector<Tensor> block_forward(Tensor x, std::vector<Tensor> operands,
                                  std::vector<int64_t> geometry, std::vector<double> eps,
                                  int64_t shortcut, int64_t pad_stride, std::vector<int64_t> keep) {
  constexpr const char* op = "block_forward";
  const Block block(op, operands, geometry, eps, shortcut, pad_stride);
  const size_t n = block.convs.size(), main = block.main;
  check(keep.size() == n + main - 1 && eps.size() == n, op, ": keep must have ", n + main - 1,
        " values, got ", keep.size());
  Saved saved{{}, std::vector<std::optional<Tensor>>(main - 1), {}};
  saved.outputs.resize(n);
  const auto normed = [&](size_t i, const Tensor& source) {
    auto [z, found] = block.convs[i].run_with_statistics(source);
    if (keep[i]) saved.outputs[i] = z;
    return Normed{z, found, &block.norms[i]};
  };
  std::vector<std::optional<Tensor>> statistics(n);
  Tensor h = x;
  for (size_t i = 0; i + 1 < main; ++i) {
    const Normed found = normed(i, h);
    statistics[i] = found.statistics;
    h = normalised(found);
    if (keep[n + i]) saved.inner[i] = h;
  }
  const Normed last = normed(main - 1, h);
  statistics[main - 1] = last.statistics;
  std::optional<Tensor> y;
  if (block.shortcut == kProjection) {
    const Normed branch = normed(main, x);
    statistics[main] = branch.statistics;
    y = normalised(last, branch);
  } else {
    y = normalised(last, block.parameterless_shortcut(x));
  }
  for (auto& s : statistics) saved.statistics.push_back(*s);
  return packed(*y, saved);
}

// The gradients of the operands that require one, in order, x's first.
struct Gradients {
  const std::vector<int64_t>& needs;  // of x and of every operand
  std::vector<std::optional<Tensor>> found;

  explicit Gradients(const std::vector<int64_t>& needs) : needs(needs), found(needs.size()) {}

  bool requires_x() const { return needs[0]; }
  bool requires_gradient(size_t operand) const { return needs[1 + operand]; }
  bool requires_any(size_t begin, size_t end) const {
    for (size_t i = begin; i < end; ++i)
      if (requires_gradient(i)) return true;
    return false;
  }
  void set(size_t operand, const Tensor& t) {
    if (requires_gradient(operand)) found[1 + operand] = t;
  }
  // Of unit i's norm; its parameters follow the weight.
  void set_norm(size_t i, const NormGradients& norm) {
    set(3 * i + 1, norm.dweight), set(3 * i + 2, norm.dbias);
  }
  std::vector<Tensor> packed(const char* op) const {
    std::vector<Tensor> all;
    for (size_t i = 0; i < needs.size(); ++i) {
      if (!needs[i]) continue;
      check(found[i].has_value(), op, ": operand ", i, " has no gradient");
      all.push_back(*found[i]);
    }
    return all;
  }
};

// dy, y? (N, K, P, Q), x (N, C, H, W), channels_last; kept: the outputs of block_forward after y,
// in that order -> the required gradients, in the order of x and operands. y, if not given, and
// outputs that were not saved are recomputed.
std::vector<Tensor> block_backward(Tensor dy, Tensor x, std::optional<Tensor> y,
                                   std::vector<Tensor> operands, std::vector<Tensor> kept,
                                   std::vector<int64_t> geometry, std::vector<double> eps,
                                   int64_t shortcut, int64_t pad_stride, std::vector<int64_t> keep,
                                   std::vector<int64_t> needs) {
  constexpr const char* op = "block_backward";
  const Block block(op, operands, geometry, eps, shortcut, pad_stride);
  const size_t n = block.convs.size(), main = block.main, last = main - 1;
  check(keep.size() == n + main - 1 && eps.size() == n && needs.size() == operands.size() + 1, op,
        ": keep must have ", n + main - 1, " values and needs ", operands.size() + 1, ", got ",
        keep.size(), " and ", needs.size());
  size_t next = n;
  const std::vector<int64_t> keep_outputs(keep.begin(), keep.begin() + static_cast<int64_t>(n));
  const std::vector<int64_t> keep_inner(keep.begin() + static_cast<int64_t>(n), keep.end());
  auto outputs = unpack(kept, next, keep_outputs), inner = unpack(kept, next, keep_inner);
  check(next == kept.size(), op, ": got ", kept.size(), " saved tensors instead of ", next);

  const auto normed_from = [&](size_t i, const Tensor& source) {
    if (!outputs[i]) outputs[i] = block.convs[i].run(source);
    return Normed{*outputs[i], kept[i], &block.norms[i]};
  };
  // Input of convolution i of the branch, recomputed if it was not saved.
  const auto input_of = [&](size_t i) {
    // Recompute forward from the last saved one.
    size_t from = i;
    while (from > 0 && !inner[from - 1]) --from;
    for (size_t j = from; j < i; ++j)
      inner[j] = normalised(normed_from(j, j == 0 ? x : *inner[j - 1]));
    return i == 0 ? x : *inner[i - 1];
  };
  const auto normed = [&](size_t i) {
    if (outputs[i]) return Normed{*outputs[i], kept[i], &block.norms[i]};
    return normed_from(i, i >= main ? x : input_of(i));
  };

  Gradients grads(needs);
  std::optional<Normed> other;
  if (block.shortcut == kProjection) other = normed(main);
  if (!y)
    y = other ? normalised(normed(last), *other)
              : normalised(normed(last), block.parameterless_shortcut(x));
  // The first unit of the branch that requires gradients; nothing is propagated before it.
  size_t first = 0;
  if (!grads.requires_x())
    while (first < main && !grads.requires_any(3 * first, 3 * first + 3)) ++first;
  const bool masked = (block.shortcut == kIdentity || block.shortcut == kPad) && grads.requires_x();
  BlockEndGradients end = norm_gradients(dy, y, normed(last), other ? &*other : nullptr,
                                         block.shortcut != kNone, masked);
  y.reset();
  outputs[last].reset();
  std::optional<Tensor> dx;
  if (block.shortcut == kIdentity && grads.requires_x()) dx = end.g;
  if (end.other) {
    grads.set_norm(main, *end.other);
    if (grads.requires_gradient(3 * main))
      grads.set(3 * main, block.convs[main].weight_gradient(end.other->dx, x));
    outputs[main].reset(), other.reset();
  }
  std::optional<Tensor> g;
  if (block.shortcut == kPad) g = end.g;
  end.g.reset();
  std::optional<NormGradients> found = std::move(end.main);
  for (size_t i = last; i + 1 > first; --i) {
    grads.set_norm(i, *found);
    if (i == 0) {
      if (grads.requires_gradient(0)) grads.set(0, block.convs[0].weight_gradient(found->dx, x));
      if (grads.requires_x()) dx = block.convs[0].input_gradient(found->dx, x, dx);
      break;
    }
    const Normed before = normed(i - 1);
    if (grads.requires_gradient(3 * i))
      grads.set(3 * i, inner[i - 1] ? block.convs[i].weight_gradient(found->dx, *inner[i - 1])
                                    : weight_gradient_through(block.convs[i], found->dx, before));
    if (i == first) break;
    found = norm_gradients_through(block.convs[i], std::move(found->dx), before);
    inner[i - 1].reset(), outputs[i - 1].reset();
  }
  if (end.other && grads.requires_x()) dx = block.convs[main].input_gradient(end.other->dx, x, dx);
  if (dx && g) add_padding_gradient(*dx, *g, pad_stride, dtype_index(op, "x", x));
  if (dx) grads.found[0] = dx;
  return grads.packed(op);
}

// y = conv_n(relu(norm_n(... conv_1(relu(norm_1(x)))))) + shortcut, batch statistics. The shortcut,
// of which a projection has no norm, starts from x or, if `shared`, from the first ReLU. keep: (2n
// - 1,) for n norms: the outputs of all convolutions but the last, and of all ReLUs.
std::vector<Tensor> preact_forward(Tensor x, std::vector<Tensor> operands,
                                   std::vector<int64_t> geometry, std::vector<double> eps,
                                   int64_t shortcut, int64_t pad_stride, bool shared,
                                   std::vector<int64_t> keep) {
  constexpr const char* op = "preact_forward";
  const Block block(op, operands, geometry, eps, shortcut, pad_stride);
  const size_t main = block.main;
  check(keep.size() == 2 * main - 1 && eps.size() == main, op, ": keep must have ", 2 * main - 1,
        " values, got ", keep.size());
  Saved saved{
      std::vector<std::optional<Tensor>>(main - 1), std::vector<std::optional<Tensor>>(main), {}};
  Tensor z = x, h = x, source = x, statistics = bn_statistics(x);
  for (size_t i = 0; i < main; ++i) {
    const Normed normed{z, statistics, &block.norms[i]};
    saved.statistics.push_back(normed.statistics);
    h = normalised(normed);
    if (keep[main - 1 + i]) saved.inner[i] = h;
    if (i == 0 && shared) source = h;
    if (i + 1 < main) {
      std::tie(z, statistics) = block.convs[i].run_with_statistics(h);
      if (keep[i]) saved.outputs[i] = z;
    }
  }
  std::optional<Tensor> residual = block.parameterless_shortcut(source);
  if (block.shortcut == kProjection) residual = block.convs[main].run(source);
  return packed(block.convs[main - 1].run(h, residual), saved);
}

// As block_backward, for preact_forward.
std::vector<Tensor> preact_backward(Tensor dy, Tensor x, std::vector<Tensor> operands,
                                    std::vector<Tensor> kept, std::vector<int64_t> geometry,
                                    std::vector<double> eps, int64_t shortcut, int64_t pad_stride,
                                    bool shared, std::vector<int64_t> keep,
                                    std::vector<int64_t> needs) {
  constexpr const char* op = "preact_backward";
  const Block block(op, operands, geometry, eps, shortcut, pad_stride);
  const size_t main = block.main;
  check(keep.size() == 2 * main - 1 && eps.size() == main && needs.size() == operands.size() + 1,
        op, ": keep must have ", 2 * main - 1, " values and needs ", operands.size() + 1, ", got ",
        keep.size(), " and ", needs.size());
  const DtypeIndex dtype = dtype_index(op, "x", x);
  size_t next = main;
  const auto middle = keep.begin() + static_cast<int64_t>(main) - 1;
  auto outputs = unpack(kept, next, {keep.begin(), middle});
  auto inner = unpack(kept, next, {middle, keep.end()});
  check(next == kept.size(), op, ": got ", kept.size(), " saved tensors instead of ", next);
  outputs.insert(outputs.begin(), x);

  const auto normed = [&](size_t i) { return Normed{*outputs[i], kept[i], &block.norms[i]}; };
  // Input of convolution i, recomputed if it was not saved.
  const auto input_of = [&](size_t i) {
    size_t from = i;
    while (!inner[from] && !outputs[from]) --from;
    for (size_t j = from; j <= i; ++j) {
      if (!outputs[j] && !inner[j]) outputs[j] = block.convs[j - 1].run(*inner[j - 1]);
      if (!inner[j]) inner[j] = normalised(normed(j));
    }
    return *inner[i];
  };
  // `added`, which may be overwritten, plus the gradient of the shortcut's source.
  const auto shortcut_gradient = [&](const Tensor& from, Tensor added) {
    if (block.shortcut == kProjection) return block.convs[main].input_gradient(dy, from, added);
    if (block.shortcut == kPad) add_padding_gradient(added, dy, pad_stride, dtype);
    if (block.shortcut == kIdentity) add_in_place(added, dy, dtype);
    return added;
  };

  Gradients grads(needs);
  // The first unit that requires gradients; nothing is propagated before it.
  size_t first = 0;
  if (!grads.requires_x())
    while (first < main && !grads.requires_any(3 * first, 3 * first + 3)) ++first;
  std::optional<Tensor> dz = dy;
  for (size_t i = main; i-- > first;) {
    const Tensor h = input_of(i);
    if (grads.requires_gradient(3 * i)) grads.set(3 * i, block.convs[i].weight_gradient(*dz, h));
    if (i == first && !grads.requires_x() && !grads.requires_any(3 * i + 1, 3 * i + 3)) break;
    std::optional<NormGradients> norm;
    if (i == 0 && shared) {
      const Tensor dh = shortcut_gradient(h, block.convs[i].input_gradient(*dz, h));
      norm = norm_gradients(dh, h, normed(i), nullptr, false, false).main;
    } else {
      norm = norm_gradients_through(block.convs[i], std::move(*dz), normed(i));
    }
    const NormGradients& found = *norm;
    grads.set_norm(i, found);
    dz = found.dx;
    if (i > 0) inner[i].reset(), outputs[i].reset();
  }
  if (grads.requires_x()) grads.found[0] = shared ? *dz : shortcut_gradient(x, *dz);
  if (block.shortcut == kProjection && grads.requires_gradient(3 * main))
    grads.set(3 * main, block.convs[main].weight_gradient(dy, shared ? input_of(0) : x));
  return grads.packed(op);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "block_forward(Tensor x, Tensor[] operands, int[] geometry, float[] eps, int shortcut, "
      "int pad_stride, int[] keep) -> Tensor[]");
  m.def(
      "block_backward(Tensor dy, Tensor x, Tensor? y, Tensor[] operands, Tensor[] kept, "
      "int[] geometry, float[] eps, int shortcut, int pad_stride, int[] keep, int[] needs) -> "
      "Tensor[]");
  m.def(
      "preact_forward(Tensor x, Tensor[] operands, int[] geometry, float[] eps, int shortcut, "
      "int pad_stride, bool shared, int[] keep) -> Tensor[]");
  m.def(
      "preact_backward(Tensor dy, Tensor x, Tensor[] operands, Tensor[] kept, int[] geometry, "
      "float[] eps, int shortcut, int pad_stride, bool shared, int[] keep, int[] needs) -> "
      "Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("block_forward", TORCH_BOX(fused_resnet::block_forward));
  m.impl("block_backward", TORCH_BOX(fused_resnet::block_backward));
  m.impl("preact_forward", TORCH_BOX(fused_resnet::preact_forward));
  m.impl("preact_backward", TORCH_BOX(fused_resnet::preact_backward));
}
