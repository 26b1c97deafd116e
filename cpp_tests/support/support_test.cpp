// The judges judged: the oracle's gradients by finite differences, its softmax and merging by hand, formats by values.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "attention_case.h"
#include "bounds.h"
#include "float_formats.h"
#include "problem.h"

namespace flashcore::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Σ dout·out + Σ dlse·lse: the function whose gradients the backward pass gives. Empty rows do not count.
double loss(const OracleCall& call, const Array4& dout, const Array4& dlse) {
  const OracleResult r = oracle_forward(call);
  double sum = 0;
  for (std::size_t n = 0; n < r.out.values().size(); ++n) sum += r.out.values()[n] * dout.values()[n];
  for (std::size_t n = 0; n < r.lse.values().size(); ++n)
    if (r.lse.values()[n] != -kInfinity) sum += r.lse.values()[n] * dlse.values()[n];
  return sum;
}

Array4 random_like(Random& random, const Array4& x) {
  Array4 y = x;
  for (double& value : y.values()) value = random.normal();
  return y;
}

void expect_slopes(OracleCall& call, Array4 OracleCall::* input, const Array4& gradient, const Array4& dout,
                   const Array4& dlse, const char* name) {
  constexpr double kStep = 1e-5;
  std::vector<double>& values = (call.*input).values();
  for (std::size_t n = 0; n < values.size(); ++n) {
    const double x = values[n];
    if (std::isnan(x)) {  // hidden: no query sees it
      EXPECT_EQ(gradient.values()[n], 0) << name << " " << n;
      continue;
    }
    values[n] = x + kStep;
    const double above = loss(call, dout, dlse);
    values[n] = x - kStep;
    const double below = loss(call, dout, dlse);
    values[n] = x;
    EXPECT_NEAR(gradient.values()[n], (above - below) / (2 * kStep), 1e-7) << name << " " << n;
  }
}

class OracleGradients : public ::testing::TestWithParam<const char*> {};

TEST_P(OracleGradients, AgreeWithFiniteDifferences) {
  AttentionCase c(detail::parse_problem(GetParam()), Device{});
  Random random(5);
  const OracleResult forward = oracle_forward(c.oracle);
  const Array4 dout = random_like(random, forward.out);
  const Array4 dlse = random_like(random, forward.lse);
  const OracleGrads grads = oracle_backward(c.oracle, dout, dlse);
  expect_slopes(c.oracle, &OracleCall::q, grads.dq, dout, dlse, "dq");
  expect_slopes(c.oracle, &OracleCall::k, grads.dk, dout, dlse, "dk");
  expect_slopes(c.oracle, &OracleCall::v, grads.dv, dout, dlse, "dv");
  if (c.oracle.bias) expect_slopes(c.oracle, &OracleCall::bias, grads.dbias, dout, dlse, "dbias");
  if (c.oracle.sinks) expect_slopes(c.oracle, &OracleCall::sinks, grads.dsinks, dout, dlse, "dsinks");
}

INSTANTIATE_TEST_SUITE_P(Support, OracleGradients,
                         ::testing::Values("fwd fp64 b1 q4 k5 h2 d3", "fwd fp64 b1 q6 k4 h2 d3 causal_br sinks",
                                           "fwd fp64 b1 q4 k6 h4/2 d3/2 causal_tl window2,* bias alibi",
                                           "fwd fp64 b2 q3 k5 h2 d3 softcap1.5 dropout0.4 seed11 mask bias sinks",
                                           "fwd fp64 b3 q4 k5 h2 d2 varlen9/11 causal_br seqused"));

TEST(Oracle, AveragesValuesWhereAllScoresAreEqual) {
  OracleCall call{.q = Array4(1, 1, 1, 2), .k = Array4(1, 1, 4, 2, 3.0), .v = Array4(1, 1, 4, 1)};
  call.seqlen_q = {1};
  call.seqlen_k = {4};
  for (int j = 0; j < 4; ++j) call.v(0, 0, j, 0) = j;
  const OracleResult r = oracle_forward(call);
  EXPECT_DOUBLE_EQ(r.out(0, 0, 0, 0), 1.5);
  EXPECT_DOUBLE_EQ(r.lse(0, 0, 0, 0), std::log(4.0));
}

TEST(Oracle, WeighsTwoKeysByTheLogisticFunction) {
  OracleCall call{.q = Array4(1, 1, 1, 1, 1.0), .k = Array4(1, 1, 2, 1), .v = Array4(1, 1, 2, 1)};
  call.seqlen_q = {1};
  call.seqlen_k = {2};
  call.k(0, 0, 0, 0) = 0.7;
  call.v(0, 0, 0, 0) = 1;
  EXPECT_DOUBLE_EQ(oracle_forward(call).out(0, 0, 0, 0), 1 / (1 + std::exp(-0.7)));
}

TEST(Oracle, GivesZeroAndMinusInfinityWhereNothingIsSeen) {
  OracleCall call{.q = Array4(1, 1, 2, 1, 1.0), .k = Array4(1, 1, 1, 1, 1.0), .v = Array4(1, 1, 1, 1, 1.0)};
  call.seqlen_q = {2};
  call.seqlen_k = {1};
  call.causal = true;
  const OracleResult r = oracle_forward(call);
  EXPECT_EQ(r.out(0, 0, 0, 0), 0);
  EXPECT_EQ(r.lse(0, 0, 0, 0), -kInfinity);
  EXPECT_EQ(r.out(0, 0, 1, 0), 1);
}

TEST(Oracle, MergesTwoHalvesIntoTheWhole) {
  AttentionCase c(detail::parse_problem("fwd fp64 b1 q3 k8 h2 d4"), Device{});
  OracleCall halves[] = {c.oracle, c.oracle};
  for (int half = 0; half < 2; ++half) {
    halves[half].keep = Array4(1, 1, 1, 8);
    for (int j = 0; j < 8; ++j) halves[half].keep(0, 0, 0, j) = j / 4 == half;
  }
  const OracleResult whole = oracle_forward(c.oracle);
  const OracleResult merged = oracle_merge(oracle_forward(halves[0]), oracle_forward(halves[1]));
  expect_close(merged.out, whole.out, 1e-14, "out");
  expect_close(merged.lse, whole.lse, 1e-14, "lse");
}

TEST(FloatFormats, HaveTheValuesOfTheirStandards) {
  EXPECT_EQ(decode(DType::float16, 0x3c00), 1);
  EXPECT_EQ(decode(DType::float16, 0x7bff), 65504);
  EXPECT_EQ(decode(DType::float16, 0x0001), std::ldexp(1, -24));
  EXPECT_EQ(decode(DType::float16, 0xfc00), -kInfinity);
  EXPECT_EQ(decode(DType::bfloat16, 0x3f80), 1);
  EXPECT_EQ(decode(DType::bfloat16, 0xc049), -3.140625);
  EXPECT_EQ(decode(DType::float8_e4m3, 0x38), 1);
  EXPECT_EQ(decode(DType::float8_e4m3, 0x7e), 448);
  EXPECT_EQ(decode(DType::float8_e4m3, 0x01), std::ldexp(1, -9));
  EXPECT_TRUE(std::isnan(decode(DType::float8_e4m3, 0xff)));
}

TEST(FloatFormats, RoundToNearestEven) {
  EXPECT_EQ(rounded(DType::float16, 2049), 2048);
  EXPECT_EQ(rounded(DType::float16, 2051), 2052);
  EXPECT_EQ(rounded(DType::bfloat16, 257), 256);
  EXPECT_EQ(rounded(DType::bfloat16, 259), 260);
  EXPECT_EQ(rounded(DType::float16, 65519), 65504);
  EXPECT_EQ(rounded(DType::float16, 65520), kInfinity);
}

TEST(TestTensors, NoticeWritesBesideThem) {
  TestTensor t(DType::float32, Device{}, {2, 3}, 1);
  for_each_index(t.view(), [&](const Index& index) { t.set(index, 1); });
  t.upload();
  EXPECT_TRUE(t.surroundings_untouched());
  static_cast<float*>(t.view().data)[3] = 5;  // in the gap after the first row
  t.download();
  EXPECT_FALSE(t.surroundings_untouched());
}

}  // namespace
}  // namespace flashcore::testing
