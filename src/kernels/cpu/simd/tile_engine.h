// TileEngine: the forward's two products on AMX, with floats as sums of kParts bfloat16 (tile_product.h).
//
// Keys and transposed values are A, as they come; queries and weights are B, in pairs: of elements of a query, and of
// keys. With queries in lanes a pair of weights is two vectors of the score tile put together, so nothing that grows
// with the number of scores is ever transposed.
#pragma once

#include "arena.h"
#include "parts.h"
#include "query_block.h"
#include "value.h"

namespace flashcore::cpu {
namespace {

/// 2^x for x up to 127, for weights that are rounded to kParts bfloat16: to 2.9e-6, with three parts to 1.6e-7. Below
/// 2^−126 it stays 2^−126. NaN stays NaN.
template <int kParts>
FLASHCORE_INLINE VecF exp2_for_parts(VecF x) {
  constexpr float kRounder = 12582912.f;  // 1.5 · 2^23, as in exp2()
  x = max_of(broadcast(-126.f), x);
  const VecF shifted = x + kRounder;
  const VecF f = x - (shifted - kRounder);
  VecF p;
  // Minimax polynomials on [−1/2, 1/2] that are 1 at 0.
  if constexpr (kParts < 3) {
    p = f * 9.58538242e-3f + 5.59066273e-2f;
    p = p * f + 2.40240380e-1f;
    p = p * f + 6.93124175e-1f;
    p = p * f + 1.0f;
  } else {
    p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
  }
  return reinterpret_cast<VecF>(reinterpret_cast<VecU>(p) + (reinterpret_cast<VecU>(shifted) << 23));
}

/// Some rows of scores of one vector of queries, `stride` floats apart, and where their weights go as pairs of keys.
struct ScoreColumn {
  const float* scores;
  std::int64_t stride;
  int keys;
  std::uint32_t* pairs;
  std::int64_t part;
};

/// The running sum of a vector of queries, and the largest exponent met.
struct ColumnSums {
  VecF sum;
  VecF top;
};

template <int kParts>
FLASHCORE_INLINE void store_pair(VecF a, VecF b, std::uint32_t* to, std::int64_t part) {
  VecU pairs[kParts];
  round_pair<kParts>(a, b, pairs);
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) _mm512_storeu_si512(to + i * part, reinterpret_cast<__m512i>(pairs[i]));
}

/// pairs = {2^x, 2^y}.
template <int kParts>
FLASHCORE_INLINE void weigh_pair(VecF x, VecF y, ColumnSums& sums, std::uint32_t* pairs, std::int64_t part) {
  sums.top = max_of(y, max_of(x, sums.top));
  const VecF a = exp2_for_parts<kParts>(x);
  const VecF b = exp2_for_parts<kParts>(y);
  sums.sum += a + b;
  store_pair<kParts>(a, b, pairs, part);
}

/// pairs = 2^(scores·unit − max).
template <int kParts>
FLASHCORE_INLINE void weigh(const ScoreColumn& c, VecF unit, VecF max, ColumnSums& sums) {
  ColumnSums own = sums;
  const float* at = c.scores;
  std::uint32_t* to = c.pairs;
  int j = 0;
#pragma GCC unroll 2
  for (; j + 2 <= c.keys; j += 2, at += 2 * c.stride, to += kLanes)
    weigh_pair<kParts>(load(at) * unit - max, load(at + c.stride) * unit - max, own, to, c.part);
  if (j < c.keys) {
    const VecF x = load(at) * unit - max;
    own.top = max_of(x, own.top);
    const VecF a = exp2_for_parts<kParts>(x);
    own.sum += a;
    store_pair<kParts>(a, VecF{}, to, c.part);
  }
  sums = own;
}

template <int kParts>
class TileEngine {
 public:
  static constexpr int kKeyStep = kTileDepth;
  static constexpr int kTileKeys = 256;
  static_assert(kTileKeys <= kMostTileKeys);

  /// Keys and values are split once a span, which is to stay in L2 beside the queries.
  static std::int64_t span_keys(const detail::Params& p) {
    return p.page.block_table ? kTileKeys : span_blocks(p.size.head_dim, p.size.head_dim_v) * kTileKeys;
  }

  static std::size_t bytes(std::int64_t head_dim, std::int64_t head_dim_v) {
    const std::int64_t blocks = span_blocks(head_dim, head_dim_v);
    return Arena::rounded_floats(kTileKeys * kBlockQueries) +
           Arena::rounded_floats(KeyBlocks::floats(head_dim, kTileKeys)) +
           Arena::rounded_floats(KeyBlocks::floats(head_dim_v, kTileKeys)) +
           Arena::rounded(static_cast<std::size_t>(2 * blocks * key_halves(head_dim))) +
           Arena::rounded(static_cast<std::size_t>(2 * blocks * value_halves(head_dim_v))) +
           Arena::rounded_floats(kParts * kTileKeys / 2 * kBlockQueries) +
           Arena::rounded_floats(head_dim * kBlockQueries);
  }
  static std::size_t query_bytes(std::int64_t head_dim) {
    return Arena::rounded_floats(kParts * whole_depth(head_dim) / 2 * kBlockQueries);
  }
  static std::size_t out_bytes(std::int64_t head_dim_v) {
    return Arena::rounded_floats(whole_tiles(head_dim_v) * kBlockQueries);
  }

  TileEngine(const detail::Params& p, const detail::Sequence& s, const ScoreRules& rules, std::int64_t head_k,
             std::int64_t, Arena& arena)
      : p_(p),
        s_(s),
        head_k_(head_k),
        unit_(__builtin_fabsf(rules.query_scale())),
        sign_(rules.query_scale() < 0 ? -1.f : 1.f),
        tile_(arena.take<float>(kTileKeys * kBlockQueries)),
        keys_(p, p.k, s, head_k, p.size.head_dim, arena.take<float>(KeyBlocks::floats(p.size.head_dim, kTileKeys))),
        values_(p, p.v, s, head_k, p.size.head_dim_v,
                arena.take<float>(KeyBlocks::floats(p.size.head_dim_v, kTileKeys))),
        key_tiles_(
            arena.take<std::uint16_t>(span_blocks(p.size.head_dim, p.size.head_dim_v) * key_halves(p.size.head_dim))),
        value_tiles_(arena.take<std::uint16_t>(span_blocks(p.size.head_dim, p.size.head_dim_v) *
                                               value_halves(p.size.head_dim_v))),
        weights_(arena.take<std::uint32_t>(kParts * kTileKeys / 2 * kBlockQueries)),
        columns_(arena.take<float>(p.size.head_dim * kBlockQueries)) {}

  float* tile() const { return tile_; }

  template <class T>
  void pack(QueryBlock& b, const Rows<T>& queries, int, int) {
    b.finite = pack_pairs<kParts, T>(queries, sign_, b.vectors, static_cast<std::uint32_t*>(b.q));
  }

  void set_keys(std::int64_t first, std::int64_t count, std::int64_t) {
    first_ = first;
    end_ = first + count;
    for (Split& split : key_splits_) split = {};
    for (Split& split : value_splits_) split = {};
  }

  const bool* missing(std::int64_t key) {
    if (!p_.page.block_table) return nullptr;
    keys_.rows(block_begin(key), block_count(key));
    return keys_.missing();
  }

  /// The tile becomes the scores, to be changed and excluded from.
  void find_scores(QueryBlock& b, const ScoreTile& t) {
    multiply_scores(b, t);
    change_scores(t, [this](VecF x, int, int) { return x * unit_; });
  }

  /// The tile becomes the weights of changed scores. Returns what sums before it are multiplied with.
  const VecF* find_weights(QueryBlock& b, const ScoreTile& t) {
    in_pairs_ = false;
    weigh_changed_scores(b, t, correction_);
    return correction_;
  }

  /// Both at once where nothing is changed or excluded. Null: sums before are multiplied with 1.
  const VecF* find_plain_weights(QueryBlock& b, const ScoreTile& t) {
    in_pairs_ = true;
    ColumnSums sums[kTileVectors];
    VecF top[kTileVectors];
    // Note: the first keys' maximum is nearly always near enough to that of all.
    if (!b.started) set_max(b, t);
    if (all_finite(b, t)) {
      multiply_and_weigh(b, t, sums);
    } else {
      multiply_scores(b, t);
      weigh_whole(b, t, sums);
    }
    for (int n = 0; n < b.vectors; ++n) top[n] = sums[n].top;
    if (!needs_raise(b, top)) {
      for (int n = 0; n < b.vectors; ++n) b.sum[n] = sums[n].sum;
      return nullptr;
    }
    // Note: only where it must be, so that no query's result depends on its neighbours.
    VecF all[kTileVectors];
    VecF offset[kTileVectors] = {};
    multiply_scores(b, t);
    find_max(t, all);
    for (int n = 0; n < b.vectors; ++n) all[n] = to_raise(b, n, top[n]) ? all[n] * unit_ : broadcast(-kInfinity);
    raise_max(b, offset, all, correction_);
    weigh_whole(b, t, sums);
    for (int n = 0; n < b.vectors; ++n) b.sum[n] = sums[n].sum;
    return correction_;
  }

  /// The tile becomes the weights of find_plain_weights.
  void make_weights_floats(const QueryBlock& b, const ScoreTile& t) {
    if (!in_pairs_) return;
    in_pairs_ = false;
    multiply_scores(b, t);
    change_scores(t, [&](VecF x, int, int n) { return exp2_for_parts<kParts>(x * unit_ - finite_max(b, n)); });
  }

  /// out = out · correction + the weighted values.
  void add_values(QueryBlock& b, const ScoreTile& t, const VecF* correction, bool) {
    const int dim = p_.size.head_dim_v;
    const SplitRows values = values_of(t.first_key);
    if (correction && b.started) scale_out(b, dim, correction);
    if (!in_pairs_) pair_weights(t);
    constexpr int kDepth = kTileKeys / kTileDepth;
    const std::uint16_t* first =
        values.tiles + (t.first_key - block_begin(t.first_key)) / kTileDepth * kParts * kTileHalves;
    const TileProduct p = tile_product({first, kDepth * kParts * kTileHalves}, dim, t.keys, weights_, b.out, t.width());
    if (b.started)
      multiply<kParts, true>(p);
    else
      multiply<kParts, false>(p);
    if (!values.finite) add_special_values(b, t);
  }

 private:
  static constexpr int kStep = 2 * kTileSide;  // keys whose scores are found at a time
  static constexpr int kMostBlocks = 8;
  static constexpr std::int64_t kSpanBytes = 384 * 1024;

  /// Whether a block of keys or values has been split, and was finite.
  struct Split {
    bool done;
    bool finite;
  };
  struct SplitRows {
    const std::uint16_t* tiles;
    bool finite;
  };

  static std::int64_t key_halves(std::int64_t head_dim) { return kParts * kTileKeys * whole_depth(head_dim); }
  static std::int64_t value_halves(std::int64_t head_dim_v) { return kParts * kTileKeys * whole_tiles(head_dim_v); }
  static std::int64_t span_blocks(std::int64_t head_dim, std::int64_t head_dim_v) {
    const std::int64_t bytes = 2 * (key_halves(head_dim) + value_halves(head_dim_v));
    return max_of<std::int64_t>(1, min_of<std::int64_t>(kMostBlocks, kSpanBytes / bytes));
  }

  std::int64_t block_begin(std::int64_t key) const { return key / kTileKeys * kTileKeys; }
  int block_count(std::int64_t key) const {
    return static_cast<int>(min_of<std::int64_t>(kTileKeys, end_ - block_begin(key)));
  }

  /// The block of `key` in parts, by `split` if that has not been done yet.
  template <class Function>
  SplitRows split_once(Split& state, const std::uint16_t* tiles, const detail::TensorParams& tensor, KeyBlocks& blocks,
                       int dim, std::int64_t key, Function&& split) {
    if (state.done) return {tiles, state.finite};
    state.done = true;
    const std::int64_t begin = block_begin(key);
    const int count = block_count(key);
    if (p_.page.block_table) {
      const KeyRows rows = blocks.rows(begin, count);
      state.finite = split(Rows<float>{rows.data, rows.stride, count, dim});
    } else {
      with_storage(p_.dtype, [&](auto storage) {
        using T = decltype(storage);
        const T* data = static_cast<const T*>(tensor.data) + detail::k_offset(p_, tensor, s_, head_k_, begin);
        state.finite = split(Rows<T>{data, tensor.seq, count, dim});
      });
    }
    return {tiles, state.finite};
  }

  SplitRows keys_of(std::int64_t key) {
    const std::int64_t index = (key - first_) / kTileKeys;
    std::uint16_t* tiles = key_tiles_ + index * key_halves(p_.size.head_dim);
    return split_once(key_splits_[index], tiles, p_.k, keys_, p_.size.head_dim, key,
                      [&](const auto& rows) { return split_rows<kParts>(rows, tiles); });
  }

  SplitRows values_of(std::int64_t key) {
    constexpr int kTiles = kTileKeys / kTileDepth * kParts;
    const std::int64_t index = (key - first_) / kTileKeys;
    std::uint16_t* tiles = value_tiles_ + index * value_halves(p_.size.head_dim_v);
    return split_once(value_splits_[index], tiles, p_.v, values_, p_.size.head_dim_v, key,
                      [&](const auto& rows) { return split_columns<kParts>(rows, kTiles, tiles); });
  }

  /// Whether all numbers of the scores have parts.
  bool all_finite(const QueryBlock& b, const ScoreTile& t) {
    return kParts == 1 || (b.finite && keys_of(t.first_key).finite);
  }

  static VecF finite_max(const QueryBlock& b, int n) { return b.max[n] > -kInfinity ? b.max[n] : VecF{}; }

  TileProduct score_product(const QueryBlock& b, const ScoreTile& t) {
    const int dim = p_.size.head_dim;
    const std::int64_t row = whole_depth(dim) * kParts * kTileSide;
    const std::uint16_t* first =
        keys_of(t.first_key).tiles + (t.first_key - block_begin(t.first_key)) / kTileSide * row;
    return tile_product({first, row}, t.keys, dim, static_cast<const std::uint32_t*>(b.q), t.data, t.width());
  }

  void multiply_scores(const QueryBlock& b, const ScoreTile& t) {
    multiply<kParts, false>(score_product(b, t));
    if (!all_finite(b, t)) add_special_scores(b, t);
  }

  /// Weights of a tile that holds all its scores.
  void weigh_whole(const QueryBlock& b, const ScoreTile& t, ColumnSums* sums) {
    start_sums(b, sums);
    for (int j = 0; j < t.keys; j += kTileSide) weigh_rows(b, t, t.row(j), kTileSide, t.width(), j, sums);
  }

  /// Some rows of scores after the other, while the products of the next ones are found: the processor then works on
  /// both at a time.
  void multiply_and_weigh(QueryBlock& b, const ScoreTile& t, ColumnSums* sums) {
    TileProduct p = score_product(b, t);
    const std::uint16_t* keys = p.a;
    p.c_row = kTileSide;
    p.c_column = kStep * kTileSide;
    const auto scores_of = [&](int j) { return t.data + (j / kStep & 1) * kStep * t.width(); };
    const auto turn_to_step = [&](int j) {
      p.rows = min_of(kStep, static_cast<int>(whole_tiles(t.keys)) - j) / kTileSide;
      p.a = keys + j / kTileSide * p.a_row;
      p.c = scores_of(j);
    };
    const auto pairs = static_cast<unsigned>((kStep / 2 + p.depth - 1) / p.depth);  // of keys, a step of depth
    start_sums(b, sums);
    turn_to_step(0);
    multiply<kParts, false>(p);
    for (int j = 0; j < t.keys; j += kStep) {
      const bool next = j + kStep < t.keys;
      if (next) turn_to_step(j + kStep);
      if (next && p.rows == 2 && p.columns == 2) {
        StepWeights weights(*this, b, scores_of(j), pairs_of(t, j, 0), sums);
        multiply_tiles<2, 2, kParts, false>(p, 0, [&]() __attribute__((always_inline)) { weights.next(pairs); });
        weights.next(kStep / 2);
        weights.store(sums);
      } else {
        if (next) multiply<kParts, false>(p);
        for (int i = 0; i < kStep && j + i < t.keys; i += kTileSide)
          weigh_rows(b, t, scores_of(j) + i * kTileSide, p.c_column, kTileSide, j + i, sums);
      }
    }
  }

  /// Weights of kStep keys of kTileVectors vectors of queries, two keys after the other.
  class StepWeights {
   public:
    FLASHCORE_INLINE StepWeights(const TileEngine& e, const QueryBlock& b, const float* scores, std::uint32_t* pairs,
                                 const ColumnSums* sums)
        : scores_(scores), pairs_(pairs), unit_(broadcast(e.unit_)) {
      for (int n = 0; n < kTileVectors; ++n) {
        max_[n] = finite_max(b, n);
        sums_[n] = sums[n];
      }
    }

    /// The next `pairs` pairs, as far as there are any.
    FLASHCORE_INLINE void next(unsigned pairs) {
      const unsigned end = min_of<unsigned>(key_ + 2 * pairs, kStep);
      for (; key_ < end; key_ += 2)
#pragma GCC unroll 2
        for (int n = 0; n < kTileVectors; ++n) {
          const float* at = scores_ + n * kStep * kTileSide + key_ * kTileSide;
          weigh_pair<kParts>(load(at) * unit_ - max_[n], load(at + kTileSide) * unit_ - max_[n], sums_[n],
                             pairs_ + n * kTilePairs + key_ / 2 * kTileSide, kTileVectors * kTilePairs);
        }
    }

    FLASHCORE_INLINE void store(ColumnSums* sums) const {
      for (int n = 0; n < kTileVectors; ++n) sums[n] = sums_[n];
    }

   private:
    const float* scores_;
    std::uint32_t* pairs_;
    VecF unit_;
    VecF max_[kTileVectors];
    ColumnSums sums_[kTileVectors];
    unsigned key_ = 0;
  };

  /// The maximum of a block without sums becomes that of its first keys.
  void set_max(QueryBlock& b, const ScoreTile& t) {
    ScoreTile first = t;
    first.keys = min_of(kTileSide, t.keys);
    multiply_scores(b, first);
    find_max(first, b.max);
    for (int n = 0; n < b.vectors; ++n) b.max[n] *= unit_;
  }

  void start_sums(const QueryBlock& b, ColumnSums* sums) const {
    for (int n = 0; n < b.vectors; ++n) sums[n] = {b.sum[n], broadcast(-kInfinity)};
  }

  /// Weights of the tile's keys from `key` on, kTileSide at most; behind the last key those of nobody. Scores are
  /// `column` floats from vector to vector and `row` from key to key.
  void weigh_rows(const QueryBlock& b, const ScoreTile& t, const float* scores, std::int64_t column, std::int64_t row,
                  int key, ColumnSums* sums) {
    const int keys = min_of(kTileSide, t.keys - key);
    for (int n = 0; n < t.vectors; ++n) {
      const VecF max = finite_max(b, n);
      const ScoreColumn c{scores + n * column, row, keys, pairs_of(t, key, n), t.vectors * kTilePairs};
      weigh<kParts>(c, broadcast(unit_), max, sums[n]);
    }
    if (key + kTileSide < t.keys) return;
    for (int j = key + (keys + 1) / 2 * 2; j < whole_depth(t.keys); j += 2)
      for (int n = 0; n < t.vectors; ++n) store_pair<kParts>(VecF{}, VecF{}, pairs_of(t, j, n), t.vectors * kTilePairs);
  }

  /// Where the weights of a tile's key and the one behind it lie.
  std::uint32_t* pairs_of(const ScoreTile& t, int key, int n) const {
    return weights_ + (key / kTileDepth * kParts * t.vectors + n) * kTilePairs + key % kTileDepth / 2 * kTileSide;
  }

  void pair_weights(const ScoreTile& t) {
    for (int j = 0; j < whole_depth(t.keys); j += 2)
      for (int n = 0; n < t.vectors; ++n) {
        const VecF a = j < t.keys ? load(t.row(j) + n * kLanes) : VecF{};
        const VecF b = j + 1 < t.keys ? load(t.row(j + 1) + n * kLanes) : VecF{};
        store_pair<kParts>(a, b, pairs_of(t, j, n), t.vectors * kTilePairs);
      }
  }

  // ---- NaN and Inf: rare, and as slow as they are ----

  static bool is_special(float x) { return !(x * 0.f == 0.f); }

  KeyRows float_rows(KeyBlocks& blocks, const ScoreTile& t) const {
    const std::int64_t begin = block_begin(t.first_key);
    return blocks.rows(begin, block_count(t.first_key)).from(t.first_key - begin);
  }

  /// Adds to the scores what the parts left out.
  void add_special_scores(const QueryBlock& b, const ScoreTile& t) {
    const int dim = p_.size.head_dim;
    with_storage(p_.dtype, [&](auto storage) {
      using T = decltype(storage);
      const T* q = static_cast<const T*>(p_.q.data) + detail::q_offset(p_.q, s_, b.head, b.first);
      pack_transposed<T>({q, p_.q.seq, b.queries, dim}, sign_, b.vectors, t.width(), columns_);
    });
    const KeyRows k = float_rows(keys_, t);
    for (int j = 0; j < t.keys; ++j)
      for (int d = 0; d < dim; ++d) {
        const float key = k.data[j * k.stride + d];
        for (int i = 0; i < t.queries; ++i) {
          const float query = columns_[d * t.width() + i];
          if (is_special(key) || is_special(query)) t.row(j)[i] += key * query;
        }
      }
  }

  /// Adds to the sums what split_columns left out, where it has a weight.
  void add_special_values(const QueryBlock& b, const ScoreTile& t) {
    const KeyRows v = float_rows(values_, t);
    for (int j = 0; j < t.keys; ++j)
      for (int d = 0; d < p_.size.head_dim_v; ++d) {
        const float value = v.data[j * v.stride + d];
        for (int i = 0; is_special(value) && i < t.queries; ++i) {
          const float weight = weight_of(t, j, i);
          if (weight != 0.f) b.out[d * t.width() + i] += weight * value;
        }
      }
  }

  /// The first part of a weight: it is 0 where the weight is.
  float weight_of(const ScoreTile& t, int key, int query) const {
    const std::uint32_t pair = pairs_of(t, key, query / kLanes)[query % kLanes];
    const std::uint32_t bits = key % 2 ? pair & kUpperHalf : pair << 16;
    float weight;
    std::memcpy(&weight, &bits, sizeof weight);
    return weight;
  }

  const detail::Params& p_;
  const detail::Sequence& s_;
  const std::int64_t head_k_;
  const float unit_;  // what scores are multiplied with to be in units of log 2, or the argument of tanh
  const float sign_;  // queries have taken its sign
  float* const tile_;
  KeyBlocks keys_;  // as floats, where these are needed
  KeyBlocks values_;
  std::uint16_t* const key_tiles_;
  std::uint16_t* const value_tiles_;  // transposed
  std::uint32_t* const weights_;      // pairs of keys
  float* const columns_;
  std::int64_t first_ = 0;  // of the current span of keys
  std::int64_t end_ = 0;
  Split key_splits_[kMostBlocks] = {};
  Split value_splits_[kMostBlocks] = {};
  bool in_pairs_ = false;  // whether the weights of the tile at hand are
  VecF correction_[kTileVectors];
};

}  // namespace
}  // namespace flashcore::cpu
