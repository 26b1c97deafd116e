// semantics.h: lengths, addresses and visibility, one element at a time. Whatever lengths and tables hold, no address
// leaves the tensors.
#include "kernels/semantics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "../support/oracle.h"
#include "../support/random.h"

namespace flashcore::testing {
namespace {

using namespace flashcore::detail;

Params varlen_params(const std::vector<std::int32_t>& cu_q, const std::vector<std::int32_t>& cu_k) {
  Params p;
  p.size.batch = static_cast<std::int64_t>(cu_q.size()) - 1;
  p.size.seqlen_q = p.size.seqlen_k = 10;
  p.size.total_q = p.size.total_k = 20;
  p.sequence.cu_seqlens_q = cu_q.data();
  p.sequence.cu_seqlens_k = cu_k.data();
  return p;
}

TEST(SequenceOf, IsTheWholeTensorWithoutLengths) {
  Params p;
  p.size.seqlen_q = 5;
  p.size.seqlen_k = 9;
  const Sequence s = sequence_of(p, 3);
  EXPECT_EQ(s.batch, 3);
  EXPECT_EQ(s.q_begin, 0);
  EXPECT_EQ(s.seqlen_q, 5);
  EXPECT_EQ(s.seqlen_k, 9);
}

TEST(SequenceOf, FollowsOffsets) {
  const std::vector<std::int32_t> cu_q = {0, 4, 4, 9}, cu_k = {0, 7, 8, 8};
  const Params p = varlen_params(cu_q, cu_k);
  const Sequence s = sequence_of(p, 1);
  EXPECT_EQ(s.q_begin, 4);
  EXPECT_EQ(s.seqlen_q, 0);
  EXPECT_EQ(s.k_begin, 7);
  EXPECT_EQ(s.seqlen_k, 1);
}

TEST(SequenceOf, CountsUsedAndNewKeys) {
  const std::vector<std::int32_t> used = {3, 30};
  Params p;
  p.size.seqlen_k = 10;
  p.sequence.seqused_k = used.data();
  p.sequence.seqlen_new = 2;
  EXPECT_EQ(sequence_of(p, 0).seqlen_k, 5);
  EXPECT_EQ(sequence_of(p, 1).seqlen_k, 10) << "clamped to the cache";
}

TEST(SequenceOf, NeverLeavesTheTensorsWhateverTheOffsetsHold) {
  Random random(1);
  for (int n = 0; n < 2000; ++n) {
    std::vector<std::int32_t> cu_q(4), cu_k(4), used(3);
    for (auto* values : {&cu_q, &cu_k, &used})
      for (std::int32_t& x : *values) x = static_cast<std::int32_t>(random.integer(-30, 50));
    if (n % 50 == 0) cu_q[1] = cu_k[2] = used[0] = INT32_MAX;
    if (n % 50 == 1) cu_q[1] = cu_k[2] = used[0] = INT32_MIN;
    Params p = varlen_params(cu_q, cu_k);
    p.sequence.seqused_k = used.data();
    for (std::int64_t b = 0; b < 3; ++b) {
      const Sequence s = sequence_of(p, b);
      ASSERT_TRUE(s.q_begin >= 0 && s.seqlen_q >= 0 && s.q_begin + s.seqlen_q <= p.size.total_q);
      ASSERT_TRUE(s.k_begin >= 0 && s.seqlen_k >= 0 && s.k_begin + s.seqlen_k <= p.size.total_k);
    }
  }
}

TEST(BatchOfRow, FindsTheOwnerAndSkipsEmptySequences) {
  const std::vector<std::int32_t> cu = {0, 0, 4, 4, 4, 9};
  const Params p = varlen_params(cu, cu);
  const std::int64_t owners[] = {1, 1, 1, 1, 4, 4, 4, 4, 4};
  for (std::int64_t row = 0; row < 9; ++row) EXPECT_EQ(batch_of_row(p, row), owners[row]) << row;
  EXPECT_EQ(batch_of_row(p, 9), -1);
  EXPECT_EQ(batch_of_row(p, 19), -1);
}

TEST(BatchOfRow, OfNoSequencesIsNobody) {
  const std::vector<std::int32_t> cu = {0};
  EXPECT_EQ(batch_of_row(varlen_params(cu, cu), 0), -1);
}

TEST(VisibleKeys, AgreeWithTheOracleForEveryRule) {
  for (const bool causal : {false, true})
    for (const bool top_left : {false, true})
      for (const std::int64_t left : {-1, 0, 3, 100})
        for (const std::int64_t right : {-1, 0, 2, 100})
          for (const auto& [seqlen_q, seqlen_k] :
               {std::pair{5, 5}, std::pair{4, 9}, std::pair{9, 4}, std::pair{1, 6}}) {
            if (top_left && !causal) continue;
            OracleCall call;
            call.seqlen_q = {seqlen_q};
            call.seqlen_k = {seqlen_k};
            call.causal = causal;
            call.corner = top_left ? Corner::top_left : Corner::bottom_right;
            call.window_left = left;
            call.window_right = right;
            const PositionParams position{causal, top_left, left, right};
            const Sequence s{0, 0, 0, seqlen_q, seqlen_k};
            for (std::int64_t i = 0; i < seqlen_q; ++i) {
              const KeyRange range = visible_keys(position, s, i);
              for (std::int64_t j = 0; j < seqlen_k; ++j)
                ASSERT_EQ(j >= range.begin && j < range.end, oracle_visible(call, 0, 0, i, j))
                    << "i " << i << " j " << j << " window " << left << ',' << right;
            }
          }
}

TEST(VisibleKeys, BoundsThatAreHugeDoNotWrapAround) {
  const Sequence s{0, 0, 0, 4, 4};
  const KeyRange range = visible_keys({false, false, INT64_MAX, INT64_MAX}, s, 3);
  EXPECT_EQ(range.begin, 0);
  EXPECT_EQ(range.end, 4);
}

TEST(KOffset, FollowsThePageTable) {
  const std::vector<std::int32_t> table = {2, 0, 1, 1};  // two sequences, two pages each
  Params p;
  p.page = {table.data(), 2, 4, 3, 2};
  const TensorParams t{nullptr, 1000, 100, 10};
  const Sequence second{1, 0, 0, 1, 8};
  EXPECT_EQ(k_offset(p, t, {0, 0, 0, 1, 8}, 0, 0), 2000);
  EXPECT_EQ(k_offset(p, t, {0, 0, 0, 1, 8}, 3, 6), 0 + 300 + 20);
  EXPECT_EQ(k_offset(p, t, second, 1, 5), 1000 + 100 + 10);
}

TEST(KOffset, OfAPageOutsideTheCacheIsMinusOne) {
  const std::vector<std::int32_t> table = {-1, 3};
  Params p;
  p.page = {table.data(), 0, 4, 3, 2};
  const TensorParams t{nullptr, 1000, 100, 10};
  const Sequence s{0, 0, 0, 1, 8};
  EXPECT_EQ(k_offset(p, t, s, 0, 0), -1);
  EXPECT_EQ(k_offset(p, t, s, 0, 4), -1);
  EXPECT_EQ(k_offset(p, t, s, 0, 8), -1) << "beyond the table";
}

TEST(Offsets, AreSixtyFourBitsWide) {
  const std::int64_t large = std::int64_t(1) << 33;
  const TensorParams t{nullptr, large, 1 << 20, 1 << 10};
  const Sequence s{3, 0, 0, 1, 1};
  EXPECT_EQ(q_offset(t, s, 2, 1), 3 * large + (2 << 20) + (1 << 10));
  EXPECT_EQ(k_offset(Params{}, t, s, 2, 1), 3 * large + (2 << 20) + (1 << 10));
}

TEST(ScoreOf, AppliesScaleSoftcapAlibiAndBiasInThisOrder) {
  float bias = 0.25f;
  float slope = 0.5f;
  Params p;
  p.score.softcap = 3;
  p.bias = {&bias, DType::float32, 0, 0, 0, 0};
  p.alibi = {&slope, DType::float32, 0, 0};
  const Sequence s{0, 0, 0, 2, 6};
  const auto score = score_of<double>(p, s, 0, 1, 2, 8.0, 0.5, 0.5);
  const double t = std::tanh(8.0 * 0.5 / 3);
  EXPECT_DOUBLE_EQ(score.value, 3 * t - 0.5 * 3 + 0.25);  // distance |1 + 6 - 2 - 2|
  EXPECT_DOUBLE_EQ(score.slope, 1 - t * t);
}

TEST(DropoutFactor, DropsBelowTheThresholdAndScalesTheRest) {
  const DropoutParams d{9, 1u << 31, 2.0};
  const Sequence s{1, 0, 0, 4, 64};
  for (std::int64_t j = 0; j < 64; ++j)
    ASSERT_EQ(dropout_factor<double>(d, s, 2, 3, j), oracle_random_word(9, 1, 2, 3, j) < (1u << 31) ? 0 : 2);
  EXPECT_EQ(dropout_factor<double>(DropoutParams{9, 0, 1}, s, 2, 3, 4), 1);
}

TEST(Rotated, TurnsPairsByTheirAngle) {
  const double row[] = {1, 2, 3, 4, 5};
  const double cosine[] = {0, 0, 0.6, 0.8}, sine[] = {0, 0, 0.8, 0.6};  // two positions, two pairs
  RotaryParams r{cosine, sine, DType::float64, 2, 2, 2, 4, false};
  EXPECT_DOUBLE_EQ(rotated(row, 0, 1, r), 1 * 0.6 - 3 * 0.8);
  EXPECT_DOUBLE_EQ(rotated(row, 2, 1, r), 3 * 0.6 + 1 * 0.8);
  EXPECT_DOUBLE_EQ(rotated(row, 3, 1, r), 4 * 0.8 + 2 * 0.6);
  EXPECT_EQ(rotated(row, 4, 1, r), 5) << "beyond rotary_dim";
  EXPECT_EQ(rotated(row, 0, 2, r), 1) << "beyond the tables";
  EXPECT_EQ(rotated(row, 0, -1, r), 1) << "before the tables";
  r.interleaved = true;
  EXPECT_DOUBLE_EQ(rotated(row, 0, 1, r), 1 * 0.6 - 2 * 0.8);
  EXPECT_DOUBLE_EQ(rotated(row, 3, 1, r), 4 * 0.8 + 3 * 0.6);
}

}  // namespace
}  // namespace flashcore::testing
