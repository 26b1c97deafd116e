// The vectorised CPU rows: every instruction set of this processor against the oracle, at the edges of their tiles.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "../support/attention_case.h"
#include "../support/environment.h"
#include "flashcore/threads.h"
#include "kernels/cpu/simd/isa.h"

namespace flashcore::testing {
namespace {

/// Those of this processor, the best last.
std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const char* name : {"baseline", "avx2", "avx512", "amx", "neon"}) {
    const Environment wanted("FLASHCORE_CPU_ISA", name);
    try {
      names.push_back(cpu::chosen_isa().name);
    } catch (const InvalidArgument&) {
      // not built here, or not in this processor
    }
  }
  return names;
}

class EachIsa : public ::testing::TestWithParam<std::string> {
 protected:
  void check(const std::string& line, std::uint64_t seed = 1) const {
    const Environment wanted("FLASHCORE_CPU_ISA", GetParam().c_str());
    for (const Variant& variant : all_variants()) {
      SCOPED_TRACE(line + ", " + variant.name);
      AttentionCase c(detail::parse_problem(line), Device{}, variant, seed);
      ASSERT_NE(c.supports().kernel, "cpu.reference");
      c.run();
      c.check();
    }
  }
};

// Tiles are 12 to 48 queries wide and 128 or 256 keys long: these sizes leave every kind of rest.
TEST_P(EachIsa, TakesSizesThatFillNoTile) {
  for (const char* line : {
           "fwd fp32 b1 q1 k129 h2 d64 lse",
           "fwd fp16 b1 q16 k128 h1 d128 lse",
           "fwd bf16 b1 q49 k127 h1 d80 lse",
           "fwd fp32 b1 q65 k131 h1 d33/65 lse",
           "fwd fp16 b1 q100 k260 h3/1 d96/24 lse",
           "fwd fp32 b1 q193 k5 h1 d64 lse",
           "fwd bf16 b2 q112 k144 h4/2 d64 causal_br lse",
           "fwd bf16 b1 q65 k530 h1 d64 lse",
           "fwd fp16 b1 q33 k303 h1 d40 lse",
           "fwd fp32 b1 q400 k400 h1 d64 causal lse",
       })
    check(line);
}

TEST_P(EachIsa, SkipsAndMasksWholeAndPartialBlocks) {
  for (const char* line : {
           "fwd fp32 b1 q300 k300 h1 d16 window20,10 lse",
           "fwd fp16 b1 q60 k500 h2/1 d64 causal_br window130,* lse",
           // The last query sees nothing of a tile, and all of the next.
           "fwd fp32 b1 q47 k600 h1 d64 causal_br window343,* lse",
           "fwd bf16 b1 q290 k150 h1 d32 causal_br mask lse",
           "fwd fp32 b2 q70 k140 h2 d16 causal_tl bias mask alibi softcap3 dropout0.3 seed5 lse",
           "fwd fp16 b3 q150 k200 h4/2 d24/40 varlen170/333 causal_br bias lse",
           "decode bf16 b2 q3 k336 h8/2 d64 page48 append3 rotary32 causal lse",
           "decode fp32 b2 q1 k300 h4/1 d128 append1 lse",
       })
    check(line);
}

TEST_P(EachIsa, FindsGradientsAtTheEdgesOfTiles) {
  for (const char* line : {
           "bwd fp32 b1 q65 k131 h2/1 d64 dlse",
           "bwd bf16 b2 q49 k129 h1 d80/24 causal_br",
           "bwd fp16 b1 q200 k150 h3/1 d33/65 window40,20 sinks dsinks",
           "bwd fp32 b2 q70 k140 h2 d16 causal_tl bias mask alibi softcap3 dropout0.3 seed5 dlse",
           "bwd fp16 b3 q150 k200 h4/2 d128 varlen170/333 causal_br mask",
           "bwd fp32 b2 q60 k300 h2 d64 seqused alibi",
           "bwd fp32 b2 q70 k140 h4/2 d16 bias dbias",
           "bwd fp32 b3 q110 k150 h2 d24/40 varlen170/333 causal_br softcap3 mask bias sinks dbias dsinks dlse",
       })
    check(line);
}

// Few key heads with many keys: chunks of keys are tasks of their own, whose parts of dq are summed.
TEST_P(EachIsa, FindsGradientsOfKeysInChunks) {
  for (const char* line : {
           "bwd fp32 b1 q60 k2500 h4/2 d32/16 causal_br bias sinks dbias dsinks dlse",
           "bwd bf16 b1 q40 k3100 h2/1 d70 window1500,* mask",
           "bwd fp16 b2 q30 k1300 h1 d40 seqused dropout0.3 seed5",
           "bwd fp32 b3 q20 k1200 h2/1 d16 varlen40/2100 causal_tl",
       })
    check(line);
}

// Where heads are wide few queries stay in the cache: the next ones meet the keys after these are done.
TEST_P(EachIsa, FindsGradientsOfQueriesInChunks) {
  for (const char* line : {
           "bwd fp32 b1 q290 k200 h2/1 d256 causal_br sinks dsinks dlse",
           "bwd bf16 b1 q400 k140 h1 d256 window60,40 mask",
           "bwd fp16 b2 q400 k170 h1 d200/256 varlen500/333 dropout0.3 seed5 bias dbias",
           "bwd fp32 b1 q140 k1100 h1 d256 causal_tl softcap3",
       })
    check(line);
}

// Whatever the numbers of threads and so the cut into tasks, the arithmetic of each result is the same.
TEST_P(EachIsa, GivesTheSameBitsForAnyNumberOfThreads) {
  const Environment wanted("FLASHCORE_CPU_ISA", GetParam().c_str());
  const int before = num_threads();
  for (const char* line : {
           "fwd fp16 b2 q500 k400 h6/2 d64 causal_br lse",
           "fwd fp32 b1 q1000 k200 h1 d32 alibi lse",
           "decode bf16 b2 q1 k2000 h8/4 d64 lse",
           "bwd fp32 b2 q100 k120 h4/2 d32 causal_br bias sinks dbias dsinks",
           "bwd fp16 b1 q70 k3000 h4/2 d32 causal_br",
           "bwd fp32 b1 q300 k2100 h1 d256 causal_br",
       }) {
    std::vector<std::vector<unsigned char>> bits;
    for (const int threads : {1, 2, 5}) {
      set_num_threads(threads);
      AttentionCase c(detail::parse_problem(line), Device{});
      c.run();
      if (bits.empty()) bits = c.output_bytes();
      EXPECT_EQ(bits, c.output_bytes()) << line << " with " << threads << " threads";
    }
  }
  set_num_threads(before);
}

// A key far below the maximum has a weight that would be subnormal; its value must then count as nothing at all.
TEST_P(EachIsa, KeepsAccuracyWhereWeightsUnderflow) {
  check("fwd fp32 b1 q64 k256 h1 d64 scale8 lse");
  check("fwd bf16 b1 q64 k256 h1 d64 scale20 lse");
}

/// Words that any phase may have.
std::string random_features(Random& random, const char* other_corner) {
  const auto pick = [&random](std::initializer_list<const char*> words) {
    return std::string(words.begin()[random.integer(0, static_cast<std::int64_t>(words.size()) - 1)]);
  };
  std::string words = pick({"", "", " causal_br", other_corner});
  words += pick({"", "", " window*,9", " window30,*", " window100,40"});
  words += pick({"", "", "", " softcap2.5"});
  words += pick({"", "", "", " dropout0.3 seed77"});
  for (const char* word : {" mask", " bias", " alibi"}) words += random.integer(0, 3) == 0 ? word : "";
  return words;
}

std::string random_backward_line(Random& random) {
  const auto number = [&random](std::int64_t low, std::int64_t high) {
    return std::to_string(random.integer(low, high));
  };
  const char* dtypes[] = {"fp32", "fp16", "bf16"};
  const char* heads[] = {"1", "2", "4/2", "3/1"};
  const std::int64_t q = random.integer(1, 120);
  const std::int64_t k = random.integer(1, 300);
  std::string line = std::string("bwd ") + dtypes[random.integer(0, 2)] + " b" + number(1, 2) + " q" +
                     std::to_string(q) + " k" + std::to_string(k) + " h" + heads[random.integer(0, 3)] + " d" +
                     number(1, 130) + "/" + number(1, 130);
  if (random.integer(0, 3) == 0) line += " varlen" + number(q, 2 * q) + "/" + number(k, 2 * k);
  line += random_features(random, " causal_tl");
  if (line.find(" bias") != std::string::npos) line += " dbias";
  return line + (random.integer(0, 1) ? " dlse" : "") + (random.integer(0, 2) ? "" : " sinks dsinks");
}

std::string random_line(Random& random) {
  const auto pick = [&random](std::initializer_list<const char*> words) {
    return std::string(words.begin()[random.integer(0, static_cast<std::int64_t>(words.size()) - 1)]);
  };
  const auto number = [&random](std::int64_t low, std::int64_t high) {
    return std::to_string(random.integer(low, high));
  };
  const bool decode = random.integer(0, 3) == 0;
  const bool varlen = !decode && random.integer(0, 3) == 0;
  const std::int64_t q = decode ? random.integer(1, 20) : random.integer(1, 200);
  const std::int64_t k = random.integer(decode ? q : 1, 400);
  const std::int64_t page = decode && random.integer(0, 1) ? random.integer(1, 70) : 0;
  std::string line = (decode ? "decode " : "fwd ") + pick({"fp32", "fp16", "bf16"}) + " b" + number(1, 3) + " q" +
                     std::to_string(q) + " k" + std::to_string(page ? (k + page - 1) / page * page : k) + " h" +
                     pick({"1", "2", "4/2", "3/1", "8/2"}) + " d" + std::to_string(2 * random.integer(1, 70)) + "/" +
                     number(1, 130);
  if (varlen)
    line += " varlen" + std::to_string(random.integer(q, 2 * q)) + "/" + std::to_string(random.integer(k, 2 * k));
  if (page) line += " page" + std::to_string(page);
  if (decode && random.integer(0, 1)) line += " append" + number(1, q);
  if (decode && random.integer(0, 1)) line += pick({" rotary2", " rotary2i"});
  line += random_features(random, decode ? " causal_br" : " causal_tl");
  if (random.integer(0, 1) && line.find("causal_br window") == std::string::npos) line += pick({"", " sinks"});
  return line + " lse";
}

TEST_P(EachIsa, AgreesWithTheOracleOnRandomProblems) {
  Random random(2026);
  for (int n = 0; n < 40; ++n) check(random_line(random), static_cast<std::uint64_t>(n));
}

TEST_P(EachIsa, AgreesWithTheOracleOnRandomGradients) {
  Random random(2027);
  for (int n = 0; n < 25; ++n) check(random_backward_line(random), static_cast<std::uint64_t>(n));
}

INSTANTIATE_TEST_SUITE_P(CpuSimd, EachIsa, ::testing::ValuesIn(instruction_sets()),
                         [](const auto& info) { return info.param; });

TEST(CpuSimd, ChoosesTheBestInstructionSetThatIsThere) { EXPECT_EQ(cpu::chosen_isa().name, instruction_sets().back()); }

TEST(CpuSimd, LeavesPartsOutUnlessTheyAreNamed) {
  EXPECT_FALSE(cpu::chosen_isa(false).in_parts);
  for (const std::string& name : instruction_sets()) {
    const Environment wanted("FLASHCORE_CPU_ISA", name.c_str());
    EXPECT_EQ(cpu::chosen_isa(false).name, name);
  }
}

TEST(CpuSimd, RefusesAnInstructionSetThatIsNotThere) {
  const Environment wanted("FLASHCORE_CPU_ISA", "mmx");
  AttentionCase c(detail::parse_problem("fwd fp32 b1 q4 k4 h1 d8"), Device{});
  try {
    c.run();
    FAIL() << "no error";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("mmx"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find(instruction_sets().front()), std::string::npos);
  }
}

}  // namespace
}  // namespace flashcore::testing
