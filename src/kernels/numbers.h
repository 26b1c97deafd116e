// Storage formats: the 16- and 8-bit floats as plain bits, with the same round-to-nearest-even on the host and the
// device. No CUDA header is needed; device code uses the hardware's conversions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(FLASHCORE_HD)  // a translation unit may have chosen a linkage of its own
#elif defined(__CUDACC__)
#define FLASHCORE_HD __host__ __device__ inline
#else
#define FLASHCORE_HD inline
#endif

namespace flashcore::detail {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
struct Float8E4M3 {
  std::uint8_t bits;
};

FLASHCORE_HD std::uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

FLASHCORE_HD float float_of(std::uint32_t u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

FLASHCORE_HD float load(float x) { return x; }
FLASHCORE_HD double load(double x) { return x; }

FLASHCORE_HD float load(BFloat16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

FLASHCORE_HD float load(Float16 x) {
#ifdef __CUDA_ARCH__
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // Inf, NaN
  // Shifting the exponent into place leaves it 112 too small; one multiplication corrects normals and subnormals.
  const float value = float_of(magnitude << 13) * float_of(239u << 23);
  return float_of(bits_of(value) | sign);
#endif
}

FLASHCORE_HD float load(Float8E4M3 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x80u) << 24;
  const std::uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return float_of(sign | 0x7fc00000u);  // the format's only NaN
  const float value = float_of(magnitude << 20) * float_of(247u << 23);
  return float_of(bits_of(value) | sign);
}

FLASHCORE_HD void store(float& target, float x) { target = x; }
FLASHCORE_HD void store(double& target, double x) { target = x; }

FLASHCORE_HD void store(BFloat16& target, float x) {
  const std::uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    target.bits = static_cast<std::uint16_t>(u >> 16 | 0x40u);  // a quiet NaN stays a NaN
  } else {
    target.bits = static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
}

FLASHCORE_HD void store(Float16& target, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target.bits) : "f"(x));
#else
  const std::uint32_t u = bits_of(x);
  const std::uint16_t sign = static_cast<std::uint16_t>(u >> 16 & 0x8000u);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    target.bits = sign | 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    target.bits = sign | 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal in half: let a float addition do the rounding
    const float shifted = float_of(magnitude) + 0.5f;
    target.bits = sign | static_cast<std::uint16_t>(bits_of(shifted) - bits_of(0.5f));
  } else {
    const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    target.bits = sign | static_cast<std::uint16_t>((rounded - 0x38000000u) >> 13);
  }
#endif
}

/// Saturates at 448, the largest value: the format has no infinity.
FLASHCORE_HD void store(Float8E4M3& target, float x) {
  const std::uint32_t u = bits_of(x);
  const std::uint8_t sign = static_cast<std::uint8_t>(u >> 24 & 0x80u);
  const std::uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    target.bits = sign | 0x7fu;
  } else if (magnitude >= 0x43e00000u) {  // 448 or more
    target.bits = sign | 0x7eu;
  } else if (magnitude < 0x3c800000u) {  // subnormal, in steps of 2^-9: let a float addition do the rounding
    const float shifted = float_of(magnitude) + 16384.0f;
    target.bits = sign | static_cast<std::uint8_t>(bits_of(shifted) - bits_of(16384.0f));
  } else {
    const std::uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    target.bits = sign | static_cast<std::uint8_t>((rounded - (120u << 23)) >> 20);
  }
}

/// What sums are taken in for values stored as T.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace flashcore::detail
