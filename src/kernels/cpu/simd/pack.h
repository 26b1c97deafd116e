// Between storage and tiles: conversion to floats, and transposition so that queries stand in the lanes.
#pragma once

#include "vec.h"

#include "../../semantics.h"

namespace flashcore::cpu {
namespace {

/// Calls `body` with a value of the type that `dtype` is stored in.
template <class Body>
FLASHCORE_INLINE void with_storage(DType dtype, Body&& body) {
  if (dtype == DType::float16) return body(detail::Float16{});
  if (dtype == DType::bfloat16) return body(detail::BFloat16{});
  body(float{});
}

/// The same with the bytes of a boolean mask.
template <class Body>
FLASHCORE_INLINE void with_plane_storage(DType dtype, Body&& body) {
  if (dtype == DType::boolean) return body(std::uint8_t{});
  with_storage(dtype, body);
}

/// Rows of floats.
struct KeyRows {
  const float* data;
  std::int64_t stride;

  FLASHCORE_INLINE KeyRows from(std::int64_t row) const { return {data + row * stride, stride}; }
};

/// rows × columns of an array in memory; columns are contiguous.
template <class T>
struct Rows {
  const T* data;
  std::int64_t stride;
  int rows;
  int columns;
};

/// Brings rows into the cache that are needed soon: processors do not foresee the next where rows are read or written
/// side by side. There need not be any; behind a tile with fewer than kTileVectors vectors there are none.
template <class T>
FLASHCORE_INLINE void prefetch_rows(const Rows<T>& rows) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < rows.rows; ++i)
    for (int column = 0; column < rows.columns; column += kLine)
      __builtin_prefetch(rows.data + i * rows.stride + column);
}

/// tile[column][row] = factor · source[row][column], for `vectors` vectors of a tile whose rows are `width` floats
/// apart. Lanes without a row are 0.
template <class T>
__attribute__((noinline)) void pack_transposed(const Rows<T>& source, float factor, int vectors, int width,
                                               float* tile) {
  for (int n = 0; n < vectors; ++n) {
    const int rows = min_of(kLanes, source.rows - n * kLanes);
    const T* behind = source.data + (source.rows + n * kLanes) * source.stride;  // of the next tile
    if (vectors == kTileVectors) prefetch_rows(Rows<T>{behind, source.stride, rows, source.columns});
    for (int column = 0; column < source.columns; column += kLanes) {
      const int columns = min_of(kLanes, source.columns - column);
      const T* from = source.data + n * kLanes * source.stride + column;
      float* to = tile + static_cast<std::int64_t>(column) * width + n * kLanes;
      VecF x[kLanes];
      if (rows == kLanes && columns == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) x[i] = load_floats(from + i * source.stride) * factor;
      } else {
        for (int i = 0; i < kLanes; ++i)
          x[i] = i < rows ? load_floats(from + i * source.stride, columns) * factor : VecF{};
      }
      transpose(x);
      if (columns == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * width, x[i]);
      } else {
        for (int i = 0; i < columns; ++i) store(to + i * width, x[i]);
      }
    }
  }
}

/// unpack_transposed for the whole vectors of two bfloat16 a lane that a row has, and how many columns these are.
template <class T>
FLASHCORE_INLINE int unpack_pairs(const float* from, int width, VecF factor, T* target, std::int64_t stride, int rows,
                                  int columns) {
  if constexpr (!std::is_same_v<T, detail::BFloat16>) return 0;
  int column = 0;
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) {
    VecF x[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i, from += 2 * width)
      x[i] = reinterpret_cast<VecF>(narrow_pair(load(from) * factor, load(from + width) * factor));
    transpose(x);
    for (int i = 0; i < kLanes && i < rows; ++i)
      *reinterpret_cast<UnalignedPairs*>(target + i * stride + column) = reinterpret_cast<VecU>(x[i]);
  }
  return column;
}

/// target[row][column] = factor[lane of the row] · tile[column][row], rounded to storage.
template <class T>
__attribute__((noinline)) void unpack_transposed(const float* tile, int vectors, const VecF* factor, T* target,
                                                 std::int64_t stride, int rows, int columns) {
  const int width = vectors * kLanes;
  for (int n = 0; n < vectors; ++n) {
    const T* behind = target + (n + 1) * kLanes * stride;
    if (vectors == kTileVectors) prefetch_rows(Rows<T>{behind, stride, kLanes, columns});
    int column = unpack_pairs<T>(tile + n * kLanes, width, factor[n], target + n * kLanes * stride, stride,
                                 rows - n * kLanes, columns);
    for (; column < columns; column += kLanes) {
      const int count = min_of(kLanes, columns - column);
      const float* from = tile + static_cast<std::int64_t>(column) * width + n * kLanes;
      VecF x[kLanes];
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) x[i] = load(from + i * width) * factor[n];
      } else {
        for (int i = 0; i < kLanes; ++i) x[i] = i < count ? load(from + i * width) * factor[n] : VecF{};
      }
      transpose(x);
      for (int i = 0; i < kLanes && n * kLanes + i < rows; ++i)
        store_floats(target + (n * kLanes + i) * stride + column, x[i], count);
    }
  }
}

/// A row as floats. `target` has room for whole vectors: what lies behind `count` there becomes 0.
template <class T>
FLASHCORE_INLINE void widen_row(const T* source, std::int64_t count, float* target) {
  std::int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes <= count; i += kLanes) store(target + i, load_floats(source + i));
  if (i < count) store(target + i, load_floats(source + i, static_cast<int>(count - i)));
}

/// Rows as floats, `target_stride` apart, with up to a vector of zeros behind the last.
template <class T>
__attribute__((noinline)) void widen_rows(const Rows<T>& source, float* target, std::int64_t target_stride) {
  if (source.stride == source.columns && target_stride == source.columns)
    return widen_row(source.data, static_cast<std::int64_t>(source.rows) * source.columns, target);
  for (int i = 0; i < source.rows; ++i)
    widen_row(source.data + i * source.stride, source.columns, target + i * target_stride);
}

/// Whether no number is NaN or Inf: 0 times them is 0.
template <class T>
bool all_finite(const T* rows, std::int64_t stride, std::int64_t count, int columns) {
  const bool dense = stride == columns;
  const std::int64_t length = dense ? count * columns : columns;
  VecF zeros[4] = {};
  for (std::int64_t i = 0; i < (dense ? 1 : count); ++i) {
    const T* row = rows + i * stride;
    std::int64_t d = 0;
    for (; d + 4 * kLanes <= length; d += 4 * kLanes)
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) zeros[n] += load_floats(row + d + n * kLanes) * 0.f;
    for (; d < length; d += kLanes)
      zeros[0] += load_floats(row + d, static_cast<int>(min_of<std::int64_t>(kLanes, length - d))) * 0.f;
  }
  return sum_of_lanes(zeros[0] + zeros[1] + zeros[2] + zeros[3]) == 0.f;
}

}  // namespace
}  // namespace flashcore::cpu
