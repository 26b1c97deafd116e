// Arena: one piece of scratch memory, handed out in parts.
#pragma once

#include "vec.h"

namespace flashcore::cpu {
namespace {

/// Scratch memory, given out in pieces that start on a cache line.
class Arena {
 public:
  explicit Arena(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(std::int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += rounded(static_cast<std::size_t>(count) * sizeof(T));
    return piece;
  }
  /// Bytes that a piece takes.
  static std::size_t rounded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }
  static std::size_t rounded_floats(std::int64_t count) {
    return rounded(static_cast<std::size_t>(count) * sizeof(float));
  }

 private:
  char* next_;
};

}  // namespace
}  // namespace flashcore::cpu
