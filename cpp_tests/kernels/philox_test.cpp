// philox.h: the published known-answer vectors, and which word of which call belongs to which weight.
#include "kernels/philox.h"

#include <gtest/gtest.h>

#include "../support/oracle.h"
#include "../support/random.h"

namespace flashcore::testing {
namespace {

using detail::Philox4;

void expect_words(const Philox4& actual, std::uint32_t w0, std::uint32_t w1, std::uint32_t w2, std::uint32_t w3) {
  EXPECT_EQ(actual.word[0], w0);
  EXPECT_EQ(actual.word[1], w1);
  EXPECT_EQ(actual.word[2], w2);
  EXPECT_EQ(actual.word[3], w3);
}

TEST(Philox, MatchesKnownAnswerForZeros) {
  expect_words(detail::philox(0, 0, 0, 0, 0), 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8);
}

TEST(Philox, MatchesKnownAnswerForOnes) {
  constexpr std::uint32_t kOnes = 0xffffffff;
  expect_words(detail::philox(kOnes, kOnes, kOnes, kOnes, 0xffffffffffffffff), 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
               0x6d5451fd);
}

TEST(Philox, MatchesKnownAnswerForDigitsOfPi) {
  expect_words(detail::philox(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0x299f31d0a4093822), 0xd16cfe09,
               0x94fdcceb, 0x5001e420, 0x24126ea1);
}

TEST(Philox, OracleMatchesKnownAnswers) {
  const std::uint32_t words[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int key = 0; key < 4; ++key) EXPECT_EQ(oracle_random_word(0, 0, 0, 0, key), words[key]);
}

TEST(Philox, WordOfAWeightIsCountedByKeyQueryHeadBatch) {
  Random random(3);
  for (int n = 0; n < 1000; ++n) {
    const std::uint64_t seed = random.bits();
    const std::int64_t batch = random.integer(0, 100), head = random.integer(0, 100);
    const std::int64_t query = random.integer(0, 1 << 20), key = random.integer(0, 1 << 20);
    ASSERT_EQ(detail::dropout_word(seed, batch, head, query, key), oracle_random_word(seed, batch, head, query, key));
  }
}

TEST(Philox, DropsAboutTheAskedShare) {
  constexpr int kWeights = 100000;
  constexpr double kShare = 0.3;
  int dropped = 0;
  for (int key = 0; key < kWeights; ++key) dropped += detail::dropout_word(42, 1, 2, 3, key) < kShare * 4294967296.0;
  EXPECT_NEAR(dropped / static_cast<double>(kWeights), kShare, 0.01);  // seven standard deviations
}

}  // namespace
}  // namespace flashcore::testing
