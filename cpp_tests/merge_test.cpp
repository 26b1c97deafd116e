// merge_states: two attentions over disjoint keys become the attention over all of them.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "flashcore/flashcore.h"
#include "support/bounds.h"
#include "support/float_formats.h"
#include "support/oracle.h"
#include "support/random.h"
#include "support/test_tensor.h"

namespace flashcore::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kBatch = 2, kHeads = 3, kRows = 5, kDim = 7;

/// One state: tensors on the device and their values.
struct State {
  State(DType dtype, Layout where, Device device, Random& random) : layout(where) {
    const std::int64_t batch = layout == Layout::thd ? 1 : kBatch;
    const DType lse_dtype = dtype == DType::float64 ? DType::float64 : DType::float32;
    values = {Array4(batch, kHeads, kRows, kDim), Array4(batch, kHeads, kRows, 1)};
    for (double& x : values.out.values()) x = rounded(dtype, random.normal());
    for (double& x : values.lse.values()) x = rounded(lse_dtype, 5 * random.normal());
    if (layout == Layout::thd) {
      out = TestTensor(dtype, device, {kRows, kHeads, kDim}, 1);
      lse = TestTensor(lse_dtype, device, {kHeads, kRows}, 1);
    } else {
      out = layout == Layout::bhsd ? TestTensor(dtype, device, {batch, kHeads, kRows, kDim}, 1)
                                   : TestTensor(dtype, device, {batch, kRows, kHeads, kDim}, 1);
      lse = TestTensor(lse_dtype, device, {batch, kHeads, kRows}, 1);
    }
    upload();
  }

  Index out_index(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) const {
    return layout == Layout::bhsd ? Index{b, h, i, d} : layout == Layout::bshd ? Index{b, i, h, d} : Index{i, h, d, 0};
  }
  Index lse_index(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return layout == Layout::thd ? Index{h, i, 0, 0} : Index{b, h, i, 0};
  }

  template <class Visit>
  void for_each_row(const Visit& visit) const {
    for (std::int64_t b = 0; b < values.lse.size(0); ++b)
      for (std::int64_t h = 0; h < kHeads; ++h)
        for (std::int64_t i = 0; i < kRows; ++i) visit(b, h, i);
  }

  void upload() {
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      lse.set(lse_index(b, h, i), values.lse(b, h, i, 0));
      for (std::int64_t d = 0; d < kDim; ++d) out.set(out_index(b, h, i, d), values.out(b, h, i, d));
    });
    out.upload();
    lse.upload();
  }

  void download() {
    out.download();
    lse.download();
    for_each_row([&](std::int64_t b, std::int64_t h, std::int64_t i) {
      values.lse(b, h, i, 0) = lse.get(lse_index(b, h, i));
      for (std::int64_t d = 0; d < kDim; ++d) values.out(b, h, i, d) = out.get(out_index(b, h, i, d));
    });
  }

  AttentionState view() const { return {out.view(), lse.view()}; }

  Layout layout;
  OracleResult values;
  TestTensor out, lse;
};

void expect_merged(const OracleResult& actual, const OracleResult& truth, DType dtype) {
  const double bound = unit_roundoff(dtype) * largest(truth.out) + sum_epsilon(dtype) * largest(truth.out);
  expect_close(actual.out, truth.out, bound, "out");
  expect_close(actual.lse, truth.lse, sum_epsilon(dtype) * (1 + largest(truth.lse)), "lse");
}

class MergeStates : public ::testing::TestWithParam<Device> {};

TEST_P(MergeStates, GivesTheUnionOfTheKeys) {
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64})
    for (const Layout layout : {Layout::bhsd, Layout::bshd, Layout::thd}) {
      Random random(7);
      State a(dtype, layout, GetParam(), random), b(dtype, layout, GetParam(), random);
      State merged(dtype, layout, GetParam(), random);
      const OracleResult truth = oracle_merge(a.values, b.values);
      merge_states(a.view(), b.view(), merged.view(), layout);
      merged.download();
      SCOPED_TRACE(name_of(dtype));
      expect_merged(merged.values, truth, dtype);
      EXPECT_TRUE(merged.out.surroundings_untouched());
      EXPECT_TRUE(merged.lse.surroundings_untouched());
    }
}

TEST_P(MergeStates, MayWriteIntoEitherInput) {
  for (const bool into_first : {true, false}) {
    Random random(8);
    State a(DType::float32, Layout::bhsd, GetParam(), random), b(DType::float32, Layout::bhsd, GetParam(), random);
    const OracleResult truth = oracle_merge(a.values, b.values);
    State& target = into_first ? a : b;
    merge_states(a.view(), b.view(), target.view());
    target.download();
    expect_merged(target.values, truth, DType::float32);
  }
}

TEST_P(MergeStates, OfEmptyRowsIsNeverNaN) {
  Random random(9);
  State a(DType::float32, Layout::bhsd, GetParam(), random), b(DType::float32, Layout::bhsd, GetParam(), random);
  State merged(DType::float32, Layout::bhsd, GetParam(), random);
  for (std::int64_t d = 0; d < kDim; ++d) {
    a.values.out(0, 0, 0, d) = a.values.out(0, 0, 1, d) = 0;
    b.values.out(0, 0, 0, d) = b.values.out(0, 0, 2, d) = 0;
  }
  a.values.lse(0, 0, 0, 0) = a.values.lse(0, 0, 1, 0) = -kInfinity;  // row 0: both empty, 1: only a, 2: only b
  b.values.lse(0, 0, 0, 0) = b.values.lse(0, 0, 2, 0) = -kInfinity;
  a.upload();
  b.upload();
  merge_states(a.view(), b.view(), merged.view());
  merged.download();
  expect_merged(merged.values, oracle_merge(a.values, b.values), DType::float32);
  EXPECT_EQ(merged.values.lse(0, 0, 0, 0), -kInfinity);
  EXPECT_EQ(merged.values.out(0, 0, 1, 3), b.values.out(0, 0, 1, 3));
}

TEST_P(MergeStates, RefusesShapesAndDtypesThatDiffer) {
  Random random(10);
  State a(DType::float32, Layout::bhsd, GetParam(), random), b(DType::float16, Layout::bhsd, GetParam(), random);
  State merged(DType::float32, Layout::bhsd, GetParam(), random);
  const std::vector<unsigned char> before = merged.out.bytes();
  EXPECT_THROW(merge_states(a.view(), b.view(), merged.view()), InvalidType);
  AttentionState shorter = a.view();
  shorter.out.shape[2] = kRows - 1;
  EXPECT_THROW(merge_states(a.view(), shorter, merged.view()), InvalidArgument);
  AttentionState shifted = a.view();
  shifted.out.data = static_cast<char*>(shifted.out.data) + 4;
  EXPECT_THROW(merge_states(a.view(), a.view(), shifted), InvalidArgument) << "out overlaps out_a, shifted";
  merged.download();
  EXPECT_EQ(merged.out.bytes(), before);
}

TEST(MergeStatesOnTwoDevices, IsRefusedInTheWordsOfTheCall) {
  Random random(1);
  const State a(DType::float32, Layout::bhsd, kCpu, random);
  AttentionState elsewhere = a.view();
  elsewhere.lse.device = {DeviceType::cuda, 1};
  try {
    merge_states(a.view(), elsewhere, a.view());
    FAIL() << "lse_b is on another device";
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()).find("lse_b is on cuda:1, but out_a is on cpu"), 0u) << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(Merge, MergeStates, ::testing::ValuesIn(test_devices()),
                         [](const auto& info) { return test_name(info.param); });

}  // namespace
}  // namespace flashcore::testing
