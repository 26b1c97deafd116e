// Query heads as rows of their key head: when, and that every row stays where it was.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/common/grouped_heads.h"

namespace flashcore::testing {
namespace {

using detail::Params;

constexpr int kBlockM = 128;

/// batch 4, 8 query heads on 2 key heads, 5 queries, head_dim 16; `bshd`: heads of a query lie side by side.
Params call(std::int64_t seqlen = 5, bool bshd = false) {
  Params p;
  p.size.batch = 4;
  p.size.seqlen_q = seqlen;
  p.size.total_q = 4 * seqlen;
  p.size.heads_q = 8;
  p.size.heads_k = 2;
  p.size.head_dim = p.size.head_dim_v = 16;
  p.q.batch = p.out.batch = 8 * seqlen * 16;
  p.q.head = p.out.head = bshd ? 16 : seqlen * 16;
  p.q.seq = p.out.seq = bshd ? 8 * 16 : 16;
  static float memory;
  p.lse = {&memory, 8 * seqlen, seqlen, 1};
  return p;
}

std::vector<std::int64_t> row_offsets(const Params& p, std::int64_t batch_stride, std::int64_t head, std::int64_t seq) {
  std::vector<std::int64_t> offsets;
  for (std::int64_t b = 0; b < p.size.batch; ++b)
    for (std::int64_t h = 0; h < p.size.heads_q; ++h)
      for (std::int64_t i = 0; i < p.size.seqlen_q; ++i) offsets.push_back(b * batch_stride + h * head + i * seq);
  return offsets;
}

TEST(GroupedHeads, RowsStayWhereTheyWere) {
  for (const bool one_query : {false, true}) {
    const Params p = one_query ? call(1, true) : call();
    const Params packed = with_heads_as_rows(p, kBlockM, 8);
    ASSERT_EQ(packed.size.heads_q, 2);
    EXPECT_EQ(packed.size.seqlen_q, 4 * p.size.seqlen_q);
    EXPECT_EQ(packed.size.total_q, 4 * p.size.total_q);
    EXPECT_EQ(row_offsets(packed, packed.q.batch, packed.q.head, packed.q.seq),
              row_offsets(p, p.q.batch, p.q.head, p.q.seq));
    EXPECT_EQ(row_offsets(packed, packed.out.batch, packed.out.head, packed.out.seq),
              row_offsets(p, p.out.batch, p.out.head, p.out.seq));
    EXPECT_EQ(row_offsets(packed, packed.lse.batch, packed.lse.head, packed.lse.seq),
              row_offsets(p, p.lse.batch, p.lse.head, p.lse.seq));
  }
}

TEST(GroupedHeads, StayApartWhereThatSavesNoRound) {
  EXPECT_EQ(with_heads_as_rows(call(), kBlockM, 32).size.heads_q, 8) << "32 tiles fill no multiprocessor twice";
  EXPECT_EQ(with_heads_as_rows(call(128), kBlockM, 8).size.heads_q, 8) << "the tiles are full";
}

TEST(GroupedHeads, StayApartWhereMemoryOrTheCallDoesNotAllowIt) {
  EXPECT_EQ(with_heads_as_rows(call(5, true), kBlockM, 8).size.heads_q, 8);
  Params strided = call();
  strided.lse.head += 1;
  EXPECT_EQ(with_heads_as_rows(strided, kBlockM, 8).size.heads_q, 8);
  strided.lse.data = nullptr;
  EXPECT_EQ(with_heads_as_rows(strided, kBlockM, 8).size.heads_q, 2) << "lse is not wanted";
  Params broadcast = call(1);
  broadcast.q.head = 0;
  EXPECT_EQ(with_heads_as_rows(broadcast, kBlockM, 8).size.heads_q, 8) << "rows that repeat have no tensor map";
  Params sinks = call();
  sinks.sinks.data = &sinks;
  EXPECT_EQ(with_heads_as_rows(sinks, kBlockM, 8).size.heads_q, 8) << "each head has its own";
}

}  // namespace
}  // namespace flashcore::testing
