// FloatEngine: the forward's two products in floats, by broadcasts from keys and values that stay where they lie.
//
// The running maximum is subtracted by starting the accumulators of S at −max. Where scores are changed afterwards they
// start at 0, and the maximum is looked for when they are done.
#pragma once

#include "arena.h"
#include "query_block.h"
#include "value.h"

namespace flashcore::cpu {
namespace {

class FloatEngine {
 public:
  /// Tiles start at a multiple of these many keys; dropout asks for 4.
  static constexpr int kKeyStep = 4;
  static constexpr int kTileKeys = kBlockKeys;

  static std::int64_t span_keys(const detail::Params&) { return kTileKeys; }

  static std::size_t bytes(std::int64_t head_dim, std::int64_t head_dim_v) {
    return Arena::rounded_floats(kTileKeys * kBlockQueries) + Arena::rounded_floats(KeyBlocks::floats(head_dim)) +
           Arena::rounded_floats(KeyBlocks::floats(head_dim_v));
  }
  static std::size_t query_bytes(std::int64_t head_dim) { return Arena::rounded_floats(head_dim * kBlockQueries); }
  static std::size_t out_bytes(std::int64_t head_dim_v) { return Arena::rounded_floats(head_dim_v * kBlockQueries); }

  FloatEngine(const detail::Params& p, const detail::Sequence& s, const ScoreRules& rules, std::int64_t head_k,
              std::int64_t query_blocks, Arena& arena)
      : p_(p),
        rules_(rules),
        tile_(arena.take<float>(kTileKeys * kBlockQueries)),
        keys_(p, p.k, s, head_k, p.size.head_dim, arena.take<float>(KeyBlocks::floats(p.size.head_dim))),
        values_(p, p.v, s, head_k, p.size.head_dim_v, arena.take<float>(KeyBlocks::floats(p.size.head_dim_v)),
                query_blocks) {}

  float* tile() const { return tile_; }

  /// Takes queries into a block: `vectors` of its vectors from the one numbered `first` on.
  template <class T>
  void pack(QueryBlock& b, const Rows<T>& queries, int first, int vectors) {
    float* q = static_cast<float*>(b.q) + first * kLanes;
    pack_transposed<T>(queries, rules_.query_scale(), vectors, b.vectors * kLanes, q);
  }

  /// Turns to keys [first, first + count). The next query block brings those behind them into L2 while it computes.
  void set_keys(std::int64_t first, std::int64_t count, std::int64_t end) {
    first_ = first;
    count_ = static_cast<int>(count);
    const std::int64_t next = first + kTileKeys;
    const bool more = next < end;
    if (keys_.in_place() && values_.in_place()) {
      prefetch_keys_ = more ? keys_.address(next) : nullptr;
      prefetch_values_ = values_.address(first);
    } else {
      prefetch_keys_ = more ? values_.address(next) : nullptr;
      prefetch_values_ = more ? keys_.address(next) : nullptr;
    }
  }

  /// Which keys of the block of `key` have no page; null if all have one.
  const bool* missing(std::int64_t) {
    keys_.rows(first_, count_);
    return keys_.missing();
  }

  /// The tile becomes the scores, to be changed and excluded from.
  void find_scores(QueryBlock& b, const ScoreTile& t) {
    const VecF zero[kTileVectors] = {};
    VecF unused[kTileVectors] = {};
    multiply_queries(b, t, zero, unused);
  }

  /// The tile becomes the weights of changed scores. Returns what sums before it are multiplied with.
  const VecF* find_weights(QueryBlock& b, const ScoreTile& t) {
    weigh_changed_scores(b, t, correction_);
    return correction_;
  }

  /// Both at once where nothing is changed or excluded. Null: sums before are multiplied with 1.
  const VecF* find_plain_weights(QueryBlock& b, const ScoreTile& t) {
    VecF top[kTileVectors];
    VecF offset[kTileVectors];
    for (int n = 0; n < b.vectors; ++n) {
      top[n] = broadcast(-kInfinity);
      offset[n] = b.max[n] > -kInfinity ? -b.max[n] : VecF{};
    }
    multiply_queries(b, t, offset, top);
    if (!needs_raise(b, top)) {
      exponentiate<false>(t, nullptr, b.sum);
      return nullptr;
    }
    raise_max(b, offset, top, correction_);
    exponentiate<true>(t, offset, b.sum);
    return correction_;
  }

  void make_weights_floats(const QueryBlock&, const ScoreTile&) {}  // they are

  /// out = out · correction + the weighted values.
  void add_values(QueryBlock& b, const ScoreTile& t, const VecF* correction, bool some_excluded) {
    const int dim = p_.size.head_dim_v;
    const KeyRows v = values_.rows(first_, count_).from(t.first_key - first_);
    if (some_excluded && !values_.is_finite(first_, count_)) {
      scale_out(b, dim, correction);
      add_values_with_weight(t, v, dim, b.out);
    } else if (!b.started) {
      cpu::add_values<Start::zero>(t, v, dim, b.out, nullptr, prefetch_keys_);
    } else if (correction) {
      cpu::add_values<Start::scaled>(t, v, dim, b.out, correction, prefetch_keys_);
    } else {
      cpu::add_values<Start::add>(t, v, dim, b.out, nullptr, prefetch_keys_);
    }
    prefetch_keys_ = nullptr;
  }

 private:
  void multiply_queries(QueryBlock& b, const ScoreTile& t, const VecF* start, VecF* top) {
    const KeyRows k = keys_.rows(first_, count_).from(t.first_key - first_);
    multiply_rows(t, k, p_.size.head_dim, static_cast<const float*>(b.q), start, top, prefetch_values_);
    prefetch_values_ = nullptr;
  }

  const detail::Params& p_;
  const ScoreRules& rules_;
  float* const tile_;
  KeyBlocks keys_;
  KeyBlocks values_;
  std::int64_t first_ = 0;  // of the current block of keys
  int count_ = 0;
  const char* prefetch_keys_ = nullptr;
  const char* prefetch_values_ = nullptr;
  VecF correction_[kTileVectors];
};

}  // namespace
}  // namespace flashcore::cpu
