// Dropout's random words: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// The word of a weight depends only on the seed and on (batch, head, query, key), so that every kernel, tile size and
// device drops the same weights, and the backward pass draws them again instead of storing them.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace flashcore::detail {

struct Philox4 {
  std::uint32_t word[4];
};

FLASHCORE_HD Philox4 philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                            std::uint64_t seed) {
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = 0xD2511F53ull * c0;
    const std::uint64_t p1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// The random word of one weight: keys 4n … 4n+3 share one Philox call.
FLASHCORE_HD std::uint32_t dropout_word(std::uint64_t seed, std::int64_t batch, std::int64_t head, std::int64_t query,
                                        std::int64_t key) {
  const Philox4 r = philox(static_cast<std::uint32_t>(key >> 2), static_cast<std::uint32_t>(query),
                           static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(batch), seed);
  const std::uint32_t low = key & 1 ? r.word[1] : r.word[0];  // not r.word[key & 3]: registers have no index
  const std::uint32_t high = key & 1 ? r.word[3] : r.word[2];
  return key & 2 ? high : low;
}

}  // namespace flashcore::detail
