// ScoreGrads: the weights of a tile drawn up again, and the gradients of its scores.
//
//   P^T = 2^(K·Q^T − lse)       dS^T = P^T ∘ (dropout ∘ V·dO^T − Δ)
// Δ_i = dout_i·out_i − dlse_i is what the softmax's sum takes back from each score of query i; the gradient of lse
// enters each score with its weight, which is why Δ takes it up.
#pragma once

#include "arena.h"
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
  float delta = sum_of_lanes(product);
  const detail::RowParams& dlse = p.grad.dlse;
  if (dlse.data) delta -= static_cast<const float*>(dlse.data)[detail::row_offset(dlse, s, head, i)];
  return {lse * kLog2E, delta};
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
  for (int i = 0; i < t.width(); ++i) {
    const RowFacts facts = i < t.queries ? row_facts<T>(p, s, head, t.first_query + i) : RowFacts{kInfinity, 0};
    to.lse[i] = facts.lse;
    to.delta[i] = facts.delta;
  }
}

/// The keys and values that tiles are cut from.
struct KeySpan {
  KeyBlocks& keys;
  KeyBlocks& values;
  std::int64_t first;
  int count;
};

class ScoreGrads {
 public:
  ScoreGrads(const detail::Params& p, const detail::Sequence& s, Arena& arena)
      : p_(p),
        s_(s),
        weights_(arena.take<float>(kBlockKeys * kBlockQueries)),
        grads_(arena.take<float>(kBlockKeys * kBlockQueries)),
        slopes_(arena.take<float>(kBlockKeys * kBlockQueries)),
        rules_(p, s, arena.take<float>(kBlockKeys * kBlockQueries)) {}

  static std::size_t bytes() { return 4 * Arena::rounded(kBlockKeys * kBlockQueries * sizeof(float)); }

  const ScoreRules& rules() const { return rules_; }

  /// Finds weights() and grads() for the keys of the span that some query of `block` sees; false if there are none.
  bool find(const ScoreTile& block, std::int64_t head, const QueryColumns& columns, const KeySpan& span) {
    tile_ = block;
    tile_.data = weights_;
    const detail::KeyRange seen = rules_.keys_of(block.first_query, block.queries);
    tile_.first_key = max_of(span.first, seen.begin / 4 * 4);  // dropout asks for a multiple of 4
    const std::int64_t end = min_of(span.first + span.count, seen.end);
    if (tile_.first_key >= end) return false;
    tile_.keys = static_cast<int>(end - tile_.first_key);
    const Extent extent = rules_.extent(tile_, head);
    if (extent == Extent::nothing) return false;
    const bool edges = rules_.has_edges(tile_);
    some_excluded_ = edges || rules_.changes_scores();
    const std::int64_t row = tile_.first_key - span.first;
    find_weights(head, extent, edges, columns, span.keys.rows(span.first, span.count).from(row));
    find_grads(head, columns, span.values.rows(span.first, span.count).from(row));
    return true;
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
  bool some_excluded() const { return some_excluded_; }

  /// grads() become those by the product before the softcap.
  void pass_softcap() {
    if (p_.score.softcap <= 0) return;
    // Note: where a key is not seen its slope may be NaN, and does not count.
    change_scores(grads(), [&](VecF x, int j, int n) {
      return x != 0.f ? x * load(slopes_ + j * tile_.width() + n * kLanes) : VecF{};
    });
  }

 private:
  void find_weights(std::int64_t head, Extent extent, bool edges, const QueryColumns& columns, const KeyRows& k) {
    const bool general = rules_.changes_scores();
    VecF offset[kTileVectors];
    VecF unused[kTileVectors];
    for (int n = 0; n < tile_.vectors; ++n) {
      offset[n] = general ? VecF{} : -load(columns.lse + n * kLanes);
      unused[n] = VecF{};
    }
    multiply_rows(tile_, k, p_.size.head_dim, columns.q, offset, unused, nullptr);
    if (general) rules_.change_scores(tile_, head, extent, slopes_);
    if (edges) rules_.exclude_by_position(tile_);
    if (!general) return change_scores(tile_, [](VecF x, int, int) { return exp2(x); });
    change_scores(tile_, [&](VecF x, int, int n) { return exp2(x - load(columns.lse + n * kLanes)); });
  }

  void find_grads(std::int64_t head, const QueryColumns& columns, const KeyRows& v) {
    const ScoreTile to = grads();
    const bool drops = p_.dropout.threshold > 0;
    VecF delta[kTileVectors];
    VecF offset[kTileVectors];
    VecF unused[kTileVectors];
    for (int n = 0; n < to.vectors; ++n) {
      delta[n] = load(columns.delta + n * kLanes);
      offset[n] = drops ? VecF{} : -delta[n];
      unused[n] = VecF{};
    }
    multiply_rows(to, v, p_.size.head_dim_v, columns.dout, offset, unused, nullptr);
    // Note: where a weight is 0 the value may be NaN, and does not count.
    if (!drops)
      return change_scores(to, [&](VecF x, int j, int n) {
        const VecF weight = load(tile_.row(j) + n * kLanes);
        return weight != 0.f ? weight * x : VecF{};
      });
    for_dropout_factors(to, p_.dropout, s_, head, [&](int j, int n, VecF factor) {
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
  bool some_excluded_ = false;
};

}  // namespace
}  // namespace flashcore::cpu
