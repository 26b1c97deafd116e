// StridedArray: a test's own array on a device, with strides of any kind and guarded margins.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "flashcore/tensor.h"
#include "float_formats.h"
#include "random.h"
#include "test_device.h"

namespace flashcore::testing {

using Sizes = std::vector<std::int64_t>;

inline Sizes dense(const Sizes& shape) {
  Sizes stride(shape.size(), 1);
  for (int i = static_cast<int>(shape.size()) - 2; i >= 0; --i) stride[i] = stride[i + 1] * shape[i + 1];
  return stride;
}

/// Element offsets in row-major order, from the first element.
inline std::vector<std::int64_t> offsets_of(const Sizes& shape, const Sizes& stride) {
  std::vector<std::int64_t> offsets = {0};
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    std::vector<std::int64_t> next;
    for (const std::int64_t offset : offsets)
      for (std::int64_t i = 0; i < shape[axis]; ++i) next.push_back(offset + i * stride[axis]);
    offsets = next;
  }
  return offsets;
}

/// An array on a device with strides of any kind, with a few elements before and after it that belong to
/// nobody: so many that the array itself may be read 16 bytes at a time.
class StridedArray {
 public:
  StridedArray(Device device, DType dtype, const Sizes& shape, const Sizes& stride) {
    view_.dtype = dtype;
    view_.device = device;
    view_.rank = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), view_.shape.begin());
    std::copy(stride.begin(), stride.end(), view_.stride.begin());
    offsets_ = offsets_of(shape, stride);
    std::int64_t low = 0;
    std::int64_t high = 0;
    for (const std::int64_t offset : offsets_) {
      low = std::min(low, offset);
      high = std::max(high, offset);
    }
    first_ = kMargin - low;
    std::vector<double> all(static_cast<std::size_t>(first_ + high + 1 + kMargin), 77.0);
    memory_ = DeviceArray(all.size() * size_of(dtype), device);
    store(all);
    view_.data = static_cast<char*>(memory_.data()) + first_ * static_cast<std::int64_t>(size_of(dtype));
  }
  StridedArray(Device device, DType dtype, const Sizes& shape) : StridedArray(device, dtype, shape, dense(shape)) {}

  const TensorView& view() const { return view_; }

  /// Elements in row-major order.
  std::vector<double> values() const {
    const std::vector<double> all = load();
    std::vector<double> values;
    for (const std::int64_t offset : offsets_) values.push_back(all[first_ + offset]);
    return values;
  }

  void set(const std::vector<double>& values) {
    std::vector<double> all = load();
    for (std::size_t i = 0; i < offsets_.size(); ++i) all[first_ + offsets_[i]] = values[i];
    store(all);
  }

  StridedArray fill_random(Random& random) && {
    std::vector<double> all = load();
    for (const std::int64_t offset : offsets_) all[first_ + offset] = random.normal();
    store(all);
    return std::move(*this);
  }

  /// All the memory, margins included.
  std::vector<unsigned char> bytes() const { return to_host<unsigned char>(memory_); }

  /// How many bytes differ from `before` that belong to no element.
  int strays(const std::vector<unsigned char>& before) const {
    const std::vector<unsigned char> after = bytes();
    const std::size_t size = size_of(view_.dtype);
    std::vector<bool> owned(after.size() / size, false);
    for (const std::int64_t offset : offsets_) owned[static_cast<std::size_t>(first_ + offset)] = true;
    int count = 0;
    for (std::size_t i = 0; i < after.size(); ++i) count += after[i] != before[i] && !owned[i / size];
    return count;
  }

 private:
  static constexpr std::int64_t kMargin = 8;

  std::vector<double> load() const {
    const std::vector<unsigned char> raw = bytes();
    const std::size_t size = size_of(view_.dtype);
    std::vector<double> values(raw.size() / size);
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, raw.data() + i * size, size);
      values[i] = decode(view_.dtype, bits);
    }
    return values;
  }

  void store(const std::vector<double>& values) {
    const std::size_t size = size_of(view_.dtype);
    std::vector<unsigned char> raw(values.size() * size);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint64_t bits = encode(view_.dtype, values[i]);
      std::memcpy(raw.data() + i * size, &bits, size);
    }
    memory_.upload(raw.data());
  }

  std::vector<std::int64_t> offsets_;
  std::int64_t first_ = 0;
  DeviceArray memory_;
  TensorView view_;
};

/// One view for each way to lay out a shape: dense, permuted, with gaps, reversed.
inline std::vector<Sizes> layouts(const Sizes& shape) {
  const std::size_t rank = shape.size();
  Sizes reversed_order(rank, 1);
  for (std::size_t i = 1; i < rank; ++i) reversed_order[i] = reversed_order[i - 1] * shape[i - 1];
  Sizes gaps = dense(shape);
  for (std::int64_t& stride : gaps) stride *= 3;
  Sizes backwards = dense(shape);
  for (std::size_t i = 0; i < rank; i += 2) backwards[i] = -backwards[i];
  return {dense(shape), reversed_order, gaps, backwards};
}

}  // namespace flashcore::testing
