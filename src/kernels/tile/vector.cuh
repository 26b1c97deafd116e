// What a thread moves at once: 16 bytes.
#pragma once

namespace flashcore::tile {

inline constexpr int kVectorBytes = 16;

template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / static_cast<int>(sizeof(T));
  T x[kSize];
};

}  // namespace flashcore::tile
