// registry: which rows there are, how they are called, and how they refuse.
#include "registry.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "flashcore/error.h"
#include "flashcore/flashcore.h"

namespace flashcore::testing {
namespace {

using namespace flashcore::detail;

TEST(Matches, TakesWholeWordsInARow) {
  EXPECT_TRUE(matches("cuda.reference", ""));
  EXPECT_TRUE(matches("cuda.reference", "cuda.reference"));
  EXPECT_TRUE(matches("cuda.reference", "cuda"));
  EXPECT_TRUE(matches("cuda.reference", "reference"));
  EXPECT_TRUE(matches("cuda.sm90.forward", "cuda.sm90"));
  EXPECT_TRUE(matches("cuda.sm90.forward", "sm90.forward"));
  EXPECT_TRUE(matches("cuda.sm90.forward", "sm90"));
  EXPECT_TRUE(matches("cuda.sm90x.sm90", "sm90"));
  EXPECT_TRUE(matches("cuda.sm90.forward", "sm90"));
}

TEST(Matches, RefusesPartsOfWordsAndOtherNames) {
  EXPECT_FALSE(matches("cuda.reference", "cud"));
  EXPECT_FALSE(matches("cuda.reference", "ference"));
  EXPECT_FALSE(matches("cuda.reference", "cuda."));
  EXPECT_FALSE(matches("cuda.reference", "cpu.reference"));
  EXPECT_FALSE(matches("cuda.reference", "cuda.reference.more"));
  EXPECT_FALSE(matches("cuda.sm90.forward", "cuda.forward"));
}

TEST(Rows, OfTheCpuAreAlwaysThere) { EXPECT_FALSE(kernels_of(DeviceType::cpu).empty()); }

TEST(Rows, OfCudaAreThereWhereCudaWasBuilt) {
  EXPECT_EQ(!kernels_of(DeviceType::cuda).empty(), built_with_cuda());
  EXPECT_EQ(find_backend(DeviceType::cuda) != nullptr, built_with_cuda());
}

TEST(Rows, AreNamedAfterTheirBackendAndOncePerPhase) {
  for (const DeviceType type : {DeviceType::cpu, DeviceType::cuda}) {
    std::set<std::pair<std::string, unsigned>> seen;
    for (const Kernel* row : kernels_of(type)) {
      const std::string backend = type == DeviceType::cpu ? "cpu." : "cuda.";
      EXPECT_EQ(std::string(row->name).substr(0, backend.size()), backend);
      EXPECT_EQ(row->device, type) << row->name;
      EXPECT_NE(row->launch, nullptr) << row->name;
      for (const Phase phase : {Phase::forward, Phase::backward, Phase::decode})
        EXPECT_TRUE(!(row->phases & bit(phase)) || seen.insert({row->name, bit(phase)}).second) << row->name;
    }
  }
}

bool is_rung(const Kernel& row) { return matches(row.name, "ladder"); }

/// Behind the reference stand only the rungs of the ladder: dispatch never comes to them.
TEST(Rows, EndWithReferencesThatKnowEveryFeature) {
  constexpr FeatureSet kScores = kCausal | kCausalTopLeft | kWindow | kMask | kBias | kSoftcap | kAlibi | kSinks |
                                 kDropout | kVarlen | kSequsedK | kGroupedHeads | kHeadDimV | kUnaligned;
  constexpr FeatureSet kOf[] = {kScores | kLse | kDescale, kScores | kDlse | kDbias | kDsinks | kDeterministic,
                                kScores | kLse | kDescale | kPaged | kAppend | kRotary};
  for (const DeviceType type : {DeviceType::cpu, DeviceType::cuda})
    for (const Phase phase : {Phase::forward, Phase::backward, Phase::decode}) {
      const Kernel* last = nullptr;
      for (const Kernel* row : kernels_of(type))
        if ((row->phases & bit(phase)) && !is_rung(*row)) last = row;
      if (!last) {
        EXPECT_TRUE(kernels_of(type).empty());
        continue;
      }
      EXPECT_TRUE(matches(last->name, "reference")) << last->name;
      EXPECT_EQ(describe_features(kOf[static_cast<int>(phase)] & ~last->features), "") << last->name;
      for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32})
        EXPECT_TRUE(last->dtypes & bit(dtype)) << last->name << " " << name_of(dtype);
    }
}

TEST(Rows, OfTheLadderStandBehindTheReference) {
  bool behind = false;
  for (const Kernel* row : kernels_of(DeviceType::cuda)) {
    if (matches(row->name, "reference")) behind = true;
    EXPECT_EQ(is_rung(*row), behind && !matches(row->name, "reference")) << row->name;
  }
}

Kernel row_for_refusals() {
  Kernel row{};
  row.name = "test.row";
  row.phases = bit(Phase::forward);
  row.features = kCausal;
  row.dtypes = bit(DType::float16);
  row.refuse = [](const Problem& p, const DeviceInfo&) {
    return p.size.head_dim > 64 ? std::string("only head_dim up to 64") : std::string();
  };
  return row;
}

TEST(Refusal, SaysWhichPartOfTheProblemIsUnknown) {
  const Kernel row = row_for_refusals();
  const auto reason = [&row](const char* line) { return refusal(row, parse_problem(line), DeviceInfo{}); };
  EXPECT_EQ(reason("fwd fp16 b1 q8 k8 h1 d64 causal"), "");
  EXPECT_EQ(reason("bwd fp16 b1 q8 k8 h1 d64"), "does not do backward");
  EXPECT_EQ(reason("fwd bf16 b1 q8 k8 h1 d64"), "does not know bfloat16");
  EXPECT_EQ(reason("fwd fp16 b1 q8 k8 h1 d64 softcap2 causal bias"), "does not know bias, softcap");
  EXPECT_EQ(reason("fwd fp16 b1 q8 k8 h1 d65"), "only head_dim up to 64");
}

TEST(Refusal, AgreesWithFitsByKind) {
  const Kernel row = row_for_refusals();
  for (const char* line : {"fwd fp16 b1 q8 k8 h1 d64", "fwd fp16 b1 q8 k8 h1 d64 lse", "bwd fp16 b1 q8 k8 h1 d64",
                           "fwd fp32 b1 q8 k8 h1 d64"}) {
    const Problem p = parse_problem(line);
    EXPECT_EQ(fits_by_kind(row, p, features_of(p)), refusal(row, p, DeviceInfo{}).empty()) << line;
  }
}

TEST(Backends, RefuseADeviceThatIsNotThere) {
  EXPECT_THROW(backend_of({DeviceType::cpu, 3}), Unsupported);
  EXPECT_THROW(backend_of({DeviceType::cuda, 99}), Unsupported);
  EXPECT_EQ(backend_of({DeviceType::cpu, 0}).type, DeviceType::cpu);
}

}  // namespace
}  // namespace flashcore::testing
