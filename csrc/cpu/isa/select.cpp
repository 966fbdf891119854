// Selects the build of the CPU kernels for this processor.
#include <stdlib.h>
#include <string.h>

#include "cpu/isa/kernels.h"

namespace fused_resnet {

namespace generic {
extern const CpuKernels kernels;
}

#if defined(__x86_64__)
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
#endif

// Follows PyTorch's ATEN_CPU_CAPABILITY: default or avx2 disables wider vectors.
const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const char* limit = getenv("ATEN_CPU_CAPABILITY");
    if (limit && strcmp(limit, "default") == 0) return generic::kernels;
    const bool at_most_avx2 = limit && strcmp(limit, "avx2") == 0;
    if (has_avx2 && has_avx512 && !at_most_avx2) return avx512::kernels;
    if (has_avx2) return avx2::kernels;
#endif
    return generic::kernels;
  }();
  return chosen;
}

}  // namespace fused_resnet
