// Overlap: exact for the views that programs make, judged by the bytes themselves.
#include "overlap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "support/random.h"

namespace flashcore {
namespace {

using detail::byte_range;
using detail::ByteRange;
using detail::is_same_view;
using detail::may_overlap;
using detail::meet;
using detail::overlaps_itself;

using Sizes = std::vector<std::int64_t>;

alignas(64) unsigned char memory[1 << 16];

TensorView view(std::int64_t byte_offset, const Sizes& shape, const Sizes& stride, DType dtype = DType::float32) {
  TensorView t;
  t.data = memory + byte_offset;
  t.dtype = dtype;
  t.rank = static_cast<int>(shape.size());
  for (int i = 0; i < t.rank; ++i) {
    t.shape[i] = shape[i];
    t.stride[i] = stride[i];
  }
  return t;
}

TEST(MayOverlap, SeparateBuffersDoNot) {
  EXPECT_FALSE(may_overlap(view(0, {8}, {1}), view(32, {8}, {1})));
  EXPECT_TRUE(may_overlap(view(0, {8}, {1}), view(31, {8}, {1})));
  EXPECT_TRUE(may_overlap(view(0, {8}, {1}), view(28, {1}, {1})));
}

TEST(MayOverlap, SlicesOfPackedQkvDoNot) {
  // (batch 2, seqlen 5, three, heads 3, head_dim 4) seen as (batch, heads, seqlen, head_dim)
  const Sizes shape = {2, 3, 5, 4};
  const Sizes stride = {5 * 36, 4, 36, 1};
  const TensorView q = view(0, shape, stride);
  const TensorView k = view(12 * 4, shape, stride);
  const TensorView v = view(24 * 4, shape, stride);
  EXPECT_FALSE(may_overlap(q, k));
  EXPECT_FALSE(may_overlap(k, v));
  EXPECT_FALSE(may_overlap(v, q));
  EXPECT_TRUE(may_overlap(q, q));
  EXPECT_TRUE(may_overlap(q, view(11 * 4, shape, stride)));
}

TEST(MayOverlap, PackedAlongEachDimension) {
  for (int packed = 0; packed < 5; ++packed) {  // where the "three" lies among (2, 3, 5, 4)
    Sizes shape = {2, 3, 5, 4};
    Sizes full = shape;
    full.insert(full.begin() + packed, 3);
    Sizes stride(5, 1);
    for (int i = 3; i >= 0; --i) stride[i] = stride[i + 1] * full[i + 1];
    const std::int64_t step = stride[packed] * 4;
    stride.erase(stride.begin() + packed);
    EXPECT_FALSE(may_overlap(view(0, shape, stride), view(step, shape, stride))) << packed;
    EXPECT_FALSE(may_overlap(view(2 * step, shape, stride), view(0, shape, stride))) << packed;
    EXPECT_TRUE(may_overlap(view(0, shape, stride), view(0, shape, stride))) << packed;
  }
}

TEST(MayOverlap, EvenAndOddElementsDoNot) {
  EXPECT_FALSE(may_overlap(view(0, {10}, {2}), view(4, {10}, {2})));
  EXPECT_FALSE(may_overlap(view(0, {10}, {2}), view(76, {10}, {-2})));
  EXPECT_TRUE(may_overlap(view(0, {10}, {2}), view(2, {10}, {2})));  // between elements, in the middle of one
}

TEST(MayOverlap, EmptyTensorsAndNoTensorDoNot) {
  EXPECT_FALSE(may_overlap(view(0, {0, 4}, {4, 1}), view(0, {4}, {1})));
  EXPECT_FALSE(may_overlap(TensorView{}, view(0, {4}, {1})));
}

TEST(MayOverlap, StridesOfSizeOneDimensionsDoNotMatter) {
  EXPECT_FALSE(may_overlap(view(0, {1, 4}, {INT64_MAX, 1}), view(16, {1, 4}, {INT64_MIN, 1})));
}

TEST(MayOverlap, AddressesBeyondAllMemoryCountAsOverlap) {
  EXPECT_TRUE(may_overlap(view(0, {3, 4}, {INT64_MAX / 2, 1}), view(4096, {4}, {1})));
  EXPECT_TRUE(overlaps_itself(view(0, {3, 4}, {INT64_MIN, 1})));
}

TEST(OverlapsItself, DenseAndPermutedViewsDoNot) {
  EXPECT_FALSE(overlaps_itself(view(0, {}, {})));
  EXPECT_FALSE(overlaps_itself(view(0, {2, 3, 4}, {12, 4, 1})));
  EXPECT_FALSE(overlaps_itself(view(0, {4, 2, 3}, {1, 12, 4})));
  EXPECT_FALSE(overlaps_itself(view(400, {2, 3, 4}, {-12, 4, -1})));
  EXPECT_FALSE(overlaps_itself(view(0, {1, 3}, {0, 1})));
  EXPECT_FALSE(overlaps_itself(view(0, {0, 3}, {0, 0})));
  EXPECT_FALSE(overlaps_itself(view(0, {2, 3}, {3, 2})));  // 0 2 4 and 3 5 7
}

TEST(OverlapsItself, BroadcastAndSlidingViewsDo) {
  EXPECT_TRUE(overlaps_itself(view(0, {2, 3}, {0, 1})));
  EXPECT_TRUE(overlaps_itself(view(0, {4, 3}, {1, 1})));
  EXPECT_TRUE(overlaps_itself(view(0, {2, 4}, {3, 1})));
  EXPECT_TRUE(overlaps_itself(view(0, {3, 3}, {2, 4})));
  EXPECT_TRUE(overlaps_itself(view(64, {2, 4}, {-3, 1})));
}

TEST(IsSameView, IgnoresOnlyStridesOfSizeOne) {
  EXPECT_TRUE(is_same_view(view(0, {1, 4}, {7, 1}), view(0, {1, 4}, {9, 1})));
  EXPECT_FALSE(is_same_view(view(0, {2, 2}, {2, 1}), view(0, {2, 2}, {1, 2})));
  EXPECT_FALSE(is_same_view(view(0, {4}, {1}), view(4, {4}, {1})));
  EXPECT_FALSE(is_same_view(view(0, {4}, {1}), view(0, {4}, {1}, DType::int32)));
}

/// Every byte of every element, elements that share one counted twice.
std::vector<std::int64_t> bytes_of(const TensorView& t) {
  std::vector<std::int64_t> starts = {reinterpret_cast<unsigned char*>(t.data) - memory};
  const auto size = static_cast<std::int64_t>(size_of(t.dtype));
  for (int axis = 0; axis < t.rank; ++axis) {
    std::vector<std::int64_t> next;
    for (const std::int64_t start : starts)
      for (std::int64_t i = 0; i < t.shape[axis]; ++i) next.push_back(start + i * t.stride[axis] * size);
    starts = next;
  }
  std::vector<std::int64_t> bytes;
  for (const std::int64_t start : starts)
    for (std::int64_t i = 0; i < size; ++i) bytes.push_back(start + i);
  return bytes;
}

TensorView random_view(testing::Random& random) {
  constexpr DType kDTypes[] = {DType::boolean, DType::float16, DType::float32, DType::float64};
  Sizes shape;
  Sizes stride;
  for (std::int64_t rank = random.integer(0, 4); rank > 0; --rank) {
    shape.push_back(random.integer(0, 15) == 0 ? 0 : random.integer(1, 4));
    stride.push_back(random.integer(-24, 24));
  }
  return view(4096 + random.integer(0, 60), shape, stride, kDTypes[random.integer(0, 3)]);
}

TEST(ByteRange, EndsAtTheOutermostBytes) {
  testing::Random random(43);
  const auto origin = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory));
  for (int round = 0; round < 2000; ++round) {
    const TensorView t = random_view(random);
    const std::vector<std::int64_t> bytes = bytes_of(t);
    const ByteRange range = byte_range(t);
    if (bytes.empty()) {
      ASSERT_EQ(range.begin, range.end) << describe(t);
      continue;
    }
    const auto [first, last] = std::minmax_element(bytes.begin(), bytes.end());
    ASSERT_EQ(range.begin, origin + *first) << describe(t);
    ASSERT_EQ(range.end, origin + *last + 1) << describe(t);
  }
}

TEST(ByteRange, MeetsEveryOtherWhereStridesReachTooFar) {
  const ByteRange far = byte_range(view(0, {3, 4}, {INT64_MAX / 2, 1}));
  EXPECT_TRUE(meet(far, byte_range(view(4096, {4}, {1}))));
  EXPECT_TRUE(meet(byte_range(view(4096, {4}, {1})), far));
}

TEST(ByteRange, NeighboursDoNotMeet) {
  const ByteRange left = byte_range(view(0, {8}, {1}));
  EXPECT_FALSE(meet(left, byte_range(view(32, {8}, {1}))));
  EXPECT_TRUE(meet(left, byte_range(view(31, {8}, {1}))));
}

TEST(Overlap, AgreesWithTheBytesOfRandomViews) {
  testing::Random random(42);
  for (int round = 0; round < 20000; ++round) {
    const TensorView a = random_view(random);
    TensorView b = random_view(random);
    if (round % 2 == 0) {  // a shifted copy of a: the hardest to tell apart
      void* const data = b.data;
      b = a;
      b.data = data;
    }
    const std::vector<std::int64_t> of_a = bytes_of(a);
    const std::set<std::int64_t> set(of_a.begin(), of_a.end());
    bool common = false;
    for (const std::int64_t byte : bytes_of(b)) common = common || set.count(byte) > 0;
    ASSERT_EQ(may_overlap(a, b), common) << describe(a) << " and " << describe(b);
    ASSERT_EQ(may_overlap(b, a), common) << describe(a) << " and " << describe(b);
    ASSERT_EQ(overlaps_itself(a), set.size() < of_a.size()) << describe(a);
  }
}

}  // namespace
}  // namespace flashcore
