// The matrix product on AMX: C = start + A·B, where numbers are sums of `kParts` bfloat16.
//
// A float16 is exactly the sum of two bfloat16, a float32 of three. Of the products of parts those are taken that a
// float32 sum can hold: part i of A with part j of B where i + j < kParts (the idea: Henry, Tang, Heinecke, "Leveraging
// the bfloat16 artificial intelligence datatype for higher-precision computations", 2019).
#pragma once

#include "amx.h"
#include "vec.h"

namespace flashcore::cpu {
namespace {

constexpr int kTileSide = 16;   // rows and floats a row
constexpr int kTileDepth = 32;  // bfloat16 of A's row

FLASHCORE_INLINE std::int64_t whole_tiles(std::int64_t count) {
  return (count + kTileSide - 1) / kTileSide * kTileSide;
}
FLASHCORE_INLINE std::int64_t whole_depth(std::int64_t count) {
  return (count + kTileDepth - 1) / kTileDepth * kTileDepth;
}

constexpr int kTileFloats = kTileSide * kTileSide;
constexpr int kTilePairs = kTileFloats;              // dwords of B's tile
constexpr int kTileHalves = kTileSide * kTileDepth;  // bfloat16 of A's

/// A and B are stored tile by tile: A's as [row][depth][part], B's as [depth][part][column].
struct TileProduct {
  int rows;     // of tiles
  int depth;    // in kTileDepth
  int columns;  // of tiles; one or two but for multiply_add_wide
  const std::uint16_t* a;
  std::int64_t a_row;  // from a row of tiles to the next
  const std::uint32_t* b;
  float* c;
  std::int64_t c_row;     // from row to row inside a tile
  std::int64_t c_column;  // from tile to tile
};

/// A: its first tile, and from a row of tiles to the next.
struct TileRows {
  const std::uint16_t* tiles;
  std::int64_t row;
};

/// The product of `rows` rows and a depth of `depth` numbers, into rows of C of `width` floats.
FLASHCORE_INLINE TileProduct tile_product(const TileRows& a, std::int64_t rows, std::int64_t depth,
                                          const std::uint32_t* b, float* c, std::int64_t width) {
  return {.rows = static_cast<int>(whole_tiles(rows) / kTileSide),
          .depth = static_cast<int>(whole_depth(depth) / kTileDepth),
          .columns = static_cast<int>(width / kTileSide),
          .a = a.tiles,
          .a_row = a.row,
          .b = b,
          .c = c,
          .c_row = width,
          .c_column = kTileSide};
}

struct Nothing {
  FLASHCORE_INLINE void operator()() const {}
};

/// Tiles 0 to 3 accumulate, 4 and 5 hold A, 6 and 7 hold B. After each step of depth comes `between()`: other work that
/// the processor does while tiles are multiplied, since it looks no further ahead than a few products.
template <int kM, int kN, int kParts, bool kAdd, class Between = Nothing>
FLASHCORE_INLINE void multiply_tiles(const TileProduct& p, int row, Between&& between = {}) {
  static_assert(kM <= 2 && kN <= 2);
  float* const c = p.c + static_cast<std::int64_t>(row) * kTileSide * p.c_row;
  float* const next_row = c + kTileSide * p.c_row;
  const std::int64_t c_bytes = p.c_row * 4;
  if constexpr (kAdd) {
    tile_load<0>(c, c_bytes);
    if constexpr (kN > 1) tile_load<1>(c + p.c_column, c_bytes);
    if constexpr (kM > 1) tile_load<2>(next_row, c_bytes);
    if constexpr (kM > 1 && kN > 1) tile_load<3>(next_row + p.c_column, c_bytes);
  } else {
    tile_zero<0>();
    if constexpr (kN > 1) tile_zero<1>();
    if constexpr (kM > 1) tile_zero<2>();
    if constexpr (kM > 1 && kN > 1) tile_zero<3>();
  }
  const std::uint16_t* a = p.a + row * p.a_row;
  const std::uint32_t* b = p.b;
  for (int k = 0; k < p.depth; ++k) {
#pragma GCC unroll 3
    for (int i = 0; i < kParts; ++i) {
      tile_load<4>(a, 64);
      if constexpr (kM > 1) tile_load<5>(a + p.a_row, 64);
#pragma GCC unroll 3
      for (int j = 0; j < kParts - i; ++j) {
        const std::uint32_t* part = b + j * kN * kTilePairs;
        tile_load<6>(part, 64);
        tile_multiply<0, 4, 6>();
        if constexpr (kM > 1) tile_multiply<2, 5, 6>();
        if constexpr (kN > 1) tile_load<7>(part + kTilePairs, 64);
        if constexpr (kN > 1) tile_multiply<1, 4, 7>();
        if constexpr (kM > 1 && kN > 1) tile_multiply<3, 5, 7>();
      }
      a += kTileHalves;
    }
    b += kParts * kN * kTilePairs;
    between();
  }
  tile_store<0>(c, c_bytes);
  if constexpr (kN > 1) tile_store<1>(c + p.c_column, c_bytes);
  if constexpr (kM > 1) tile_store<2>(next_row, c_bytes);
  if constexpr (kM > 1 && kN > 1) tile_store<3>(next_row + p.c_column, c_bytes);
}

template <int kN, int kParts, bool kAdd>
__attribute__((noinline)) void multiply_tile_rows(const TileProduct& p) {
  int row = 0;
  for (; row + 2 <= p.rows; row += 2) multiply_tiles<2, kN, kParts, kAdd>(p, row);
  if (row < p.rows) multiply_tiles<1, kN, kParts, kAdd>(p, row);
}

/// C += A·B for any number of columns of tiles, two after the other in B and C: `b_pair` from two to the next two.
template <int kParts>
__attribute__((noinline)) void multiply_add_wide(const TileProduct& p, std::int64_t b_pair) {
  for (int row = 0; row < p.rows; row += 2) {
    TileProduct part = p;
    for (int column = 0; column < p.columns; column += 2, part.b += b_pair, part.c += 2 * p.c_column) {
      const bool two = column + 2 <= p.columns;
      if (row + 2 <= p.rows) {
        two ? multiply_tiles<2, 2, kParts, true>(part, row) : multiply_tiles<2, 1, kParts, true>(part, row);
      } else {
        two ? multiply_tiles<1, 2, kParts, true>(part, row) : multiply_tiles<1, 1, kParts, true>(part, row);
      }
    }
  }
}

/// C = A·B, or += where kAdd.
template <int kParts, bool kAdd>
FLASHCORE_INLINE void multiply(const TileProduct& p) {
  if (p.columns == 2)
    multiply_tile_rows<2, kParts, kAdd>(p);
  else
    multiply_tile_rows<1, kParts, kAdd>(p);
}

}  // namespace
}  // namespace flashcore::cpu
