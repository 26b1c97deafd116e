// Array4: the tests' own array of doubles over (batch, heads, rows, columns).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace flashcore::testing {

class Array4 {
 public:
  Array4() = default;
  Array4(std::int64_t n0, std::int64_t n1, std::int64_t n2, std::int64_t n3, double value = 0)
      : shape_{n0, n1, n2, n3}, values_(static_cast<std::size_t>(n0 * n1 * n2 * n3), value), given_(true) {}

  /// False for an array that was never given a shape: "there is none".
  explicit operator bool() const { return given_; }

  std::int64_t size(int axis) const { return shape_[static_cast<std::size_t>(axis)]; }
  const std::array<std::int64_t, 4>& shape() const { return shape_; }
  std::vector<double>& values() { return values_; }
  const std::vector<double>& values() const { return values_; }

  double& operator()(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
    return values_[offset(a, b, c, d)];
  }
  double operator()(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) const {
    return values_[offset(a, b, c, d)];
  }

  /// The offset of an element where a size of 1 stands for every index.
  std::size_t broadcast_offset(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) const {
    return offset(shape_[0] == 1 ? 0 : a, shape_[1] == 1 ? 0 : b, shape_[2] == 1 ? 0 : c, shape_[3] == 1 ? 0 : d);
  }
  double broadcast(std::int64_t a, std::int64_t b, std::int64_t c = 0, std::int64_t d = 0) const {
    return values_[broadcast_offset(a, b, c, d)];
  }

 private:
  std::size_t offset(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) const {
    return static_cast<std::size_t>(((a * shape_[1] + b) * shape_[2] + c) * shape_[3] + d);
  }

  std::array<std::int64_t, 4> shape_{};
  std::vector<double> values_;
  bool given_ = false;
};

}  // namespace flashcore::testing
