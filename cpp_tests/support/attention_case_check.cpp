// AttentionCase: where each row lies, and the judgement.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "attention_case.h"
#include "bounds.h"
#include "float_formats.h"

namespace flashcore::testing {
namespace {

using detail::Phase;

Rounding rounding_to(DType dtype) {
  return [dtype](double x) { return rounded(dtype, x); };
}

}  // namespace

// ---- where rows lie -------------------------------------------------------------------------------------------------

TestTensor AttentionCase::rows_tensor(DType dtype, std::int64_t batch, std::int64_t heads, std::int64_t seq,
                                      std::int64_t total, std::int64_t dim) const {
  switch (layout_) {
    case Layout::bhsd:
      return TestTensor(dtype, device_, {batch, heads, seq, dim}, variant_.gap);
    case Layout::bshd:
      return TestTensor(dtype, device_, {batch, seq, heads, dim}, variant_.gap);
    case Layout::thd:
      break;
  }
  return TestTensor(dtype, device_, {total, heads, dim}, variant_.gap);
}

TestTensor AttentionCase::query_rows(DType dtype, std::int64_t dim) const {
  const detail::Sizes& s = problem.size;
  return rows_tensor(dtype, s.batch, s.heads_q, s.seqlen_q, s.total_q, dim);
}

TestTensor AttentionCase::key_rows(std::int64_t dim) const {
  const detail::Sizes& s = problem.size;
  if (problem.page_size == 0) return rows_tensor(problem.dtype, s.batch, s.heads_k, s.seqlen_k, s.total_k, dim);
  const std::int64_t pages = s.batch * (s.seqlen_k / problem.page_size);
  return rows_tensor(problem.dtype, pages, s.heads_k, problem.page_size, 0, dim);
}

TestTensor AttentionCase::row_numbers(DType dtype) const {
  const detail::Sizes& s = problem.size;
  if (packed()) return TestTensor(dtype, device_, {s.heads_q, s.total_q}, variant_.gap);
  return TestTensor(dtype, device_, {s.batch, s.heads_q, s.seqlen_q}, variant_.gap);
}

Index AttentionCase::query_index(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t d) const {
  if (layout_ == Layout::bhsd) return {b, h, i, d};
  if (layout_ == Layout::bshd) return {b, i, h, d};
  return {begin_q_[static_cast<std::size_t>(b)] + i, h, d, 0};
}

Index AttentionCase::key_index(std::int64_t b, std::int64_t h, std::int64_t j, std::int64_t d) const {
  if (layout_ == Layout::thd) return {begin_k_[static_cast<std::size_t>(b)] + j, h, d, 0};
  if (problem.page_size > 0) {
    b = pages_[static_cast<std::size_t>(b)][static_cast<std::size_t>(j / problem.page_size)];
    j %= problem.page_size;
  }
  return layout_ == Layout::bhsd ? Index{b, h, j, d} : Index{b, j, h, d};
}

Index AttentionCase::lse_index(std::int64_t b, std::int64_t h, std::int64_t i) const {
  if (packed()) return {h, begin_q_[static_cast<std::size_t>(b)] + i, 0, 0};
  return {b, h, i, 0};
}

void AttentionCase::put_queries(TestTensor& t, const Array4& values) const {
  for (std::int64_t b = 0; b < values.size(0); ++b)
    for (std::int64_t h = 0; h < values.size(1); ++h)
      for (std::int64_t i = 0; i < extent_q_[static_cast<std::size_t>(b)]; ++i)
        for (std::int64_t d = 0; d < values.size(3); ++d) t.set(query_index(b, h, i, d), values(b, h, i, d));
}

void AttentionCase::put_keys(TestTensor& t, const Array4& values) const {
  for (std::int64_t b = 0; b < values.size(0); ++b)
    for (std::int64_t h = 0; h < values.size(1); ++h)
      for (std::int64_t j = 0; j < extent_k_[static_cast<std::size_t>(b)]; ++j)
        for (std::int64_t d = 0; d < values.size(3); ++d) t.set(key_index(b, h, j, d), values(b, h, j, d));
}

Array4 AttentionCase::get_queries(const TestTensor& t) const {
  const std::int64_t dim = t.size(t.view().rank - 1);
  Array4 values(problem.size.batch, problem.size.heads_q, problem.size.seqlen_q, dim);
  for (std::int64_t b = 0; b < values.size(0); ++b)
    for (std::int64_t h = 0; h < values.size(1); ++h)
      for (std::int64_t i = 0; i < extent_q_[static_cast<std::size_t>(b)]; ++i)
        for (std::int64_t d = 0; d < dim; ++d) values(b, h, i, d) = t.get(query_index(b, h, i, d));
  return values;
}

Array4 AttentionCase::get_keys(const TestTensor& t) const {
  const std::int64_t dim = t.size(t.view().rank - 1);
  Array4 values(problem.size.batch, problem.size.heads_k, problem.size.seqlen_k, dim);
  for (std::int64_t b = 0; b < values.size(0); ++b)
    for (std::int64_t h = 0; h < values.size(1); ++h)
      for (std::int64_t j = 0; j < extent_k_[static_cast<std::size_t>(b)]; ++j)
        for (std::int64_t d = 0; d < dim; ++d) values(b, h, j, d) = t.get(key_index(b, h, j, d));
  return values;
}

Array4 AttentionCase::get_lse() const {
  Array4 values(problem.size.batch, problem.size.heads_q, problem.size.seqlen_q, 1);
  for (std::int64_t b = 0; b < values.size(0); ++b)
    for (std::int64_t h = 0; h < values.size(1); ++h)
      for (std::int64_t i = 0; i < extent_q_[static_cast<std::size_t>(b)]; ++i)
        values(b, h, i, 0) = lse.get(lse_index(b, h, i));
  return values;
}

// ---- the judgement --------------------------------------------------------------------------------------------------

void AttentionCase::download() {
  for (TestTensor* t : {&out, &lse, &k, &v, &dq, &dk, &dv, &dbias, &dsinks})
    if (*t) t->download();
}

std::vector<std::vector<unsigned char>> AttentionCase::output_bytes() const {
  std::vector<std::vector<unsigned char>> all;
  const bool backward = problem.phase == Phase::backward;
  for (const TestTensor* t : {&out, &lse})
    if (*t && !backward) all.push_back(t->bytes());
  for (const TestTensor* t : {&dq, &dk, &dv, &dbias, &dsinks})
    if (*t) all.push_back(t->bytes());
  if (k_new) {
    all.push_back(k.bytes());
    all.push_back(v.bytes());
  }
  return all;
}

void AttentionCase::check() const {
  problem.phase == Phase::backward ? check_backward() : check_forward();
  if (decode()) check_cache();
}

/// Packed rows that no sequence owns.
void AttentionCase::check_rows_of_nobody(const TestTensor& t, double expected, const char* name) const {
  if (!packed() || !t) return;
  const bool key_side = &t == &dk || &t == &dv;
  const std::int64_t owned = key_side ? begin_k_.back() : begin_q_.back();
  const std::size_t row_axis = &t == &lse ? 1 : 0;
  bool as_expected = true;
  for_each_index(t.view(), [&](const Index& index) {
    if (index[row_axis] >= owned && t.get(index) != expected) as_expected = false;
  });
  EXPECT_TRUE(as_expected) << name << ": packed rows that no sequence owns must be " << expected;
}

void AttentionCase::check_forward() const {
  const OracleResult truth = oracle_forward(oracle);
  const OracleResult naive = oracle_forward(oracle, rounding_to(problem.dtype_out));
  const double magnitude =
      largest(oracle.v) * (oracle.v_descale ? largest(oracle.v_descale) : 1) / (1 - problem.dropout_p);
  expect_close(get_queries(out), truth.out, error_bound(problem.dtype_out, truth.out, naive.out, magnitude), "out");
  EXPECT_TRUE(out.surroundings_untouched()) << "out: bytes beside the tensor were written";
  check_rows_of_nobody(out, 0, "out");
  if (!lse) return;
  // Scores are summed up in float32 whatever the dtype is.
  expect_close(get_lse(), truth.lse, sum_epsilon(problem.dtype) * (1 + largest(truth.lse)), "lse");
  EXPECT_TRUE(lse.surroundings_untouched()) << "lse: bytes beside the tensor were written";
  check_rows_of_nobody(lse, -std::numeric_limits<double>::infinity(), "lse");
}

void AttentionCase::check_backward() const {
  const OracleGrads truth = oracle_backward(oracle, dout_values_, dlse_values_);
  const OracleGrads naive = oracle_backward(oracle, dout_values_, dlse_values_, rounding_to(problem.dtype));
  const GradSizes sizes = oracle_grad_sizes(oracle, dout_values_, dlse_values_);
  const auto judge = [&](const TestTensor& t, const Array4& actual, const Array4& expected, const Array4& rough,
                         const char* name, double magnitude, double noise = 0) {
    expect_close(actual, expected, noise + error_bound(t.dtype(), expected, rough, magnitude), name);
    EXPECT_TRUE(t.surroundings_untouched()) << name << ": bytes beside the tensor were written";
    check_rows_of_nobody(t, 0, name);
  };
  const auto dense = [](const TestTensor& t, const Array4& like) {
    Array4 values = like;
    std::size_t n = 0;
    for_each_index(t.view(), [&](const Index& index) { values.values()[n++] = t.get(index); });
    return values;
  };
  judge(dq, get_queries(dq), truth.dq, naive.dq, "dq", sizes.dq);
  judge(dk, get_keys(dk), truth.dk, naive.dk, "dk", sizes.dk);
  judge(dv, get_keys(dv), truth.dv, naive.dv, "dv", sizes.dv);
  if (dbias) judge(dbias, dense(dbias, truth.dbias), truth.dbias, naive.dbias, "dbias", sizes.dbias);
  // One naive run says little about so few sums, so five standard deviations are added.
  const double noise = 5 * unit_roundoff(problem.dtype) * sizes.dsinks_noise;
  if (dsinks)
    judge(dsinks, dense(dsinks, truth.dsinks), truth.dsinks, naive.dsinks, "dsinks", largest(truth.dsinks), noise);
}

/// Appended rows hold what was given (turned by rotary, which costs a rounding); every other byte is as before.
void AttentionCase::check_cache() const {
  if (!k_new) {
    EXPECT_EQ(k.bytes(), k_before_) << "k_cache was written though nothing was appended";
    EXPECT_EQ(v.bytes(), v_before_) << "v_cache was written though nothing was appended";
    return;
  }
  std::set<Index> appended;
  bool right = true;
  const double tolerance = problem.rotary_dim > 0 ? 2 * unit_roundoff(problem.dtype) + sum_epsilon(problem.dtype) : 0;
  for (std::int64_t b = 0; b < problem.size.batch; ++b)
    for (std::int64_t h = 0; h < problem.size.heads_k; ++h)
      for (std::int64_t i = 0; i < problem.seqlen_new; ++i) {
        const std::int64_t j = cached_[static_cast<std::size_t>(b)] + i;
        appended.insert(key_index(b, h, j, 0));
        for (std::int64_t d = 0; d < problem.size.head_dim; ++d) {
          const double value = k_appended_(b, h, i, d);
          right &= std::fabs(k.get(key_index(b, h, j, d)) - value) <= tolerance * (1 + std::fabs(value));
        }
        for (std::int64_t d = 0; d < problem.size.head_dim_v; ++d)
          right &= v.get(key_index(b, h, j, d)) == v_appended_(b, h, i, d);
      }
  EXPECT_TRUE(right) << "the appended keys or values are not what was given";
  EXPECT_EQ(k.blanked(k.bytes(), appended), k.blanked(k_before_, appended)) << "k_cache: other keys were written";
  EXPECT_EQ(v.blanked(v.bytes(), appended), v.blanked(v_before_, appended)) << "v_cache: other keys were written";
}

}  // namespace flashcore::testing
