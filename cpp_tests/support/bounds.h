// How far a result may be from the oracle: one rule for all tests.
#pragma once

#include <string>

#include "array4.h"
#include "flashcore/tensor.h"

namespace flashcore::testing {

/// The largest error that a result stored in `dtype` may have. `naive` is what a plain implementation gets that rounds
/// every matrix it writes to `dtype`; `magnitude` is the size of the numbers that are summed up.
///
/// The rule of the contract, error ≤ 2 × naive error + epsilon, with an epsilon of two parts: the last rounding of the
/// result itself (one unit roundoff of its largest element: half for the rounding, half for a neighbour at a tie), and
/// the roundings of sums in float32 (float64): about sqrt(n) of them for n ≤ 2^10 summands, each of one unit roundoff,
/// doubled.
double error_bound(DType dtype, const Array4& truth, const Array4& naive, double magnitude);

/// The accumulator's part of the epsilon, relative to what is summed up.
double sum_epsilon(DType dtype);

/// Largest absolute value; NaN and infinities are left out.
double largest(const Array4& x);

/// Fails the test where `actual` is farther than `bound` from `truth`, is NaN, or is not infinite where it should be.
void expect_close(const Array4& actual, const Array4& truth, double bound, const std::string& name);

}  // namespace flashcore::testing
