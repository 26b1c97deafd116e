// Which row a block works on, and what a pair of rows needs to be scored: shared by forward and backward.
#pragma once

#include "../semantics.h"

namespace flashcore::reference {

using detail::KeyRange;
using detail::Params;
using detail::RowParams;
using detail::Sequence;
using detail::TensorParams;

template <class T>
using AccOf = typename detail::Accumulator<T>::type;

/// Marks a key or query of a tile that must not be read. No offset has this value.
inline constexpr std::int64_t kExcluded = INT64_MIN;

/// A row of one head: query i of `sequence`, or key i.
struct Row {
  Sequence sequence;
  std::int64_t head;
  std::int64_t i;
};

/// Rows are counted head by head, each with all packed rows of all sequences. A packed row that no sequence owns is
/// row i of an empty sequence: it sees nothing, is seen by nothing, and its address is still right.
inline __device__ Row query_row(const Params& p, std::int64_t index) {
  const std::int64_t head = index / p.size.total_q;
  const std::int64_t packed = index - head * p.size.total_q;
  if (!p.sequence.cu_seqlens_q) {
    const std::int64_t batch = packed / p.size.seqlen_q;
    return {detail::sequence_of(p, batch), head, packed - batch * p.size.seqlen_q};
  }
  const std::int64_t batch = detail::batch_of_row(p, packed);
  if (batch < 0) return {Sequence{}, head, packed};
  const Sequence s = detail::sequence_of(p, batch);
  return {s, head, packed - s.q_begin};
}

/// The same for keys.
inline __device__ Row key_row(const Params& p, std::int64_t index) {
  const std::int64_t head = index / p.size.total_k;
  const std::int64_t packed = index - head * p.size.total_k;
  if (!p.sequence.cu_seqlens_k) {
    const std::int64_t batch = packed / p.size.seqlen_k;
    return {detail::sequence_of(p, batch), head, packed - batch * p.size.seqlen_k};
  }
  std::int64_t low = 0;  // the last sequence whose first key is at most `packed`
  std::int64_t high = p.size.batch;
  while (low + 1 < high) {
    const std::int64_t middle = (low + high) / 2;
    if (p.sequence.cu_seqlens_k[middle] <= packed) {
      low = middle;
    } else {
      high = middle;
    }
  }
  if (p.size.batch == 0) return {Sequence{}, head, packed};
  const Sequence s = detail::sequence_of(p, low);
  if (packed < s.k_begin) return {Sequence{}, head, packed};
  return {s, head, packed - s.k_begin};  // beyond seqlen_k where nobody owns it
}

/// The queries [begin, end) that see key j: the inverse of visible_keys.
inline __device__ KeyRange visible_queries(const detail::PositionParams& p, const Sequence& s, std::int64_t j) {
  if (j >= s.seqlen_k) return {0, 0};
  const std::int64_t diagonal = j - (p.top_left ? 0 : s.seqlen_k - s.seqlen_q);
  KeyRange r{0, s.seqlen_q};
  if (p.causal && diagonal > r.begin) r.begin = diagonal;
  if (p.window_right >= 0 && diagonal - p.window_right > r.begin) r.begin = diagonal - p.window_right;
  if (p.window_left >= 0 && diagonal + p.window_left + 1 < r.end) r.end = diagonal + p.window_left + 1;
  return r;
}

inline __device__ std::int64_t head_of_keys(const Params& p, std::int64_t head) {
  return head / (p.size.heads_q / p.size.heads_k);
}

/// The factors of a score that do not depend on the pair.
template <class Acc>
struct Factors {
  Acc scale;  // includes the descales of float8
  Acc alibi_slope;
};

template <class Acc>
__device__ Factors<Acc> factors_of(const Params& p, std::int64_t batch, std::int64_t head) {
  const std::int64_t head_k = head_of_keys(p, head);
  const Acc descale = detail::head_value<Acc>(p.q_descale, batch, head_k, Acc(1)) *
                      detail::head_value<Acc>(p.k_descale, batch, head_k, Acc(1));
  return {static_cast<Acc>(p.score.scale) * descale, detail::head_value<Acc>(p.alibi, batch, head, Acc(0))};
}

template <class A, class B>
__device__ auto dot(const A* a, const B* b, int count) {
  auto sum = detail::load(a[0]) * detail::load(b[0]);
  for (int d = 1; d < count; ++d) sum += detail::load(a[d]) * detail::load(b[d]);
  return sum;
}

}  // namespace flashcore::reference
