// The CPU kernels for AVX-512 (Skylake-X, Zen 4 and later).
#if defined(__x86_64__)
#define FR_ISA avx512
#define FR_ISA_NAME "avx512"
#define FR_VECTOR_BYTES 64
#define FR_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#include "cpu/isa/body.h"
#endif
