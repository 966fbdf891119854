// The CPU kernels for AVX2 with FMA (Haswell, Zen and later).
#if defined(__x86_64__)
#define FR_ISA avx2
#define FR_ISA_NAME "avx2"
#define FR_VECTOR_BYTES 32
#define FR_TARGET "avx2,fma,f16c"
#include "cpu/isa/body.h"
#endif
