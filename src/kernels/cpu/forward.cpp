// The CPU's reference forward and decode: every feature, one tile of queries at a time, online softmax over key blocks.
//
// The queries of all heads that share a key head form one list of rows, so that a block of keys is converted to
// floats once for up to kTileRows of them, also where a call has a single query a head.
#include <cmath>

#include "../semantics.h"
#include "kernels.h"
#include "rows.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

constexpr std::int64_t kTileRows = 32;
constexpr std::int64_t kBlockKeys = 64;

enum Slice { kQueries, kSums, kKeys, kValues };  // the workspace's parts

/// One query of one head: what it sees, and its running softmax.
template <class Acc>
struct Row {
  std::int64_t head;
  std::int64_t query;
  KeyRange keys;
  Acc alibi_slope;
  Acc max;  // largest score so far
  Acc sum;  // Σ exp(score − max); 0 as long as no key was seen
};

template <class T>
class Forward {
 public:
  using Acc = typename Accumulator<T>::type;

  Forward(const Params& params, const Plan& plan, void* workspace)
      : p_(params),
        queries_(slice<Acc>(workspace, plan.slices[kQueries])),
        sums_(slice<Acc>(workspace, plan.slices[kSums])),
        keys_(slice<Acc>(workspace, plan.slices[kKeys])),
        values_(slice<Acc>(workspace, plan.slices[kValues])) {}

  void run() {
    if (p_.sequence.cu_seqlens_q) clear_packed_rows();
    const std::int64_t group = p_.size.heads_q / p_.size.heads_k;
    for (std::int64_t batch = 0; batch < p_.size.batch; ++batch) {
      const Sequence s = sequence_of(p_, batch);
      const std::int64_t rows = group * s.seqlen_q;
      for (std::int64_t head_k = 0; head_k < p_.size.heads_k; ++head_k)
        for (std::int64_t first = 0; first < rows; first += kTileRows)
          attend_tile(s, head_k, first, std::min(kTileRows, rows - first));
    }
  }

 private:
  /// Packed rows that no sequence owns are empty queries.
  void clear_packed_rows() {
    with_wide_storage(p_.dtype_out, [this](auto zero) { fill(p_.out, query_extents(p_, p_.size.head_dim_v), zero); });
    fill(p_.lse, query_extents(p_, 1), kMinusInfinity<Acc>);
  }

  void attend_tile(const Sequence& s, std::int64_t head_k, std::int64_t first, std::int64_t count) {
    Row<Acc> rows[kTileRows];
    KeyRange seen{s.seqlen_k, 0};  // by any row of the tile
    for (std::int64_t r = 0; r < count; ++r) {
      rows[r] = start_row(s, head_k, first + r, r);
      if (rows[r].keys.begin >= rows[r].keys.end) continue;
      seen.begin = std::min(seen.begin, rows[r].keys.begin);
      seen.end = std::max(seen.end, rows[r].keys.end);
    }
    scale_ = static_cast<Acc>(p_.score.scale) * head_value<Acc>(p_.q_descale, s.batch, head_k, 1) *
             head_value<Acc>(p_.k_descale, s.batch, head_k, 1);
    for (std::int64_t begin = seen.begin; begin < seen.end; begin += kBlockKeys) {
      const KeyRange block{begin, std::min(begin + kBlockKeys, seen.end)};
      load_keys(s, head_k, block);
      for (std::int64_t r = 0; r < count; ++r) attend_block(s, rows[r], r, block);
    }
    const Acc value_scale = head_value<Acc>(p_.v_descale, s.batch, head_k, 1);
    for (std::int64_t r = 0; r < count; ++r) finish_row(s, rows[r], r, value_scale);
  }

  Row<Acc> start_row(const Sequence& s, std::int64_t head_k, std::int64_t index, std::int64_t r) {
    const std::int64_t head = head_k * (p_.size.heads_q / p_.size.heads_k) + index / s.seqlen_q;
    const std::int64_t i = index % s.seqlen_q;
    const T* q = static_cast<const T*>(p_.q.data) + q_offset(p_.q, s, head, i);
    Acc* query = queries_ + r * p_.size.head_dim;
    if (p_.rotary.dim > 0) {
      for (int d = 0; d < p_.size.head_dim; ++d) query[d] = rotated(q, d, query_position(s, i), p_.rotary);
    } else {
      load_row(query, q, p_.size.head_dim);
    }
    std::fill_n(sums_ + r * p_.size.head_dim_v, p_.size.head_dim_v, Acc(0));
    const Acc slope = head_value<Acc>(p_.alibi, s.batch, head, 0);
    return {head, i, visible_keys(p_.position, s, i), slope, kMinusInfinity<Acc>, Acc(0)};
  }

  void load_keys(const Sequence& s, std::int64_t head_k, const KeyRange& block) {
    for (std::int64_t j = block.begin; j < block.end; ++j) {
      const std::int64_t n = j - block.begin;
      const std::int64_t k = k_offset(p_, p_.k, s, head_k, j);
      present_[n] = is_present(p_, k);
      if (!present_[n]) continue;
      load_row(keys_ + n * p_.size.head_dim, static_cast<const T*>(p_.k.data) + k, p_.size.head_dim);
      const std::int64_t v = k_offset(p_, p_.v, s, head_k, j);
      load_row(values_ + n * p_.size.head_dim_v, static_cast<const T*>(p_.v.data) + v, p_.size.head_dim_v);
    }
  }

  void attend_block(const Sequence& s, Row<Acc>& row, std::int64_t r, const KeyRange& block) {
    const std::int64_t begin = std::max(block.begin, row.keys.begin);
    const std::int64_t end = std::min(block.end, row.keys.end);
    Acc score[kBlockKeys];  // −inf where the key is excluded
    Acc max = row.max;
    for (std::int64_t j = begin; j < end; ++j) {
      const std::int64_t n = j - block.begin;
      score[n] = kMinusInfinity<Acc>;
      if (!present_[n] || !kept_by_mask(p_.mask, s, row.head, row.query, j)) continue;
      const Acc product = dot(queries_ + r * p_.size.head_dim, keys_ + n * p_.size.head_dim, p_.size.head_dim);
      score[n] = score_of(p_, s, row.head, row.query, j, product, scale_, row.alibi_slope).value;
      if (score[n] > max) max = score[n];
    }
    Acc* sums = sums_ + r * p_.size.head_dim_v;
    if (max > row.max) {
      const Acc correction = std::exp(row.max - max);
      row.sum *= correction;
      for (int d = 0; d < p_.size.head_dim_v; ++d) sums[d] *= correction;
      row.max = max;
    }
    for (std::int64_t j = begin; j < end; ++j) {
      const std::int64_t n = j - block.begin;
      if (score[n] == kMinusInfinity<Acc>) continue;
      const Acc weight = std::exp(score[n] - max);
      row.sum += weight;
      const Acc kept = weight * dropout_factor<Acc>(p_.dropout, s, row.head, row.query, j);
      add_scaled(sums, kept, values_ + n * p_.size.head_dim_v, p_.size.head_dim_v);
    }
  }

  void finish_row(const Sequence& s, const Row<Acc>& row, std::int64_t r, Acc value_scale) {
    Acc lse = kMinusInfinity<Acc>;
    Acc factor = 0;
    if (row.sum != 0) {  // some key was seen
      const Acc sink = head_value<Acc>(p_.sinks, 0, row.head, kMinusInfinity<Acc>);
      const Acc max = std::max(row.max, sink);
      const Acc correction = std::exp(row.max - max);
      const Acc sum = row.sum * correction + std::exp(sink - max);
      lse = max + std::log(sum);
      factor = value_scale * correction / sum;
    }
    const Acc* sums = sums_ + r * p_.size.head_dim_v;
    const std::int64_t out = q_offset(p_.out, s, row.head, row.query);
    for (int d = 0; d < p_.size.head_dim_v; ++d) store_as(p_.out.data, p_.dtype_out, out + d, sums[d] * factor);
    if (p_.lse.data) static_cast<Acc*>(p_.lse.data)[row_offset(p_.lse, s, row.head, row.query)] = lse;
  }

  const Params& p_;
  Acc* queries_;                   // (kTileRows, head_dim)
  Acc* sums_;                      // (kTileRows, head_dim_v): Σ weight·value
  Acc* keys_;                      // (kBlockKeys, head_dim)
  Acc* values_;                    // (kBlockKeys, head_dim_v)
  bool present_[kBlockKeys] = {};  // false where the page table points nowhere
  Acc scale_ = 1;
};

}  // namespace

void plan_forward(const Problem& problem, const DeviceInfo&, Plan& plan) {
  const std::size_t number = problem.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  const auto add = [&](Slice part, std::int64_t rows, std::int64_t dim) {
    plan.slices[part] = plan.workspace.add(static_cast<std::size_t>(rows * dim) * number);
  };
  add(kQueries, kTileRows, problem.size.head_dim);
  add(kSums, kTileRows, problem.size.head_dim_v);
  add(kKeys, kBlockKeys, problem.size.head_dim);
  add(kValues, kBlockKeys, problem.size.head_dim_v);
}

void launch_forward(const Plan& plan, const Params& params, void* workspace, Stream) {
  if (params.append.k_new.data) append_keys(params);
  with_storage(params.dtype, [&](auto storage) { Forward<decltype(storage)>(params, plan, workspace).run(); });
}

}  // namespace flashcore::cpu
