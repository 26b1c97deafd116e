// numbers.h: every value of the small formats, and every rounding boundary between them.
#include "kernels/numbers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "../support/float_formats.h"
#include "../support/random.h"

namespace flashcore::testing {
namespace {

using detail::BFloat16;
using detail::Float16;
using detail::Float8E4M3;
using detail::load;
using detail::store;

template <class T>
struct FormatOf;
template <>
struct FormatOf<Float16> {
  static constexpr DType dtype = DType::float16;
};
template <>
struct FormatOf<BFloat16> {
  static constexpr DType dtype = DType::bfloat16;
};
template <>
struct FormatOf<Float8E4M3> {
  static constexpr DType dtype = DType::float8_e4m3;
};

template <class T>
void expect_loads_every_value(unsigned count) {
  for (unsigned bits = 0; bits < count; ++bits) {
    const double expected = decode(FormatOf<T>::dtype, bits);
    const double actual = load(T{static_cast<decltype(T::bits)>(bits)});
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(actual)) << "bits " << bits;
      continue;
    }
    ASSERT_EQ(actual, expected) << "bits " << bits;
    ASSERT_EQ(std::signbit(actual), std::signbit(expected)) << "bits " << bits;
  }
}

template <class T>
std::uint64_t stored(float x) {
  T target{};
  store(target, x);
  return target.bits;
}

template <class T>
void expect_stores_like_the_definition(float x) {
  const std::uint64_t actual = stored<T>(x);
  if (std::isnan(x)) {
    ASSERT_TRUE(std::isnan(decode(FormatOf<T>::dtype, actual)));
    return;
  }
  ASSERT_EQ(actual, encode(FormatOf<T>::dtype, x)) << "x = " << x;
}

/// Each value, the middle between it and the next, and the floats on both sides of each.
template <class T>
void expect_rounds_to_nearest_even(unsigned positive_values) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (unsigned bits = 0; bits + 1 < positive_values; ++bits) {
    const double low = decode(FormatOf<T>::dtype, bits);
    const double high = decode(FormatOf<T>::dtype, bits + 1);
    if (!std::isfinite(high)) break;
    for (const double x : {low, (low + high) / 2}) {
      if (FormatOf<T>::dtype == DType::float8_e4m3 && x >= 448) break;
      const auto middle = static_cast<float>(x);
      for (const float each : {middle, std::nextafter(middle, infinity), std::nextafter(middle, -infinity)}) {
        expect_stores_like_the_definition<T>(each);
        expect_stores_like_the_definition<T>(-each);
      }
    }
  }
}

template <class T>
void expect_stores_specials() {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float x : {0.0f, -0.0f, infinity, -infinity, std::numeric_limits<float>::max(), 65504.0f, 65519.99f,
                        65520.0f, 65536.0f, std::numeric_limits<float>::denorm_min(),
                        std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::quiet_NaN()})
    expect_stores_like_the_definition<T>(x);
  Random random(1);
  for (int n = 0; n < 200000; ++n)
    expect_stores_like_the_definition<T>(detail::float_of(static_cast<std::uint32_t>(random.bits())));
}

TEST(Numbers, LoadsEveryFloat16) { expect_loads_every_value<Float16>(1u << 16); }
TEST(Numbers, LoadsEveryBFloat16) { expect_loads_every_value<BFloat16>(1u << 16); }
TEST(Numbers, LoadsEveryFloat8E4M3) { expect_loads_every_value<Float8E4M3>(1u << 8); }

TEST(Numbers, StoresFloat16RoundedToNearestEven) { expect_rounds_to_nearest_even<Float16>(0x7c00); }
TEST(Numbers, StoresBFloat16RoundedToNearestEven) { expect_rounds_to_nearest_even<BFloat16>(0x7f80); }

TEST(Numbers, StoresFloat16SpecialsAndAnyFloat) { expect_stores_specials<Float16>(); }
TEST(Numbers, StoresBFloat16SpecialsAndAnyFloat) { expect_stores_specials<BFloat16>(); }

TEST(Numbers, StoresFloat8E4M3RoundedToNearestEven) { expect_rounds_to_nearest_even<Float8E4M3>(0x7f); }

TEST(Numbers, Float8E4M3SaturatesAtItsLargestValue) {
  for (const float x : {448.0f, 449.0f, 1e6f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(load(Float8E4M3{static_cast<std::uint8_t>(stored<Float8E4M3>(x))}), 448.0f) << x;
    EXPECT_EQ(load(Float8E4M3{static_cast<std::uint8_t>(stored<Float8E4M3>(-x))}), -448.0f) << x;
  }
  EXPECT_TRUE(std::isnan(load(Float8E4M3{static_cast<std::uint8_t>(stored<Float8E4M3>(std::nanf("")))})));
}

TEST(Numbers, StoreUndoesLoadForEveryFiniteFloat16) {
  for (unsigned bits = 0; bits < (1u << 16); ++bits) {
    const float x = load(Float16{static_cast<std::uint16_t>(bits)});
    ASSERT_TRUE(std::isnan(x) || stored<Float16>(x) == bits) << bits;
  }
}

TEST(Numbers, SumsAreTakenInFloatButForDouble) {
  static_assert(std::is_same_v<detail::Accumulator<Float16>::type, float>);
  static_assert(std::is_same_v<detail::Accumulator<float>::type, float>);
  static_assert(std::is_same_v<detail::Accumulator<double>::type, double>);
}

}  // namespace
}  // namespace flashcore::testing
