// The CPU kernels for what every machine of this architecture has (SSE2, NEON).
#define FR_ISA generic
#if defined(__aarch64__)
#define FR_ISA_NAME "neon"
#else
#define FR_ISA_NAME "generic"
#endif
#define FR_VECTOR_BYTES 16
#include "cpu/isa/body.h"
