// What a thread moves at once: 16 bytes, and how a quad gathers them from the fragments of a matrix product.
#pragma once

#include <cstdint>

namespace flashcore::tile {

inline constexpr int kVectorBytes = 16;

template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int kSize = kVectorBytes / static_cast<int>(sizeof(T));
  T x[kSize];
};

/// Thread `t` of a quad holds words (0, t), (1, t), (2, t), (3, t) of a 4 × 4 matrix; afterwards (t, 0) … (t, 3). By
/// all lanes.
__device__ __forceinline__ void quad_transpose(std::uint32_t (&x)[4], int t) {
  constexpr unsigned kAll = 0xffffffffu;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = t & step;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      std::uint32_t& low = x[step == 1 ? 2 * pair : pair];
      std::uint32_t& high = x[step == 1 ? 2 * pair + 1 : pair + 2];
      const std::uint32_t other = __shfl_xor_sync(kAll, upper ? low : high, step);
      low = upper ? other : low;
      high = upper ? high : other;
    }
  }
}

}  // namespace flashcore::tile
