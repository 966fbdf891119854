// Host code of training batch norm on the CPU: partitioning a tensor for threads, statistics, and
// the per-channel arithmetic between the passes of cpu/batch_norm/bn_add_relu_kernels.h.
#pragma once

#include <cmath>
#include <numeric>

#include "common.h"
#include "cpu/isa/kernels.h"
#include "cpu/threads.h"

namespace fused_resnet {

constexpr int64_t kMinTaskElements = 16384;  // elements that justify another task
constexpr int64_t kSegment = 2048;           // elements of a plane added up in float32 at a time
constexpr int64_t kCentreValues = 16;        // values per channel averaged for the first centre
constexpr int64_t kPadding = 16;             // lanes of the widest vector
constexpr int64_t kShortRow = 256;           // rows shorter than this are joined into longer ones

// How many rows of C values are processed as one. Short rows are joined into longer ones that are a
// multiple of a vector, as if there were that many times as many channels: no lanes idle, and
// consecutive additions go to different sums.
inline int64_t rows_joined(int64_t C) {
  const int64_t whole = kPadding / std::gcd(std::max<int64_t>(C, 1), kPadding);
  return C > 0 && C < kShortRow ? (kShortRow / C + whole - 1) / whole * whole : 1;
}

// body(walk, count) over `rows` rows of C values: joined rows, then the remainder as one shorter
// row.
template <typename Body>
void for_joined_rows(int64_t C, int64_t rows, const Body& body) {
  const int64_t joined = rows_joined(C), whole = rows / joined, rest = rows % joined;
  if (whole > 0) body(Walk{.period = C * joined}, whole);
  if (rest > 0) body(Walk{.period = C * rest, .first = whole * joined * C}, int64_t{1});
}

// Partition of a tensor into items for threads: rows, or segments of planes.
struct Partition {
  Layout4d layout;
  Walk walk;
  int64_t items;     // whole rows (or joined rows), or segments
  int64_t leftover;  // rows that did not fill the last joined row
  int64_t count;     // values per channel

  explicit Partition(const Layout4d& layout) : layout(layout), walk{}, items(0), leftover(0) {
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
    return Split(items, 1, kMinTaskElements / std::max<int64_t>(item_elements(), 1));
  }
  // Whether every item starts on a cache line when the tensor does.
  bool items_are_lines(int64_t element_bytes) const {
    return item_elements() * element_bytes % kLineBytes == 0 &&
           (layout.channels_last || walk.plane * element_bytes % kLineBytes == 0);
  }

  // body(walk, begin, end, task) over all items, then over the leftover rows, which form one
  // shorter row.
  template <typename Body>
  void run(const Split& split, const Body& body) const {
    split.run([&](int64_t task, int64_t begin, int64_t end) { body(walk, begin, end, task); });
    if (leftover > 0)
      body(Walk{.period = leftover * layout.C, .first = items * walk.period}, 0, 1, 0);
  }
};

// A per-channel array as the kernels read it: repeated for joined rows, padded with zeros.
template <typename A>
std::vector<A> spread(const Partition& partition, const std::vector<double>& channels) {
  std::vector<A> out(static_cast<size_t>(partition.walk.period + kPadding), A{0});
  for (int64_t j = 0; j < partition.walk.period; ++j)
    out[j] = static_cast<A>(channels[j % partition.layout.C]);
  return out;
}

// n per-channel sums: kernel(walk, begin, end, task_sums) runs on every range of items. Each task
// adds to its own arrays, which are added up in the order of the tasks.
template <size_t n, typename Kernel>
void sum_over_tasks(const Partition& partition, std::array<std::vector<double>, n>& sums,
                    const Kernel& kernel) {
  const Split split = partition.split();
  const int64_t period = partition.walk.period, C = partition.layout.C;
  // One cache line between the arrays of different tasks.
  const int64_t pitch = static_cast<int64_t>(n) * period + 8;
  std::vector<double> partial(static_cast<size_t>(std::max<int64_t>(split.tasks, 1) * pitch), 0.0);
  partition.run(split, [&](const Walk& walk, int64_t begin, int64_t end, int64_t task) {
    std::array<double*, n> task_sums;
    for (size_t i = 0; i < n; ++i)
      task_sums[i] = partial.data() + task * pitch + static_cast<int64_t>(i) * period;
    kernel(walk, begin, end, task_sums);
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

// Sets mean and variance of channel c from `count` values with s1 = sum(x - centre) and s2 = sum((x
// - centre)^2); false if they are non-finite.
inline bool set_moments(Statistics& to, int64_t c, double count, double centre, double s1,
                        double s2) {
  const double shift = s1 / count;
  to.mean[c] = centre + shift;
  // An infinite sum of squares stays infinite instead of Inf - Inf.
  const double squares = std::isfinite(s2) ? s2 - s1 * shift : s2;
  to.var[c] = squares < 0 ? 0.0 : squares / count;
  return std::isfinite(to.mean[c]) && std::isfinite(s2);
}

inline Statistics zero_statistics(int64_t C) {
  const std::vector<double> zeros(static_cast<size_t>(C), 0.0);
  return {zeros, zeros};
}

// Statistics of x (N, C, H, W), channels_last, not float64, accumulated over ranges of pixels by
// several tasks. Each task uses a centre of its own, the mean of its first few pixels: near enough
// to the mean for sums in double, and exact for a constant channel.
class RowStatistics {
 public:
  RowStatistics(int64_t C, DtypeIndex dtype, int64_t tasks)
      : C_(C), dtype_(dtype), joined_(rows_joined(C_)), tasks_(static_cast<size_t>(tasks)) {}

  // Adds `rows` pixels, the first of which is at x. Every pixel is added once, by one task.
  void add(int64_t task, const char* x, int64_t rows) {
    if (rows == 0) return;
    Sums& sums = tasks_[task];
    if (sums.rows == 0) start(sums, x, rows);
    sums.rows += rows;
    for_joined_rows(C_, rows, [&](const Walk& walk, int64_t count) {
      cpu_kernels().bn_stats_rows[dtype_](walk, x, 0, count, sums.centre.data(), sums.s1.data(),
                                          sums.s2.data());
    });
  }

  // Statistics of all pixels; nullopt if squares overflow float32 or a value is non-finite.
  std::optional<Statistics> finish() const {
    Statistics result = zero_statistics(C_);
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
    const int64_t samples = std::min(kCentreValues, rows);
    std::vector<double> unused(static_cast<size_t>(C_), 0.0);
    const std::vector<double> zeros(unused);
    sums.centre.assign(period, 0.0), sums.s1.assign(period, 0.0), sums.s2.assign(period, 0.0);
    cpu_kernels().bn_stats_rows_double[dtype_](Walk{.period = C_}, x, 0, samples, zeros.data(),
                                               sums.centre.data(), unused.data());
    for (int64_t c = 0; c < C_; ++c) sums.centre[c] /= static_cast<double>(samples);
    for (int64_t j = C_; j < C_ * joined_; ++j) sums.centre[j] = sums.centre[j - C_];
  }

  int64_t C_;
  DtypeIndex dtype_;
  int64_t joined_;
  std::vector<Sums> tasks_;
};

// Statistics of a whole tensor, channels_last or contiguous. Two passes in double for float64, if
// squares overflow float32, or with Inf or NaN in x.
inline Statistics statistics(const Partition& partition, const Tensor& x, DtypeIndex dtype) {
  const CpuKernels& kernels = cpu_kernels();
  const bool rows = partition.layout.channels_last;
  const int64_t C = partition.layout.C, size = static_cast<int64_t>(x.element_size());
  const auto* x_ptr = static_cast<const char*>(x.const_data_ptr());
  const double count = static_cast<double>(partition.count);
  Statistics result = zero_statistics(C);
  if (partition.count == 0) return result;
  std::array<std::vector<double>, 2> sums;
  const auto& [s1, s2] = sums;
  const auto pass = [&](const std::vector<double>& centre, bool in_double) {
    const std::vector<double> centres = spread<double>(partition, centre);
    const auto kernel = rows        ? kernels.bn_stats_rows_double[dtype]
                        : in_double ? kernels.bn_stats_planes_double[dtype]
                                    : kernels.bn_stats_planes[dtype];
    sum_over_tasks(partition, sums,
                   [&](const Walk& walk, int64_t begin, int64_t end, auto& task_sums) {
                     kernel(walk, x_ptr, begin, end, centres.data(), task_sums[0], task_sums[1]);
                   });
    bool finite = true;
    for (int64_t c = 0; c < C; ++c)
      finite = set_moments(result, c, count, centre[c], s1[c], s2[c]) && finite;
    return finite;
  };
  const std::vector<double> zeros(static_cast<size_t>(C), 0.0);
  if (dtype != kFloat64 && rows) {
    const Split split(partition.count, 1, kMinTaskElements / std::max<int64_t>(C, 1));
    RowStatistics found(C, dtype, split.tasks);
    split.run([&](int64_t task, int64_t begin, int64_t end) {
      found.add(task, x_ptr + begin * C * size, end - begin);
    });
    if (auto done = found.finish()) return *done;
  } else if (dtype != kFloat64) {
    // The centre is the mean of each channel's first few values.
    std::vector<double> centre(zeros), unused(zeros);
    const int64_t samples = std::min(kCentreValues, partition.layout.HW);
    for (int64_t c = 0; c < C; ++c)
      kernels.bn_stats_rows_double[dtype](Walk{.period = 1}, x_ptr + c * partition.layout.HW * size,
                                          0, samples, zeros.data(), &centre[c], &unused[c]);
    for (double& c : centre) c /= static_cast<double>(samples);
    if (pass(centre, false)) return result;
  }
  pass(zeros, true);
  const Statistics first = result;
  pass(first.mean, true);
  for (int64_t c = 0; c < C; ++c)
    if (!std::isfinite(first.mean[c])) result.mean[c] = first.mean[c];
  return result;
}

// A new (C,) tensor, float32 (float64 for float64 data), holding `values`.
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

// A batch norm: y = (x - mean) * weight / sqrt(var + eps) + bias, all (C,).
struct Norm {
  Statistics stats;
  std::vector<double> weight, bias;
  double eps;

  double invstd(int64_t c) const { return 1.0 / std::sqrt(stats.var[c] + eps); }
  // The mean minus the mean rounded to A; 0 if non-finite.
  template <typename A>
  double rounding_error(int64_t c) const {
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
    // The kernels subtract the mean rounded to A; this corrects for the rounding.
    affine.shift[c] -= norm.rounding_error<A>(static_cast<int64_t>(c)) * affine.scale[c];
  }
  return affine;
}

// y = activation(norm(x) + residual), with `residual_norm` activation(norm(x) +
// residual_norm(residual))
template <typename A>
void apply_norm(const Partition& partition, DtypeIndex dtype, const Tensor& x, const Norm& norm,
                const std::optional<Tensor>& residual, const Norm* residual_norm,
                Activation activation, Tensor& y) {
  const int64_t C = partition.layout.C, size = static_cast<int64_t>(x.element_size());
  if (x.numel() == 0) return;
  auto [scale, shift] = affine_of<A>(norm);
  std::vector<double> scale2;
  if (residual_norm) {
    const Affine other = affine_of<A>(*residual_norm);
    scale2 = other.scale;
    for (int64_t c = 0; c < C; ++c) shift[c] += other.shift[c];
  }
  const auto means = spread<A>(partition, norm.stats.mean);
  const auto scales = spread<A>(partition, scale), shifts = spread<A>(partition, shift);
  std::vector<A> means2, scales2;
  if (residual_norm) {
    means2 = spread<A>(partition, residual_norm->stats.mean);
    scales2 = spread<A>(partition, scale2);
  }
  void* y_ptr = y.mutable_data_ptr();
  const bool stream =
      partition.items_are_lines(size) && use_streaming_stores(y_ptr, x.numel() * size);
  const CpuKernels& kernels = cpu_kernels();
  const auto kernel =
      (partition.layout.channels_last ? kernels.bn_apply_rows : kernels.bn_apply_planes)[dtype];
  partition.run(partition.split(), [&](const Walk& walk, int64_t begin, int64_t end, int64_t) {
    kernel({walk, x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr, y_ptr,
            means.data(), scales.data(), shifts.data(), residual_norm ? means2.data() : nullptr,
            residual_norm ? scales2.data() : nullptr, activation, stream},
           begin, end);
  });
}

// Mask of dy: none, the ReLU's output y (N, C, H, W), or `affine`, from which the kernels recompute
// that output from x.
struct Mask {
  std::optional<Tensor> y;
  const Affine* affine = nullptr;
};

// What the backward passes share: dy, its mask, x and its mean, and the output, which may be null.
template <typename A>
struct Backward : BnBackward {
  std::vector<A> means, mask_scales, mask_shifts;

  Backward(const Partition& partition, const Tensor& dy_, const Mask& mask, const Tensor& x_,
           const Statistics& stats, const void* output)
      : BnBackward{}, means(spread<A>(partition, stats.mean)) {
    const int64_t size = static_cast<int64_t>(x_.element_size());
    dy = dy_.const_data_ptr(), x = x_.const_data_ptr(), mean = means.data();
    if (mask.y) y = mask.y->const_data_ptr();
    if (mask.affine) {
      mask_scales = spread<A>(partition, mask.affine->scale);
      mask_shifts = spread<A>(partition, mask.affine->shift);
      mask_scale = mask_scales.data(), mask_shift = mask_shifts.data();
    }
    stream = partition.items_are_lines(size) && use_streaming_stores(output, x_.numel() * size);
  }
  BnBackward on(const Walk& part) const {
    BnBackward bn = *this;
    bn.walk = part;
    return bn;
  }
};

// With g = masked dy: sum g, sum g * (x - mean) and, with another normalised tensor x2, sum g * (x2
// - mean2), each (C,). g is written to `masked` if given.
using GradientSums = std::array<std::vector<double>, 3>;
template <typename A>
GradientSums reduce_gradient(const Partition& partition, DtypeIndex dtype, const Tensor& dy,
                             const Mask& mask, const Tensor& x, const Statistics& stats,
                             const std::optional<Tensor>& x2, const Statistics* stats2,
                             Tensor* masked) {
  GradientSums sums;
  for (auto& s : sums) s.assign(static_cast<size_t>(partition.layout.C), 0.0);
  if (x.numel() == 0) return sums;
  void* g = masked ? masked->mutable_data_ptr() : nullptr;
  Backward<A> bn(partition, dy, mask, x, stats, g);
  const auto means2 = x2 ? spread<A>(partition, stats2->mean) : std::vector<A>{};
  if (x2) bn.x2 = x2->const_data_ptr(), bn.mean2 = means2.data();
  bn.dresidual = g;
  const CpuKernels& kernels = cpu_kernels();
  const auto reduce =
      (partition.layout.channels_last ? kernels.bn_reduce_rows : kernels.bn_reduce_planes)[dtype];
  sum_over_tasks(partition, sums,
                 [&](const Walk& walk, int64_t begin, int64_t end, auto& task_sums) {
                   reduce(bn.on(walk), begin, end, task_sums[0], task_sums[1], task_sums[2]);
                 });
  return sums;
}

// x (N, C, H, W), channels_last, not float64, of which ranges of pixels are normalised.
struct NormedRows {
  Partition partition;
  DtypeIndex dtype;
  std::vector<float> mean, scale, shift;
  const char* x;
  int64_t pixel_bytes;

  NormedRows(const Tensor& t, const Norm& norm)
      : partition(layout_of("normalised", t)),
        dtype(dtype_index("normalised", "x", t)),
        mean(spread<float>(partition, norm.stats.mean)),
        scale(spread<float>(partition, affine_of<float>(norm).scale)),
        shift(spread<float>(partition, affine_of<float>(norm).shift)),
        x(static_cast<const char*>(t.const_data_ptr())),
        pixel_bytes(partition.layout.C * static_cast<int64_t>(t.element_size())) {}
};

// reduce_gradient accumulated over ranges of dy's pixels by several tasks, with dy masked by
// relu(norm(x)).
class RowGradientSums : NormedRows {
 public:
  RowGradientSums(const Tensor& x, const Norm& norm, int64_t tasks)
      : NormedRows(x, norm),
        norm_(norm),
        pitch_(2 * partition.walk.period + 8),  // one cache line between tasks
        sums_(static_cast<size_t>(tasks * pitch_), 0.0) {}

  // Adds pixels [begin, end), the first of which is at dy. Every pixel is added once, by one task.
  void add(int64_t task, const char* dy, int64_t begin, int64_t end) {
    BnBackward bn{};
    bn.dy = dy, bn.x = x + begin * pixel_bytes;
    bn.mean = mean.data(), bn.mask_scale = scale.data(), bn.mask_shift = shift.data();
    double* task_sums = sums_.data() + task * pitch_;
    for_joined_rows(partition.layout.C, end - begin, [&](const Walk& walk, int64_t count) {
      bn.walk = walk;
      cpu_kernels().bn_reduce_rows[dtype](bn, 0, count, task_sums,
                                          task_sums + partition.walk.period, nullptr);
    });
  }

  GradientSums finish() const {
    const int64_t C = partition.layout.C, period = partition.walk.period;
    GradientSums found;
    for (auto& sum : found) sum.assign(static_cast<size_t>(C), 0.0);
    for (auto task_sums = sums_.begin(); task_sums != sums_.end(); task_sums += pitch_)
      for (int64_t i = 0; i < 2 * period; ++i) found[i / period][i % C] += task_sums[i];
    for (int64_t c = 0; c < C; ++c) found[1][c] -= found[0][c] * norm_.rounding_error<float>(c);
    return found;
  }

 private:
  Norm norm_;
  int64_t pitch_;
  std::vector<double> sums_;
};

// dx = scale * ((g - sum_g / count) - (x - mean) * invstd^2 * sum_gx / count), scale = weight *
// invstd, g = masked dy; the sums are over all `count` values of a channel, in all processes.
template <typename A>
void apply_gradient(const Partition& partition, DtypeIndex dtype, const Tensor& dy,
                    const Mask& mask, const Tensor& x, const Norm& norm,
                    const std::vector<double>& sum_g, const std::vector<double>& sum_gx,
                    double count, Tensor& dx) {
  const int64_t C = partition.layout.C;
  if (x.numel() == 0) return;
  std::vector<double> g_mean(sum_g), slope(sum_g), scale(sum_g);
  for (int64_t c = 0; c < C; ++c) {
    const double invstd = norm.invstd(c);
    slope[c] = invstd * invstd * sum_gx[c] / count;
    g_mean[c] = sum_g[c] / count - slope[c] * norm.rounding_error<A>(c);
    scale[c] = norm.weight[c] * invstd;
  }
  const auto g_means = spread<A>(partition, g_mean), slopes = spread<A>(partition, slope);
  const auto scales = spread<A>(partition, scale);
  Backward<A> bn(partition, dy, mask, x, norm.stats, dx.const_data_ptr());
  bn.dx = dx.mutable_data_ptr(), bn.scale = scales.data();
  bn.g_mean = g_means.data(), bn.slope = slopes.data();
  const CpuKernels& kernels = cpu_kernels();
  const auto kernel = (partition.layout.channels_last ? kernels.bn_backward_rows
                                                      : kernels.bn_backward_planes)[dtype];
  partition.run(partition.split(), [&](const Walk& walk, int64_t begin, int64_t end, int64_t) {
    kernel(bn.on(walk), begin, end);
  });
}

inline ScalarType statistics_dtype(DtypeIndex dtype) {
  return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
}

}  // namespace fused_resnet
