// ScoreGrads: the weights of a tile drawn up again, and the gradients of its scores.
//
//   P^T = 2^(K·Q^T − lse)       dS^T = P^T ∘ (dropout ∘ V·dO^T − Δ)
// Δ_i = dout_i·out_i − dlse_i is what the softmax's sum takes back from each score of query i; the gradient of lse
// enters each score with its weight, which is why Δ takes it up.
#pragma once

#include "arena.h"
#include "isa.h"
#include "value.h"

namespace flashcore::cpu {
namespace {

/// lse in units of log 2, and Δ. For a query that sees nothing lse is +∞, which makes its weights 0.
struct RowFacts {
  float lse;
  float delta;
};

template <class T>
RowFacts row_facts(const detail::Params& p, const detail::Sequence& s, std::int64_t head, std::int64_t i) {
  const float lse = static_cast<const float*>(p.lse.data)[detail::row_offset(p.lse, s, head, i)];
  if (lse == -kInfinity) return {kInfinity, 0};
  const T* dout = static_cast<const T*>(p.grad.dout.data) + detail::q_offset(p.grad.dout, s, head, i);
  const T* out = static_cast<const T*>(p.out.data) + detail::q_offset(p.out, s, head, i);
  const int dim = p.size.head_dim_v;
  VecF product{};
  for (int d = 0; d < dim; d += kLanes) product += load_floats(dout + d, dim - d) * load_floats(out + d, dim - d);
  prefetch_rows(Rows<T>{out + kBlockQueries * p.out.seq, p.out.seq, 1, dim});
  float delta = sum_of_lanes(product);
  const detail::RowParams& dlse = p.grad.dlse;
  if (dlse.data) delta -= static_cast<const float*>(dlse.data)[detail::row_offset(dlse, s, head, i)];
  return {lse * kLog2E, delta};
}

template <class T>
void pack_row_facts(const detail::Params& p, const detail::Sequence& s, std::int64_t head, const ScoreTile& t,
                    float* lse, float* delta) {
  for (int i = 0; i < t.width(); ++i) {
    const RowFacts facts = i < t.queries ? row_facts<T>(p, s, head, t.first_query + i) : RowFacts{kInfinity, 0};
    lse[i] = facts.lse;
    delta[i] = facts.delta;
  }
}

/// The sink is a score whose value is 0: its gradient is the sum of −weight · Δ.
inline double sink_gradient(const detail::Params& p, const detail::Sequence& s, std::int64_t head, const float* lse,
                            const float* delta) {
  const float sink = detail::head_value<float>(p.sinks, 0, head, 0.f) * kLog2E;
  double sum = 0;
  for (std::int64_t i = 0; i < s.seqlen_q; ++i) sum -= exp2(broadcast(sink - lse[i]))[0] * delta[i];
  return sum;
}

/// Keys [first, first + count).
struct KeySpan {
  std::int64_t first;
  int count;

  FLASHCORE_INLINE bool meets(const detail::KeyRange& keys) const {
    return first < keys.end && first + count > keys.begin;
  }
};

/// factor · rows, `width` floats apart, as the gradient of keys or values of a task; nothing if it is not wanted.
template <class T>
void store_key_rows(const detail::Params& p, const BackwardTask& task, const KeySpan& span,
                    const detail::TensorParams& target, const float* rows, std::int64_t width, int dim, float factor) {
  constexpr int kRowsAhead = 8;
  if (!target.data) return;
  for (int j = 0; j < span.count; ++j, rows += width) {
    T* to = static_cast<T*>(target.data) + detail::k_offset(p, target, task.sequence, task.head_k, span.first + j);
    prefetch_rows(Rows<T>{to + kRowsAhead * target.seq, target.seq, 1, dim});
    for (int d = 0; d < dim; d += kLanes) store_floats(to + d, load(rows + d) * factor, dim - d);
  }
}

/// to += from.
inline void add_floats(const float* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(to + i, load(to + i) + load(from + i));
}

/// Columns of a query block as rows: dq's, multiplied with `factor`, or those of a task's part. Nothing if dq is not
/// wanted.
template <class T>
void store_query_columns(const detail::Params& p, const BackwardTask& task, std::int64_t head, const ScoreTile& t,
                         const float* columns, float factor) {
  if (!p.grad.dq.data) return;
  const int dim = p.size.head_dim;
  VecF factors[kTileVectors];
  for (VecF& x : factors) x = broadcast(task.dq_part ? 1.f : factor);
  if (!task.dq_part) {
    T* dq = static_cast<T*>(p.grad.dq.data) + detail::q_offset(p.grad.dq, task.sequence, head, t.first_query);
    return unpack_transposed<T>(columns, t.vectors, factors, dq, p.grad.dq.seq, t.queries, dim);
  }
  const std::int64_t width = Isa::dq_width(dim);
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  const std::int64_t row = (head - task.head_k * group) * task.sequence.seqlen_q + t.first_query;
  unpack_transposed<float>(columns, t.vectors, factors, task.dq_part + row * width, width, t.queries, dim);
}

/// dq of a head from what chunks of keys gave to it, in their order.
inline void sum_dq(const detail::Params& p, const detail::Sequence& s, std::int64_t head, const float* part,
                   std::int64_t stride, std::int64_t parts) {
  const int dim = p.size.head_dim;
  const std::int64_t width = Isa::dq_width(dim);
  const float factor = static_cast<float>(p.score.scale);
  with_storage(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    T* to = static_cast<T*>(p.grad.dq.data) + detail::q_offset(p.grad.dq, s, head, 0);
    for (std::int64_t i = 0; i < s.seqlen_q; ++i)
      for (int d = 0; d < dim; d += kLanes) {
        const float* from = part + i * width + d;
        VecF sum = load_floats(from, dim - d);
        for (std::int64_t n = 1; n < parts; ++n) sum += load_floats(from + n * stride, dim - d);
        store_floats(to + i * p.grad.dq.seq + d, sum * factor, dim - d);
      }
  });
}

/// A query block, ready for products: columns of (head_dim, width), and a number a query.
struct QueryColumns {
  float* q;  // scaled
  float* dout;
  float* lse;
  float* delta;
};

template <class T>
void pack_query_columns(const detail::Params& p, const detail::Sequence& s, std::int64_t head, const ScoreTile& t,
                        float scale, const QueryColumns& to) {
  const T* q = static_cast<const T*>(p.q.data) + detail::q_offset(p.q, s, head, t.first_query);
  const T* dout = static_cast<const T*>(p.grad.dout.data) + detail::q_offset(p.grad.dout, s, head, t.first_query);
  pack_transposed<T>({q, p.q.seq, t.queries, p.size.head_dim}, scale, t.vectors, t.width(), to.q);
  pack_transposed<T>({dout, p.grad.dout.seq, t.queries, p.size.head_dim_v}, 1.f, t.vectors, t.width(), to.dout);
  pack_row_facts<T>(p, s, head, t, to.lse, to.delta);
}

/// A chunk of a head's query blocks [begin, end), which meets the keys of a task. The first clears the keys' sums, the
/// last stores them: each time those of a block are in the cache.
struct Pass {
  std::int64_t head;
  std::int64_t begin;
  std::int64_t end;
  bool first;
  bool last;
};

/// Calls run(pass) for the chunks of all heads that share a task's keys: at least once, even without queries.
template <class Run>
void for_each_pass(const detail::Params& p, const BackwardTask& task, std::int64_t blocks, std::int64_t chunk_blocks,
                   Run&& run) {
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  const std::int64_t chunks = blocks > 0 ? (blocks + chunk_blocks - 1) / chunk_blocks : 1;
  for (std::int64_t n = 0; n < group * chunks; ++n) {
    const std::int64_t begin = n % chunks * chunk_blocks;
    run(Pass{task.head_k * group + n / chunks, begin, min_of(begin + chunk_blocks, blocks), n == 0,
             n == group * chunks - 1});
  }
}

/// Calls add(span, dq) for each block of a task's keys and sums what they add to dq, each chunk's by itself: dq of the
/// first in `sum`, which then takes up that of each other, which was in `chunk`. Both have `count` floats.
template <class Add>
void sum_chunks(const BackwardTask& task, std::int64_t count, float* sum, float* chunk, Add&& add) {
  const auto clear = [&](float* dq) { std::memset(dq, 0, static_cast<std::size_t>(count) * sizeof(float)); };
  clear(sum);
  for (std::int64_t begin = task.key_begin; begin < task.key_end; begin += task.chunk_keys) {
    const std::int64_t end = min_of(begin + task.chunk_keys, task.key_end);
    float* dq = begin == task.key_begin ? sum : chunk;
    if (dq == chunk) clear(chunk);
    for (std::int64_t first = begin; first < end; first += kBlockKeys)
      add(KeySpan{first, static_cast<int>(min_of<std::int64_t>(kBlockKeys, end - first))}, dq);
    if (dq == chunk) add_floats(chunk, count, sum);
  }
}

/// The two products of a tile, in floats: each starts from a vector for every vector of queries.
class FloatProducts {
 public:
  FloatProducts(const detail::Params& p, const QueryColumns& columns, KeyBlocks& keys, KeyBlocks& values,
                const KeySpan& span)
      : p_(p), columns_(columns), keys_(keys), values_(values), span_(span) {}

  void scores(const ScoreTile& t, const VecF* start) { multiply(t, keys_, p_.size.head_dim, columns_.q, start); }
  void grads(const ScoreTile& t, const VecF* start) { multiply(t, values_, p_.size.head_dim_v, columns_.dout, start); }

 private:
  void multiply(const ScoreTile& t, KeyBlocks& blocks, int dim, const float* columns, const VecF* start) {
    VecF unused[kTileVectors] = {};
    const KeyRows rows = blocks.rows(span_.first, span_.count).from(t.first_key - span_.first);
    multiply_rows(t, rows, dim, columns, start, unused, nullptr);
  }

  const detail::Params& p_;
  const QueryColumns& columns_;
  KeyBlocks& keys_;
  KeyBlocks& values_;
  const KeySpan& span_;
};

/// Of `count` scores less lse, and as many products less Δ: weights become 2^scores, grads their gradients.
__attribute__((noinline)) void weigh_plainly(float* weights, float* grads, std::int64_t count) {
#pragma GCC unroll 2
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const VecF weight = exp2(load(weights + i));
    store(weights + i, weight);
    // Note: where a weight is 0 the value may be NaN, and does not count.
    store(grads + i, weight != 0.f ? weight * load(grads + i) : VecF{});
  }
}

class ScoreGrads {
 public:
  ScoreGrads(const detail::Params& p, const detail::Sequence& s, std::uint8_t* mask_extents, Arena& arena)
      : p_(p),
        s_(s),
        weights_(arena.take<float>(kBlockKeys * kBlockQueries)),
        grads_(arena.take<float>(kBlockKeys * kBlockQueries)),
        slopes_(arena.take<float>(kBlockKeys * kBlockQueries)),
        rules_(p, s, arena.take<float>(kBlockKeys * kBlockQueries), mask_extents) {}

  static std::size_t bytes() { return 4 * Arena::rounded(kBlockKeys * kBlockQueries * sizeof(float)); }

  const ScoreRules& rules() const { return rules_; }

  /// Turns to the keys of the span that some query of `block` sees, from a multiple of `step` on, which is one of 4;
  /// false if there are none.
  bool turn_to(const ScoreTile& block, std::int64_t head, const KeySpan& span, int step) {
    tile_ = block;
    tile_.data = weights_;
    const detail::KeyRange seen = rules_.keys_of(block.first_query, block.queries);
    tile_.first_key = max_of(span.first, seen.begin / step * step);
    const std::int64_t end = min_of(span.first + span.count, seen.end);
    if (tile_.first_key >= end) return false;
    tile_.keys = static_cast<int>(end - tile_.first_key);
    head_ = head;
    extent_ = rules_.cut_to_mask(tile_, head);
    edges_ = rules_.has_edges(tile_);
    return extent_ != Extent::nothing;
  }

  /// Finds weights() and grads(), where products.scores(tile, start) and products.grads(tile, start) multiply.
  template <class Products>
  void find(const float* lse, const float* delta, Products&& products) {
    if (plain()) return find_plainly(lse, delta, products);
    find_weights(lse, products);
    find_grads(delta, products);
  }

  /// P^T ∘ dropout.
  const ScoreTile& weights() const { return tile_; }
  /// dS^T, by the score after softcap, ALiBi and bias.
  ScoreTile grads() const {
    ScoreTile t = tile_;
    t.data = grads_;
    return t;
  }
  /// Whether some weight may be 0 because a query does not see the key.
  bool some_excluded() const { return edges_ || rules_.changes_scores(extent_); }
  /// Whether the tile's weights are plainly 2^(scores − lse).
  bool plain() const { return !some_excluded() && p_.dropout.threshold == 0; }

  /// grads() become those by the product before the softcap.
  void pass_softcap() {
    if (p_.score.softcap <= 0) return;
    // Note: where a key is not seen its slope may be NaN, and does not count.
    change_scores(grads(), [&](VecF x, int j, int n) {
      return x != 0.f ? x * load(slopes_ + j * tile_.width() + n * kLanes) : VecF{};
    });
  }

 private:
  template <class Products>
  void find_plainly(const float* lse, const float* delta, Products& products) {
    VecF less_lse[kTileVectors];
    VecF less_delta[kTileVectors];
    for (int n = 0; n < tile_.vectors; ++n) {
      less_lse[n] = -load(lse + n * kLanes);
      less_delta[n] = -load(delta + n * kLanes);
    }
    products.scores(tile_, less_lse);
    products.grads(grads(), less_delta);
    weigh_plainly(weights_, grads_, static_cast<std::int64_t>(tile_.keys) * tile_.width());
  }

  template <class Products>
  void find_weights(const float* lse, Products& products) {
    const bool general = rules_.changes_scores(extent_);
    VecF start[kTileVectors];
    for (int n = 0; n < tile_.vectors; ++n) start[n] = general ? VecF{} : -load(lse + n * kLanes);
    products.scores(tile_, start);
    if (general) rules_.change_scores(tile_, head_, extent_, slopes_);
    if (edges_) rules_.exclude_by_position(tile_);
    if (!general) return change_scores(tile_, [](VecF x, int, int) { return exp2(x); });
    change_scores(tile_, [&](VecF x, int, int n) { return exp2(x - load(lse + n * kLanes)); });
  }

  template <class Products>
  void find_grads(const float* deltas, Products& products) {
    const ScoreTile to = grads();
    const bool drops = p_.dropout.threshold > 0;
    VecF delta[kTileVectors];
    VecF start[kTileVectors];
    for (int n = 0; n < to.vectors; ++n) {
      delta[n] = load(deltas + n * kLanes);
      start[n] = drops ? VecF{} : -delta[n];
    }
    products.grads(to, start);
    // Note: where a weight is 0 the value may be NaN, and does not count.
    if (!drops)
      return change_scores(to, [&](VecF x, int j, int n) {
        const VecF weight = load(tile_.row(j) + n * kLanes);
        return weight != 0.f ? weight * x : VecF{};
      });
    for_dropout_factors(to, p_.dropout, s_, head_, [&](int j, int n, VecF factor) {
      float* grad = to.row(j) + n * kLanes;
      float* at = tile_.row(j) + n * kLanes;
      const VecF weight = load(at);
      const VecF kept = factor != 0.f ? load(grad) * factor : VecF{};
      store(grad, weight != 0.f ? weight * (kept - delta[n]) : VecF{});
      store(at, weight * factor);
    });
  }

  const detail::Params& p_;
  const detail::Sequence& s_;
  float* const weights_;
  float* const grads_;
  float* const slopes_;
  ScoreRules rules_;
  ScoreTile tile_ = {};
  std::int64_t head_ = 0;
  Extent extent_ = Extent::everything;
  bool edges_ = false;
};

}  // namespace
}  // namespace flashcore::cpu
