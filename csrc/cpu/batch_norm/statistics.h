// Training batch normalisation on the CPU, as host code: cutting a tensor for threads, statistics,
// and the per-channel arithmetic between the passes of cpu/batch_norm/bn_add_relu_kernels.h.
#pragma once

#include <cmath>
#include <numeric>

#include "common.h"
#include "cpu/isa/kernels.h"

namespace fused_resnet {

constexpr int64_t kSmallestPiece = 16384;  // elements worth handing to another thread
constexpr int64_t kSegment = 2048;         // elements of a plane added up in float32 at a time
constexpr int64_t kCentreValues = 16;  // values per channel that a first guess of the mean takes
constexpr int64_t kPadding = 16;       // the widest vector's lanes
constexpr int64_t kShortRow = 256;     // rows shorter than this are joined into longer ones

// How many rows of C values are taken for one: short rows are joined into longer ones that are a
// multiple of a vector, as if there were so many times as many channels: no lanes idle, and a sum
// is not needed again at once.
inline int64_t rows_joined(int64_t C) {
  const int64_t whole = kPadding / std::gcd(std::max<int64_t>(C, 1), kPadding);
  return C > 0 && C < kShortRow ? (kShortRow / C + whole - 1) / whole * whole : 1;
}

// body(walk, first row, count) over `rows` rows of C values: joined ones, then the rest as a short
// one.
template <typename Body>
void for_joined_rows(int64_t C, int64_t rows, const Body& body) {
  const int64_t joined = rows_joined(C), whole = rows / joined, rest = rows % joined;
  if (whole > 0) body(Walk{C * joined, 0, 0, 0}, 0, whole);
  if (rest > 0) body(Walk{C * rest, 0, 0, 0}, whole * joined, int64_t{1});
}

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
      const int64_t joined = rows_joined(C);
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

// Mean and variance of `count` values with s1 = sum(x - centre) and s2 = sum((x - centre)^2), into
// channel c; false where they are no finite numbers.
inline bool set_moments(Statistics& to, int64_t c, double count, double centre, double s1,
                        double s2) {
  const double shift = s1 / count;
  to.mean[c] = centre + shift;
  // An infinite sum of squares stays infinite instead of Inf - Inf.
  const double squares = std::isfinite(s2) ? s2 - s1 * shift : s2;
  to.var[c] = squares < 0 ? 0.0 : squares / count;
  return std::isfinite(to.mean[c]) && std::isfinite(s2);
}

inline Statistics no_statistics(int64_t C) {
  const std::vector<double> zeros(static_cast<size_t>(C), 0.0);
  return {zeros, zeros};
}

// Statistics of x (N, C, H, W), channels_last, not float64, whose pixels tasks come by piece by
// piece. Each task adds up about a centre of its own, the mean of its first few pixels: near enough
// to the mean for sums in double, and exact for a constant channel.
class RowStatistics {
 public:
  RowStatistics(int64_t C, DtypeIndex dtype, int64_t tasks)
      : C_(C),
        bytes_(dtype == kFloat32 ? 4 : 2),
        dtype_(dtype),
        joined_(rows_joined(C_)),
        tasks_(static_cast<size_t>(tasks)) {}

  // x: the first of `rows` pixels that no task has added before
  void add(int64_t task, const char* x, int64_t rows) {
    if (rows == 0) return;
    Sums& sums = tasks_[task];
    if (sums.rows == 0) start(sums, x, rows);
    sums.rows += rows;
    for_joined_rows(C_, rows, [&](const Walk& walk, int64_t first, int64_t count) {
      cpu_kernels().bn_stats_rows[dtype_](walk, x + first * C_ * bytes_, 0, count,
                                          sums.centre.data(), sums.s1.data(), sums.s2.data());
    });
  }

  // Of all pixels; nothing where squares overflow float32 or a value is no finite number.
  std::optional<Statistics> finish() const {
    Statistics result = no_statistics(C_);
    const Sums* first = nullptr;
    std::vector<double> s1(static_cast<size_t>(C_), 0.0), s2(s1);
    double count = 0;
    for (const Sums& sums : tasks_) {
      if (sums.rows == 0) continue;
      if (!first) first = &sums;
      count += static_cast<double>(sums.rows);
      for (int64_t c = 0; c < C_; ++c) {
        double t1 = 0, t2 = 0;
        for (int64_t j = c; j < C_ * joined_; j += C_) t1 += sums.s1[j], t2 += sums.s2[j];
        const double d = sums.centre[c] - first->centre[c];
        s1[c] += t1 + static_cast<double>(sums.rows) * d;
        s2[c] += t2 + d * (2 * t1 + static_cast<double>(sums.rows) * d);
      }
    }
    if (!first) return result;
    bool finite = true;
    for (int64_t c = 0; c < C_; ++c)
      finite = set_moments(result, c, count, first->centre[c], s1[c], s2[c]) && finite;
    return finite ? std::optional<Statistics>(result) : std::nullopt;
  }

 private:
  struct Sums {
    int64_t rows = 0;
    std::vector<double> centre, s1, s2;  // (joined * C,)
  };

  void start(Sums& sums, const char* x, int64_t rows) const {
    const auto period = static_cast<size_t>(C_ * joined_);
    const int64_t some = std::min(kCentreValues, rows);
    std::vector<double> unused(static_cast<size_t>(C_), 0.0);
    const std::vector<double> zeros(unused);
    sums.centre.assign(period, 0.0), sums.s1.assign(period, 0.0), sums.s2.assign(period, 0.0);
    cpu_kernels().bn_stats_rows_double[dtype_](Walk{C_, 0, 0, 0}, x, 0, some, zeros.data(),
                                               sums.centre.data(), unused.data());
    for (int64_t c = 0; c < C_; ++c) sums.centre[c] /= static_cast<double>(some);
    for (int64_t j = C_; j < C_ * joined_; ++j) sums.centre[j] = sums.centre[j - C_];
  }

  int64_t C_, bytes_;
  DtypeIndex dtype_;
  int64_t joined_;
  std::vector<Sums> tasks_;
};

// Statistics of all of x at a time, and of planes. `twice`: float64, or squares that overflow
// float32, or Inf and NaN in x: two passes in double.
inline Statistics statistics(const Plan& plan, const Tensor& x, DtypeIndex dtype,
                             bool twice = false) {
  const CpuKernels& kernels = cpu_kernels();
  const bool rows = plan.layout.channels_last;
  const int64_t C = plan.layout.C, size = static_cast<int64_t>(x.element_size());
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const double count = static_cast<double>(plan.count);
  Statistics result = no_statistics(C);
  if (plan.count == 0) return result;
  std::array<std::vector<double>, 2> sums;
  const auto& [s1, s2] = sums;
  const auto pass = [&](const std::vector<double>& centre, bool in_double) {
    const std::vector<double> centres = spread<double>(plan, centre);
    const auto kernel = rows        ? kernels.bn_stats_rows_double[dtype]
                        : in_double ? kernels.bn_stats_planes_double[dtype]
                                    : kernels.bn_stats_planes[dtype];
    add_up(plan, sums, [&](const Walk& walk, int64_t first, int64_t begin, int64_t end, auto& own) {
      kernel(walk, x_ptr + first * size, begin, end, centres.data(), own[0], own[1]);
    });
    bool finite = true;
    for (int64_t c = 0; c < C; ++c)
      finite = set_moments(result, c, count, centre[c], s1[c], s2[c]) && finite;
    return finite;
  };
  if (dtype != kFloat64 && !twice && rows) {
    const Split split(plan.count, 1, kSmallestPiece / std::max<int64_t>(C, 1));
    RowStatistics found(C, dtype, split.tasks);
    split.run([&](int64_t task, int64_t begin, int64_t end) {
      found.add(task, x_ptr + begin * C * size, end - begin);
    });
    if (auto done = found.finish()) return *done;
  } else if (dtype != kFloat64 && !twice) {
    // The centre is the mean of each channel's first few values.
    std::vector<double> centre(static_cast<size_t>(C), 0.0);
    std::vector<double> unused(static_cast<size_t>(C), 0.0);
    const std::vector<double> zeros(static_cast<size_t>(C), 0.0);
    const int64_t some = std::min(kCentreValues, plan.layout.HW);
    for (int64_t c = 0; c < C; ++c)
      kernels.bn_stats_rows_double[dtype](Walk{1, 0, 0, 0}, x_ptr + c * plan.layout.HW * size, 0,
                                          some, zeros.data(), &centre[c], &unused[c]);
    for (double& c : centre) c /= static_cast<double>(some);
    if (pass(centre, false)) return result;
  }
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

// A new (rows, C) tensor, float64.
inline Tensor to_rows(const Tensor& x, const std::vector<const std::vector<double>*>& rows,
                      int64_t C) {
  Tensor out =
      torch::stable::new_empty(x, {static_cast<int64_t>(rows.size()), C}, ScalarType::Double);
  auto* p = static_cast<double*>(out.mutable_data_ptr());
  for (const auto* row : rows) p = std::copy(row->begin(), row->end(), p);
  return out;
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

// As reduce_gradient, with dy's pixels as tasks come by piece by piece, masked by the ReLU of what
// `norm` makes of x (N, C, H, W), channels_last, not float64.
class RowGradientSums {
 public:
  RowGradientSums(const Tensor& x, const Norm& norm, int64_t tasks)
      : plan_(layout_of("gradient sums", x)),
        dtype_(dtype_index("gradient sums", "x", x)),
        norm_(norm),
        mean_(spread<float>(plan_, norm.stats.mean)),
        scale_(spread<float>(plan_, affine_of<float>(norm).scale)),
        shift_(spread<float>(plan_, affine_of<float>(norm).shift)),
        x_(static_cast<const char*>(x.const_data_ptr())),
        pixel_bytes_(plan_.layout.C * static_cast<int64_t>(x.element_size())),
        pitch_(2 * plan_.walk.period + 8),  // one cache line between the sums of different tasks
        sums_(static_cast<size_t>(tasks * pitch_), 0.0) {}

  // dy: pixel `begin` of those up to `end`, which no task has added before
  void add(int64_t task, const char* dy, int64_t begin, int64_t end) {
    for_joined_rows(
        plan_.layout.C, end - begin, [&](const Walk& walk, int64_t first, int64_t count) {
          BnBackward bn{};
          bn.walk = walk;
          bn.dy = dy + first * pixel_bytes_;
          bn.x = x_ + (begin + first) * pixel_bytes_;
          bn.mean = mean_.data(), bn.own_scale = scale_.data(), bn.own_shift = shift_.data();
          double* own = sums_.data() + task * pitch_;
          cpu_kernels().bn_reduce_rows[dtype_](bn, 0, count, own, own + plan_.walk.period, nullptr);
        });
  }

  GradientSums finish() const {
    const int64_t C = plan_.layout.C, period = plan_.walk.period;
    GradientSums found;
    for (auto& sum : found) sum.assign(static_cast<size_t>(C), 0.0);
    for (auto own = sums_.begin(); own != sums_.end(); own += pitch_)
      for (int64_t i = 0; i < 2 * period; ++i) found[i / period][i % C] += own[i];
    for (int64_t c = 0; c < C; ++c) found[1][c] -= found[0][c] * norm_.lost<float>(c);
    return found;
  }

 private:
  Plan plan_;
  DtypeIndex dtype_;
  Norm norm_;
  std::vector<float> mean_, scale_, shift_;
  const char* x_;
  int64_t pixel_bytes_, pitch_;
  std::vector<double> sums_;
};

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
