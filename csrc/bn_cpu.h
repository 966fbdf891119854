// Training batch normalisation on the CPU, as host code: cutting a tensor for threads, statistics,
// and the per-channel arithmetic between the passes of bn_add_relu_kernels.h.
#pragma once

#include <cmath>
#include <numeric>

#include "common.h"
#include "cpu_kernels.h"

namespace fused_resnet {

constexpr int64_t kSmallestPiece = 16384;  // elements worth handing to another thread
constexpr int64_t kSegment = 2048;         // elements of a plane added up in float32 at a time
constexpr int64_t kCentreValues = 16;  // values per channel that a first guess of the mean takes
constexpr int64_t kPadding = 16;       // the widest vector's lanes
constexpr int64_t kShortRow = 256;     // rows shorter than this are joined into longer ones

// The pieces of a tensor that threads take: rows or segments of planes.
struct Plan {
  Layout4d layout;
  Walk walk;
  int64_t items;     // whole rows (or joined rows), or segments
  int64_t leftover;  // rows that did not fill the last joined row
  int64_t count;     // values per channel

  explicit Plan(const Layout4d& layout) : layout(layout), walk{}, items(0), leftover(0) {
    const auto [N, C, HW, channels_last] = layout;
    count = N * HW;
    if (channels_last) {
      // Short rows are joined into longer ones that are a multiple of a vector, as if there were
      // `joined` times as many channels: no lanes idle, and a sum is not needed again at once.
      const int64_t whole = kPadding / std::gcd(std::max<int64_t>(C, 1), kPadding);
      const int64_t joined =
          C > 0 && C < kShortRow ? (kShortRow / C + whole - 1) / whole * whole : 1;
      walk.period = C * joined;
      items = count / joined;
      leftover = count % joined;
    } else {
      walk.period = C;
      walk.plane = HW;
      walk.segments = std::max<int64_t>((HW + kSegment - 1) / kSegment, 1);
      walk.segment = std::min(kSegment, HW);
      items = N * C * walk.segments;
    }
  }

  int64_t item_elements() const { return layout.channels_last ? walk.period : walk.segment; }
  Split split() const {
    return Split(items, 1, kSmallestPiece / std::max<int64_t>(item_elements(), 1));
  }
  // Whether every item starts on a cache line when the tensor does.
  bool items_are_lines(int64_t element_bytes) const {
    return item_elements() * element_bytes % kLineBytes == 0 &&
           (layout.channels_last || walk.plane * element_bytes % kLineBytes == 0);
  }

  // body(walk, first element, begin, end, task) over all items, then over the leftover rows, which
  // are one short row of their own.
  template <typename Body>
  void run(const Split& split, const Body& body) const {
    split.run([&](int64_t task, int64_t begin, int64_t end) { body(walk, 0, begin, end, task); });
    if (leftover > 0) {
      Walk rest = walk;
      rest.period = leftover * layout.C;
      body(rest, items * walk.period, 0, 1, 0);
    }
  }
};

// A per-channel array as the kernels read it: repeated for joined rows, padded with zeros.
template <typename A>
std::vector<A> spread(const Plan& plan, const std::vector<double>& channels) {
  std::vector<A> out(static_cast<size_t>(plan.walk.period + kPadding), A{0});
  for (int64_t j = 0; j < plan.walk.period; ++j)
    out[j] = static_cast<A>(channels[j % plan.layout.C]);
  return out;
}

// Per-channel sums, as many as `sums` has: kernel(walk, first element, begin, end, own sums) on
// every piece, each task into arrays of its own, added up in the order of the tasks.
template <size_t n, typename Kernel>
void add_up(const Plan& plan, std::array<std::vector<double>, n>& sums, const Kernel& kernel) {
  const Split split = plan.split();
  const int64_t period = plan.walk.period, C = plan.layout.C;
  // One cache line between the arrays of different tasks.
  const int64_t pitch = static_cast<int64_t>(n) * period + 8;
  std::vector<double> partial(static_cast<size_t>(std::max<int64_t>(split.tasks, 1) * pitch), 0.0);
  plan.run(split, [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, int64_t task) {
    std::array<double*, n> own;
    for (size_t i = 0; i < n; ++i)
      own[i] = partial.data() + task * pitch + static_cast<int64_t>(i) * period;
    kernel(walk, first, begin, end, own);
  });
  for (size_t i = 0; i < n; ++i) {
    sums[i].assign(static_cast<size_t>(C), 0.0);
    for (int64_t task = 0; task < split.tasks || task == 0; ++task)
      for (int64_t j = 0; j < period; ++j)
        sums[i][j % C] += partial[task * pitch + static_cast<int64_t>(i) * period + j];
  }
}

struct Statistics {
  std::vector<double> mean, var;  // (C,)
};

inline Statistics statistics(const Plan& plan, const Tensor& x, DtypeIndex dtype) {
  const CpuKernels& kernels = cpu_kernels();
  const bool rows = plan.layout.channels_last;
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const double count = static_cast<double>(plan.count);
  Statistics result{std::vector<double>(static_cast<size_t>(C), 0.0),
                    std::vector<double>(static_cast<size_t>(C), 0.0)};
  if (plan.count == 0) return result;
  std::array<std::vector<double>, 2> sums;
  const auto& [s1, s2] = sums;
  const auto pass = [&](const std::vector<double>& centre, bool in_double) {
    const std::vector<double> centres = spread<double>(plan, centre);
    const auto kernel =
        rows ? (in_double ? kernels.bn_stats_rows_double : kernels.bn_stats_rows)[dtype]
             : (in_double ? kernels.bn_stats_planes_double : kernels.bn_stats_planes)[dtype];
    add_up(plan, sums, [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, auto& own) {
      kernel(walk, x_ptr + first * size, begin, end, centres.data(), own[0], own[1]);
    });
    bool finite = true;
    for (int64_t c = 0; c < C; ++c) {
      const double shift = s1[c] / count;
      result.mean[c] = centre[c] + shift;
      // An infinite sum of squares stays infinite instead of Inf - Inf.
      const double squares = std::isfinite(s2[c]) ? s2[c] - s1[c] * shift : s2[c];
      result.var[c] = squares < 0 ? 0.0 : squares / count;
      finite = finite && std::isfinite(result.mean[c]) && std::isfinite(s2[c]);
    }
    return finite;
  };
  if (dtype != kFloat64) {
    // The centre is the mean of each channel's first few values: near enough to the mean for sums
    // in double, and exact for a constant channel.
    std::vector<double> centre(static_cast<size_t>(C), 0.0);
    std::vector<double> unused(static_cast<size_t>(C), 0.0);
    const std::vector<double> zeros(static_cast<size_t>(C), 0.0);
    const auto add = kernels.bn_stats_rows_double[dtype];
    const int64_t some = std::min(kCentreValues, rows ? plan.count : plan.layout.HW);
    if (rows) {
      add(Walk{C, 0, 0, 0}, x_ptr, 0, some, zeros.data(), centre.data(), unused.data());
    } else {
      for (int64_t c = 0; c < C; ++c)
        add(Walk{1, 0, 0, 0}, x_ptr + c * plan.layout.HW * size, 0, some, zeros.data(), &centre[c],
            &unused[c]);
    }
    for (double& c : centre) c /= static_cast<double>(some);
    if (pass(centre, false)) return result;
  }
  // float64, or squares that overflow float32, or Inf and NaN in x: two passes in double.
  pass(std::vector<double>(static_cast<size_t>(C), 0.0), true);
  const Statistics first = result;
  pass(first.mean, true);
  for (int64_t c = 0; c < C; ++c)
    if (!std::isfinite(first.mean[c])) result.mean[c] = first.mean[c];
  return result;
}

// A new (C,) tensor, float32 (float64 beside float64 data), holding `values`.
template <typename A>
Tensor to_tensor(const Tensor& x, const std::vector<double>& values) {
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(x, {static_cast<int64_t>(values.size())}, dtype);
  auto* out_ptr = static_cast<A*>(out.mutable_data_ptr());
  for (size_t c = 0; c < values.size(); ++c) out_ptr[c] = static_cast<A>(values[c]);
  return out;
}

template <typename A>
std::vector<double> to_vector(const Tensor& t) {
  const auto* p = static_cast<const A*>(t.const_data_ptr());
  return std::vector<double>(p, p + t.numel());
}

template <typename A>
std::vector<double> to_vector(const std::optional<Tensor>& t, int64_t C, double otherwise) {
  return t ? to_vector<A>(*t) : std::vector<double>(static_cast<size_t>(C), otherwise);
}

// One batch normalisation: y = (x - mean) * weight / sqrt(var + eps) + bias, all (C,).
struct Norm {
  Statistics stats;
  std::vector<double> weight, bias;
  double eps;

  double invstd(int64_t c) const { return 1.0 / std::sqrt(stats.var[c] + eps); }
  // What rounding the mean to A takes off it.
  template <typename A>
  double lost(int64_t c) const {
    const double d = stats.mean[c] - static_cast<double>(static_cast<A>(stats.mean[c]));
    return std::isfinite(d) ? d : 0.0;
  }
};

template <typename Body>
auto with_accumulator(DtypeIndex dtype, const Body& body) {
  return dtype == kFloat64 ? body(double{}) : body(float{});
}

// (rows, C), float64, contiguous
inline void check_rows(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t C) {
  check(t.scalar_type() == ScalarType::Double && t.dim() == 2 && t.size(0) == rows &&
            t.size(1) == C && t.is_cpu() && is_dense(t) && (C <= 1 || t.stride(1) == 1),
        op, ": ", name, " must be float64 of shape (", rows, ", ", C, "), got ",
        name_of(t.scalar_type()), " of shape ", shape_of(t));
}

inline std::vector<double> row_of(const Tensor& t, int64_t row) {
  const auto* p = static_cast<const double*>(t.const_data_ptr()) + row * t.size(1);
  return std::vector<double>(p, p + t.size(1));
}

inline Statistics to_statistics(const Tensor& stats) {
  return {row_of(stats, 0), row_of(stats, 1)};
}

template <typename A>
Norm norm_of(const char* op, const Tensor& stats, const std::optional<Tensor>& weight,
             const std::optional<Tensor>& bias, double eps, int64_t C, const Tensor& x) {
  constexpr ScalarType dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  check_rows(op, "statistics", stats, 2, C);
  if (weight) check_channel_vector(op, "weight", *weight, C, dtype, x);
  if (bias) check_channel_vector(op, "bias", *bias, C, dtype, x);
  return {to_statistics(stats), to_vector<A>(weight, C, 1.0), to_vector<A>(bias, C, 0.0), eps};
}

// A norm as one multiply-add: y = (x - mean) * scale + shift, (C,).
struct Affine {
  std::vector<double> scale, shift;
};
template <typename A>
Affine affine_of(const Norm& norm) {
  Affine affine{norm.weight, norm.bias};
  for (size_t c = 0; c < affine.scale.size(); ++c) {
    affine.scale[c] = norm.weight[c] * norm.invstd(static_cast<int64_t>(c));
    // (x - mean) is taken with the mean rounded to A; what the rounding took off goes here.
    affine.shift[c] -= norm.lost<A>(static_cast<int64_t>(c)) * affine.scale[c];
  }
  return affine;
}

// y = relu(norm(x) + residual), or with `residual_norm` y = relu(norm(x) + residual_norm(residual))
template <typename A>
void apply_norm(const Plan& plan, DtypeIndex dtype, const Tensor& x, const Norm& norm,
                const std::optional<Tensor>& residual, const Norm* residual_norm, bool relu,
                Tensor& y) {
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  if (x.numel() == 0) return;
  auto [scale, shift] = affine_of<A>(norm);
  std::vector<double> scale2;
  if (residual_norm) {
    const Affine other = affine_of<A>(*residual_norm);
    scale2 = other.scale;
    for (int64_t c = 0; c < C; ++c) shift[c] += other.shift[c];
  }
  const auto means = spread<A>(plan, norm.stats.mean);
  const auto scales = spread<A>(plan, scale), shifts = spread<A>(plan, shift);
  std::vector<A> means2, scales2;
  if (residual_norm) {
    means2 = spread<A>(plan, residual_norm->stats.mean);
    scales2 = spread<A>(plan, scale2);
  }
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const auto* residual_ptr =
      residual ? static_cast<const char*>(residual->const_data_ptr()) : nullptr;
  auto* y_ptr = static_cast<char*>(y.mutable_data_ptr());
  const bool stream = plan.items_are_lines(size) && streams_past_caches(y_ptr, x.numel() * size);
  const CpuKernels& kernels = cpu_kernels();
  const auto kernel =
      (plan.layout.channels_last ? kernels.bn_apply_rows : kernels.bn_apply_planes)[dtype];
  plan.run(plan.split(), [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, int64_t) {
    const int64_t offset = first * size;
    kernel({walk, x_ptr + offset, residual_ptr ? residual_ptr + offset : nullptr, y_ptr + offset,
            means.data(), scales.data(), shifts.data(), residual_norm ? means2.data() : nullptr,
            residual_norm ? scales2.data() : nullptr, relu, stream},
           begin, end);
  });
}

// What masks dy: nothing, the ReLU's output y (N, C, H, W), or `own`, by which the kernels compute
// that output again from x.
struct Mask {
  std::optional<Tensor> y;
  const Affine* own = nullptr;
};

// With g = dy where the mask lets it through: sum g, sum g * (x - mean)
// and, with another normalised tensor x2, sum g * (x2 - mean2), each (C,); g goes to `masked`, if
// that is given.
using GradientSums = std::array<std::vector<double>, 3>;
template <typename A>
GradientSums reduce_gradient(const Plan& plan, DtypeIndex dtype, const Tensor& dy, const Mask& mask,
                             const Tensor& x, const Statistics& stats,
                             const std::optional<Tensor>& x2, const Statistics* stats2,
                             Tensor* masked) {
  GradientSums sums;
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  for (auto& s : sums) s.assign(static_cast<size_t>(C), 0.0);
  if (x.numel() == 0) return sums;
  const auto means = spread<A>(plan, stats.mean);
  const auto means2 = x2 ? spread<A>(plan, stats2->mean) : std::vector<A>{};
  const auto pointer = [](const auto& t) {
    return t ? static_cast<const char*>(t->const_data_ptr()) : nullptr;
  };
  const auto* dy_ptr = static_cast<const char*>(dy.const_data_ptr());
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const char *y_ptr = pointer(mask.y), *x2_ptr = pointer(x2);
  const auto own_scale = mask.own ? spread<A>(plan, mask.own->scale) : std::vector<A>{};
  const auto own_shift = mask.own ? spread<A>(plan, mask.own->shift) : std::vector<A>{};
  auto* masked_ptr = masked ? static_cast<char*>(masked->mutable_data_ptr()) : nullptr;
  const bool stream =
      plan.items_are_lines(size) && streams_past_caches(masked_ptr, x.numel() * size);
  const auto at = [](auto* p, int64_t offset) { return p ? p + offset : p; };
  const CpuKernels& kernels = cpu_kernels();
  const auto reduce =
      (plan.layout.channels_last ? kernels.bn_reduce_rows : kernels.bn_reduce_planes)[dtype];
  add_up(plan, sums, [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, auto& own) {
    const int64_t offset = first * size;
    BnBackward bn{};
    bn.walk = walk;
    bn.dy = dy_ptr + offset;
    bn.x = x_ptr + offset;
    bn.y = at(y_ptr, offset);
    bn.x2 = at(x2_ptr, offset);
    bn.dresidual = at(masked_ptr, offset);
    bn.mean = means.data();
    bn.mean2 = means2.data();
    bn.own_scale = mask.own ? own_scale.data() : nullptr;
    bn.own_shift = own_shift.data();
    bn.stream = stream;
    reduce(bn, begin, end, own[0], own[1], own[2]);
  });
  return sums;
}

// dx = scale * ((g - sum_g / count) - (x - mean) * invstd^2 * sum_gx / count), scale = weight *
// invstd, g = dy where the mask lets it through; sums over all `count` values of a channel,
// wherever they are.
template <typename A>
void apply_gradient(const Plan& plan, DtypeIndex dtype, const Tensor& dy, const Mask& mask,
                    const Tensor& x, const Norm& norm, const std::vector<double>& sum_g,
                    const std::vector<double>& sum_gx, double count, Tensor& dx) {
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  if (x.numel() == 0) return;
  std::vector<double> g_mean(sum_g), slope(sum_g), scale(sum_g);
  for (int64_t c = 0; c < C; ++c) {
    const double invstd = norm.invstd(c);
    slope[c] = invstd * invstd * sum_gx[c] / count;
    g_mean[c] = sum_g[c] / count - slope[c] * norm.lost<A>(c);
    scale[c] = norm.weight[c] * invstd;
  }
  const auto means = spread<A>(plan, norm.stats.mean), g_means = spread<A>(plan, g_mean);
  const auto slopes = spread<A>(plan, slope), scales = spread<A>(plan, scale);
  const auto* dy_ptr = static_cast<const char*>(dy.const_data_ptr());
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const auto* y_ptr = mask.y ? static_cast<const char*>(mask.y->const_data_ptr()) : nullptr;
  const auto own_scale = mask.own ? spread<A>(plan, mask.own->scale) : std::vector<A>{};
  const auto own_shift = mask.own ? spread<A>(plan, mask.own->shift) : std::vector<A>{};
  auto* dx_ptr = static_cast<char*>(dx.mutable_data_ptr());
  const bool stream = plan.items_are_lines(size) && streams_past_caches(dx_ptr, x.numel() * size);
  const CpuKernels& kernels = cpu_kernels();
  const auto kernel =
      (plan.layout.channels_last ? kernels.bn_backward_rows : kernels.bn_backward_planes)[dtype];
  plan.run(plan.split(), [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, int64_t) {
    const int64_t offset = first * size;
    BnBackward bn{};
    bn.walk = walk;
    bn.dy = dy_ptr + offset;
    bn.x = x_ptr + offset;
    bn.y = y_ptr ? y_ptr + offset : nullptr;
    bn.dx = dx_ptr + offset;
    bn.mean = means.data();
    bn.g_mean = g_means.data();
    bn.own_scale = mask.own ? own_scale.data() : nullptr;
    bn.own_shift = own_shift.data();
    bn.slope = slopes.data();
    bn.scale = scales.data();
    bn.stream = stream;
    kernel(bn, begin, end);
  });
}

inline ScalarType statistics_dtype(DtypeIndex dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fused_resnet
