// Host code shared by all ops: argument checks, memory layout, dtypes, and (in CUDA files) the
// device guard and launch check. Uses only libtorch's stable ABI.
#pragma once

// libtorch 2.11 is the oldest supported release: a build against it or a later one runs with every
// release from 2.11 on.
#define TORCH_TARGET_VERSION 0x020b000000000000

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "activation.h"

namespace fused_resnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error (RuntimeError in Python) with only the given message: the stable ABI's
// own check puts the C++ file and line before it.
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(!condition, 0)) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline Activation activation_of(const char* op, int64_t value) {
  check(0 <= value && value < kActivations, op, ": activation must be 0 (none) or 1 (ReLU), got ",
        value);
  return static_cast<Activation>(value);
}

// Written only if a message is: a check that holds must not cost one.
struct Listed {
  const Tensor& tensor;
  int64_t (Tensor::*value)(int64_t) const;
};

inline std::ostream& operator<<(std::ostream& out, const Listed& of) {
  out << '(';
  for (int64_t d = 0; d < of.tensor.dim(); ++d) out << (d ? ", " : "") << (of.tensor.*of.value)(d);
  return out << (of.tensor.dim() == 1 ? ",)" : ")");
}

inline Listed shape_of(const Tensor& t) { return {t, &Tensor::size}; }
inline Listed strides_of(const Tensor& t) { return {t, &Tensor::stride}; }

inline const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// The column of a kernel table (cpu/isa/kernels.h), and the index of a dtype switch in CUDA code.
enum DtypeIndex : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kDtypes = 4;

inline DtypeIndex dtype_index(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      check(false, op, ": ", argument, " must be float32, bfloat16, float16 or float64, got ",
            name_of(t.scalar_type()));
      return kFloat32;
  }
}

// True if the elements fill one range of memory without gaps, in any order of the dimensions.
inline bool is_dense(const Tensor& t) {
  std::vector<std::array<int64_t, 2>> dims;  // (stride, size), innermost first
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return true;
    if (t.size(d) > 1) dims.push_back({t.stride(d), t.size(d)});
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Checks that `t` has the reference's shape, dtype, device and strides, so that one flat index
// addresses both. Strides of dimensions of size 1 are meaningless and not compared.
inline void check_same_layout(const char* op, const char* argument, const Tensor& t,
                              const char* reference_name, const Tensor& reference) {
  check(t.scalar_type() == reference.scalar_type(), op, ": ", argument, " must have ",
        reference_name, "'s dtype ", name_of(reference.scalar_type()), ", got ",
        name_of(t.scalar_type()));
  bool same_shape = t.dim() == reference.dim();
  for (int64_t d = 0; same_shape && d < t.dim(); ++d) same_shape = t.size(d) == reference.size(d);
  check(same_shape, op, ": ", argument, " must have ", reference_name, "'s shape ",
        shape_of(reference), ", got ", shape_of(t));
  check(t.is_cuda() == reference.is_cuda() && t.is_cpu() == reference.is_cpu() &&
            t.get_device_index() == reference.get_device_index(),
        op, ": ", argument, " must be on ", reference_name, "'s device");
  bool same_strides = true;
  for (int64_t d = 0; t.numel() > 0 && d < t.dim(); ++d)
    same_strides &= t.size(d) <= 1 || t.stride(d) == reference.stride(d);
  check(same_strides, op, ": ", argument, " must have ", reference_name, "'s strides ",
        strides_of(reference), ", got ", strides_of(t));
}

inline void check_dense(const char* op, const char* argument, const Tensor& t) {
  check(is_dense(t), op, ": ", argument,
        " must be dense (contiguous or channels_last), got strides ", strides_of(t), " for shape ",
        shape_of(t));
}

// A per-channel vector: contiguous, (C,), float32 (float64 for float64 data).
inline void check_channel_vector(const char* op, const char* argument, const Tensor& t, int64_t C,
                                 ScalarType dtype, const Tensor& x) {
  check(t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == C, op, ": ", argument, " must be ",
        name_of(dtype), " of shape (", C, ",), got ", name_of(t.scalar_type()), " of shape ",
        shape_of(t));
  check(C <= 1 || t.stride(0) == 1, op, ": ", argument, " must be contiguous, got stride ",
        t.stride(0));
  check(t.is_cuda() == x.is_cuda() && t.is_cpu() == x.is_cpu() &&
            t.get_device_index() == x.get_device_index(),
        op, ": ", argument, " must be on x's device");
}

// How a kernel iterates over a dense (N, C, H, W) tensor:
//   channels_last: rows of C values, N*H*W of them;
//   contiguous: planes of H*W values, N*C of them, the channel changing from plane to plane.
struct Layout4d {
  int64_t N, C, HW;
  bool channels_last;
};

inline Layout4d layout_of(const char* op, const Tensor& x) {
  check(x.dim() == 4, op, ": x must have shape (N, C, H, W), got ", shape_of(x));
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const auto strides_are = [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    return (N <= 1 || x.stride(0) == n) && (C <= 1 || x.stride(1) == c) &&
           (H <= 1 || x.stride(2) == h) && (W <= 1 || x.stride(3) == w);
  };
  const bool empty = x.numel() == 0;
  const bool rows = empty || strides_are(C * H * W, 1, W * C, C);
  const bool planes = empty || strides_are(C * H * W, H * W, W, 1);
  check(rows || planes, op, ": x must be contiguous or channels_last, got strides ", strides_of(x),
        " for shape ", shape_of(x));
  // One channel matches both: long planes vectorise, rows of one value do not.
  return {N, C, H * W, rows && !(planes && C == 1)};
}

// Writing newly mapped memory costs page faults: writing 100 MB through 4 KiB pages takes several
// times as long as the arithmetic of a fused kernel. glibc maps every allocation above 32 MiB anew,
// so request huge pages there, where the system allows it (transparent_hugepage=madvise), for the
// part of the output that fills them: bn_add_relu forward and backward at (32, 256, 56, 56) float32
// takes 0.28 of the time. Smaller blocks come from the heap with their pages mapped, and the advice
// costs more than it saves (1.1 to 1.3 of the time at 26 MB).
inline void advise_huge_pages(const Tensor& output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t mmap_threshold_bytes = int64_t{1} << 25;
  constexpr uintptr_t huge_page_bytes = uintptr_t{1} << 21;
  if (bytes < mmap_threshold_bytes) return;
  const auto begin = reinterpret_cast<uintptr_t>(output.data_ptr());
  const uintptr_t first = (begin + huge_page_bytes - 1) & ~(huge_page_bytes - 1);
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~(huge_page_bytes - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)output;
  (void)bytes;
#endif
}

constexpr int64_t kLineBytes = 64;

// Whether to write an output with non-temporal stores: if it is too large to still be in the caches
// when it is read, and starts on a cache line. A regular store reads the line that it overwrites
// first.
inline bool use_streaming_stores(const void* p, int64_t bytes) {
  constexpr int64_t large_bytes = int64_t{1} << 24;
  return p && bytes >= large_bytes && reinterpret_cast<uintptr_t>(p) % kLineBytes == 0;
}

// An uninitialised CPU tensor with x's shape, strides and dtype.
inline Tensor empty_output_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
  if (y.is_cpu()) advise_huge_pages(y, y.numel() * static_cast<int64_t>(y.element_size()));
  return y;
}

// The same of shape (N, C, H, W), channels_last, with x's dtype.
inline Tensor empty_channels_last(const Tensor& x, int64_t N, int64_t C, int64_t H, int64_t W) {
  Tensor y = torch::stable::empty({N, C, H, W}, x.scalar_type(), std::nullopt, x.device(),
                                  std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  advise_huge_pages(y, y.numel() * static_cast<int64_t>(y.element_size()));
  return y;
}

}  // namespace fused_resnet
