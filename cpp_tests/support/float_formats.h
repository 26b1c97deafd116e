// The storage formats, written down by their definition (sign, exponent, fraction) and nothing else, as a judge of the
// library's own conversions.
#pragma once

#include <cstdint>

#include "flashcore/tensor.h"

namespace flashcore::testing {

/// The number that `bits` stand for in `dtype`.
double decode(DType dtype, std::uint64_t bits);

/// The bits of the number nearest to `x`; ties go to the even fraction. Beyond the largest number: Inf, or NaN where
/// the format has no Inf.
std::uint64_t encode(DType dtype, double x);

/// `x` rounded to `dtype`.
inline double rounded(DType dtype, double x) { return decode(dtype, encode(dtype, x)); }

/// Half the distance from 1 to the next number: the largest relative error of one rounding.
double unit_roundoff(DType dtype);

}  // namespace flashcore::testing
