// One vector of the instruction set being compiled for, and one struct per dtype that loads and
// stores it: FR_VECTOR_BYTES wide, GCC and Clang vector extensions, arithmetic in float (double for
// float64 data). Included inside the instruction set's namespace, so that builds of one function do
// not collide at link time; for the same reason it includes nothing and uses no std:: templates.
//
// A dtype struct D has: T, the type in memory; A, the type of the arithmetic; V, a vector of A;
// lanes; load/store of one vector at any alignment, stream (an aligned non-temporal store), load_n
// and store_n of the first n lanes, and the scalar pair get/put.
#pragma once

#define FR_INLINE static inline __attribute__((always_inline))
#define FR_LAMBDA __attribute__((always_inline))

typedef float vf __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(FR_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(FR_VECTOR_BYTES / 2)));

template <typename V>
FR_INLINE V load_any(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V>
FR_INLINE void store_any(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// A non-temporal store, which does not read the line it overwrites; p aligned to sizeof(V).
template <typename V>
FR_INLINE void stream_any(void* p, V v) {
#if defined(__x86_64__)
#if FR_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if FR_VECTOR_BYTES >= 32
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
  store_any(p, v);
}

FR_INLINE vf float16_to_float(vh h) {
#if FR_VECTOR_BYTES == 64 && defined(__x86_64__)
  return (vf)_mm512_maskz_cvtph_ps((__mmask16)-1, (__m256i)h);
#elif FR_VECTOR_BYTES == 32 && defined(__x86_64__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vu bits = __builtin_convertvector(h, vu);
  const vu magnitude = (bits & 0x7fffu) << 13;
  const vu exponent = magnitude & 0x0f800000u;
  const vu rebased = magnitude + 0x38000000u;  // exponent bias 15 -> 127
  const vu special = rebased + 0x38000000u;    // Inf and NaN keep a full exponent
  const vf tiny = (vf)(rebased + 0x00800000u) - (vf)(vu{} + 0x38800000u);  // subnormals
  vu out = exponent == 0x0f800000u ? special : rebased;
  out = exponent == 0u ? (vu)tiny : out;
  return (vf)(out | ((bits & 0x8000u) << 16));
#endif
}

// Round to nearest even; NaN stays NaN, overflow becomes Inf.
FR_INLINE vh float_to_float16(vf x) {
#if FR_VECTOR_BYTES == 64 && defined(__x86_64__)
  return (vh)_mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)x,
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FR_VECTOR_BYTES == 32 && defined(__x86_64__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu bits = (vu)x, magnitude = bits & 0x7fffffffu;
  const vu normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal's rounded bits at the bottom of the significand.
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  const vu nan_or_inf = (vu)(magnitude > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u);
  vu out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x47800000u ? nan_or_inf : out;
  return __builtin_convertvector(out | ((bits >> 16) & 0x8000u), vh);
#endif
}

FR_INLINE vf bfloat16_to_float(vh b) { return (vf)(__builtin_convertvector(b, vu) << 16); }

// Round to nearest even; NaN stays NaN.
FR_INLINE vh float_to_bfloat16(vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((vu)(x != x ? quiet : rounded), vh);
}

// load_n, store_n and the scalar accessors, from a dtype's load and store.
template <typename D, typename T_, typename A_, typename V_>
struct Dtype {
  typedef T_ T;
  typedef A_ A;
  typedef V_ V;
  static constexpr int lanes = FR_VECTOR_BYTES / sizeof(A);
  static constexpr float zero = 0;  // the largest value of A that is stored as 0

  FR_INLINE V load_n(const T* p, int64_t n) {
    T buffer[lanes] = {};
    __builtin_memcpy(buffer, p, static_cast<uint64_t>(n) * sizeof(T));
    return D::load(buffer);
  }
  FR_INLINE void store_n(T* p, V v, int64_t n) {
    T buffer[lanes];
    D::store(buffer, v);
    __builtin_memcpy(p, buffer, static_cast<uint64_t>(n) * sizeof(T));
  }
  FR_INLINE A get(const T* p) { return D::load_n(p, 1)[0]; }
  FR_INLINE V splat(A a) { return a - V{}; }
};

struct Float32 : Dtype<Float32, float, float, vf> {
  FR_INLINE float get(const float* p) { return *p; }
  FR_INLINE vf load(const float* p) { return load_any<vf>(p); }
  FR_INLINE void store(float* p, vf v) { store_any(p, v); }
  FR_INLINE void stream(float* p, vf v) { stream_any(p, v); }
};

struct Float64 : Dtype<Float64, double, double, vd> {
  FR_INLINE double get(const double* p) { return *p; }
  FR_INLINE vd load(const double* p) { return load_any<vd>(p); }
  FR_INLINE void store(double* p, vd v) { store_any(p, v); }
  FR_INLINE void stream(double* p, vd v) { stream_any(p, v); }
};

struct BFloat16 : Dtype<BFloat16, uint16_t, float, vf> {
  static constexpr float zero = 0x1p-134f;
  FR_INLINE float get(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof(value));
    return value;
  }
  FR_INLINE vf load(const uint16_t* p) { return bfloat16_to_float(load_any<vh>(p)); }
  FR_INLINE void store(uint16_t* p, vf v) { store_any(p, float_to_bfloat16(v)); }
  FR_INLINE void stream(uint16_t* p, vf v) { stream_any(p, float_to_bfloat16(v)); }
};

struct Float16 : Dtype<Float16, uint16_t, float, vf> {
  static constexpr float zero = 0x1p-25f;
  FR_INLINE vf load(const uint16_t* p) { return float16_to_float(load_any<vh>(p)); }
  FR_INLINE void store(uint16_t* p, vf v) { store_any(p, float_to_float16(v)); }
  FR_INLINE void stream(uint16_t* p, vf v) { stream_any(p, float_to_float16(v)); }
};

// max(v, 0) that passes NaN and -0.0, as torch's relu does.
template <typename V>
FR_INLINE V relu_of(V v) {
  return v < 0 ? V{} : v;
}
#if defined(__x86_64__)
// One instruction instead of two: its second operand is the result if either is NaN or both are 0.
FR_INLINE vf relu_of(vf v) {
  vf result;
  asm("vmaxps %2, %1, %0" : "=v"(result) : "v"(vf{}), "v"(v));
  return result;
}
#endif

template <typename V>
FR_INLINE V activated(Activation activation, V v) {
  return activation == kRelu ? relu_of(v) : v;
}

FR_INLINE bool has_nan(vf v) {
  const vi nan_lanes = v != v;
  int32_t any = 0;
  for (int lane = 0; lane < FR_VECTOR_BYTES / 4; ++lane) any |= nan_lanes[lane];
  return any != 0;
}

// dy unless y, the ReLU's output, is at most `zero`; a NaN in y passes dy, as in torch's
// threshold_backward. y in the arithmetic's dtype: `zero` is D::zero.
template <typename V>
FR_INLINE V masked_by(V dy, V y, float zero = 0) {
#if defined(__x86_64__)
  // Keeps dy in its own register. Merged into one masked load, dy would be loaded only after y has
  // arrived from memory, and memory-bound kernels took 1.5 times as long.
  asm("" : "+v"(dy));
#endif
  return y <= zero ? V{} : dy;
}

template <typename D>
FR_INLINE double sum_lanes(typename D::V v) {
  double sum[D::lanes];
  for (int i = 0; i < D::lanes; ++i) sum[i] = v[i];
  for (int half = D::lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
  return sum[0];
}

// The two access modes of a kernel: a whole vector, or the first n lanes of one.
template <typename D>
struct FullVector {
  static constexpr int64_t n = D::lanes;
  FR_INLINE typename D::V load(const typename D::T* p) { return D::load(p); }
  FR_INLINE typename D::V keep(typename D::V v) { return v; }
  FR_INLINE void store(typename D::T* p, typename D::V v, bool non_temporal) {
    non_temporal ? D::stream(p, v) : D::store(p, v);
  }
};
template <typename D>
struct PartialVector {
  int64_t n;
  inline __attribute__((always_inline)) typename D::V load(const typename D::T* p) const {
    return D::load_n(p, n);  // zeros in the lanes from n on
  }
  inline __attribute__((always_inline)) typename D::V keep(typename D::V v) const {
    for (int i = 0; i < D::lanes; ++i) v[i] = i < n ? v[i] : 0;
    return v;
  }
  inline __attribute__((always_inline)) void store(typename D::T* p, typename D::V v, bool) const {
    D::store_n(p, v, n);
  }
};

// body(j, memory) for every vector of [0, n): FullVector, then PartialVector for the remainder.
template <typename D, typename Body>
FR_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + D::lanes <= n; j += D::lanes) body(j, FullVector<D>{});
  if (j < n) body(j, PartialVector<D>{n - j});
}

template <int n>
struct Group {
  static constexpr int count = n;  // of vectors
};

// body(j, memory, group): the same in groups of four vectors, then of one.
template <typename D, typename Body>
FR_INLINE void for_groups(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + 4 * D::lanes <= n; j += 4 * D::lanes) body(j, FullVector<D>{}, Group<4>{});
  for (; j + D::lanes <= n; j += D::lanes) body(j, FullVector<D>{}, Group<1>{});
  if (j < n) body(j, PartialVector<D>{n - j}, Group<1>{});
}
