// Rows of an output from wgmma accumulators to global memory, without shared memory.
#pragma once

#include <cstdint>

#include "../ptx/global.cuh"
#include "../ptx/warp.cuh"
#include "vector.cuh"

namespace flashcore::tile {

/// Two rows of a thread's quad, N / 2 columns: the four threads exchange pairs of columns so that each stores 16 bytes.
/// `target`: where the first row's first column goes, on 16 bytes; the second row is `next` elements further. Of the
/// columns, `columns` exist. kAnyColumns: that may be no multiple of 8. By all lanes.
template <class Element, bool kAnyColumns, int N>
__device__ __forceinline__ void store_rows(const float (&o)[N], Element* target, std::int64_t next,
                                           const bool (&exists)[2], int columns, int quad_lane) {
#pragma unroll
  for (int i = 0; i < N / 16; ++i) {
    const int first = 32 * i + 8 * quad_lane;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      std::uint32_t x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float* pair = &o[16 * i + 4 * c + 2 * r];
        x[c] = ptx::pack<Element>(pair[0], pair[1]);
      }
      quad_transpose(x, quad_lane);
      Element* const to = target + r * next + first;
      ptx::store_if(exists[r] && first + 8 <= columns, to, x);
      if constexpr (kAnyColumns) {
#pragma unroll 1
        for (int c = 0; c < columns % 8; ++c) {  // the last columns, where they are no multiple of 8
          ptx::store_if(exists[r] && first == columns / 8 * 8, to + c, static_cast<std::uint16_t>(x[0]));
          x[0] = x[0] >> 16 | x[1] << 16;
          x[1] = x[1] >> 16 | x[2] << 16;
          x[2] = x[2] >> 16 | x[3] << 16;
          x[3] >>= 16;
        }
      }
    }
  }
}

}  // namespace flashcore::tile
