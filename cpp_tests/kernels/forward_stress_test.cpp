// Forward rows in numbers: random problems on poisoned memory, and odd sizes under steep scores.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../support/attention_case.h"
#include "../support/bounds.h"
#include "../support/float_formats.h"
#include "../support/test_device.h"
#include "each_row.h"

namespace flashcore::testing {
namespace {

using detail::CausalRule;
using detail::Problem;

class ForwardStress : public ::testing::TestWithParam<Row> {
 protected:
  const detail::Kernel& row() const { return *GetParam().row; }
  Device device() const { return GetParam().device; }
  bool takes(const Problem& problem) const { return detail::refusal(row(), problem, device_info(device())).empty(); }
  std::string any_word(const Problem& problem, Random& random) const {
    const std::vector<std::string> words = words_of(row(), problem, device());
    return words[static_cast<std::size_t>(random.integer(0, static_cast<std::int64_t>(words.size()) - 1))];
  }
};

// ---- random problems ------------------------------------------------------------------------------------------------

/// A forward problem of any kind that some fast row may know.
std::string random_line(Random& random) {
  constexpr std::int64_t kLengths[] = {1, 63, 64, 65, 127, 128, 129, 192, 257};  // on and beside the edges of tiles
  const auto length = [&] { return random.integer(0, 1) ? kLengths[random.integer(0, 8)] : random.integer(1, 300); };
  const auto often = [&](double chance) { return random.uniform() < chance; };
  const auto number = [](std::int64_t n) { return std::to_string(n); };
  const std::int64_t heads_k = random.integer(1, 2);
  const std::int64_t dim = 8 * random.integer(1, often(0.5) ? 16 : 32);
  std::string line = std::string("fwd ") + (often(0.5) ? "fp16" : "bf16") + " b" + number(random.integer(1, 2)) + " q" +
                     number(length()) + " k" + number(length()) + " h" + number(heads_k * random.integer(1, 3)) + "/" +
                     number(heads_k) + " d" + number(dim);
  if (often(0.2)) line += "/" + number(8 * random.integer(1, dim / 8));
  if (often(0.4)) line += often(0.7) ? " causal_br" : " causal_tl";
  if (often(0.2)) line += " window" + number(random.integer(0, 150)) + ",*";
  if (often(0.15)) line += " softcap5";
  if (often(0.15)) line += " scale0.3";
  for (const char* word : {" mask", " bias", " alibi", " sinks"})
    if (often(0.12)) line += word;
  return often(0.7) ? line + " lse" : line;
}

/// Rows [first, first + count) of batch b; a dimension of size 1 stays one.
Array4 cut(const Array4& x, std::int64_t b, std::int64_t first, std::int64_t count) {
  if (!x) return {};
  const bool one_row = x.size(2) == 1;
  Array4 part(1, x.size(1), one_row ? 1 : count, x.size(3));
  for (std::int64_t h = 0; h < part.size(1); ++h)
    for (std::int64_t i = 0; i < part.size(2); ++i)
      for (std::int64_t n = 0; n < part.size(3); ++n)
        part(0, h, i, n) = x(x.size(0) == 1 ? 0 : b, h, one_row ? 0 : first + i, n);
  return part;
}

/// A few query rows of one batch, all heads: small enough for the oracle, whatever the problem.
struct Slice {
  std::int64_t batch;
  std::int64_t first;
  std::int64_t count;
};

/// Positions are counted from a corner, so the slice starts or ends there.
Slice random_slice(const AttentionCase& c, Random& random) {
  constexpr std::int64_t kRows = 64;  // over all heads
  const detail::Sizes& s = c.problem.size;
  const std::int64_t batch = random.integer(0, s.batch - 1);
  const std::int64_t count = std::min(s.seqlen_q, std::max<std::int64_t>(1, kRows / s.heads_q));
  const bool by_position = c.problem.causal != CausalRule::none || c.problem.window_left >= 0;
  const bool from_top = by_position && c.oracle.corner == Corner::top_left;
  const bool from_bottom = (by_position && !from_top) || c.oracle.alibi;
  if (from_top && from_bottom) return {batch, 0, s.seqlen_q};
  if (from_top) return {batch, 0, count};
  return {batch, from_bottom ? s.seqlen_q - count : random.integer(0, s.seqlen_q - count), count};
}

OracleCall slice_of(const OracleCall& all, const Slice& slice) {
  OracleCall part = all;
  part.q = cut(all.q, slice.batch, slice.first, slice.count);
  part.k = cut(all.k, slice.batch, 0, all.k.size(2));
  part.v = cut(all.v, slice.batch, 0, all.v.size(2));
  part.seqlen_q = {slice.count};
  part.seqlen_k = {all.seqlen_k[static_cast<std::size_t>(slice.batch)]};
  part.keep = cut(all.keep, slice.batch, slice.first, slice.count);
  part.bias = cut(all.bias, slice.batch, slice.first, slice.count);
  part.alibi = cut(all.alibi, slice.batch, 0, 1);
  part.sinks = cut(all.sinks, slice.batch, 0, 1);
  return part;
}

void check_slice(const AttentionCase& c, const Slice& slice) {
  const OracleCall call = slice_of(c.oracle, slice);
  const OracleResult truth = oracle_forward(call);
  const DType dtype = c.problem.dtype_out;
  const OracleResult naive = oracle_forward(call, [dtype](double x) { return rounded(dtype, x); });
  Array4 out = truth.out;
  Array4 lse = truth.lse;
  for (std::int64_t h = 0; h < out.size(1); ++h)
    for (std::int64_t i = 0; i < out.size(2); ++i) {
      const std::int64_t row = slice.first + i;
      for (std::int64_t d = 0; d < out.size(3); ++d)
        out(0, h, i, d) =
            c.out.get(c.options.layout == Layout::bhsd ? Index{slice.batch, h, row, d} : Index{slice.batch, row, h, d});
      if (c.lse) lse(0, h, i, 0) = c.lse.get({slice.batch, h, row, 0});
    }
  expect_close(out, truth.out, error_bound(dtype, truth.out, naive.out, largest(call.v)), "out");
  expect_close(lse, truth.lse, sum_epsilon(dtype) * (1 + largest(truth.lse)), "lse");
  EXPECT_TRUE(c.out.surroundings_untouched()) << "out: bytes beside the tensor were written";
}

/// The results of a run on a workspace full of `workspace_byte` and outputs that begin as `out_value`. Copies only what
/// it must: where many processes share a GPU, each copy waits for its turn.
std::vector<std::vector<unsigned char>> run_on(AttentionCase& c, const AttentionPlan& plan, DeviceArray& workspace,
                                               int workspace_byte, double out_value) {
  const std::vector<unsigned char> poison(plan.workspace_bytes(), static_cast<unsigned char>(workspace_byte));
  workspace.upload(poison.data());
  for (TestTensor* t : {&c.out, &c.lse}) {
    if (!*t) continue;
    t->fill(out_value);
    t->upload();
  }
  plan.run(c.inputs(), c.outputs(), workspace.data(), nullptr);
  for (TestTensor* t : {&c.out, &c.lse})
    if (*t) t->download();
  return c.output_bytes();
}

/// The fast GPU rows together do a thousand and more; the CPU and the yardstick show that the test itself is right.
int problem_count(const Row& row) {
  if (row.device.type == DeviceType::cpu) return 20;
  return std::string(row.row->name) == "cuda.reference" ? 50 : 250;
}

TEST_P(ForwardStress, RandomProblemsGiveTheSameBitsWhateverTheMemoryHolds) {
  Random random(2024);
  for (int done = 0; done < problem_count(GetParam()) && !HasFailure();) {
    const std::string line = random_line(random);
    const Problem problem = detail::parse_problem(line);
    if (!takes(problem)) continue;
    const Variant& variant = all_variants()[static_cast<std::size_t>(random.integer(0, 3))];
    SCOPED_TRACE(line + ", " + variant.name + ", problem " + std::to_string(done));
    AttentionCase c(problem, device(), variant, random.bits());
    const std::string word = any_word(problem, random);
    c.options.kernel = word;
    if (!c.supports().ok) continue;  // unaligned rows
    const AttentionPlan plan = AttentionPlan::forward(c.inputs(), c.outputs(), c.options);
    DeviceArray workspace(plan.workspace_bytes(), device());
    const auto first = run_on(c, plan, workspace, 0xff, std::nan(""));
    const auto second = run_on(c, plan, workspace, 0x3c, 777);
    EXPECT_EQ(first, second) << "the two runs differ";
    check_slice(c, random_slice(c, random));
    ++done;
  }
}

// ---- odd sizes, steep scores ----------------------------------------------------------------------------------------

enum class Slope { none, rising, falling };

/// Keys so that every query's scores climb (or fall) by 8 every 64 keys: more than a lazy running maximum puts up with,
/// in each block or in none, whichever way a kernel walks. The scores are exact in both formats.
void make_steep(AttentionCase& c, Slope slope) {
  const auto place = [&](std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) {
    return c.options.layout == Layout::bhsd ? Index{b, h, i, d} : Index{b, i, h, d};
  };
  const auto set = [&](TestTensor& t, Array4& values, const auto& value_of) {
    for (std::int64_t b = 0; b < values.size(0); ++b)
      for (std::int64_t h = 0; h < values.size(1); ++h)
        for (std::int64_t i = 0; i < values.size(2); ++i)
          for (std::int64_t d = 0; d < values.size(3); ++d) {
            double& value = values(b, h, i, d);
            if (std::isnan(value)) continue;  // a key that no query sees
            value = value_of(value, i, d);
            t.set(place(b, h, i, d), value);
          }
    t.upload();
  };
  const std::int64_t last_key = c.problem.size.seqlen_k - 1;
  const std::int64_t last_dim = c.problem.size.head_dim - 1;
  set(c.q, c.oracle.q, [&](double value, std::int64_t, std::int64_t d) { return d == last_dim ? 1 : value; });
  set(c.k, c.oracle.k, [&](double, std::int64_t j, std::int64_t d) {
    const std::int64_t key = slope == Slope::rising ? j : last_key - j;
    return d == last_dim ? static_cast<double>(8 * (key / 64)) : 0.0;
  });
}

/// The head_dim at which the row is the one that is chosen by itself, so that each works in its own bucket.
std::int64_t own_head_dim(const Row& row) {
  for (const std::int64_t dim : {64, 96, 128, 256, 192}) {
    const Problem problem = detail::parse_problem("fwd fp16 b8 q2048 k2048 h32 d" + std::to_string(dim));
    if (std::string(detail::make_plan(problem, device_info(row.device)).kernel->name) == row.row->name) return dim;
  }
  return 64;
}

TEST_P(ForwardStress, OddSizesAreRightUnderSteepScores) {
  constexpr const char* kSizes[] = {"q1 k1",     "q1 k4097",   "q63 k65",   "q65 k63",   "q127 k129",  "q129 k127",
                                    "q129 k129", "q1000 k129", "q65 k1000", "q4097 k63", "q129 k4097", "q1000 k1"};
  const Variant& bhsd = all_variants()[0];
  const Variant& bshd = all_variants()[3];
  const std::string dim = " d" + std::to_string(own_head_dim(GetParam()));
  Random random(3);
  int taken = 0;
  for (const char* sizes : kSizes)
    for (const char* mask : {"", " causal_br"})
      for (const Slope slope : {Slope::none, Slope::rising, Slope::falling})
        for (const Variant* variant : {&bhsd, &bshd}) {
          const char* dtype = (variant == &bhsd) == (slope == Slope::none) ? "fwd fp16 b1 " : "fwd bf16 b1 ";
          const char* scale = slope == Slope::none ? "" : " scale1";
          const Problem problem =
              detail::parse_problem(dtype + std::string(sizes) + " h2/1" + dim + mask + scale + " lse");
          if (!takes(problem)) continue;
          SCOPED_TRACE(to_line(problem) + ", " + variant->name + ", slope " + std::to_string(static_cast<int>(slope)));
          AttentionCase c(problem, device(), *variant);
          const std::string word = any_word(problem, random);
          c.options.kernel = word;
          if (slope != Slope::none) make_steep(c, slope);
          c.run();
          c.check();
          ++taken;
        }
  if (taken == 0) GTEST_SKIP() << "the row takes no plain forward of 16-bit numbers";
}

// Sequences of a few rows leave some of a tile's warpgroups without work, which must still keep step with the others:
// one that ran ahead once hung, seldom.
TEST_P(ForwardStress, SequencesOfUnevenLengthsKeepTheirBits) {
  const int repeats = GetParam().device.type == DeviceType::cpu ? 2 : 50;
  int taken = 0;
  for (const char* line : {"fwd fp16 b60 q200 k300 h4 d64 varlen1500/4000 lse",
                           "fwd bf16 b60 q200 k300 h4 d128 varlen1500/4000 softcap9 lse",
                           "fwd fp16 b60 q200 k300 h4/2 d128 varlen1500/4000 causal_br lse",
                           "fwd bf16 b60 q200 k300 h2 d256 varlen1500/4000 window70,*",
                           "fwd fp16 b200 q70 k140 h4 d64 causal_br seqused"}) {
    const Problem problem = detail::parse_problem(line);
    if (!takes(problem)) continue;
    AttentionCase c(problem, device(), all_variants()[0]);
    for (const std::string& word : words_of(row(), problem, device())) {
      SCOPED_TRACE(std::string(line) + ", " + word);
      c.options.kernel = word;
      const AttentionPlan plan = AttentionPlan::forward(c.inputs(), c.outputs(), c.options);
      DeviceArray workspace(plan.workspace_bytes(), device());
      const auto first = run_on(c, plan, workspace, 0xff, std::nan(""));
      for (int n = 1; n < repeats; ++n) ASSERT_EQ(run_on(c, plan, workspace, n, n), first) << "run " << n;
      c.check();
      ++taken;
    }
  }
  if (taken == 0) GTEST_SKIP() << "the row takes no sequences of different lengths";
}

INSTANTIATE_TEST_SUITE_P(Rows, ForwardStress, ::testing::ValuesIn(rows_of(bit(detail::Phase::forward))), name_of_row);

}  // namespace
}  // namespace flashcore::testing
