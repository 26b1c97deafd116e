// AMX: one instruction, one function; and the configuration that all tile kernels here share.
//
// A tile register is 16 rows of 64 bytes: 16×16 floats, or 16×32 bfloat16.
#pragma once

#include <cstdint>

#include "linkage.h"

namespace flashcore::cpu {
namespace {

/// Eight tiles of 16 rows of 64 bytes, for as long as it lives. What the thread had configured before comes back.
class TileScope {
 public:
  TileScope() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Config own = {};
    own.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      own.row_bytes[tile] = 64;
      own.rows[tile] = 16;
    }
    asm volatile("ldtilecfg %0" ::"m"(own));
  }
  ~TileScope() {
    if (before_.palette == 0)
      asm volatile("tilerelease");
    else
      asm volatile("ldtilecfg %0" ::"m"(before_));
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Config {
    std::uint8_t palette;
    std::uint8_t start_row;
    std::uint8_t reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);

  Config before_;
};

template <int kTile>
FLASHCORE_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

/// Rows `stride` bytes apart.
template <int kTile>
FLASHCORE_INLINE void tile_load(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
FLASHCORE_INLINE void tile_store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}

/// C += A·B in floats: A is 16×32 bfloat16, B holds row pairs: its dword (k, n) is {B[2k][n], B[2k+1][n]}.
template <int kC, int kA, int kB>
FLASHCORE_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace flashcore::cpu
