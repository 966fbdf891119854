// What Python asks of the library beside its ops: its version, what was built, the memory pool,
// settings and reasons. Plain C functions, called by ctypes (fused_resnet/kernels/library.py): the
// library knows nothing of Python, and an answer passes neither the dispatcher nor its modes, which
// would trace, count or fake it as an op. No tensor passes through this file.
#include "cpu/convolution/conv_bn_relu.h"
#include "cpu/convolution/host.h"
#include "cpu/convolution/train.h"
#include "cuda/convolution/tiles.h"
#include "cuda/kernel_list.h"

#define FUSED_RESNET_API extern "C" __attribute__((visibility("default")))

namespace fused_resnet {
namespace {

// In the order of DtypeIndex.
constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16", "float64"};

// kDtypes for any other name
int dtype_named(const std::string& name) {
  int i = 0;
  while (i < kDtypes && name != kDtypeNames[i]) ++i;
  return i;
}

// JSON, as far as facts need it.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

std::string member(const char* name, const std::string& json) { return quoted(name) + ": " + json; }

std::string joined(const std::vector<std::string>& parts, char open, char close) {
  std::string out(1, open);
  for (size_t i = 0; i < parts.size(); ++i) out += (i ? ", " : "") + parts[i];
  return out + close;
}

std::string object(const std::vector<std::string>& members) { return joined(members, '{', '}'); }
std::string list(const std::vector<std::string>& items) { return joined(items, '[', ']'); }

// An answer lives until the thread's next one.
const char* answer(std::string json) {
  thread_local std::string kept;
  kept = std::move(json);
  return kept.c_str();
}

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

std::string build_info() {
  std::vector<std::string> dtypes;
  for (int i = 0; i < kDtypes; ++i)
    if (conv_supported(static_cast<DtypeIndex>(i))) dtypes.push_back(quoted(kDtypeNames[i]));
#if defined(FUSED_RESNET_WITH_CUDA)
  const std::string cuda_version = quoted(cuda_toolkit_version());
  const std::string cuda_archs = quoted(FUSED_RESNET_CUDA_ARCHS);
#else
  const std::string cuda_version = "null", cuda_archs = "null";
#endif
  return object({
      member("version", quoted(FUSED_RESNET_VERSION)),
      member("compiler", quoted(kCompiler)),
      member("cxx_flags", quoted(FUSED_RESNET_CXX_FLAGS)),
      member("torch_version", quoted(FUSED_RESNET_TORCH)),
      member("torch_target_version", quoted("2.11")),
      member("cuda_version", cuda_version),
      member("cuda_archs", cuda_archs),
      member("cpu_isa", quoted(cpu_kernels().isa)),
      member("conv_dtypes", list(dtypes)),
      member("conv_bfloat16", quoted(widens_bfloat16() ? "in float32" : "by dot product")),
  });
}

std::string gemm_tiles() {
  std::vector<std::string> rows;
  for (const GemmTile& tile : kGemmTiles)
    rows.push_back(object({
        member("architecture", std::to_string(tile.architecture)),
        member("block_m", std::to_string(tile.block_m)),
        member("block_n", std::to_string(tile.block_n)),
        member("warps", std::to_string(tile.warps)),
        member("stages", std::to_string(tile.stages)),
        member("normalises", tile.normalises() ? "true" : "false"),
    }));
  return list(rows);
}

// On a machine with a GPU this initialises the CUDA runtime.
std::string kernel_rows() {
  std::vector<std::string> rows;
#if defined(FUSED_RESNET_WITH_CUDA)
  const auto known = [](int value) { return value < 0 ? "null" : std::to_string(value); };
  for (const CudaKernel& kernel : cuda_kernels())
    rows.push_back(object({
        member("name", quoted(kernel.name)),
        member("arch", kernel.binary_version < 0 ? quoted(FUSED_RESNET_CUDA_ARCHS)
                                                 : std::to_string(kernel.binary_version)),
        member("registers", known(kernel.registers)),
        member("shared_bytes", known(kernel.shared_bytes)),
    }));
#endif
  return list(rows);
}

// For users of the ops in C++, and for a second copy of this library, which must not be loaded.
std::string version() { return FUSED_RESNET_VERSION; }

std::vector<int64_t> taken(const int64_t* values, int count) { return {values, values + count}; }

// What `reason` returns; an exception, which must not reach C, is a reason too.
template <typename Reason>
const char* caught(const Reason& reason) {
  try {
    return reason();
  } catch (const std::exception& error) {
    return answer(error.what());
  }
}

}  // namespace
}  // namespace fused_resnet

namespace fr = fused_resnet;

FUSED_RESNET_API const char* fused_resnet_build_info() { return fr::answer(fr::build_info()); }
FUSED_RESNET_API const char* fused_resnet_gemm_tiles() { return fr::answer(fr::gemm_tiles()); }
FUSED_RESNET_API const char* fused_resnet_cuda_kernels() { return fr::answer(fr::kernel_rows()); }

// used_bytes, free_bytes and peak_bytes of the pool of training steps
FUSED_RESNET_API void fused_resnet_memory(int64_t* three) {
  const fr::PoolState state = fr::pool_state();
  three[0] = state.used_bytes, three[1] = state.free_bytes, three[2] = state.peak_bytes;
}
FUSED_RESNET_API void fused_resnet_reset_memory_peak() { fr::reset_pool_peak(); }
FUSED_RESNET_API int64_t fused_resnet_release_memory() { return fr::release_pool(); }

// How many convolutions, input gradients and weight gradients the training kernels have run.
FUSED_RESNET_API void fused_resnet_conv_passes(int64_t* three) {
  const fr::ConvPasses& passes = fr::conv_passes();
  three[0] = passes.convolutions.load();
  three[1] = passes.input_gradients.load();
  three[2] = passes.weight_gradients.load();
}

// weight_shape: K, C / groups, R, S; dilation: height, width. Null where a kernel serves.
FUSED_RESNET_API const char* fused_resnet_convolution_reason(const int64_t* weight_shape,
                                                             const char* dtype,
                                                             const int64_t* dilation,
                                                             int64_t groups) {
  const int index = fr::dtype_named(dtype);
  if (index == fr::kDtypes) return "no kernel for this dtype";
  return fr::caught([&] {
    return fr::convolution_reason(static_cast<fr::DtypeIndex>(index), fr::taken(weight_shape, 4),
                                  fr::taken(dilation, 2), groups);
  });
}

// pass: convolution, input_gradient or weight_gradient; geometry: stride, padding and dilation,
// (height, width) each, and groups. Null where a kernel serves.
FUSED_RESNET_API const char* fused_resnet_training_reason(const char* pass,
                                                          const int64_t* weight_shape,
                                                          const char* dtype,
                                                          const int64_t* geometry) {
  const int index = fr::dtype_named(dtype);
  if (index == fr::kDtypes) return "no kernel for this dtype";
  const std::string name = pass;
  const auto which = name == "convolution"      ? fr::Pass::kConvolution
                     : name == "input_gradient" ? fr::Pass::kInputGradient
                                                : fr::Pass::kWeightGradient;
  return fr::caught([&] {
    return fr::training_reason(which, static_cast<fr::DtypeIndex>(index),
                               fr::taken(weight_shape, 4), fr::taken(geometry, fr::kSizes));
  });
}

FUSED_RESNET_API bool fused_resnet_widens_bfloat16() { return fr::widens_bfloat16(); }

// choice: 1, compute later bfloat16 convolutions in float32; 0, with the dot product if available;
// -1, with the faster of the two
FUSED_RESNET_API void fused_resnet_widen_bfloat16(int choice) { fr::widen_bfloat16(choice); }

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_native, m) { m.def("version() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_native, CompositeExplicitAutograd, m) {
  m.impl("version", TORCH_BOX(fused_resnet::version));
}
