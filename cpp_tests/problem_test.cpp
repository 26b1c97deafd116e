// problem: the line is printed and read back, words that cannot be read are named, equal questions are equal values.
#include "problem.h"

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "flashcore/attention.h"
#include "flashcore/error.h"
#include "kernels/case_lines.h"
#include "support/random.h"

namespace flashcore::testing {
namespace {

using namespace flashcore::detail;

TEST(ProblemLine, IsReadAsItsWordsSay) {
  const Problem p = parse_problem(
      "decode bf16 b64 q2 k8192 h64/8 d128/64 page16 append2 rotary32i causal window100,* softcap30 dropout0.1 "
      "seed7 scale0.5 out_fp32 mask bias alibi sinks lse");
  EXPECT_EQ(p.phase, Phase::decode);
  EXPECT_EQ(p.dtype, DType::bfloat16);
  EXPECT_EQ(p.dtype_out, DType::float32);
  EXPECT_EQ(p.size.batch, 64);
  EXPECT_EQ(p.size.seqlen_q, 2);
  EXPECT_EQ(p.size.seqlen_k, 8192);
  EXPECT_EQ(p.size.heads_q, 64);
  EXPECT_EQ(p.size.heads_k, 8);
  EXPECT_EQ(p.group(), 8);
  EXPECT_EQ(p.size.head_dim, 128);
  EXPECT_EQ(p.size.head_dim_v, 64);
  EXPECT_EQ(p.page_size, 16);
  EXPECT_EQ(p.seqlen_new, 2);
  EXPECT_EQ(p.rotary_dim, 32);
  EXPECT_TRUE(p.rotary_interleaved);
  EXPECT_EQ(p.causal, CausalRule::bottom_right);
  EXPECT_EQ(p.window_left, 100);
  EXPECT_EQ(p.window_right, -1);
  EXPECT_EQ(p.softcap, 30);
  EXPECT_EQ(p.dropout_p, 0.1);
  EXPECT_EQ(p.seed, 7u);
  EXPECT_EQ(p.scale, 0.5);
  EXPECT_EQ(p.flags, kMask | kBias | kAlibi | kSinks | kLse | kSequsedK);
}

TEST(ProblemLine, LeavesOutDefaults) {
  EXPECT_EQ(canonical_problem_line("  fwd  bf16 causal b2 q4096 k4096 scale0.125 h32/8 d64/64 out_bf16 dropout0 "),
            "fwd bf16 b2 q4096 k4096 h32/8 d64 causal");
  EXPECT_EQ(parse_problem("fwd fp16 b1 q1 k1 h1 d64").scale, 0.125);
  EXPECT_EQ(parse_problem("fwd e4m3 b1 q1 k1 h1 d64").dtype_out, DType::bfloat16);
}

TEST(ProblemLine, OfEveryCaseIsReadBack) {
  for (const std::string line : kCaseLines) {
    const std::size_t space = line.find(' ');
    const Problem p = parse_problem(line.substr(0, space) + " fp16" + line.substr(space));
    EXPECT_EQ(parse_problem(to_line(p)), p) << line << " became " << to_line(p);
    EXPECT_EQ(canonical_problem_line(to_line(p)), to_line(p));
  }
}

std::string random_line(Random& random) {
  const auto one_of = [&random](std::initializer_list<const char*> words) {
    return std::string(words.begin()[random.integer(0, static_cast<std::int64_t>(words.size()) - 1)]);
  };
  const auto number = [&random](std::int64_t low, std::int64_t high) {
    return std::to_string(random.integer(low, high));
  };
  const std::string phase = one_of({"fwd", "bwd", "decode"});
  const std::int64_t heads_k = random.integer(1, 8);
  const std::int64_t page = random.integer(1, 64);
  const std::int64_t pages = random.integer(1, 1 << 24);
  std::string line = phase + ' ' + one_of({"fp16", "bf16", "fp32", "fp64", "e4m3"});
  line += " b" + number(0, 9) + " q" + number(0, 3) + " k" + std::to_string(page * pages);
  line += " h" + std::to_string(heads_k * random.integer(1, 4)) + '/' + std::to_string(heads_k);
  line += " d" + number(16, 256) + '/' + number(1, 256);
  std::vector<std::string> options = {"window" + one_of({"*", "0", "17"}) + ',' + one_of({"*", "0", "4"}),
                                      "softcap" + std::to_string(random.uniform() * 50),
                                      "dropout" + std::to_string(random.uniform()),
                                      "seed" + std::to_string(random.bits()),
                                      "scale" + std::to_string(random.normal()),
                                      "out_" + one_of({"fp16", "bf16", "fp32"}),
                                      "mask",
                                      "alibi",
                                      "descale",
                                      "seqused",
                                      "deterministic",
                                      "unaligned"};
  const auto add = [&options](std::initializer_list<std::string> words) { options.insert(options.end(), words); };
  if (phase == "decode")
    add({"page" + std::to_string(page), "append1",
         "rotary" + std::to_string(2 * random.integer(1, 8)) + one_of({"", "i"}), "causal_br"});
  else
    add({"varlen" + number(0, 99) + '/' + number(0, 99), one_of({"causal_tl", "causal_br"})});
  if (phase == "bwd")
    add({"dlse", one_of({"bias", "bias dbias"}), one_of({"sinks", "sinks dsinks"})});
  else
    add({"lse", "bias", "sinks"});
  for (const std::string& option : options)
    if (random.uniform() < 0.3) line += ' ' + option;
  return line;
}

TEST(ProblemLine, OfRandomProblemsIsReadBack) {
  Random random(17);
  for (int n = 0; n < 5000; ++n) {
    const std::string line = random_line(random);
    const Problem p = parse_problem(line);
    ASSERT_EQ(parse_problem(to_line(p)), p) << line << " became " << to_line(p);
  }
}

struct BadLine {
  const char* line;
  const char* word;  // what the message must name
};

class UnreadableLine : public ::testing::TestWithParam<BadLine> {};

TEST_P(UnreadableLine, IsRefusedWithTheWordAndTheGrammar) {
  try {
    parse_problem(GetParam().line);
    FAIL() << "was read";
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(GetParam().word), std::string::npos) << message;
    EXPECT_NE(message.find("a problem line is"), std::string::npos) << message;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Problem, UnreadableLine,
    ::testing::Values(
        BadLine{"", "phase"}, BadLine{"fwd b1 q1 k1 h1 d8", "dtype"}, BadLine{"fwd fp16 b1 q1 k1 h1", "head_dim"},
        BadLine{"fwd fp16 b1 q1 k1 h1 d8 wobble", "wobble"}, BadLine{"fwd fp17 b1 q1 k1 h1 d8", "fp17"},
        BadLine{"fwd fp16 bx q1 k1 h1 d8", "bx"}, BadLine{"fwd fp16 b1 q-1 k1 h1 d8", "q-1"},
        BadLine{"fwd fp16 b1 q1 k1 h8/3 d8", "8/3"}, BadLine{"fwd fp16 b1 q1 k1 h1 d0", "256"},
        BadLine{"fwd fp16 b1 q1 k1 h1 d257", "257"}, BadLine{"fwd fp16 b1 q1 k1 h1 d8/300", "300"},
        BadLine{"fwd fp16 b1 q99999999999999999999 k1 h1 d8", "q99999999999999999999"},
        BadLine{"fwd fp16 b1 q1 k1 h1 d8 window3", "window3"}, BadLine{"fwd fp16 b1 q1 k1 h1 d8 dropout1", "[0, 1)"},
        BadLine{"fwd fp16 b1 q1 k1 h1 d8 softcap-2", "softcap"}, BadLine{"fwd fp16 b1 q1 k1 h1 d8 page0", "page0"},
        BadLine{"fwd fp16 b1 q2 k3 h1 d8 causal", "causal_tl"}));

std::string refusal_of(const std::string& line) {
  try {
    parse_problem(line);
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    return message.substr(0, message.find('\n'));  // the grammar follows
  }
  return "";
}

void expect_misfit(const std::string& line, const std::string& word, const std::string& rule) {
  const std::string message = refusal_of(line);
  EXPECT_NE(message.find('"' + word + "\" does not fit: "), std::string::npos) << line << ": " << message;
  EXPECT_NE(message.find(rule), std::string::npos) << line << ": " << message;
}

TEST(ProblemLine, RefusesWordsThatTheKindOfCallCannotTake) {
  const std::string sizes = " fp16 b1 q8 k96 h1 d64 bias sinks ";
  for (const char* phase : {"fwd", "bwd"})
    for (const char* word : {"page16", "append3", "rotary32"}) expect_misfit(phase + sizes + word, word, "decode");
  for (const char* phase : {"fwd", "decode"})
    for (const char* word : {"dlse", "dbias", "dsinks"}) expect_misfit(phase + sizes + word, word, "bwd");
  expect_misfit("bwd" + sizes + "lse", "lse", "fwd and decode");
  expect_misfit("decode" + sizes + "varlen8/96", "varlen8/96", "fwd and bwd");
  expect_misfit("decode" + sizes + "causal_tl", "causal_tl", "causal_br");
}

TEST(ProblemLine, RefusesGradientsOfWhatIsNotThere) {
  expect_misfit("bwd fp16 b1 q8 k8 h1 d8 sinks dbias", "dbias", "no bias");
  expect_misfit("bwd fp16 b1 q8 k8 h1 d8 bias dsinks", "dsinks", "no sinks");
}

TEST(ProblemLine, RefusesWordsThatDoNotFitTheSizes) {
  const std::string line = "decode fp16 b1 q1 k96 h1 d64 ";
  expect_misfit(line + "rotary33", "rotary33", "even number");
  expect_misfit(line + "rotary66i", "rotary66i", "2 to 64");
  expect_misfit(line + "append97", "append97", "holds 96");
  expect_misfit(line + "page64", "page64", "\"k96\"");
  EXPECT_EQ(refusal_of(line + "rotary64 append96 page48"), "");
}

TEST(ProblemLine, RefusesTwoWordsAboutTheSame) {
  const std::string line = "fwd fp16 b1 q8 k8 h1 d8 causal mask window1,2 softcap1 dropout0.1 seed1 scale1 out_fp16 ";
  const std::pair<std::string, std::string> pairs[] = {{"fwd", "bwd"},
                                                       {"fwd", "fwd"},
                                                       {"fp16", "fp32"},
                                                       {"b1", "b2"},
                                                       {"h1", "h4/2"},
                                                       {"causal", "causal_br"},
                                                       {"causal", "causal"},
                                                       {"mask", "mask"},
                                                       {"window1,2", "window3,4"},
                                                       {"softcap1", "softcap2"},
                                                       {"dropout0.1", "dropout0"},
                                                       {"seed1", "seed1"},
                                                       {"scale1", "scale2"},
                                                       {"out_fp16", "out_bf16"}};
  for (const auto& [first, second] : pairs)
    EXPECT_NE(refusal_of(line + second).find('"' + first + "\" and \"" + second + '"'), std::string::npos)
        << refusal_of(line + second);
}

TEST(ProblemLine, NamesTheSizesThatAreMissing) {
  EXPECT_EQ(refusal_of("fwd fp16 q8 h1 d8"),
            "problem line \"fwd fp16 q8 h1 d8\": a size is missing: b (batch), k (seqlen_k)");
}

TEST(Normalise, MakesEqualQuestionsEqual) {
  const auto line = [](const char* text) { return canonical_problem_line(text); };
  EXPECT_EQ(line("fwd fp16 b1 q8 k8 h1 d8 causal_tl"), line("fwd fp16 b1 q8 k8 h1 d8 causal_br"));
  EXPECT_EQ(line("fwd fp16 b1 q8 k8 h1 d8 causal window4,9"), line("fwd fp16 b1 q8 k8 h1 d8 causal window4,*"));
  EXPECT_EQ(line("fwd fp16 b1 q8 k8 h1 d8 seed5"), line("fwd fp16 b1 q8 k8 h1 d8"));
  EXPECT_EQ(line("decode fp16 b1 q1 k8 h1 d8 causal"), line("decode fp16 b1 q1 k8 h1 d8"));
  EXPECT_EQ(line("fwd fp16 b1 q8 k8 h1 d8 deterministic"), line("fwd fp16 b1 q8 k8 h1 d8"));
}

TEST(Normalise, KeepsDifferentQuestionsApart) {
  const Problem plain = parse_problem("fwd fp16 b1 q8 k9 h1 d8");
  for (const char* other : {"bwd fp16 b1 q8 k9 h1 d8",           "fwd bf16 b1 q8 k9 h1 d8",
                            "fwd fp16 b2 q8 k9 h1 d8",           "fwd fp16 b1 q7 k9 h1 d8",
                            "fwd fp16 b1 q8 k8 h1 d8",           "fwd fp16 b1 q8 k9 h2 d8",
                            "fwd fp16 b1 q8 k9 h2/1 d8",         "fwd fp16 b1 q8 k9 h1 d9",
                            "fwd fp16 b1 q8 k9 h1 d8/9",         "fwd fp16 b1 q8 k9 h1 d8 causal_tl",
                            "fwd fp16 b1 q8 k9 h1 d8 causal_br", "fwd fp16 b1 q8 k9 h1 d8 window1,*",
                            "fwd fp16 b1 q8 k9 h1 d8 window*,1", "fwd fp16 b1 q8 k9 h1 d8 scale1",
                            "fwd fp16 b1 q8 k9 h1 d8 softcap1",  "fwd fp16 b1 q8 k9 h1 d8 dropout0.1",
                            "fwd fp16 b1 q8 k9 h1 d8 mask",      "fwd fp16 b1 q8 k9 h1 d8 lse",
                            "fwd fp16 b1 q8 k9 h1 d8 varlen8/9", "fwd fp16 b1 q8 k9 h1 d8 out_fp32"})
    EXPECT_NE(parse_problem(other), plain) << other;
  EXPECT_NE(parse_problem("fwd fp16 b1 q8 k9 h1 d8 causal_tl"), parse_problem("fwd fp16 b1 q8 k9 h1 d8 causal_br"));
  EXPECT_NE(parse_problem("fwd fp16 b1 q8 k9 h1 d8 dropout0.1 seed1"),
            parse_problem("fwd fp16 b1 q8 k9 h1 d8 dropout0.1 seed2"));
}

TEST(Features, AreThoseThatTheMembersImply) {
  EXPECT_EQ(features_of(parse_problem("fwd fp16 b1 q8 k8 h1 d8")), 0u);
  EXPECT_EQ(features_of(parse_problem("fwd fp16 b1 q8 k9 h2/1 d8/4 causal_tl window3,* softcap1 dropout0.5")),
            kCausal | kCausalTopLeft | kWindow | kSoftcap | kDropout | kGroupedHeads | kHeadDimV);
  EXPECT_EQ(features_of(parse_problem("decode fp16 b1 q2 k8 h1 d8 page4 append1 rotary4")),
            kSequsedK | kPaged | kAppend | kRotary);
}

TEST(Features, AreNamedInWords) {
  EXPECT_EQ(describe_features(0), "");
  EXPECT_EQ(describe_features(kCausal | kSoftcap), "causal, softcap");
  for (FeatureSet flag = 1; flag <= kCausalTopLeft; flag <<= 1) EXPECT_NE(describe_features(flag), "") << flag;
}

}  // namespace
}  // namespace flashcore::testing
