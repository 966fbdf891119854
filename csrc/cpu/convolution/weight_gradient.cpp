// Weight gradients of a training step's convolutions, on the CPU, by the kernels of
// cpu/convolution/weight_gradient_kernels.h and, for 3x3,
// cpu/convolution/weight_gradient_winograd_kernels.h.
#include "cpu/batch_norm/passes.h"
#include "cpu/batch_norm/statistics.h"
#include "cpu/convolution/groups.h"
#include "cpu/convolution/host.h"
#include "cpu/convolution/train.h"
#include "cpu/memory_pool.h"
#include "cpu/relayout.h"

namespace fused_resnet {
namespace {

// from (rows, columns) -> to (columns, rows), multiples of 16
void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  Split(columns / 16, 1, 4).run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin * 16; j < end * 16; j += 16)
      for (int64_t i = 0; i < rows; i += 16)
        cpu_kernels().transpose(from + i * columns + j, columns, to + j * rows + i, rows);
  });
}

// out (count,) <- the sum over the tasks, in order, of what body(begin, end, sums) computes for
// each task's rows
template <typename Body>
void sum_over_rows(int64_t rows, int64_t count, float* out, const Body& body) {
  const Split split(rows, 1, 1);
  const Scratch partial(std::max<int64_t>(split.tasks - 1, 1) * count * 4);
  auto* partial_ptr = reinterpret_cast<float*>(partial.data());
  split.run([&](int64_t task, int64_t begin, int64_t end) {
    body(begin, end, task == 0 ? out : partial_ptr + (task - 1) * count);
  });
  if (split.tasks == 1) return;
  Split(count, 16, 65536).run([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t task = 1; task < split.tasks; ++task) {
      const float* from = partial_ptr + (task - 1) * count;
      for (int64_t i = begin; i < end; ++i) out[i] += from[i];
    }
  });
}

// Whether to split outputs over threads, each of which lays out (of groups: recomputes) all of x;
// else rows are split, and the threads' sums added up.
bool splits_outputs(const WeightGradient& g, int64_t outputs) {
  return g.pixels * g.groups < 3 * outputs * g.R * g.S;
}

// out (K, R, S, C / groups) float32 <- the weight gradient, over all rows and outputs
void sum_weight_gradient(const WeightGradient& g, ConvVariant variant, float* out) {
  const auto kernel = cpu_kernels().conv_weight_gradient[variant];
  const auto scratch_bytes = cpu_kernels().weight_gradient_scratch[variant];
  const int64_t taps = g.R * g.S, rows = g.N * g.P, inputs = g.C / g.groups;
  const int64_t weights = g.K * taps * inputs;
  if (g.pixels == 0) {
    std::fill_n(out, weights, 0.0f);
    return;
  }
  if (splits_outputs(g, g.K)) {
    Split(g.K / 16, 1, 1).run([&](int64_t, int64_t begin, int64_t end) {
      const Scratch scratch(scratch_bytes(g, (end - begin) * 16));
      kernel(g, scratch.data(), 0, rows, begin * 16, end * 16, out + begin * 16 * taps * inputs);
    });
    return;
  }
  sum_over_rows(rows, weights, out, [&](int64_t begin, int64_t end, float* sums) {
    const Scratch scratch(scratch_bytes(g, g.K));
    kernel(g, scratch.data(), begin, end, 0, g.K, sums);
  });
}

// Whether the Winograd kernel for exactly 16 channels applies. It reads float32.
bool has_16_channels(const WeightGradient& g) {
  return g.C == 16 && g.K == 16 && g.dilation_h * g.dilation_w == 1 &&
         cpu_kernels().winograd_gradient_16;
}

// The same for a 3x3 convolution of stride 1, by the Winograd algorithm; false if a result is
// non-finite.
bool sum_winograd_gradient(const WeightGradient& g, ConvVariant variant, float* out) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t m = g.winograd_tile, weights = g.K * winograd_products(m) * g.C;
  const int64_t tiles = winograd_tiles(g, m);
  const bool sixteen = has_16_channels(g);
  const bool by_outputs = !sixteen && splits_outputs(g, g.K);
  const int64_t granule = sixteen ? kTilesOf16 : 1;
  const Split split(by_outputs ? g.K / 16 : tiles, granule, granule);
  const int64_t parts = by_outputs ? 1 : split.tasks;
  const Scratch sums(parts * weights * 4);
  auto* sums_ptr = reinterpret_cast<float*>(sums.data());
  split.run([&](int64_t task, int64_t begin, int64_t end) {
    if (sixteen) return kernels.winograd_gradient_16(g, begin, end, sums_ptr + task * weights);
    const int64_t outputs = by_outputs ? (end - begin) * 16 : g.K;
    const Scratch scratch(kernels.winograd_gradient_scratch(g, outputs));
    if (by_outputs)
      kernels.winograd_gradient[variant](g, scratch.data(), 0, tiles, begin * 16, end * 16,
                                         sums_ptr + begin * 16 * (weights / g.K));
    else
      kernels.winograd_gradient[variant](g, scratch.data(), begin, end, 0, g.K,
                                         sums_ptr + task * weights);
  });
  const Split finish(g.K, 1, 8);
  std::vector<char> finite(static_cast<size_t>(finish.tasks), 0);
  finish.run([&](int64_t task, int64_t begin, int64_t end) {
    finite[task] =
        kernels.winograd_gradient_output(m, sums_ptr + begin * (weights / g.K), parts, weights,
                                         end - begin, g.C, out + begin * 9 * g.C);
  });
  return std::find(finite.begin(), finite.end(), 0) == finite.end();
}

// The checked operands of a weight gradient.
WeightGradient weight_gradient_of(const char* op, const Tensor& dy, const Tensor& x, int64_t R,
                                  int64_t S, const Sizes& geometry) {
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Layout4d in = layout_of(op, x), out = layout_of(op, dy);
  check((in.channels_last || in.C == 1) && out.channels_last && dy.scalar_type() == x.scalar_type(),
        op, ": x and dy must be channels_last and of one dtype, got strides ", strides_of(x),
        " and ", strides_of(dy));
  const int64_t groups = geometry.size() == kSizes ? std::max<int64_t>(geometry[6], 1) : 1;
  check(in.C % groups == 0, op, ": x must have a multiple of ", groups, " channels, got ", in.C);
  const std::vector<int64_t> weight_shape{out.C, in.C / groups, R, S};
  WeightGradient g{};
  static_cast<ConvShape&>(g) =
      conv_shape(op, x.size(0), x.size(2), x.size(3), weight_shape, geometry);
  const char* reason = training_reason(Pass::kWeightGradient, dtype, weight_shape, geometry);
  check(!reason, op, ": ", reason ? reason : "", ", got x of shape ", shape_of(x), ", dy of shape ",
        shape_of(dy), ", taps ", R, " x ", S);
  check(dy.size(0) == g.N && g.P == dy.size(2) && g.Q == dy.size(3), op, ": dy of shape ",
        shape_of(dy), " does not match x of shape ", shape_of(x), " convolved");
  g.x = x.const_data_ptr(), g.dy = dy.const_data_ptr();
  g.pixels = g.N * g.P * g.Q, g.x_pixels = g.N * g.H * g.W;
  ++conv_passes().weight_gradients;
  return g;
}

// How a gradient is computed and split over threads.
struct GradientAlgorithm {
  ConvVariant variant;
  bool pointwise;
  int64_t winograd_tile;
  bool swapped;     // x and dy are swapped, and so are K and C
  bool by_outputs;  // outputs are split, else rows (of tiles)

  GradientAlgorithm(const WeightGradient& g, DtypeIndex dtype) : variant(*conv_variant(dtype)) {
    const bool strides = g.stride_h * g.stride_w > 1, nonempty = g.pixels > 0;
    pointwise = nonempty && !strides && g.R * g.S == 1 && g.pad_h == 0 && g.pad_w == 0;
    // The transposed operand costs more to lay out: use the one with fewer channels.
    swapped = pointwise && g.K > g.C && !g.grouped();
    winograd_tile = nonempty ? winograd_tile_of_step(g, variant, kMaxWinogradWeights) : 0;
    by_outputs = splits_outputs(g, swapped ? g.C : g.K);
  }
};

// dweight (K, C / groups, R, S), channels_last or `contiguous`, from what compute(out) writes to
// its memory: (K, R, S, C / groups), which is rearranged in place, weight by weight, in cache.
template <typename Compute>
Tensor gradient_in_layout(const ConvShape& g, bool contiguous, const Compute& compute) {
  const int64_t K = g.K, C = g.C / (g.groups * g.merged), R = g.R, S = g.S;
  const bool rearranged = contiguous && C > 1 && R * S > 1;
  Tensor dweight = rearranged
                       ? pooled_empty({K, C, R, S}, {C * R * S, R * S, S, 1}, ScalarType::Float)
                       : pooled_channels_last(K, C, R, S, ScalarType::Float);
  auto* out = static_cast<float*>(dweight.mutable_data_ptr());
  compute(out);
  if (rearranged) transpose_each(out, K, R * S, C);
  return dweight;
}

// out (K, R, S, C / groups)
void weight_gradient_by(WeightGradient g, const GradientAlgorithm& algorithm, const Tensor& dy,
                        const Tensor& x, float* out) {
  const ConvVariant variant = algorithm.variant;
  if (algorithm.pointwise) {
    // Rows as long as one chain of additions, or slightly shorter for equal shares of the threads.
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t pair = variant == kBFloatPairs ? 2 : 1,
                  longest = cpu_kernels().gradient_chain[variant] * pair;
    const int64_t rows = round_up((g.pixels + longest - 1) / longest, threads);
    g.N = 1, g.Q = round_up((g.pixels + rows - 1) / rows, pair);
    g.P = (g.pixels + g.Q - 1) / g.Q;
    g.H = g.P, g.W = g.Q;
  }
  const std::vector<float> zeros(static_cast<size_t>(g.C), 0.0f);
  g.zeros = zeros.data();
  if (algorithm.winograd_tile > 0) {
    WeightGradient prepared = g;
    prepared.winograd_tile = algorithm.winograd_tile;
    std::optional<Operand> wide_x, wide_dy;
    if (has_16_channels(g)) {
      wide_x.emplace(x, variant), wide_dy.emplace(dy, variant);
      prepared.x = wide_x->data(), prepared.dy = wide_dy->data();
    }
    if (sum_winograd_gradient(prepared, variant, out)) return;
  }
  if (g.merged > 1) {
    const Scratch result(g.K * g.R * g.S * g.C / g.groups * 4);
    auto* merged = reinterpret_cast<float*>(result.data());
    sum_weight_gradient(g, variant, merged);
    return take_own_groups(g, merged, out);
  }
  if (!algorithm.swapped) return sum_weight_gradient(g, variant, out);
  std::swap(g.x, g.dy), std::swap(g.C, g.K);
  g.recomputes_dy = true;
  const Scratch result(g.K * g.C * 4);
  auto* swapped = reinterpret_cast<float*>(result.data());
  sum_weight_gradient(g, variant, swapped);
  transpose(swapped, g.K, g.C, out);
}

// Implements WeightGradient::recompute: relu(norm(x)) for a range of pixels, in thread-local
// memory; context: a NormedRows.
const void* recompute(const void* context, int64_t begin, int64_t end) {
  thread_local std::vector<char> memory;
  const auto& source = *static_cast<const NormedRows*>(context);
  const int64_t bytes = std::max<int64_t>(end - begin, 0) * source.pixel_bytes + kLineBytes;
  char* y = aligned(memory, bytes);
  BnForward bn{};
  bn.x = source.x + begin * source.pixel_bytes, bn.y = y;
  bn.mean = source.mean.data(), bn.scale = source.scale.data(), bn.shift = source.shift.data();
  for_joined_rows(source.partition.layout.C, end - begin, [&](const Walk& walk, int64_t rows) {
    bn.walk = walk, bn.activation = kRelu;
    cpu_kernels().bn_apply_rows[source.dtype](bn, 0, rows);
  });
  return y - begin * source.pixel_bytes;
}

// The same for few input channels.
void narrow_weight_gradient(WeightGradient g, ConvVariant variant, const Tensor& dy,
                            const Tensor& x, float* out) {
  const int64_t values = g.S * g.C, weights = g.R * values * g.K;
  if (g.pixels == 0) {
    std::fill_n(out, weights, 0.0f);
    return;
  }
  const Operand wide_x(x, variant), wide_dy(dy, variant);
  g.x = wide_x.data(), g.dy = wide_dy.data();
  const auto kernel = cpu_kernels().narrow_gradient[variant == kBFloatPairs ? variant : kFloat];
  const Scratch memory(weights * 4);  // (R, S C, K)
  auto* sums = reinterpret_cast<float*>(memory.data());
  sum_over_rows(g.N * g.P, weights, sums, [&](int64_t begin, int64_t end, float* part) {
    const Scratch scratch(cpu_kernels().narrow_gradient_scratch(g));
    kernel(g, scratch.data(), begin, end, part);
  });
  for (int64_t k = 0; k < g.K; ++k)
    for (int64_t i = 0; i < g.R * values; ++i) *out++ = sums[i * g.K + k];
}

}  // namespace

Tensor weight_gradient(Tensor dy, Tensor x, int64_t R, int64_t S, Sizes geometry, bool contiguous) {
  constexpr const char* op = "weight_gradient";
  const WeightGradient g = weight_gradient_of(op, dy, x, R, S, geometry);
  const DtypeIndex dtype = dtype_index(op, "x", x);
  return gradient_in_layout(g, contiguous, [&](float* out) {
    g.C < 16 ? narrow_weight_gradient(g, *conv_variant(dtype), dy, x, out)
             : weight_gradient_by(g, GradientAlgorithm(g, dtype), dy, x, out);
  });
}

Tensor weight_gradient_of_normed(Tensor dy, Tensor x, int64_t R, int64_t S, Sizes geometry,
                                 Tensor stats, Tensor norm_weight, Tensor norm_bias, double eps,
                                 bool contiguous) {
  constexpr const char* op = "weight_gradient_of_normed";
  WeightGradient g = weight_gradient_of(op, dy, x, R, S, geometry);
  const GradientAlgorithm algorithm(g, dtype_index(op, "x", x));
  const auto computed_from = [&](const Tensor& source) {
    return gradient_in_layout(
        g, contiguous, [&](float* out) { weight_gradient_by(g, algorithm, dy, source, out); });
  };
  // Each thread recomputes what it reads of relu(norm(x)), which is all of it if outputs are split.
  // Then, and for the Winograd kernel for 16 channels, which reads only tensors, it is computed
  // once as a tensor.
  const bool needs_tensor = algorithm.winograd_tile > 0 && has_16_channels(g);
  if (g.pixels == 0 || algorithm.by_outputs || needs_tensor) {
    const Tensor normed = bn_apply(x, stats, norm_weight, norm_bias, eps, {}, {}, {}, {}, 0, kRelu);
    g.x = normed.const_data_ptr();
    return computed_from(normed);
  }
  const NormedRows source(x, norm_of<float>(op, stats, norm_weight, norm_bias, eps, g.C, x));
  g.recompute = recompute, g.context = &source;
  return computed_from(x);
}

}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "weight_gradient(Tensor dy, Tensor x, int R, int S, int[] geometry, bool contiguous) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("weight_gradient", TORCH_BOX(fused_resnet::weight_gradient));
}
