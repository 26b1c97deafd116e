// The register tile that every matrix product of this backend is made of: C = start + A·B with vectors along C's rows.
//
// A's elements are read one at a time and broadcast, so A may lie in memory by rows or by columns, and keys and values
// take part as they are, without packing. B and C have kVectors vectors a row.
#pragma once

#include "vec.h"

namespace flashcore::cpu {
namespace {

/// How C starts.
enum class Start {
  zero,
  given,   // every row starts as the vectors `start`
  add,     // C's own values
  scaled,  // C's own values, each column multiplied with `start`
};

struct Product {
  int m = 0;  // rows of C
  int k = 0;
  const float* a = nullptr;
  std::int64_t lda = 0;
  const float* b = nullptr;
  std::int64_t ldb = 0;
  float* c = nullptr;
  std::int64_t ldc = 0;
  const VecF* start = nullptr;
  VecF* max = nullptr;             // kMax: raised to the largest value of each column
  const char* prefetch = nullptr;  // a stream to bring into L2 on the way, 32 bytes for each step of k; may be null
};

template <int kRows, int kVectors, bool kColumnsOfA, bool kPrefetch>
FLASHCORE_INLINE void accumulate(VecF (&c)[kRows][kVectors], int k, const float* a, std::int64_t lda, const float* b,
                                 std::int64_t ldb, const char*& prefetch) {
#pragma GCC unroll 2
  for (int i = 0; i < k; ++i) {
    VecF row[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const VecF x = broadcast(kColumnsOfA ? a[m] : a[m * lda]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) c[m][n] += x * row[n];
    }
    if constexpr (kPrefetch) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += 32;
    }
    a += kColumnsOfA ? lda : 1;
    b += ldb;
  }
}

template <int kRows, int kVectors, bool kColumnsOfA, Start kStart, bool kMax, bool kPrefetch>
FLASHCORE_INLINE void tile(const Product& p, int first, std::int64_t lda, std::int64_t ldb, std::int64_t ldc,
                           const char*& prefetch) {
  float* out = p.c + first * ldc;
  VecF c[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      if constexpr (kStart == Start::zero) c[m][n] = VecF{};
      if constexpr (kStart == Start::given) c[m][n] = p.start[n];
      if constexpr (kStart == Start::add) c[m][n] = load(out + m * ldc + n * kLanes);
      if constexpr (kStart == Start::scaled) c[m][n] = load(out + m * ldc + n * kLanes) * p.start[n];
    }
  const float* a = p.a + (kColumnsOfA ? first : first * lda);
  accumulate<kRows, kVectors, kColumnsOfA, kPrefetch>(c, p.k, a, lda, p.b, ldb, prefetch);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) store(out + m * ldc + n * kLanes, c[m][n]);
  if constexpr (kMax) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      VecF top = c[0][n];
#pragma GCC unroll 16
      for (int m = 1; m < kRows; ++m) top = max_of(top, c[m][n]);
      p.max[n] = max_of(p.max[n], top);
    }
  }
}

/// kLda, kLd: leading dimensions of A, and of B and C, where they are known to the compiler; else 0.
template <int kVectors, bool kColumnsOfA, Start kStart, bool kMax, int kLda, int kLd>
__attribute__((noinline)) void multiply(const Product& p) {
  const std::int64_t lda = kLda ? kLda : p.lda;
  const std::int64_t ldb = kLd ? kLd : p.ldb;
  const std::int64_t ldc = kLd ? kLd : p.ldc;
  constexpr int kRows = kTileRows * (kVectors == 1 ? 2 : 1);
  const char* prefetch = p.prefetch;
  int m = 0;
  if (kVectors > 1 && prefetch) {
    for (; m + kRows <= p.m; m += kRows)
      tile<kRows, kVectors, kColumnsOfA, kStart, kMax, (kVectors > 1)>(p, m, lda, ldb, ldc, prefetch);
  }
  for (; m + kRows <= p.m; m += kRows)
    tile<kRows, kVectors, kColumnsOfA, kStart, kMax, false>(p, m, lda, ldb, ldc, prefetch);
  if constexpr (kRows > 4) {
    for (; m + 4 <= p.m; m += 4) tile<4, kVectors, kColumnsOfA, kStart, kMax, false>(p, m, lda, ldb, ldc, prefetch);
  }
  for (; m < p.m; ++m) tile<1, kVectors, kColumnsOfA, kStart, kMax, false>(p, m, lda, ldb, ldc, prefetch);
}

/// A·B where B and C are one tile wide (`vectors` ≤ kTileVectors) and dense.
template <bool kColumnsOfA, Start kStart, bool kMax, int kLda = 0>
FLASHCORE_INLINE void multiply_dense(int vectors, const Product& p) {
  if (vectors == 1)
    multiply<1, kColumnsOfA, kStart, kMax, kLda, kLanes>(p);
  else if (vectors == 2)
    multiply<2, kColumnsOfA, kStart, kMax, kLda, 2 * kLanes>(p);
  else if constexpr (kTileVectors >= 3)
    multiply<3, kColumnsOfA, kStart, kMax, kLda, 3 * kLanes>(p);
}

}  // namespace
}  // namespace flashcore::cpu
