// Floats as sums of bfloat16, in the two forms that tile products take: rows, and pairs of rows.
#pragma once

#include "pack.h"
#include "tile_product.h"

#include <type_traits>

namespace flashcore::cpu {
namespace {

/// How many bfloat16 hold a number of a storage type.
template <class T>
constexpr int kPartsOf = 3;
template <>
constexpr int kPartsOf<detail::Float16> = 2;
template <>
constexpr int kPartsOf<detail::BFloat16> = 1;

constexpr std::uint32_t kUpperHalf = 0xffff0000u;

/// The first of the bfloat16 that x is a sum of; x becomes the rest. Three of them hold every float if they are cut
/// off; of two the first is rounded, which leaves less to the second.
template <int kParts>
FLASHCORE_INLINE VecU take_part(VecF& x) {
  VecU bits = reinterpret_cast<VecU>(x);
  if constexpr (kParts == 2) bits += 0x8000u;
  const VecU part = bits & kUpperHalf;
  x -= reinterpret_cast<VecF>(part);
  return part;
}

/// {a, b} as dwords for each of the first kTaken parts; what is left over stays in `a`, `b`.
template <int kParts, int kTaken = kParts>
FLASHCORE_INLINE void split_pair(VecF& a, VecF& b, VecU (&pairs)[kParts]) {
#pragma GCC unroll 3
  for (int i = 0; i < kTaken; ++i) {
    const VecU low = take_part<kParts>(a);
    pairs[i] = (low >> 16) | take_part<kParts>(b);
  }
}

/// The same for numbers with more digits than the parts hold: the last part is rounded.
template <int kParts>
FLASHCORE_INLINE void round_pair(VecF a, VecF b, VecU (&pairs)[kParts]) {
  split_pair<kParts, kParts - 1>(a, b, pairs);
  const auto order =
      reinterpret_cast<__m512i>(VecU{0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
                                     0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f});
  const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
  pairs[kParts - 1] = reinterpret_cast<VecU>(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(both)));
}

/// The first kStored parts of 32 floats as rows of bfloat16, `part` apart; what is left over stays in `low`, `high`.
template <int kParts, int kStored = kParts>
FLASHCORE_INLINE void store_row_parts(VecF& low, VecF& high, std::uint16_t* to, std::int64_t part) {
  const auto upper_halves =
      reinterpret_cast<__m512i>(VecU{0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d,
                                     0x230021, 0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035, 0x3b0039, 0x3f003d});
#pragma GCC unroll 3
  for (int i = 0; i < kStored; ++i) {
    const auto a = reinterpret_cast<__m512i>(take_part<kParts>(low));
    const auto b = reinterpret_cast<__m512i>(take_part<kParts>(high));
    _mm512_storeu_si512(to + i * part, _mm512_permutex2var_epi16(a, upper_halves, b));
  }
}

/// x, but 0 where it is NaN or Inf, which `found` then holds.
FLASHCORE_INLINE VecF finite_of(VecF x, __mmask16& found) {
  constexpr int kNanOrInfinity = 0x99;
  const __mmask16 special = _mm512_fpclass_ps_mask(reinterpret_cast<__m512>(x), kNanOrInfinity);
  found |= special;
  return reinterpret_cast<VecF>(_mm512_maskz_mov_ps(static_cast<__mmask16>(~special), reinterpret_cast<__m512>(x)));
}

template <class T>
FLASHCORE_INLINE VecF load_or_zero(const T* p, int count) {
  if (count >= kLanes) return load_floats(p);
  return count <= 0 ? VecF{} : load_floats(p, count);
}

/// Rows of bfloat16 that fill tiles of one part as they are.
FLASHCORE_INLINE void copy_rows(const Rows<detail::BFloat16>& source, std::uint16_t* to) {
  const std::int64_t row_tiles = source.columns / kTileDepth * kTileHalves;
  for (int j = 0; j < source.rows; ++j) {
    std::uint16_t* row = to + j / kTileSide * row_tiles + j % kTileSide * kTileDepth;
    const detail::BFloat16* from = source.data + j * source.stride;
    for (int d = 0; d < source.columns; d += kTileDepth, row += kTileHalves)
      _mm512_storeu_si512(row, _mm512_loadu_si512(from + d));
  }
}

/// Rows as A: tiles [row][depth][part], filled up with zeros. NaN and Inf have no parts and become 0, except those of
/// bfloat16 in one part. Returns whether there were none (of bfloat16 it need not be known).
template <int kParts, class T>
__attribute__((noinline)) bool split_rows(const Rows<T>& source, std::uint16_t* to) {
  if constexpr (kParts == 1 && std::is_same_v<T, detail::BFloat16>) {
    if (source.columns % kTileDepth == 0 && source.rows % kTileSide == 0) return copy_rows(source, to), true;
  }
  __mmask16 special = 0;
  const std::int64_t row_tiles = whole_depth(source.columns) / kTileDepth * kParts * kTileHalves;
  for (int j = 0; j < whole_tiles(source.rows); ++j) {
    std::uint16_t* row = to + j / kTileSide * row_tiles + j % kTileSide * kTileDepth;
    const T* from = source.data + (j < source.rows ? j : 0) * source.stride;
    const int columns = j < source.rows ? source.columns : 0;
    for (int d = 0; d < source.columns; d += kTileDepth, row += kParts * kTileHalves) {
      VecF low = load_or_zero(from + d, columns - d);
      VecF high = load_or_zero(from + d + kLanes, columns - d - kLanes);
      if constexpr (kParts > 1) {
        low = finite_of(low, special);
        high = finite_of(high, special);
      }
      store_row_parts<kParts>(low, high, row, kTileHalves);
    }
  }
  return special == 0;
}

/// Pairs {a, b} of 16 bfloat16 of two rows.
FLASHCORE_INLINE VecU pair_rows(const detail::BFloat16* a, const detail::BFloat16* b, __mmask16 kept_a,
                                __mmask16 kept_b) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept_a, a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept_b, b));
  return reinterpret_cast<VecU>(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/// split_columns of bfloat16 in one part.
__attribute__((noinline)) bool split_columns_of_one(const Rows<detail::BFloat16>& source, std::int64_t tiles,
                                                    std::uint16_t* to) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 special = 0;
  for (int j = 0; j < source.rows; j += kTileDepth)
    for (int d = 0; d < source.columns; d += kLanes) {
      const int left = source.columns - d;
      const __mmask16 kept = static_cast<__mmask16>(left >= kLanes ? 0xffff : (1 << left) - 1);
      VecF x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        const int row = j + 2 * r;
        const auto* from = source.data + (row < source.rows ? row : 0) * source.stride + d;
        const VecU pairs = pair_rows(from, row + 1 < source.rows ? from + source.stride : from,
                                     row < source.rows ? kept : 0, row + 1 < source.rows ? kept : 0);
        const auto bits = reinterpret_cast<__m512i>(pairs);
        const __mmask32 own = _mm512_cmpeq_epi16_mask(_mm512_and_si512(bits, exponent), exponent);
        special |= own;
        x[r] = reinterpret_cast<VecF>(_mm512_maskz_mov_epi16(~own, bits));
      }
      transpose(x);
      std::uint16_t* tile = to + (d / kTileSide * tiles + j / kTileDepth) * kTileHalves;
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) _mm512_storeu_ps(tile + r * kTileDepth, reinterpret_cast<__m512>(x[r]));
    }
  return special == 0;
}

/// Their transpose as A: rows are columns, depth is rows; `tiles` tiles lie between a row of tiles and the next.
/// NaN and Inf become 0: their products with a weight of 0 must be. Returns whether there were none.
template <int kParts, class T>
__attribute__((noinline)) bool split_columns(const Rows<T>& source, std::int64_t tiles, std::uint16_t* to) {
  if constexpr (kParts == 1 && std::is_same_v<T, detail::BFloat16>) return split_columns_of_one(source, tiles, to);
  __mmask16 special = 0;
  for (int j = 0; j < source.rows; j += kTileDepth)
    for (int d = 0; d < source.columns; d += kLanes) {
      VecF x[kParts][kLanes];
      const int columns = source.columns - d;
#pragma GCC unroll 1
      for (int r = 0; r < kLanes; ++r) {
        const int row = j + 2 * r;
        const T* from = source.data + row * source.stride + d;
        VecF a = row < source.rows ? finite_of(load_or_zero(from, columns), special) : VecF{};
        VecF b = row + 1 < source.rows ? finite_of(load_or_zero(from + source.stride, columns), special) : VecF{};
        VecU pairs[kParts];
        split_pair<kParts>(a, b, pairs);
        for (int i = 0; i < kParts; ++i) x[i][r] = reinterpret_cast<VecF>(pairs[i]);
      }
      std::uint16_t* tile = to + (d / kTileSide * tiles + j / kTileDepth * kParts) * kTileHalves;
      for (int i = 0; i < kParts; ++i, tile += kTileHalves) {
        transpose(x[i]);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) _mm512_storeu_ps(tile + r * kTileDepth, reinterpret_cast<__m512>(x[i][r]));
      }
    }
  return special == 0;
}

/// 32 floats with more digits than the parts hold as rows of bfloat16, `part` apart: the last part is rounded.
template <int kParts>
FLASHCORE_INLINE void round_row(VecF low, VecF high, std::uint16_t* to, std::int64_t part) {
  store_row_parts<kParts, kParts - 1>(low, high, to, part);
  const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low));
  _mm512_storeu_si512(to + (kParts - 1) * part, reinterpret_cast<__m512i>(both));
}

/// 32 rows, or fewer, as B: pairs of rows, one tile of 16 columns after the other, `column` apart; parts are `part`
/// apart. What is missing is 0.
template <int kParts, class T>
__attribute__((noinline)) void pack_row_pairs(const Rows<T>& source, std::int64_t column, std::int64_t part,
                                              std::uint32_t* to) {
  for (int d = 0; d < source.columns; d += kTileSide, to += column)
    for (int r = 0; r < kTileSide; ++r) {
      const T* from = source.data + 2 * r * source.stride + d;
      const int columns = source.columns - d;
      VecF a = 2 * r < source.rows ? load_or_zero(from, columns) : VecF{};
      VecF b = 2 * r + 1 < source.rows ? load_or_zero(from + source.stride, columns) : VecF{};
      VecU pairs[kParts];
      split_pair<kParts>(a, b, pairs);
      for (int i = 0; i < kParts; ++i)
        _mm512_storeu_si512(to + i * part + r * kTileSide, reinterpret_cast<__m512i>(pairs[i]));
    }
}

/// pack_pairs of bfloat16 in one part: pairs of elements are dwords as they lie, of which the bits `flip` are flipped.
__attribute__((noinline)) void pack_dwords(const Rows<detail::BFloat16>& source, std::uint32_t flip, int vectors,
                                           std::uint32_t* to) {
  const __m512i flipped = _mm512_set1_epi32(static_cast<int>(flip));
  for (int n = 0; n < vectors; ++n)
    for (int d = 0; d < source.columns; d += kTileDepth) {
      const int left = source.columns - d;
      const __mmask32 kept = left >= kTileDepth ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      VecF x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int row = n * kLanes + i;
        const bool exists = row < source.rows;
        const auto* from = source.data + (exists ? row : 0) * source.stride + d;
        const __m512i dwords = _mm512_maskz_loadu_epi16(exists ? kept : 0, from);
        x[i] = reinterpret_cast<VecF>(_mm512_xor_si512(dwords, flipped));
      }
      transpose(x);
      std::uint32_t* tile = to + (d / kTileDepth * vectors + n) * kTilePairs;
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) _mm512_storeu_ps(tile + k * kTileSide, reinterpret_cast<__m512>(x[k]));
    }
}

/// factor · rows, transposed, as B: tiles [depth][part][column] of pairs of elements of a row, `vectors` columns.
/// Lanes without a row are 0. NaN and Inf as in split_rows.
template <int kParts, class T>
__attribute__((noinline)) bool pack_pairs(const Rows<T>& source, float factor, int vectors, std::uint32_t* to) {
  if constexpr (kParts == 1 && std::is_same_v<T, detail::BFloat16>)
    return pack_dwords(source, factor < 0 ? 0x80008000u : 0, vectors, to), true;
  __mmask16 special = 0;
  for (int n = 0; n < vectors; ++n)
    for (int d = 0; d < source.columns; d += kTileDepth) {
      VecF x[kParts][kLanes];
#pragma GCC unroll 1
      for (int i = 0; i < kLanes; ++i) {
        const bool exists = n * kLanes + i < source.rows;
        const T* from = source.data + (exists ? n * kLanes + i : 0) * source.stride + d;
        const int columns = exists ? source.columns - d : 0;
        VecF low = load_or_zero(from, columns) * factor;
        VecF high = load_or_zero(from + kLanes, columns - kLanes) * factor;
        if constexpr (kParts > 1) {
          low = finite_of(low, special);
          high = finite_of(high, special);
        }
        alignas(64) std::uint16_t row[kParts * kTileDepth];
        store_row_parts<kParts>(low, high, row, kTileDepth);
        for (int part = 0; part < kParts; ++part)
          x[part][i] = load(reinterpret_cast<const float*>(row + part * kTileDepth));
      }
      for (int part = 0; part < kParts; ++part) {
        transpose(x[part]);
        std::uint32_t* tile = to + ((d / kTileDepth * kParts + part) * vectors + n) * kTilePairs;
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) _mm512_storeu_ps(tile + k * kTileSide, reinterpret_cast<__m512>(x[part][k]));
      }
    }
  return special == 0;
}

}  // namespace
}  // namespace flashcore::cpu
