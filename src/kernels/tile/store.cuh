// Rows of an output from wgmma accumulators to global memory, without shared memory.
#pragma once

#include <cstdint>

#include "../ptx/global.cuh"
#include "../ptx/warp.cuh"
#include "vector.cuh"

namespace flashcore::tile {

/// A row that a quad holds, N pairs of columns in each of its threads: pair g is columns 8g + 2·quad_lane and the next.
/// The threads exchange pairs so that each stores 16 bytes. `target`: where the row's first column goes, on 16 bytes.
/// Of the columns, `columns` exist. kAnyColumns: that may be no multiple of 8. By all lanes.
template <class Element, bool kAnyColumns, int N>
__device__ __forceinline__ void store_row(const float2 (&pairs)[N], Element* target, bool exists, int columns,
                                          int quad_lane) {
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int first = 32 * i + 8 * quad_lane;
    std::uint32_t x[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = ptx::pack<Element>(pairs[4 * i + c].x, pairs[4 * i + c].y);
    quad_transpose(x, quad_lane);
    ptx::store_if(exists && first + 8 <= columns, target + first, x);
    if constexpr (kAnyColumns) {
#pragma unroll 1
      for (int c = 0; c < columns % 8; ++c) {  // the last columns, where they are no multiple of 8
        ptx::store_if(exists && first == columns / 8 * 8, target + first + c, static_cast<std::uint16_t>(x[0]));
        x[0] = x[0] >> 16 | x[1] << 16;
        x[1] = x[1] >> 16 | x[2] << 16;
        x[2] = x[2] >> 16 | x[3] << 16;
        x[3] >>= 16;
      }
    }
  }
}

/// Row r (0 or 1) of a thread's accumulators, as store_row wants it.
template <int N>
__device__ __forceinline__ void pairs_of_row(const float (&o)[N], int r, float2 (&pairs)[N / 4]) {
#pragma unroll
  for (int g = 0; g < N / 4; ++g)  // no index that is not constant: it would move the accumulators to memory
    pairs[g] = r == 0 ? make_float2(o[4 * g], o[4 * g + 1]) : make_float2(o[4 * g + 2], o[4 * g + 3]);
}

}  // namespace flashcore::tile
