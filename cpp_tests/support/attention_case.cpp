// AttentionCase: the making of the tensors, and the call.
#include "attention_case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "float_formats.h"

namespace flashcore::testing {
namespace {

using detail::CausalRule;
using detail::Phase;

constexpr std::array<bool, 4> kFull = {true, true, true, true};
constexpr std::array<bool, 4> kKeysOnly = {true, false, false, true};
constexpr std::array<bool, 4> kHeadsOnly = {false, true, true, true};
constexpr std::array<bool, 4> kPlaneOnly = {false, false, true, true};
constexpr std::array<bool, 4> kQueriesOnly = {false, true, true, false};

/// Lengths that reach both ends of what is allowed: the longest, none at all, then anything.
std::vector<std::int64_t> draw_lengths(Random& random, std::int64_t batch, std::int64_t longest, std::int64_t total) {
  std::vector<std::int64_t> lengths;
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t most = std::min(longest, total);
    const std::int64_t length = b == 0 ? most : b == 2 ? 0 : random.integer(most / 2, most);
    lengths.push_back(length);
    total -= length;
  }
  return lengths;
}

std::vector<std::int64_t> starts_of(const std::vector<std::int64_t>& lengths) {
  std::vector<std::int64_t> starts(lengths.size() + 1, 0);
  std::partial_sum(lengths.begin(), lengths.end(), starts.begin() + 1);
  return starts;
}

TestTensor int32_tensor(Device device, const std::vector<std::int64_t>& values) {
  TestTensor t(DType::int32, device, {static_cast<std::int64_t>(values.size())});
  for (std::size_t n = 0; n < values.size(); ++n) t.set({static_cast<std::int64_t>(n)}, static_cast<double>(values[n]));
  return t;
}

void round_all(Array4& x, DType dtype) {
  for (double& value : x.values()) value = rounded(dtype, value);
}

Array4 random_heads(Random& random, std::int64_t batch, std::int64_t heads, double low, double high, DType dtype) {
  Array4 x(batch, heads, 1, 1);
  for (double& value : x.values()) value = low + (high - low) * random.uniform();
  round_all(x, dtype);
  return x;
}

}  // namespace

const std::vector<Variant>& all_variants() {
  static const std::vector<Variant> variants = {
      {"bhsd dense", Layout::bhsd, 0, kFull, kFull, false, false},
      {"bshd with gaps", Layout::bshd, 8, kKeysOnly, kHeadsOnly, true, true},
      {"bhsd with odd gaps", Layout::bhsd, 3, kPlaneOnly, kKeysOnly, false, true},
      {"bshd dense", Layout::bshd, 0, kQueriesOnly, kQueriesOnly, true, false},
  };
  return variants;
}

AttentionCase::AttentionCase(const detail::Problem& asked, Device device, const Variant& variant, std::uint64_t seed)
    : problem(asked), device_(device), variant_(variant), random_(seed) {
  layout_ = packed() ? Layout::thd : variant.layout;
  make_options();
  make_lengths();
  if (problem.page_size > 0) make_pages();
  make_score_tensors();
  make_rows();
  if (problem.seqlen_new > 0) make_new_keys();
  if (problem.rotary_dim > 0) make_rotary();
  if (problem.seqlen_new > 0) {
    oracle.k = oracle_append(oracle.k, cached_, k_appended_);
    oracle.v = oracle_append(oracle.v, cached_, v_appended_);
  }
  make_outputs();
  if (problem.phase == Phase::backward) make_gradients();
  upload();
}

DType AttentionCase::side_dtype() const {
  if (variant_.side_in_float32 || problem.dtype == DType::float8_e4m3) return DType::float32;
  return problem.dtype;
}

DType AttentionCase::lse_dtype() const { return problem.dtype == DType::float64 ? DType::float64 : DType::float32; }

void AttentionCase::make_options() {
  options.layout = layout_;
  const bool square = problem.size.seqlen_q == problem.size.seqlen_k && !packed() && !has(detail::kSequsedK);
  if (problem.causal == CausalRule::top_left) options.mask = Mask::top_left();
  if (problem.causal == CausalRule::bottom_right) options.mask = square ? Mask::causal() : Mask::bottom_right();
  options.mask = options.mask.window(problem.window_left, problem.window_right);
  if (problem.scale != detail::default_scale(problem.size.head_dim)) options.scale = problem.scale;
  options.softcap = problem.softcap;
  options.dropout_p = problem.dropout_p;
  options.seed = problem.seed;
  options.deterministic = has(detail::kDeterministic);
  oracle.causal = problem.causal != CausalRule::none;
  oracle.corner = problem.causal == CausalRule::top_left ? Corner::top_left : Corner::bottom_right;
  oracle.window_left = problem.window_left;
  oracle.window_right = problem.window_right;
  oracle.scale = problem.scale;
  oracle.softcap = problem.softcap;
  oracle.dropout_p = problem.dropout_p;
  oracle.seed = problem.seed;
}

void AttentionCase::make_lengths() {
  const detail::Sizes& s = problem.size;
  const auto batch = static_cast<std::size_t>(s.batch);
  extent_q_ = packed() ? draw_lengths(random_, s.batch, s.seqlen_q, s.total_q) : Lengths(batch, s.seqlen_q);
  extent_k_ = packed() ? draw_lengths(random_, s.batch, s.seqlen_k, s.total_k) : Lengths(batch, s.seqlen_k);
  oracle.seqlen_q = extent_q_;
  oracle.seqlen_k = extent_k_;
  if (packed()) {
    begin_q_ = starts_of(extent_q_);
    begin_k_ = starts_of(extent_k_);
    cu_seqlens_q = int32_tensor(device_, begin_q_);
    cu_seqlens_k = int32_tensor(device_, begin_k_);
  }
  if (!has(detail::kSequsedK)) return;
  Lengths used;
  for (std::size_t b = 0; b < batch; ++b) {
    const std::int64_t room = extent_k_[b] - problem.seqlen_new;
    used.push_back(b == 0 ? room : b == 2 ? 0 : random_.integer(room / 3, room));
    oracle.seqlen_k[b] = used[b] + problem.seqlen_new;
  }
  seqused_k = int32_tensor(device_, used);
  cached_ = used;
}

void AttentionCase::make_pages() {
  const std::int64_t columns = problem.size.seqlen_k / problem.page_size;
  Lengths order(static_cast<std::size_t>(problem.size.batch * columns));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t n = order.size(); n > 1; --n)
    std::swap(order[n - 1], order[static_cast<std::size_t>(random_.integer(0, static_cast<std::int64_t>(n) - 1))]);
  block_table = TestTensor(DType::int32, device_, {problem.size.batch, columns});
  for (std::int64_t b = 0; b < problem.size.batch; ++b) {
    const auto first = order.begin() + static_cast<std::ptrdiff_t>(b * columns);
    pages_.emplace_back(first, first + static_cast<std::ptrdiff_t>(columns));
    const std::int64_t keys = oracle.seqlen_k[static_cast<std::size_t>(b)];
    const std::int64_t needed = (keys + problem.page_size - 1) / problem.page_size;
    // Columns that no key needs keep their trap value -1.
    for (std::int64_t column = 0; column < needed; ++column)
      block_table.set({b, column}, static_cast<double>(pages_.back()[static_cast<std::size_t>(column)]));
  }
}

Array4 AttentionCase::random_plane(const std::array<bool, 4>& axes, DType dtype) {
  const detail::Sizes& s = problem.size;
  const std::int64_t full[] = {s.batch, s.heads_q, s.seqlen_q, s.seqlen_k};
  std::int64_t own[4];
  for (std::size_t axis = 0; axis < 4; ++axis) own[axis] = axes[axis] ? full[axis] : 1;
  Array4 x(own[0], own[1], own[2], own[3]);
  for (double& value : x.values())
    value = dtype == DType::boolean ? random_.uniform() < 0.6 : rounded(dtype, random_.normal());
  return x;
}

/// Leading axes of size 1 are left out of the tensor, so that lower ranks are tried as well.
TestTensor AttentionCase::plane_tensor(DType dtype, const Array4& values) const {
  std::size_t skipped = 0;
  while (skipped < 2 && values.shape()[skipped] == 1) ++skipped;
  TestTensor t(dtype, device_, {values.shape().begin() + static_cast<std::ptrdiff_t>(skipped), values.shape().end()},
               variant_.gap);
  std::size_t n = 0;
  for_each_index(t.view(), [&](const Index& index) { t.set(index, values.values()[n++]); });
  return t;
}

TestTensor AttentionCase::per_head(DType dtype, const Array4& values) const {
  const bool flat = values.size(0) == 1;
  TestTensor t(dtype, device_, flat ? Lengths{values.size(1)} : Lengths{values.size(0), values.size(1)});
  std::size_t n = 0;
  for_each_index(t.view(), [&](const Index& index) { t.set(index, values.values()[n++]); });
  return t;
}

void AttentionCase::make_score_tensors() {
  const detail::Sizes& s = problem.size;
  if (has(detail::kMask)) {
    oracle.keep = random_plane(variant_.mask_axes, DType::boolean);
    // One query row without a key to see.
    if (variant_.mask_axes[2] && !oracle.keep.values().empty())
      std::fill_n(oracle.keep.values().begin(), oracle.keep.size(3), 0.0);
    mask = plane_tensor(DType::boolean, oracle.keep);
  }
  if (has(detail::kBias)) {
    oracle.bias = random_plane(variant_.bias_axes, side_dtype());
    for (double& value : oracle.bias.values())
      if (random_.uniform() < 0.08) value = -std::numeric_limits<double>::infinity();  // an additive mask
    bias = plane_tensor(side_dtype(), oracle.bias);
  }
  if (has(detail::kAlibi)) {
    oracle.alibi = random_heads(random_, variant_.alibi_per_batch ? s.batch : 1, s.heads_q, 0.02, 0.5, DType::float32);
    alibi = per_head(DType::float32, oracle.alibi);
  }
  if (has(detail::kSinks)) {
    oracle.sinks = random_heads(random_, 1, s.heads_q, -1, 2, side_dtype());
    sinks = per_head(side_dtype(), oracle.sinks);
  }
  if (!has(detail::kDescale)) return;
  for (const auto& [values, tensor] :
       {std::pair{&oracle.q_descale, &q_descale}, std::pair{&oracle.k_descale, &k_descale},
        std::pair{&oracle.v_descale, &v_descale}}) {
    *values = random_heads(random_, s.batch, s.heads_k, 0.5, 1.5, DType::float32);
    *tensor = per_head(DType::float32, *values);
  }
}

Array4 AttentionCase::random_rows(std::int64_t heads, std::int64_t seq, std::int64_t dim) {
  Array4 x(problem.size.batch, heads, seq, dim);
  for (double& value : x.values()) value = rounded(problem.dtype, random_.normal());
  return x;
}

void AttentionCase::make_rows() {
  const detail::Sizes& s = problem.size;
  oracle.q = random_rows(s.heads_q, s.seqlen_q, s.head_dim);
  oracle.k = random_rows(s.heads_k, s.seqlen_k, s.head_dim);
  oracle.v = random_rows(s.heads_k, s.seqlen_k, s.head_dim_v);
  hide_what_no_query_sees();
  q = query_rows(problem.dtype, s.head_dim);
  k = key_rows(s.head_dim);
  v = key_rows(s.head_dim_v);
  put_queries(q, oracle.q);
  put_keys(k, oracle.k);
  put_keys(v, oracle.v);
  k_before_ = k.bytes();
  v_before_ = v.bytes();
}

void AttentionCase::hide_what_no_query_sees() {
  const detail::Sizes& s = problem.size;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t h = 0; h < s.heads_k; ++h)
      for (std::int64_t j = 0; j < s.seqlen_k; ++j) {
        bool seen = false;
        const std::int64_t group = problem.group();
        const std::int64_t pairs = group * oracle.seqlen_q[static_cast<std::size_t>(b)];
        for (std::int64_t n = 0; n < pairs && !seen && j < oracle.seqlen_k[static_cast<std::size_t>(b)]; ++n)
          seen = oracle_visible(oracle, b, h * group + n % group, n / group, j);
        if (seen) continue;
        for (std::int64_t d = 0; d < s.head_dim; ++d) oracle.k(b, h, j, d) = nan;
        for (std::int64_t d = 0; d < s.head_dim_v; ++d) oracle.v(b, h, j, d) = nan;
      }
}

void AttentionCase::make_new_keys() {
  const detail::Sizes& s = problem.size;
  k_appended_ = random_rows(s.heads_k, problem.seqlen_new, s.head_dim);
  v_appended_ = random_rows(s.heads_k, problem.seqlen_new, s.head_dim_v);
  for (const auto& [values, tensor] : {std::pair{&k_appended_, &k_new}, std::pair{&v_appended_, &v_new}}) {
    *tensor = rows_tensor(problem.dtype, s.batch, s.heads_k, problem.seqlen_new, 0, values->size(3));
    for_each_index(tensor->view(), [&, x = values, t = tensor](const Index& at) {
      t->set(at, layout_ == Layout::bshd ? (*x)(at[0], at[2], at[1], at[3]) : (*x)(at[0], at[1], at[2], at[3]));
    });
  }
}

void AttentionCase::make_rotary() {
  const std::int64_t pairs = problem.rotary_dim / 2;
  const std::int64_t positions = problem.size.seqlen_k;
  Array4 cosines(1, 1, positions, pairs);
  Array4 sines(1, 1, positions, pairs);
  cos = TestTensor(side_dtype(), device_, {positions, pairs}, variant_.gap);
  sin = TestTensor(side_dtype(), device_, {positions, pairs}, variant_.gap);
  for (std::int64_t position = 0; position < positions; ++position)
    for (std::int64_t n = 0; n < pairs; ++n) {
      const double angle = static_cast<double>(position) * std::pow(10000.0, -static_cast<double>(n) / pairs);
      cosines(0, 0, position, n) = rounded(side_dtype(), std::cos(angle));
      sines(0, 0, position, n) = rounded(side_dtype(), std::sin(angle));
      cos.set({position, n}, cosines(0, 0, position, n));
      sin.set({position, n}, sines(0, 0, position, n));
    }
  Lengths first_query;
  for (const std::int64_t keys : oracle.seqlen_k) first_query.push_back(keys - problem.size.seqlen_q);
  oracle.q = oracle_rotary(oracle.q, first_query, cosines, sines, problem.rotary_interleaved);
  if (!k_appended_) return;
  k_appended_ = oracle_rotary(k_appended_, cached_, cosines, sines, problem.rotary_interleaved);
  round_all(k_appended_, problem.dtype);  // the cache stores what was turned
}

void AttentionCase::make_outputs() {
  out = query_rows(problem.dtype_out, problem.size.head_dim_v);
  if (has(detail::kLse) || problem.phase == Phase::backward) lse = row_numbers(lse_dtype());
}

void AttentionCase::make_gradients() {
  const detail::Sizes& s = problem.size;
  OracleResult forward = oracle_forward(oracle);
  put_queries(out, forward.out);
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t h = 0; h < s.heads_q; ++h)
      for (std::int64_t i = 0; i < extent_q_[static_cast<std::size_t>(b)]; ++i)
        lse.set(lse_index(b, h, i), forward.lse(b, h, i, 0));
  dout_values_ = random_rows(s.heads_q, s.seqlen_q, s.head_dim_v);
  dout = query_rows(problem.dtype_out, s.head_dim_v);
  put_queries(dout, dout_values_);
  if (has(detail::kDlse)) {
    dlse = row_numbers(lse_dtype());
    dlse_values_ = Array4(s.batch, s.heads_q, s.seqlen_q, 1);
    for (std::int64_t b = 0; b < s.batch; ++b)
      for (std::int64_t h = 0; h < s.heads_q; ++h)
        for (std::int64_t i = 0; i < extent_q_[static_cast<std::size_t>(b)]; ++i) {
          dlse_values_(b, h, i, 0) = rounded(lse_dtype(), random_.normal());
          dlse.set(lse_index(b, h, i), dlse_values_(b, h, i, 0));
        }
  }
  dq = query_rows(problem.dtype, s.head_dim);
  dk = key_rows(s.head_dim);
  dv = key_rows(s.head_dim_v);
  if (has(detail::kDbias)) dbias = plane_tensor(side_dtype(), oracle.bias);
  if (has(detail::kDsinks)) dsinks = per_head(side_dtype(), oracle.sinks);
}

void AttentionCase::upload() {
  for (TestTensor* t :
       {&q,         &k,         &v,         &out,          &lse,          &mask,      &bias,        &alibi, &sinks,
        &q_descale, &k_descale, &v_descale, &cu_seqlens_q, &cu_seqlens_k, &seqused_k, &block_table, &k_new, &v_new,
        &cos,       &sin,       &dout,      &dlse,         &dq,           &dk,        &dv,          &dbias, &dsinks})
    if (*t) t->upload();
}

AttentionInputs AttentionCase::inputs() const {
  AttentionInputs in{.q = q.view(),
                     .k = k.view(),
                     .v = v.view(),
                     .mask = mask.view(),
                     .bias = bias.view(),
                     .alibi_slopes = alibi.view(),
                     .sinks = sinks.view(),
                     .q_descale = q_descale.view(),
                     .k_descale = k_descale.view(),
                     .v_descale = v_descale.view()};
  in.sequences = {cu_seqlens_q.view(), cu_seqlens_k.view(), seqused_k.view()};
  if (packed()) in.sequences.max_seqlen_q = problem.size.seqlen_q;
  if (packed()) in.sequences.max_seqlen_k = problem.size.seqlen_k;
  return in;
}

DecodeInputs AttentionCase::decode_inputs() const {
  return {.q = q.view(),
          .k_cache = k.view(),
          .v_cache = v.view(),
          .cache_seqlens = seqused_k.view(),
          .block_table = block_table.view(),
          .k_new = k_new.view(),
          .v_new = v_new.view(),
          .rotary = {cos.view(), sin.view(), problem.rotary_interleaved},
          .mask = mask.view(),
          .bias = bias.view(),
          .alibi_slopes = alibi.view(),
          .sinks = sinks.view(),
          .q_descale = q_descale.view(),
          .k_descale = k_descale.view(),
          .v_descale = v_descale.view()};
}

AttentionOutputs AttentionCase::outputs() const { return {out.view(), lse.view()}; }
AttentionCotangents AttentionCase::cotangents() const { return {dout.view(), dlse.view()}; }
AttentionGrads AttentionCase::grads() const { return {dq.view(), dk.view(), dv.view(), dbias.view(), dsinks.view()}; }

Support AttentionCase::supports() const {
  if (decode()) return flashcore::supports(decode_inputs(), outputs(), options);
  if (problem.phase == Phase::forward) return flashcore::supports(inputs(), outputs(), options);
  return flashcore::supports(inputs(), outputs(), cotangents(), grads(), options);
}

void AttentionCase::run(Stream stream) {
  if (decode()) {
    attention_decode(decode_inputs(), outputs(), options, stream);
  } else if (problem.phase == Phase::forward) {
    attention_forward(inputs(), outputs(), options, stream);
  } else {
    attention_backward(inputs(), outputs(), cotangents(), grads(), options, stream);
  }
  download();
}

}  // namespace flashcore::testing
