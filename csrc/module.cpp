// The Python module fused_resnet._C: build information, memory pool and settings of the native
// kernels. Importing it registers the ops, which the other files do through the dispatcher; no
// tensor passes through this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/convolution/conv_bn_relu.h"
#include "cpu/convolution/host.h"
#include "cpu/convolution/train.h"
#include "cuda/convolution/tiles.h"
#include "cuda/kernel_list.h"

namespace py = pybind11;

namespace {

// In the order of DtypeIndex.
constexpr const char* kDtypeNames[] = {"float32", "bfloat16", "float16", "float64"};

// kDtypes for any other name
int dtype_index(const std::string& name) {
  int i = 0;
  while (i < fused_resnet::kDtypes && name != kDtypeNames[i]) ++i;
  return i;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cxx_flags"] = FUSED_RESNET_CXX_FLAGS;
  info["torch_version"] = FUSED_RESNET_TORCH;
  info["torch_target_version"] = "2.11";
#if defined(FUSED_RESNET_WITH_CUDA)
  info["cuda_version"] = fused_resnet::cuda_toolkit_version();
  info["cuda_archs"] = FUSED_RESNET_CUDA_ARCHS;
#else
  info["cuda_version"] = py::none();
  info["cuda_archs"] = py::none();
#endif
  info["cpu_isa"] = fused_resnet::cpu_kernels().isa;
  py::list conv_dtypes;
  for (int i = 0; i < fused_resnet::kDtypes; ++i)
    if (fused_resnet::conv_supported(static_cast<fused_resnet::DtypeIndex>(i)))
      conv_dtypes.append(kDtypeNames[i]);
  info["conv_dtypes"] = conv_dtypes;
  info["conv_bfloat16"] = fused_resnet::widens_bfloat16() ? "in float32" : "by dot product";
  return info;
}

py::list cuda_kernels() {
  py::list list;
#if defined(FUSED_RESNET_WITH_CUDA)
  for (const fused_resnet::CudaKernel& kernel : fused_resnet::cuda_kernels()) {
    py::dict entry;
    entry["name"] = kernel.name;
    entry["arch"] = kernel.binary_version < 0 ? py::object(py::str(FUSED_RESNET_CUDA_ARCHS))
                                              : py::object(py::int_(kernel.binary_version));
    entry["registers"] =
        kernel.registers < 0 ? py::object(py::none()) : py::object(py::int_(kernel.registers));
    entry["shared_bytes"] = kernel.shared_bytes < 0 ? py::object(py::none())
                                                    : py::object(py::int_(kernel.shared_bytes));
    list.append(entry);
  }
#endif
  return list;
}

py::list gemm_tiles() {
  py::list list;
  for (const fused_resnet::GemmTile& tile : fused_resnet::kGemmTiles) {
    py::dict entry;
    entry["architecture"] = tile.architecture;
    entry["block_m"] = tile.block_m;
    entry["block_n"] = tile.block_n;
    entry["warps"] = tile.warps;
    entry["stages"] = tile.stages;
    entry["normalises"] = tile.normalises();
    list.append(entry);
  }
  return list;
}

py::dict memory() {
  const fused_resnet::PoolState state = fused_resnet::pool_state();
  py::dict found;
  found["used_bytes"] = state.used_bytes;
  found["free_bytes"] = state.free_bytes;
  found["peak_bytes"] = state.peak_bytes;
  return found;
}

py::dict conv_passes() {
  const fused_resnet::ConvPasses& passes = fused_resnet::conv_passes();
  py::dict found;
  found["convolutions"] = passes.convolutions.load();
  found["input_gradients"] = passes.input_gradients.load();
  found["weight_gradients"] = passes.weight_gradients.load();
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, memory pool and settings of the native kernels.";
  m.def("build_info", &build_info, "Compiler, flags, versions and the CPU instruction set in use.");
  m.def(
      "gemm_tiles", &gemm_tiles,
      "One dict per tile of the CUDA convolutions: architecture, block_m, block_n, warps, stages, "
      "normalises.");
  m.def("memory", &memory,
        "Bytes of the CPU memory pool of training steps: used_bytes, by live tensors; free_bytes; "
        "peak_bytes, the maximum of used_bytes since reset_memory_peak().");
  m.def("reset_memory_peak", &fused_resnet::reset_pool_peak, "Reset peak_bytes to used_bytes.");
  m.def("release_memory", &fused_resnet::release_pool,
        "Return the pool's free memory to the system; returns its size in bytes.");
  m.def(
      "conv_passes", &conv_passes,
      "Numbers of convolutions, input gradients and weight gradients that the CPU training kernels "
      "have run in this process.");
  m.def(
      "convolution_reason",
      [](const std::vector<int64_t>& weight_shape, const std::string& dtype,
         const std::vector<int64_t>& dilation, int64_t groups) -> const char* {
        const int index = dtype_index(dtype);
        if (index == fused_resnet::kDtypes) return "no kernel for this dtype";
        return fused_resnet::convolution_reason(static_cast<fused_resnet::DtypeIndex>(index),
                                                weight_shape, dilation, groups);
      },
      "Why no CPU kernel computes a convolution with weight (K, C / groups, R, S), or None.");
  m.def(
      "training_reason",
      [](const std::string& pass, const std::vector<int64_t>& weight_shape,
         const std::string& dtype, const std::vector<int64_t>& geometry,
         int64_t groups) -> const char* {
        const int index = dtype_index(dtype);
        if (index == fused_resnet::kDtypes) return "no kernel for this dtype";
        const auto which = pass == "convolution"      ? fused_resnet::Pass::kConvolution
                           : pass == "input_gradient" ? fused_resnet::Pass::kInputGradient
                                                      : fused_resnet::Pass::kWeightGradient;
        return fused_resnet::training_reason(which, static_cast<fused_resnet::DtypeIndex>(index),
                                             weight_shape, geometry, groups);
      },
      "Why no CPU kernel computes a pass of a training step (convolution, input_gradient or "
      "weight_gradient) of a convolution with weight (K, C / groups, R, S), or None.");
  m.def("widens_bfloat16", &fused_resnet::widens_bfloat16,
        "Whether bfloat16 convolutions on the CPU are computed in float32 instead of with the "
        "processor's dot product, because that is slower or unavailable.");
  m.def(
      "widen_bfloat16",
      [](const py::object& choice) {
        fused_resnet::widen_bfloat16(choice.is_none() ? -1 : int{choice.cast<bool>()});
      },
      py::arg("choice"),
      "Compute later bfloat16 convolutions in float32 (True), with the dot product if available "
      "(False), or with the faster of the two (None).");
  m.def("cuda_kernels", &cuda_kernels,
        "One dict per CUDA kernel: name, device, arch, registers, shared_bytes. On a machine with "
        "a GPU "
        "this initialises the CUDA runtime.");
}
