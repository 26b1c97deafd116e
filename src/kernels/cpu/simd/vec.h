// A vector of floats in GCC and Clang's vector extensions, and the few instructions that these cannot say.
#pragma once

#include "linkage.h"

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../numbers.h"

namespace flashcore::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kTileRows = 8;  // with three vectors a row: 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kTileRows = 4;  // 12 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kTileRows = 8;
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
#endif
#if defined(__AMX_BF16__)
#define FLASHCORE_AMX
constexpr bool kMultipliesInParts = true;
constexpr int kTileVectors = 2;  // two by two tiles accumulate
#else
constexpr bool kMultipliesInParts = false;
constexpr int kTileVectors = 3;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef std::uint8_t VecB __attribute__((vector_size(kLanes)));
typedef std::uint8_t VecBytes __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedF __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef std::uint16_t UnalignedH __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef std::uint32_t UnalignedPairs __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef std::uint8_t UnalignedB __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef std::uint8_t UnalignedBytes __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

template <class T>
FLASHCORE_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FLASHCORE_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

FLASHCORE_INLINE VecF load(const float* p) { return *reinterpret_cast<const UnalignedF*>(p); }
FLASHCORE_INLINE void store(float* p, VecF v) { *reinterpret_cast<UnalignedF*>(p) = v; }
FLASHCORE_INLINE VecF broadcast(float x) { return x - VecF{}; }
FLASHCORE_INLINE VecI broadcast(std::int32_t x) { return x - VecI{}; }
/// b where the comparison fails, so also where a is NaN.
FLASHCORE_INLINE VecF max_of(VecF a, VecF b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}
FLASHCORE_INLINE bool any_lane(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#else
  bool any = false;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) any |= mask[i] != 0;
  return any;
#endif
}

/// a·b + c with one rounding where the products of this instruction set have one, whatever a compiler makes of it.
FLASHCORE_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<VecF>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

/// 0, 1, 2, … as integers.
FLASHCORE_INLINE VecI lane_numbers() {
  VecI v;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

FLASHCORE_INLINE float sum_of_lanes(VecF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float sum[kLanes];
  store(sum, v);
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
  return sum[0];
#endif
}

/// The largest lane that is not NaN.
FLASHCORE_INLINE float max_of_lanes(VecF v) {
  float m = -kInfinity;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

/// 2^x for x up to 127, to about 2e-7. Results that would be subnormal are 0: one such weight makes every
/// multiplication with it some hundred times slower. NaN stays NaN.
FLASHCORE_INLINE VecF exp2(VecF x) {
  constexpr float kSmallest = -126.f;
#if defined(__AVX512DQ__)
  const VecF fraction = reinterpret_cast<VecF>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0));
#else
  // Adding 1.5 · 2^23 rounds to an integer, which is in the low bits; 127 more make it the exponent of a float.
  constexpr float kRounder = 12582912.f + 127.f;
  const VecF shifted = x + kRounder;
  const VecF fraction = x - (shifted - kRounder);
#endif
  // Minimax polynomial for 2^f on [−1/2, 1/2].
  VecF p = broadcast(1.32647273e-3f);
  p = p * fraction + 9.67151299e-3f;
  p = p * fraction + 5.55073358e-2f;
  p = p * fraction + 2.40222424e-1f;
  p = p * fraction + 6.93147004e-1f;
  p = p * fraction + 1.0f;
#if defined(__AVX512DQ__)
  const __mmask16 kept = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  return reinterpret_cast<VecF>(
      _mm512_maskz_scalef_ps(kept, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x - fraction)));
#else
  const VecF power = reinterpret_cast<VecF>(reinterpret_cast<VecU>(shifted) << 23);
  return x < kSmallest ? VecF{} : p * power;
#endif
}

// ---- storage types ------------------------------------------------------------------------------------------------

/// Integers of 16 bits to 32 and back, which are to have no more than 16. GCC goes by halves of the vectors here.
FLASHCORE_INLINE VecU lengthen(VecH x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return reinterpret_cast<VecU>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, VecU);
#endif
}
FLASHCORE_INLINE VecH shorten(VecU x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i v = reinterpret_cast<__m256i>(x);
  return reinterpret_cast<VecH>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
#else
  return __builtin_convertvector(x, VecH);
#endif
}

FLASHCORE_INLINE VecF widen(VecH bits, detail::BFloat16) { return reinterpret_cast<VecF>(lengthen(bits) << 16); }

FLASHCORE_INLINE VecF widen(VecH bits, detail::Float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(bits)));
#elif defined(__F16C__)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
#else
  const VecU half = __builtin_convertvector(bits, VecU);
  const VecU sign = (half & 0x8000u) << 16;
  const VecU magnitude = (half & 0x7fffu) << 13;
  const VecU normal = magnitude + (112u << 23);
  // A subnormal's bits count units of 2^-24: as the fraction of 2^-14 they are exact, and the subtraction too.
  const VecF small = reinterpret_cast<VecF>(magnitude + (113u << 23)) - 6.103515625e-05f;
  VecU result = magnitude < (1u << 23) ? reinterpret_cast<VecU>(small) : normal;
  result = magnitude >= (31u << 23) ? magnitude | 0x7f800000u : result;  // Inf, NaN
  return reinterpret_cast<VecF>(result | sign);
#endif
}

/// A bfloat16 in the upper half of each lane, and what was rounded away below.
FLASHCORE_INLINE VecU round_to_bfloat16(VecF v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? rounded : bits | 0x400000u;
}
FLASHCORE_INLINE VecH narrow(VecF v, detail::BFloat16) { return shorten(round_to_bfloat16(v) >> 16); }
/// Two bfloat16 a lane, as they follow each other in memory.
FLASHCORE_INLINE VecU narrow_pair(VecF even, VecF odd) {
  return (round_to_bfloat16(even) >> 16) | (round_to_bfloat16(odd) & 0xffff0000u);
}

FLASHCORE_INLINE VecH narrow(VecF v, detail::Float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecH>(_mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<VecH>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU sign = (bits & 0x80000000u) >> 16;
  const VecU magnitude = bits & 0x7fffffffu;
  // Where the half is subnormal a float addition does the rounding; elsewhere half an ulp less the last bit is added.
  const VecU small = reinterpret_cast<VecU>(reinterpret_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  VecU result = magnitude < 0x38800000u ? small : normal;
  result = magnitude >= 0x47800000u ? VecU{} + 0x7c00u : result;
  result = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : result;
  return __builtin_convertvector(result | sign, VecH);
#endif
}

/// kLanes elements from storage as floats. Bytes (booleans) become 0 or something else.
FLASHCORE_INLINE VecF load_floats(const float* p) { return load(p); }
template <class T>
FLASHCORE_INLINE VecF load_floats(const T* p) {
  return widen(static_cast<VecH>(*reinterpret_cast<const UnalignedH*>(p)), T{});
}
FLASHCORE_INLINE VecF load_floats(const std::uint8_t* p) {
  return __builtin_convertvector(static_cast<VecB>(*reinterpret_cast<const UnalignedB*>(p)), VecF);
}

FLASHCORE_INLINE void store_floats(float* p, VecF v) { store(p, v); }
template <class T>
FLASHCORE_INLINE void store_floats(T* p, VecF v) {
  *reinterpret_cast<UnalignedH*>(p) = narrow(v, T{});
}

/// The same for fewer elements: what lies behind them is neither read nor written.
template <class T>
FLASHCORE_INLINE VecF load_floats(const T* p, int count) {
  if (count >= kLanes) return load_floats(p);
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<std::size_t>(count) * sizeof(T));
  return load_floats(part);
}
template <class T>
FLASHCORE_INLINE void store_floats(T* p, VecF v, int count) {
  if (count >= kLanes) return store_floats(p, v);
  T part[kLanes];
  store_floats(part, v);
  std::memcpy(p, part, static_cast<std::size_t>(count) * sizeof(T));
}

// ---- transposition ------------------------------------------------------------------------------------------------

template <int... I>
FLASHCORE_INLINE VecF zip_low(VecF a, VecF b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & 1) ? kLanes + I / 2 : I / 2)...);
}
template <int... I>
FLASHCORE_INLINE VecF zip_high(VecF a, VecF b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & 1) ? kLanes + kLanes / 2 + I / 2 : kLanes / 2 + I / 2)...);
}

#if defined(__AVX2__) && !defined(__AVX512F__)
/// Transposes a square of vectors: squares of 4 in each half of the registers, then these halves change places. To
/// interleave whole vectors would take two instructions for each one here.
FLASHCORE_INLINE void transpose(VecF (&x)[kLanes]) {
  typedef double Pairs __attribute__((vector_size(kLanes * 4)));
  VecF y[kLanes];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const Pairs a = reinterpret_cast<Pairs>(__builtin_shufflevector(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13));
    const Pairs b = reinterpret_cast<Pairs>(__builtin_shufflevector(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15));
    const Pairs c = reinterpret_cast<Pairs>(__builtin_shufflevector(x[i + 2], x[i + 3], 0, 8, 1, 9, 4, 12, 5, 13));
    const Pairs d = reinterpret_cast<Pairs>(__builtin_shufflevector(x[i + 2], x[i + 3], 2, 10, 3, 11, 6, 14, 7, 15));
    y[i] = reinterpret_cast<VecF>(__builtin_shufflevector(a, c, 0, 4, 2, 6));
    y[i + 1] = reinterpret_cast<VecF>(__builtin_shufflevector(a, c, 1, 5, 3, 7));
    y[i + 2] = reinterpret_cast<VecF>(__builtin_shufflevector(b, d, 0, 4, 2, 6));
    y[i + 3] = reinterpret_cast<VecF>(__builtin_shufflevector(b, d, 1, 5, 3, 7));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = __builtin_shufflevector(y[i], y[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    x[i + 4] = __builtin_shufflevector(y[i], y[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#else
/// Transposes a square of kLanes vectors in log2(kLanes) rounds of interleaving.
FLASHCORE_INLINE void transpose(VecF (&x)[kLanes]) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  VecF y[kLanes];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = zip_low(x[i], x[i + kLanes / 2], Lanes{});
      y[2 * i + 1] = zip_high(x[i], x[i + kLanes / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}
#endif

}  // namespace
}  // namespace flashcore::cpu
