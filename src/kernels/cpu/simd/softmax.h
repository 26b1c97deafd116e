// From scores to weights: the exponential with running sums, and dropout.
#pragma once

#include "score.h"

namespace flashcore::cpu {
namespace {

template <int kVectors, bool kShift>
__attribute__((noinline)) void exponentiate_vectors(const ScoreTile& t, const VecF* shift, VecF* sum) {
  VecF total[kVectors];
  VecF offset[kVectors];
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    total[n] = sum[n];
    offset[n] = kShift ? shift[n] : VecF{};
  }
  float* p = t.data;
#pragma GCC unroll 2
  for (int j = 0; j < t.keys; ++j, p += kVectors * kLanes) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      VecF x = load(p + n * kLanes);
      if constexpr (kShift) x += offset[n];
      x = exp2(x);
      total[n] += x;
      store(p + n * kLanes, x);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) sum[n] = total[n];
}

/// tile = 2^(tile + shift), and sum += the tile's column sums.
template <bool kShift>
FLASHCORE_INLINE void exponentiate(const ScoreTile& t, const VecF* shift, VecF* sum) {
  if (t.vectors == 1)
    exponentiate_vectors<1, kShift>(t, shift, sum);
  else if (t.vectors == 2)
    exponentiate_vectors<2, kShift>(t, shift, sum);
  else if constexpr (kTileVectors >= 3)
    exponentiate_vectors<3, kShift>(t, shift, sum);
}

/// The upper and the lower half of each 64-bit product with `factor`.
FLASHCORE_INLINE void multiply_wide(VecU x, std::uint32_t factor, VecU& high, VecU& low) {
  low = x * factor;
#if defined(__AVX512F__)
  const __m512i a = reinterpret_cast<__m512i>(x);
  const __m512i f = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a, f), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), f);
  high = reinterpret_cast<VecU>(_mm512_mask_blend_epi32(0xaaaa, even, odd));
#elif defined(__AVX2__)
  const __m256i a = reinterpret_cast<__m256i>(x);
  const __m256i f = _mm256_set1_epi64x(factor);
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, f), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), f);
  high = reinterpret_cast<VecU>(_mm256_blend_epi32(even, odd, 0xaa));
#else
  typedef std::uint64_t Wide __attribute__((vector_size(kLanes * 8)));
  high = __builtin_convertvector((__builtin_convertvector(x, Wide) * static_cast<std::uint64_t>(factor)) >> 32, VecU);
#endif
}

/// detail::philox for a vector of queries: words[w] belongs to key 4·key_group + w.
FLASHCORE_INLINE void random_words(const detail::Sequence& s, std::int64_t head, std::int64_t key_group, VecU query,
                                   std::uint64_t seed, VecU (&words)[4]) {
  VecU c0 = VecU{} + static_cast<std::uint32_t>(key_group);
  VecU c1 = query;
  VecU c2 = VecU{} + static_cast<std::uint32_t>(head);
  VecU c3 = VecU{} + static_cast<std::uint32_t>(s.batch);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma GCC unroll 1
  for (int round = 0; round < 10; ++round) {
    VecU high0;
    VecU low0;
    VecU high1;
    VecU low1;
    multiply_wide(c0, 0xD2511F53u, high0, low0);
    multiply_wide(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/// Calls change(j, n, factor) for each vector of a tile with what dropout multiplies it with. The tile's first key is
/// a multiple of 4.
template <class Change>
FLASHCORE_INLINE void for_dropout_factors(const ScoreTile& t, const detail::DropoutParams& dropout,
                                          const detail::Sequence& s, std::int64_t head, Change&& change) {
  const VecU lanes = reinterpret_cast<VecU>(lane_numbers());
  const VecU threshold = VecU{} + dropout.threshold;
  const VecF kept = broadcast(static_cast<float>(dropout.keep_scale));
  for (int j = 0; j < t.keys; j += 4)
    for (int n = 0; n < t.vectors; ++n) {
      VecU words[4];
      const VecU query = lanes + static_cast<std::uint32_t>(t.first_query + n * kLanes);
      random_words(s, head, (t.first_key + j) >> 2, query, dropout.seed, words);
      for (int w = 0; w < 4 && j + w < t.keys; ++w) change(j + w, n, words[w] < threshold ? VecF{} : kept);
    }
}

__attribute__((noinline)) void drop_weights(const ScoreTile& t, const detail::DropoutParams& dropout,
                                            const detail::Sequence& s, std::int64_t head) {
  for_dropout_factors(t, dropout, s, head, [&](int j, int n, VecF factor) {
    float* at = t.row(j) + n * kLanes;
    store(at, load(at) * factor);
  });
}

}  // namespace
}  // namespace flashcore::cpu
