// Buffer: memory that goes back to the resource it came from.
#include <utility>

#include "memory/resources.h"

namespace flashcore {

Buffer::Buffer(std::size_t bytes, Device device, Stream stream) : bytes_(bytes), stream_(stream) {
  if (bytes == 0) return;
  resource_ = detail::shared_workspace_resource(device);
  data_ = resource_->allocate(bytes, stream);
}

Buffer::Buffer(Buffer&& other) noexcept
    : resource_(std::move(other.resource_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      stream_(std::exchange(other.stream_, nullptr)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  Buffer taken(std::move(other));  // what this held goes back at the end, with `taken`
  std::swap(resource_, taken.resource_);
  std::swap(data_, taken.data_);
  std::swap(bytes_, taken.bytes_);
  std::swap(stream_, taken.stream_);
  return *this;
}

Buffer::~Buffer() {
  if (data_) resource_->deallocate(data_, bytes_, stream_);
}

}  // namespace flashcore
