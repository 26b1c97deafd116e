// The error bound, and the comparison that reports the worst element.
#include "bounds.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "float_formats.h"

namespace flashcore::testing {

double sum_epsilon(DType dtype) {
  return 64 * unit_roundoff(dtype == DType::float64 ? DType::float64 : DType::float32);
}

double largest(const Array4& x) {
  double result = 0;
  for (const double value : x.values())
    if (std::isfinite(value)) result = std::max(result, std::fabs(value));
  return result;
}

double error_bound(DType dtype, const Array4& truth, const Array4& naive, double magnitude) {
  double naive_error = 0;
  for (std::size_t n = 0; n < truth.values().size(); ++n)
    naive_error = std::max(naive_error, std::fabs(naive.values()[n] - truth.values()[n]));
  return 2 * naive_error + unit_roundoff(dtype) * largest(truth) + sum_epsilon(dtype) * magnitude;
}

void expect_close(const Array4& actual, const Array4& truth, double bound, const std::string& name) {
  ASSERT_EQ(actual.shape(), truth.shape()) << name;
  std::size_t wrong = 0;
  std::size_t worst = 0;
  double worst_error = -1;
  for (std::size_t n = 0; n < truth.values().size(); ++n) {
    const double a = actual.values()[n];
    const double t = truth.values()[n];
    const double error = a == t ? 0 : std::fabs(a - t);  // equal infinities are no error
    if (error <= bound) continue;
    ++wrong;
    const double size = std::isnan(error) ? HUGE_VAL : error;
    if (size > worst_error) {
      worst = n;
      worst_error = size;
    }
  }
  if (wrong == 0) return;
  auto rest = static_cast<std::int64_t>(worst);
  std::string at;
  for (int axis = 3; axis >= 0; --axis) {
    at = (axis ? ", " : "(") + std::to_string(rest % truth.size(axis)) + at;
    rest /= truth.size(axis);
  }
  ADD_FAILURE() << name << ": " << wrong << " of " << truth.values().size() << " elements are wrong; the worst is "
                << at << "): " << actual.values()[worst] << " instead of " << truth.values()[worst] << " (bound "
                << bound << ")";
}

}  // namespace flashcore::testing
