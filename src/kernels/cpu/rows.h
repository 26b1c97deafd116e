// The arithmetic of rows on the CPU: dot products, sums of scaled rows, conversions, and the choice of storage type.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "../numbers.h"
#include "../params.h"

namespace flashcore::cpu {

template <class Acc>
inline constexpr Acc kMinusInfinity = -std::numeric_limits<Acc>::infinity();

/// Calls `body` with a value of the type that 16-bit and wider floats are stored in.
template <class Body>
void with_wide_storage(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float16:
      return body(detail::Float16{});
    case DType::bfloat16:
      return body(detail::BFloat16{});
    case DType::float32:
      return body(float{});
    case DType::float64:
      return body(double{});
    default:
      return;  // no row and no primitive accepts another dtype
  }
}

/// The same with float8 as well.
template <class Body>
void with_storage(DType dtype, Body&& body) {
  if (dtype == DType::float8_e4m3) return body(detail::Float8E4M3{});
  with_wide_storage(dtype, body);
}

/// Σ a[i]·b[i]. Independent partial sums let the compiler use vector instructions, and round less than one chain.
template <class Acc>
Acc dot(const Acc* a, const Acc* b, std::int64_t n) {
  constexpr int kLanes = 16;
  Acc lane[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += a[i + l] * b[i + l];
  Acc sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  return sum + lane[0];
}

/// target += x·row. A factor of 0 touches nothing, so that NaN in a row without weight stays where it is.
template <class Acc>
void add_scaled(Acc* target, Acc x, const Acc* row, std::int64_t n) {
  if (x == 0) return;
  for (std::int64_t i = 0; i < n; ++i) target[i] += x * row[i];
}

template <class Acc, class T>
void load_row(Acc* target, const T* row, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) target[i] = static_cast<Acc>(detail::load(row[i]));
}

template <class T, class Acc>
void store_row(T* target, const Acc* row, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) detail::store(target[i], row[i]);
}

/// Whether k_offset found the key: a page table may point nowhere.
inline bool is_present(const detail::Params& p, std::int64_t offset) {
  return !p.page.block_table || offset != -1;  // without pages any offset is one: strides may be negative
}

/// Rows of a tensor: batch (1 where packed), heads, rows of a head, elements of a row.
struct Extents {
  std::int64_t batch;
  std::int64_t heads;
  std::int64_t rows;
  std::int64_t dim;
};

inline Extents query_extents(const detail::Params& p, std::int64_t dim) {
  const bool packed = p.sequence.cu_seqlens_q != nullptr;
  return {packed ? 1 : p.size.batch, p.size.heads_q, packed ? p.size.total_q : p.size.seqlen_q, dim};
}

inline Extents key_extents(const detail::Params& p, std::int64_t dim) {
  const bool packed = p.sequence.cu_seqlens_k != nullptr;
  return {packed ? 1 : p.size.batch, p.size.heads_k, packed ? p.size.total_k : p.size.seqlen_k, dim};
}

/// Writes `value` to every element of a tensor (TensorParams, or RowParams with dim 1). Nothing if it is not wanted.
template <class T, class Tensor>
void fill(const Tensor& t, const Extents& extents, T value) {
  if (!t.data) return;
  for (std::int64_t b = 0; b < extents.batch; ++b)
    for (std::int64_t h = 0; h < extents.heads; ++h)
      for (std::int64_t i = 0; i < extents.rows; ++i)
        std::fill_n(static_cast<T*>(t.data) + b * t.batch + h * t.head + i * t.seq, extents.dim, value);
}

}  // namespace flashcore::cpu
