// Every row of every device × every feature it claims, against the oracle. A new row or table is found by itself.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ostream>

#include "../support/attention_case.h"
#include "../support/bounds.h"
#include "case_lines.h"
#include "each_row.h"
#include "registry.h"

namespace flashcore::testing {
namespace {

using detail::FeatureSet;
using detail::Kernel;
using detail::Phase;
using detail::Problem;

constexpr const char* kDTypeWords[] = {"fp32", "fp64", "fp16", "bf16", "e4m3"};

Problem with_dtype(const std::string& line, const std::string& dtype) {
  const std::size_t space = line.find(' ');
  return detail::parse_problem(line.substr(0, space) + ' ' + dtype + line.substr(space));
}

/// The line in every dtype that the row takes. Descales belong to float8 alone, as do other output dtypes.
std::vector<Problem> problems_for(const Kernel& row, Device device, const std::string& line) {
  std::vector<Problem> problems;
  for (const char* dtype : kDTypeWords) {
    const Problem p = with_dtype(line, dtype);
    const bool float8 = p.dtype == DType::float8_e4m3;
    if (!float8 && ((p.flags & detail::kDescale) || p.dtype_out != p.dtype)) continue;
    if (detail::refusal(row, p, device_info(device)).empty()) problems.push_back(p);
  }
  return problems;
}

struct RowCase {
  const Kernel* row;
  Device device;
  std::string line;
};

std::ostream& operator<<(std::ostream& os, const RowCase& c) { return os << c.row->name << ": " << c.line; }

std::vector<RowCase> all_row_cases() {
  std::vector<RowCase> cases;
  for (const Device device : test_devices())
    for (const Kernel* row : detail::kernels_of(device.type))
      for (const char* line : kCaseLines)
        if (!problems_for(*row, device, line).empty()) cases.push_back({row, device, line});
  return cases;
}

std::string name_of_case(const ::testing::TestParamInfo<RowCase>& info) {
  return as_test_name(std::string(info.param.row->name) + "__" + info.param.line);
}

/// Whether the row takes the case as it lies in memory. Unaligned rows are the one thing it may refuse here.
bool takes(const AttentionCase& c, const Kernel& row) {
  const Support support = c.supports();
  if (support.ok) return true;
  EXPECT_FALSE(row.features & detail::kUnaligned) << support.why;
  return false;
}

class RowTest : public ::testing::TestWithParam<RowCase> {};

TEST_P(RowTest, AgreesWithTheOracle) {
  const RowCase& param = GetParam();
  bool ran = false;
  for (const Problem& problem : problems_for(*param.row, param.device, param.line))
    for (const Variant& variant : all_variants()) {
      std::vector<std::string> words = words_of(*param.row, problem, param.device);
      if (&variant != &all_variants()[0]) words.resize(1);  // settings once: layouts are no matter of theirs
      for (const std::string& word : words) {
        SCOPED_TRACE(to_line(problem) + ", " + variant.name + ", " + word);
        AttentionCase c(problem, param.device, variant);
        c.options.kernel = word;
        if (!takes(c, *param.row)) break;
        c.run();
        c.check();
        ran = true;
      }
    }
  if (!ran) GTEST_SKIP() << "all variants of this case have unaligned rows";
}

INSTANTIATE_TEST_SUITE_P(Rows, RowTest, ::testing::ValuesIn(all_row_cases()), name_of_case);

class EachRow : public ::testing::TestWithParam<Row> {
 protected:
  const Kernel& row() const { return *GetParam().row; }
  Device device() const { return GetParam().device; }

  /// The first of the lines that the row takes.
  Problem first_taken(std::initializer_list<const char*> lines) const {
    for (const char* line : lines) {
      const Problem problem = detail::parse_problem(line);
      if (detail::refusal(row(), problem, device_info(device())).empty()) return problem;
    }
    ADD_FAILURE() << row().name << " takes none of these problems";
    return detail::parse_problem(*lines.begin());
  }
};
class EachForwardRow : public EachRow {};
class EachBackwardRow : public EachRow {};

TEST_P(EachRow, HasACaseForEveryFeatureItClaims) {
  FeatureSet tried = detail::kUnaligned;                                        // every case is run with odd gaps
  if (!(row().phases & bit(Phase::backward))) tried |= detail::kDeterministic;  // a forward pass always is
  for (const char* line : kCaseLines)
    for (const Problem& p : problems_for(row(), device(), line)) tried |= features_of(p);
  EXPECT_EQ(detail::describe_features(row().features & ~tried), "");
}

TEST_P(EachRow, GivesTheSameBitsAgain) {
  const Problem problem = first_taken(
      {"fwd fp16 b2 q70 k130 h4/2 d64 causal_br dropout0.1 seed9 lse", "fwd fp16 b2 q70 k130 h4/2 d64 causal_br lse",
       "fwd fp16 b2 q70 k70 h4 d64", "bwd fp16 b2 q70 k130 h4/2 d64 causal_br bias sinks dbias dsinks deterministic",
       "bwd fp16 b2 q70 k130 h4/2 d64 causal_br deterministic", "bwd fp16 b2 q70 k70 h4 d64 deterministic",
       "decode fp16 b3 q1 k300 h4/2 d64 lse"});
  AttentionCase first(problem, device());
  AttentionCase second(problem, device());
  for (AttentionCase* c : {&first, &second}) {
    c->options.kernel = row().name;
    c->run();
  }
  EXPECT_EQ(first.output_bytes(), second.output_bytes()) << to_line(problem);
}

TEST_P(EachBackwardRow, LeavesOutGradientsThatAreNotWanted) {
  const Problem problem = first_taken({"bwd fp32 b2 q9 k20 h4/2 d16 causal_br sinks bias dbias dsinks",
                                       "bwd fp32 b2 q9 k20 h4/2 d16 causal_br sinks dsinks",
                                       "bwd fp32 b2 q9 k20 h4/2 d16 causal_br", "bwd fp16 b2 q64 k64 h4 d64"});
  constexpr TestTensor AttentionCase::* kTensors[] = {&AttentionCase::dq, &AttentionCase::dk, &AttentionCase::dv,
                                                      &AttentionCase::dbias, &AttentionCase::dsinks};
  constexpr TensorView AttentionGrads::* kViews[] = {&AttentionGrads::dq, &AttentionGrads::dk, &AttentionGrads::dv,
                                                     &AttentionGrads::dbias, &AttentionGrads::dsinks};
  AttentionCase whole(problem, device());
  whole.options.kernel = row().name;
  whole.run();
  const AttentionCase untouched(problem, device());
  for (int wanted = 0; wanted < 5; ++wanted) {
    if (!(whole.*kTensors[wanted])) continue;
    AttentionCase part(problem, device());
    part.options.kernel = row().name;
    AttentionGrads grads;
    grads.*kViews[wanted] = part.grads().*kViews[wanted];
    attention_backward(part.inputs(), part.outputs(), part.cotangents(), grads, part.options);
    part.download();
    for (int n = 0; n < 5; ++n)
      EXPECT_EQ((part.*kTensors[n]).bytes(), ((n == wanted ? whole : untouched).*kTensors[n]).bytes())
          << "gradient " << n << " where only " << wanted << " is wanted";
  }
}

struct ReferenceShape {
  const char* name;
  const char* line;
};
constexpr ReferenceShape kReferenceShapes[] = {
    {"tiny", "fwd fp16 b1 q32 k32 h1 d64"},          {"small", "fwd fp16 b1 q64 k64 h2 d64"},
    {"medium", "fwd fp16 b1 q128 k128 h4 d64"},      {"mission", "fwd fp16 b1 q512 k512 h8 d64"},
    {"multi_batch", "fwd fp16 b4 q256 k256 h8 d64"},
};

TEST_P(EachForwardRow, MeetsTheReferenceShapes) {
  bool ran = false;
  for (const ReferenceShape& shape : kReferenceShapes)
    for (const std::uint64_t seed : {0u, 42u, 12345u}) {
      const Problem problem = detail::parse_problem(shape.line);
      if (!detail::refusal(row(), problem, device_info(device())).empty()) continue;
      AttentionCase c(problem, device(), all_variants()[0], seed);
      c.options.kernel = row().name;
      c.run();
      const Array4 truth = oracle_forward(c.oracle).out;
      double sum = 0;
      double worst = 0;
      std::size_t n = 0;
      for_each_index(c.out.view(), [&](const Index& index) {
        const double error = std::fabs(c.out.get(index) - truth.values()[n++]);
        sum += error;
        if (!(error <= worst)) worst = error;  // NaN stays
      });
      EXPECT_LE(worst, 1e-3) << shape.name << ", seed " << seed;
      EXPECT_LE(sum / static_cast<double>(n), 1e-4) << shape.name << ", seed " << seed;
      ran = true;
    }
  if (!ran) GTEST_SKIP() << "the row takes no plain fp16 forward";
}

INSTANTIATE_TEST_SUITE_P(Rows, EachRow, ::testing::ValuesIn(rows_of(~0u)), name_of_row);
INSTANTIATE_TEST_SUITE_P(Rows, EachForwardRow, ::testing::ValuesIn(rows_of(bit(Phase::forward))), name_of_row);
INSTANTIATE_TEST_SUITE_P(Rows, EachBackwardRow, ::testing::ValuesIn(rows_of(bit(Phase::backward))), name_of_row);

}  // namespace
}  // namespace flashcore::testing
