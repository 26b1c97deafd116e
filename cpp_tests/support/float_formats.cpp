// Storage formats by their definition.
#include "float_formats.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace flashcore::testing {
namespace {

struct Format {
  int exponent_bits;
  int fraction_bits;
  bool has_infinity;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int smallest_exponent() const { return 1 - bias(); }
  std::uint64_t all_exponent_bits() const { return (1u << exponent_bits) - 1; }
  std::uint64_t sign_bit() const { return std::uint64_t(1) << (exponent_bits + fraction_bits); }
  std::uint64_t infinity() const { return all_exponent_bits() << fraction_bits; }
  std::uint64_t largest() const { return has_infinity ? infinity() - 1 : sign_bit() - 2; }
  std::uint64_t nan() const { return sign_bit() - 1; }
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::float16:
      return {5, 10, true};
    case DType::bfloat16:
      return {8, 7, true};
    case DType::float8_e4m3:
      return {4, 3, false};
    default:
      throw std::logic_error("not a small format");
  }
}

/// ldexp(x, exponent) for what the small formats need: the power itself is a normal number.
double scaled(double x, int exponent) {
  const std::uint64_t bits = static_cast<std::uint64_t>(1023 + exponent) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return x * power;
}

double magnitude(const Format& f, std::uint64_t bits) {
  const auto exponent = static_cast<int>(bits >> f.fraction_bits);
  const auto fraction = static_cast<double>(bits & ((std::uint64_t(1) << f.fraction_bits) - 1));
  if (exponent == 0) return scaled(fraction, f.smallest_exponent() - f.fraction_bits);
  return scaled(fraction + scaled(1, f.fraction_bits), exponent - f.bias() - f.fraction_bits);
}

}  // namespace

double decode(DType dtype, std::uint64_t bits) {
  if (dtype == DType::float32) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  if (dtype == DType::float64) {
    double x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  const Format f = format_of(dtype);
  const double sign = bits & f.sign_bit() ? -1 : 1;
  const std::uint64_t unsigned_bits = bits & (f.sign_bit() - 1);
  if (f.has_infinity ? unsigned_bits > f.infinity() : unsigned_bits == f.nan())
    return std::numeric_limits<double>::quiet_NaN();
  if (f.has_infinity && unsigned_bits == f.infinity()) return sign * std::numeric_limits<double>::infinity();
  return sign * magnitude(f, unsigned_bits);
}

std::uint64_t encode(DType dtype, double x) {
  std::uint64_t bits = 0;
  if (dtype == DType::float32) {
    const auto narrow = static_cast<float>(x);
    std::memcpy(&bits, &narrow, sizeof narrow);
    return bits;
  }
  if (dtype == DType::float64) {
    std::memcpy(&bits, &x, sizeof x);
    return bits;
  }
  const Format f = format_of(dtype);
  if (std::isnan(x)) return f.nan();
  const std::uint64_t sign = std::signbit(x) ? f.sign_bit() : 0;
  const double size = std::fabs(x);
  const std::uint64_t overflow = f.has_infinity ? f.infinity() : f.nan();
  if (std::isinf(x)) return sign | overflow;
  if (size == 0) return sign;
  const int exponent = std::max(std::ilogb(size), f.smallest_exponent());
  // The fraction in units of the last place; nearbyint rounds halves to even.
  const double units = std::nearbyint(scaled(size, f.fraction_bits - exponent));
  // Counting up from the first number of this binade: a fraction that overflows carries into the exponent by itself.
  const auto first = static_cast<std::uint64_t>(exponent - f.smallest_exponent()) << f.fraction_bits;
  const std::uint64_t result = first + static_cast<std::uint64_t>(units);
  return sign | (result > f.largest() ? overflow : result);
}

double unit_roundoff(DType dtype) {
  if (dtype == DType::float64) return std::ldexp(1.0, -53);
  if (dtype == DType::float32) return std::ldexp(1.0, -24);
  return std::ldexp(1.0, -1 - format_of(dtype).fraction_bits);
}

}  // namespace flashcore::testing
