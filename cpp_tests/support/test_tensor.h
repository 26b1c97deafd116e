// TestTensor: a strided array on a device that tests fill and read element by element, with traps around it.
#pragma once

#include <array>
#include <cstdint>
#include <set>
#include <vector>

#include "test_device.h"

namespace flashcore::testing {

/// Index into a tensor of any rank up to four; what is beyond the rank is not looked at.
using Index = std::array<std::int64_t, 4>;

/// All bytes begin as 0xff, which is NaN in every floating-point format, so that whatever was never set, lies between
/// rows, or stands before and behind the tensor, poisons a result that it reaches.
class TestTensor {
 public:
  TestTensor() = default;
  /// `gap` elements stand between one row (last dimension) and the next.
  TestTensor(DType dtype, Device device, std::vector<std::int64_t> shape, std::int64_t gap = 0);

  explicit operator bool() const { return view_.rank >= 0; }
  /// Points to the device; "no tensor" if this is empty.
  const TensorView& view() const { return view_; }
  DType dtype() const { return view_.dtype; }
  std::int64_t size(int axis) const { return view_.shape[static_cast<std::size_t>(axis)]; }

  /// The host's copy, which upload and download carry over.
  void set(const Index& index, double value);
  void fill(double value);
  double get(const Index& index) const;
  void upload();
  void download();

  /// Whether every byte that belongs to no element is as it was at first.
  bool surroundings_untouched() const;
  const std::vector<unsigned char>& bytes() const { return host_; }
  /// `bytes`, an image of this tensor, without the rows (last index 0) of the set.
  std::vector<unsigned char> blanked(std::vector<unsigned char> bytes, const std::set<Index>& rows) const;

 private:
  std::size_t byte_offset(const Index& index) const;

  TensorView view_;
  std::vector<unsigned char> host_;
  DeviceArray memory_;
};

/// Calls visit(index) for every element of a shape.
template <class Visit>
void for_each_index(const TensorView& t, const Visit& visit) {
  Index size{1, 1, 1, 1};
  for (int axis = 0; axis < t.rank; ++axis)
    size[static_cast<std::size_t>(axis)] = t.shape[static_cast<std::size_t>(axis)];
  for (std::int64_t a = 0; a < size[0]; ++a)
    for (std::int64_t b = 0; b < size[1]; ++b)
      for (std::int64_t c = 0; c < size[2]; ++c)
        for (std::int64_t d = 0; d < size[3]; ++d) visit(Index{a, b, c, d});
}

}  // namespace flashcore::testing
