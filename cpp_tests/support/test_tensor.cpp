// TestTensor: element access in every dtype.
#include "test_tensor.h"

#include <algorithm>
#include <cstring>

#include "float_formats.h"

namespace flashcore::testing {
namespace {

constexpr std::size_t kTrapBytes = 256;  // before and behind; keeps the tensor's own alignment
constexpr unsigned char kTrap = 0xff;

std::uint64_t bits_for(DType dtype, double value) {
  switch (dtype) {
    case DType::boolean:
      return value != 0;
    case DType::int32:
    case DType::int64:
      return static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
    default:
      return encode(dtype, value);
  }
}

double value_of(DType dtype, std::uint64_t bits) {
  switch (dtype) {
    case DType::boolean:
      return bits != 0;
    case DType::int32:
      return static_cast<std::int32_t>(bits);
    case DType::int64:
      return static_cast<double>(static_cast<std::int64_t>(bits));
    default:
      return decode(dtype, bits);
  }
}

}  // namespace

TestTensor::TestTensor(DType dtype, Device device, std::vector<std::int64_t> shape, std::int64_t gap) {
  view_.dtype = dtype;
  view_.device = device;
  view_.rank = static_cast<int>(shape.size());
  std::int64_t elements = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    view_.shape[axis] = shape[axis];
    view_.stride[axis] = elements;
    elements *= shape[axis];
    if (axis + 1 == shape.size()) elements += gap;
  }
  host_.assign(2 * kTrapBytes + static_cast<std::size_t>(elements) * size_of(dtype), kTrap);
  memory_ = DeviceArray(host_.size(), device);
  view_.data = static_cast<char*>(memory_.data()) + kTrapBytes;
}

std::size_t TestTensor::byte_offset(const Index& index) const {
  std::int64_t offset = 0;
  for (std::size_t axis = 0; axis < static_cast<std::size_t>(view_.rank); ++axis)
    offset += index[axis] * view_.stride[axis];
  return kTrapBytes + static_cast<std::size_t>(offset) * size_of(view_.dtype);
}

void TestTensor::set(const Index& index, double value) {
  const std::uint64_t bits = bits_for(view_.dtype, value);
  std::memcpy(&host_[byte_offset(index)], &bits, size_of(view_.dtype));
}

void TestTensor::fill(double value) {
  const std::uint64_t bits = bits_for(view_.dtype, value);
  const std::size_t bytes = size_of(view_.dtype);
  for_each_index(view_, [&](const Index& index) { std::memcpy(&host_[byte_offset(index)], &bits, bytes); });
}

double TestTensor::get(const Index& index) const {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &host_[byte_offset(index)], size_of(view_.dtype));
  return value_of(view_.dtype, bits);
}

void TestTensor::upload() { memory_.upload(host_.data()); }
void TestTensor::download() { memory_.download(host_.data()); }

std::vector<unsigned char> TestTensor::blanked(std::vector<unsigned char> bytes, const std::set<Index>& rows) const {
  const std::size_t row_bytes = static_cast<std::size_t>(size(view_.rank - 1)) * size_of(view_.dtype);
  for (const Index& row : rows)
    std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(byte_offset(row)), row_bytes, kTrap);
  return bytes;
}

bool TestTensor::surroundings_untouched() const {
  std::vector<unsigned char> rest = host_;
  for_each_index(view_, [&](const Index& index) {
    std::fill_n(rest.begin() + static_cast<std::ptrdiff_t>(byte_offset(index)), size_of(view_.dtype), kTrap);
  });
  return std::all_of(rest.begin(), rest.end(), [](unsigned char byte) { return byte == kTrap; });
}

}  // namespace flashcore::testing
