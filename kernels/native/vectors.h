// What a level (one set of instructions) offers: integer vectors of LANES columns, products of bytes, floats.
//
// The compiler's flags pick the level (see native_build.py): AMX and AVX-512 VNNI, AVX-VNNI, AVX2, NEON with dot products, or,
// without any of these, plain C++ that compilers vectorize as they can.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")  // else sums are in memory

enum class Kind { F32, BF16, F16 };

static inline float from_bf16(uint16_t v) {
  uint32_t u = (uint32_t)v << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline float from_f16(uint16_t h) {
  // Shifted into place a half is 2^-112 of its value, subnormal or not; inf and NaN need their exponent back.
  uint32_t u = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
  float f;
  memcpy(&f, &u, 4);
  f *= 5.192296858534828e33f;
  memcpy(&u, &f, 4);
  if ((h & 0x7c00) == 0x7c00) u = 0x7f800000 | (uint32_t)(h & 0x3ff) << 13;
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline uint16_t to_f16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds beyond the largest half
  if (a < 0x38800000) {  // subnormal: the unit in the last place is 2^-24
    float s;
    memcpy(&s, &a, 4);
    s += 0.5f;  // whose own last place is 2^-24
    memcpy(&a, &s, 4);
    return (uint16_t)(sign | (a - 0x3f000000));
  }
  a += 0xfff + (a >> 13 & 1);
  return (uint16_t)(sign | ((a - 0x38000000) >> 13));
}

static inline float scalar(const void* p, Kind kind, size_t i) {
  if (kind == Kind::F32) return ((const float*)p)[i];
  uint16_t v = ((const uint16_t*)p)[i];
  return kind == Kind::BF16 ? from_bf16(v) : from_f16(v);
}

#if defined(__AVX512VNNI__)
constexpr int LANES = 16, MOST_ROWS = 4, SIGNED_CODES = 0;
typedef __m512i Ints;
typedef __m512 Floats;
static inline Ints load(const uint32_t* p) { return _mm512_loadu_si512(p); }
static inline void store(uint32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
template <int N> static inline Ints right(Ints v) { return _mm512_srli_epi32(v, N); }
template <int N> static inline Ints left(Ints v) { return _mm512_slli_epi32(v, N); }
static inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
static inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
static inline Ints all(int32_t v) { return _mm512_set1_epi32(v); }
static inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
template <int BITS> static inline Ints dot(Ints sum, Ints codes, int32_t x) {
  return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(x));
}
static inline Ints bytes_to_ints(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline Ints start(Ints zeros, int32_t pair) { return _mm512_madd_epi16(zeros, _mm512_set1_epi32(pair)); }
static inline Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
static inline Floats fill(float v) { return _mm512_set1_ps(v); }
static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline float total(Floats v) { return _mm512_reduce_add_ps(v); }
static inline Floats load(const void* p, Kind kind, size_t i) {
  if (kind == Kind::F32) return _mm512_loadu_ps((const float*)p + i);
  __m256i v = _mm256_loadu_si256((const __m256i*)((const uint16_t*)p + i));
  if (kind == Kind::F16) return _mm512_cvtph_ps(v);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
#elif defined(__AVX2__)
#if defined(__AVXVNNI__)
constexpr int LANES = 8, MOST_ROWS = 2, SIGNED_CODES = 0;
#else
constexpr int LANES = 8, MOST_ROWS = 4, SIGNED_CODES = 0;
#define SHORT_SUMS
#endif
typedef __m256i Ints;
typedef __m256 Floats;
static inline Ints load(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline void store(uint32_t* p, Ints v) { _mm256_storeu_si256((__m256i*)p, v); }
template <int N> static inline Ints right(Ints v) { return _mm256_srli_epi32(v, N); }
template <int N> static inline Ints left(Ints v) { return _mm256_slli_epi32(v, N); }
static inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
static inline Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
static inline Ints all(int32_t v) { return _mm256_set1_epi32(v); }
static inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
template <int BITS> static inline Ints dot(Ints sum, Ints codes, int32_t x) {
  __m256i y = _mm256_set1_epi32(x);
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, codes, y);
#else
  if constexpr (BITS == 8) {  // pairs of products of whole bytes exceed 16 bits
    __m256i low = _mm256_set1_epi8(15);
    __m256i a = _mm256_maddubs_epi16(_mm256_and_si256(codes, low), y);
    __m256i b = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), low), y);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(b, _mm256_set1_epi16(16)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, _mm256_set1_epi16(1)));
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, y), _mm256_set1_epi16(1)));
#endif
}
#if defined(SHORT_SUMS)
// Pairs of products are summed in 16 bits as long as they fit there: digits are -128 at least, codes 15, 7 or 3 at most.
template <int BITS> constexpr int TOGETHER = BITS == 4 ? 8 : BITS == 3 ? 16 : BITS == 2 ? 32 : 0;
static_assert(8 * 2 * 15 * 128 < 32768 && 16 * 2 * 7 * 128 < 32768 && 32 * 2 * 3 * 128 < 32768, "sums in 16 bits");
static inline Ints dot_short(Ints sum, Ints codes, int32_t x) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, _mm256_set1_epi32(x)));
  asm("" : "+x"(sum));  // else GCC adds in another order, which takes more registers than there are
  return sum;
}
static inline Ints widened(Ints sum, Ints part) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
}
#endif
static inline Ints bytes_to_ints(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
static inline Ints start(Ints zeros, int32_t pair) { return _mm256_madd_epi16(zeros, _mm256_set1_epi32(pair)); }
static inline Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }
static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
static inline Floats fill(float v) { return _mm256_set1_ps(v); }
static inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline float total(Floats v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
static inline Floats load(const void* p, Kind kind, size_t i) {
  if (kind == Kind::F32) return _mm256_loadu_ps((const float*)p + i);
  __m128i v = _mm_loadu_si128((const __m128i*)((const uint16_t*)p + i));
  if (kind == Kind::F16) return _mm256_cvtph_ps(v);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
#elif defined(__ARM_FEATURE_DOTPROD)
// The dot product takes signed bytes: codes of 8 bits are multiplied less 128.
constexpr int LANES = 4, MOST_ROWS = 4, SIGNED_CODES = 1;
typedef uint32x4_t Ints;
typedef float32x4_t Floats;
static inline Ints load(const uint32_t* p) { return vld1q_u32(p); }
static inline void store(uint32_t* p, Ints v) { vst1q_u32(p, v); }
template <int N> static inline Ints right(Ints v) { return vshrq_n_u32(v, N); }
template <int N> static inline Ints left(Ints v) { return vshlq_n_u32(v, N); }
static inline Ints both(Ints a, Ints b) { return vandq_u32(a, b); }
static inline Ints either(Ints a, Ints b) { return vorrq_u32(a, b); }
static inline Ints all(int32_t v) { return vdupq_n_u32((uint32_t)v); }
static inline Ints plus(Ints a, Ints b) { return vaddq_u32(a, b); }
template <int BITS> static inline Ints dot(Ints sum, Ints codes, int32_t x) {
  if constexpr (BITS == 8) codes = veorq_u32(codes, vdupq_n_u32(0x80808080u));
  int8x16_t y = vreinterpretq_s8_s32(vdupq_n_s32(x));
  return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(sum), vreinterpretq_s8_u32(codes), y));
}
static inline Ints bytes_to_ints(const uint8_t* p) {
  uint32_t four;
  memcpy(&four, p, 4);
  return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
static inline Ints start(Ints zeros, int32_t pair) {
  int16x8_t z = vreinterpretq_s16_u32(zeros), y = vreinterpretq_s16_s32(vdupq_n_s32(pair));
  int32x4_t low = vmull_s16(vget_low_s16(z), vget_low_s16(y)), high = vmull_high_s16(z, y);
  return vreinterpretq_u32_s32(vpaddq_s32(low, high));
}
static inline Floats floats(Ints v) { return vcvtq_f32_s32(vreinterpretq_s32_u32(v)); }
static inline Floats load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, Floats v) { vst1q_f32(p, v); }
static inline Floats fill(float v) { return vdupq_n_f32(v); }
static inline Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
static inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
static inline float total(Floats v) { return vaddvq_f32(v); }
static inline Floats load(const void* p, Kind kind, size_t i) {
  if (kind == Kind::F32) return vld1q_f32((const float*)p + i);
  uint16x4_t v = vld1_u16((const uint16_t*)p + i);
  if (kind == Kind::F16) return vcvt_f32_f16(vreinterpret_f16_u16(v));
  return vreinterpretq_f32_u32(vshll_n_u16(v, 16));
}
#else
constexpr int LANES = 4, MOST_ROWS = 2, SIGNED_CODES = 0;
struct Ints { uint32_t v[4]; };
struct Floats { float v[4]; };
#define EACH(type, expression) type r; for (int i = 0; i < 4; i++) r.v[i] = (expression); return r
static inline Ints load(const uint32_t* p) { EACH(Ints, p[i]); }
static inline void store(uint32_t* p, Ints v) { memcpy(p, v.v, 16); }
template <int N> static inline Ints right(Ints v) { EACH(Ints, v.v[i] >> N); }
template <int N> static inline Ints left(Ints v) { EACH(Ints, v.v[i] << N); }
static inline Ints both(Ints a, Ints b) { EACH(Ints, a.v[i] & b.v[i]); }
static inline Ints either(Ints a, Ints b) { EACH(Ints, a.v[i] | b.v[i]); }
static inline Ints all(int32_t v) { EACH(Ints, (uint32_t)v); }
static inline Ints plus(Ints a, Ints b) { EACH(Ints, a.v[i] + b.v[i]); }
template <int BITS> static inline Ints dot(Ints sum, Ints c, int32_t x) {
  int32_t a = (int8_t)x, b = (int8_t)(x >> 8), e = (int8_t)(x >> 16), d = x >> 24;
  EACH(Ints, sum.v[i] + (uint32_t)((int32_t)(c.v[i] & 255) * a + (int32_t)(c.v[i] >> 8 & 255) * b +
                                   (int32_t)(c.v[i] >> 16 & 255) * e + (int32_t)(c.v[i] >> 24) * d));
}
static inline Ints bytes_to_ints(const uint8_t* p) { EACH(Ints, p[i]); }
static inline Ints start(Ints z, int32_t pair) {
  int32_t a = (int16_t)pair, b = pair >> 16;
  EACH(Ints, (uint32_t)((int16_t)z.v[i] * a + ((int32_t)z.v[i] >> 16) * b));
}
static inline Floats floats(Ints v) { EACH(Floats, (float)(int32_t)v.v[i]); }
static inline Floats load(const float* p) { EACH(Floats, p[i]); }
static inline void store(float* p, Floats v) { memcpy(p, v.v, 16); }
static inline Floats fill(float v) { EACH(Floats, v); }
static inline Floats times(Floats a, Floats b) { EACH(Floats, a.v[i] * b.v[i]); }
static inline Floats fma(Floats a, Floats b, Floats c) { EACH(Floats, a.v[i] * b.v[i] + c.v[i]); }
static inline float total(Floats a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
static inline Floats load(const void* p, Kind kind, size_t j) { EACH(Floats, scalar(p, kind, j + i)); }
#undef EACH
#endif
