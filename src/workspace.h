// WorkspaceLayout: the slices of one scratch allocation, laid out by the plan and bound at launch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashcore::detail {

class WorkspaceLayout {
 public:
  static constexpr std::size_t kAlignment = 256;

  /// Reserves a slice and returns its offset from the workspace's start.
  std::size_t add(std::size_t bytes) {
    const std::size_t offset = bytes_;
    bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
  }

  /// Bytes of the whole workspace.
  std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

/// The address of a slice. A workspace of 0 bytes may be null.
template <class T>
T* slice(void* workspace, std::size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

}  // namespace flashcore::detail
