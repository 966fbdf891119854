// bn_add_relu and its backward on the CPU: checks, allocation, splitting over threads, and the
// per-channel arithmetic between the passes. The kernels are in bn_add_relu_kernels.h.
#include <cmath>
#include <numeric>

#include "common.h"
#include "cpu_kernels.h"

namespace fused_resnet {
namespace {

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

// Two per-channel sums: kernel(walk, first element, begin, end, sums 1, sums 2) on every piece,
// each task into arrays of its own, added up in the order of the tasks.
template <typename Kernel>
void two_sums(const Plan& plan, std::vector<double>& sums1, std::vector<double>& sums2,
              const Kernel& kernel) {
  const Split split = plan.split();
  const int64_t period = plan.walk.period, C = plan.layout.C;
  // One cache line between the arrays of different tasks.
  const int64_t pitch = 2 * period + 8;
  std::vector<double> partial(static_cast<size_t>(std::max<int64_t>(split.tasks, 1) * pitch), 0.0);
  plan.run(split, [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, int64_t task) {
    double* own = partial.data() + task * pitch;
    kernel(walk, first, begin, end, own, own + period);
  });
  sums1.assign(static_cast<size_t>(C), 0.0);
  sums2.assign(static_cast<size_t>(C), 0.0);
  for (int64_t task = 0; task < split.tasks || task == 0; ++task)
    for (int64_t j = 0; j < period; ++j) {
      sums1[j % C] += partial[task * pitch + j];
      sums2[j % C] += partial[task * pitch + period + j];
    }
}

struct Statistics {
  std::vector<double> mean, var;  // (C,)
};

Statistics statistics(const Plan& plan, const Tensor& x, DtypeIndex dtype) {
  const CpuKernels& kernels = cpu_kernels();
  const bool rows = plan.layout.channels_last;
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const double count = static_cast<double>(plan.count);
  Statistics result{std::vector<double>(static_cast<size_t>(C), 0.0),
                    std::vector<double>(static_cast<size_t>(C), 0.0)};
  if (plan.count == 0) return result;
  std::vector<double> s1, s2;
  const auto pass = [&](const std::vector<double>& centre, bool in_double) {
    const std::vector<double> centres = spread<double>(plan, centre);
    const auto kernel =
        rows ? (in_double ? kernels.bn_stats_rows_double : kernels.bn_stats_rows)[dtype]
             : (in_double ? kernels.bn_stats_planes_double : kernels.bn_stats_planes)[dtype];
    two_sums(plan, s1, s2,
             [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, double* own1,
                 double* own2) {
               kernel(walk, x_ptr + first * size, begin, end, centres.data(), own1, own2);
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

template <typename A>
std::tuple<Tensor, Tensor, Tensor> forward(const Plan& plan, DtypeIndex dtype, const Tensor& x,
                                           const std::optional<Tensor>& weight,
                                           const std::optional<Tensor>& bias,
                                           const std::optional<Tensor>& residual, double eps,
                                           bool relu) {
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  Tensor y = empty_output_like(x);
  const Statistics stats = statistics(plan, x, dtype);
  Tensor mean = to_tensor<A>(x, stats.mean), var = to_tensor<A>(x, stats.var);
  if (x.numel() == 0) return {y, mean, var};

  const std::vector<double> w = to_vector<A>(weight, C, 1.0), b = to_vector<A>(bias, C, 0.0);
  std::vector<double> scale(w), shift(b);
  for (int64_t c = 0; c < C; ++c) {
    scale[c] = w[c] / std::sqrt(stats.var[c] + eps);
    // (x - mean) is taken with the mean rounded to A; what the rounding took off goes here.
    const double lost = stats.mean[c] - static_cast<double>(static_cast<A>(stats.mean[c]));
    if (std::isfinite(lost)) shift[c] -= lost * scale[c];
  }
  const auto means = spread<A>(plan, stats.mean);
  const auto scales = spread<A>(plan, scale), shifts = spread<A>(plan, shift);
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
            means.data(), scales.data(), shifts.data(), relu, stream},
           begin, end);
  });
  return {y, mean, var};
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Plan& plan, DtypeIndex dtype, const Tensor& dy, const Tensor& x,
    const std::optional<Tensor>& y, const std::optional<Tensor>& weight, const Tensor& mean,
    const Tensor& var, double eps, bool relu, bool need_dx, bool need_dresidual) {
  const CpuKernels& kernels = cpu_kernels();
  const bool rows = plan.layout.channels_last;
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  Tensor nothing = torch::stable::new_empty(x, {0});
  Tensor dx = need_dx ? empty_output_like(x) : nothing;
  Tensor dresidual = need_dresidual ? empty_output_like(x) : nothing;
  std::vector<double> dbias(static_cast<size_t>(C), 0.0), dweight(dbias);
  if (x.numel() == 0) return {dx, to_tensor<A>(x, dweight), to_tensor<A>(x, dbias), dresidual};

  const std::vector<double> means = to_vector<A>(mean);
  const auto mean_spread = spread<A>(plan, means);
  const auto* dy_ptr = static_cast<const char*>(dy.const_data_ptr());
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const auto* y_ptr = relu ? static_cast<const char*>(y->const_data_ptr()) : nullptr;
  auto* dresidual_ptr = need_dresidual ? static_cast<char*>(dresidual.mutable_data_ptr()) : nullptr;
  auto* dx_ptr = need_dx ? static_cast<char*>(dx.mutable_data_ptr()) : nullptr;
  const bool lines = plan.items_are_lines(size);
  const auto at = [](auto* p, int64_t offset) { return p ? p + offset : p; };

  const bool stream_dresidual = lines && streams_past_caches(dresidual_ptr, x.numel() * size);
  const auto reduce = (rows ? kernels.bn_reduce_rows : kernels.bn_reduce_planes)[dtype];
  two_sums(plan, dbias, dweight,
           [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, double* sum_g,
               double* sum_gx) {
             const int64_t offset = first * size;
             BnBackward bn{};
             bn.walk = walk;
             bn.dy = dy_ptr + offset;
             bn.x = x_ptr + offset;
             bn.y = at(y_ptr, offset);
             bn.dresidual = at(dresidual_ptr, offset);
             bn.mean = mean_spread.data();
             bn.stream = stream_dresidual;
             reduce(bn, begin, end, sum_g, sum_gx);
           });

  const std::vector<double> w = to_vector<A>(weight, C, 1.0), variance = to_vector<A>(var);
  const double count = static_cast<double>(plan.count);
  std::vector<double> g_mean(w), slope(w), scale(w);
  for (int64_t c = 0; c < C; ++c) {
    const double invstd = 1.0 / std::sqrt(variance[c] + eps);
    dweight[c] *= invstd;
    g_mean[c] = dbias[c] / count;
    slope[c] = invstd * dweight[c] / count;
    scale[c] = w[c] * invstd;
  }
  if (need_dx) {
    const auto g_means = spread<A>(plan, g_mean), slopes = spread<A>(plan, slope);
    const auto scales = spread<A>(plan, scale);
    const bool stream_dx = lines && streams_past_caches(dx_ptr, x.numel() * size);
    const auto apply = (rows ? kernels.bn_backward_rows : kernels.bn_backward_planes)[dtype];
    // With dresidual written, g is there to be read; otherwise it is masked out of dy once more.
    const char* g_ptr = need_dresidual ? dresidual_ptr : dy_ptr;
    const char* mask_ptr = need_dresidual ? nullptr : y_ptr;
    plan.run(plan.split(),
             [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, int64_t) {
               const int64_t offset = first * size;
               BnBackward bn{};
               bn.walk = walk;
               bn.dy = g_ptr + offset;
               bn.x = x_ptr + offset;
               bn.y = at(mask_ptr, offset);
               bn.dx = dx_ptr + offset;
               bn.mean = mean_spread.data();
               bn.g_mean = g_means.data();
               bn.slope = slopes.data();
               bn.scale = scales.data();
               bn.stream = stream_dx;
               apply(bn, begin, end);
             });
  }
  return {dx, to_tensor<A>(x, dweight), to_tensor<A>(x, dbias), dresidual};
}

ScalarType statistics_dtype(DtypeIndex dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// x (N, C, H, W), weight? (C,), bias? (C,), residual? (N, C, H, W)
//   -> y (N, C, H, W), mean (C,), biased variance (C,)
std::tuple<Tensor, Tensor, Tensor> bn_add_relu(Tensor x, std::optional<Tensor> weight,
                                               std::optional<Tensor> bias,
                                               std::optional<Tensor> residual, double eps,
                                               bool relu) {
  constexpr const char* op = "bn_add_relu";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Plan plan(layout_of(op, x));
  const ScalarType vector_dtype = statistics_dtype(dtype);
  const int64_t C = plan.layout.C;
  if (weight) check_channel_vector(op, "weight", *weight, C, vector_dtype, x);
  if (bias) check_channel_vector(op, "bias", *bias, C, vector_dtype, x);
  if (residual) check_same_layout(op, "residual", *residual, "x", x);
  return dtype == kFloat64 ? forward<double>(plan, dtype, x, weight, bias, residual, eps, relu)
                           : forward<float>(plan, dtype, x, weight, bias, residual, eps, relu);
}

// dy, x (N, C, H, W), y? (N, C, H, W), weight? (C,), mean (C,), var (C,)
//   -> dx (N, C, H, W), dweight (C,), dbias (C,), dresidual (N, C, H, W)
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_relu_backward(
    Tensor dy, Tensor x, std::optional<Tensor> y, std::optional<Tensor> weight, Tensor mean,
    Tensor var, double eps, bool relu, bool need_dx, bool need_dresidual) {
  constexpr const char* op = "bn_add_relu_backward";
  const DtypeIndex dtype = dtype_index(op, "x", x);
  const Plan plan(layout_of(op, x));
  const ScalarType vector_dtype = statistics_dtype(dtype);
  const int64_t C = plan.layout.C;
  check_same_layout(op, "dy", dy, "x", x);
  check(!relu || y.has_value(), op, ": y must be given when relu is true");
  if (y) check_same_layout(op, "y", *y, "x", x);
  if (weight) check_channel_vector(op, "weight", *weight, C, vector_dtype, x);
  check_channel_vector(op, "mean", mean, C, vector_dtype, x);
  check_channel_vector(op, "var", var, C, vector_dtype, x);
  return dtype == kFloat64 ? backward<double>(plan, dtype, dy, x, y, weight, mean, var, eps, relu,
                                              need_dx, need_dresidual)
                           : backward<float>(plan, dtype, dy, x, y, weight, mean, var, eps, relu,
                                             need_dx, need_dresidual);
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) {
  m.def(
      "bn_add_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "bool relu) -> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "bn_add_relu_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor mean, "
      "Tensor var, float eps, bool relu, bool need_dx, bool need_dresidual) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CPU, m) {
  m.impl("bn_add_relu", TORCH_BOX(fused_resnet::bn_add_relu));
  m.impl("bn_add_relu_backward", TORCH_BOX(fused_resnet::bn_add_relu_backward));
}
