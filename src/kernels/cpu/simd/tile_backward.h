// TileBackward: the backward on AMX, with floats as sums of kParts bfloat16 (tile_product.h).
//
// For each block of keys and each group of query blocks:
//   S^T = K·Q^T,  dP^T = V·dO^T     keys and values as rows, queries in the lanes
//   dQ^T += K^T·dS^T                as the forward's O^T
//   dV += P^T·dO,  dK += dS^T·Q     a group at a time, since sums are loaded and stored once a product
// As in the forward nothing that grows with the number of scores is transposed: P^T and dS^T are rows of A, and pairs
// of keys of dS^T are B.
#pragma once

#include "isa.h"
#include "score_grads.h"
#include "tile_engine.h"

namespace flashcore::cpu {
namespace {

template <int kParts>
class TileBackward {
 public:
  static std::size_t scratch_bytes(std::int64_t head_dim, std::int64_t head_dim_v) {
    const auto halves = [](std::int64_t count) { return Arena::rounded(static_cast<std::size_t>(2 * count)); };
    return ScoreGrads::bytes() + 2 * halves(key_halves(head_dim)) + halves(key_halves(head_dim_v)) +
           2 * halves(kWeightHalves) + halves(kPairHalves) + 2 * Arena::rounded_floats(2 * kStepFloats);
  }

  TileBackward(const detail::Params& p, const BackwardTask& task, Arena scratch, Arena workspace)
      : p_(p),
        task_(task),
        s_(task.sequence),
        dim_(p.size.head_dim),
        dim_v_(p.size.head_dim_v),
        width_(whole_tiles(dim_)),
        width_v_(whole_tiles(dim_v_)),
        blocks_((s_.seqlen_q + kBlockQueries - 1) / kBlockQueries),
        chunk_blocks_(min_of(blocks_, task.chunk_queries / kBlockQueries)),
        scale_(static_cast<float>(p.score.scale)),
        q_pairs_(workspace.take<std::uint32_t>(chunk_blocks_ * pairs_of_block(dim_))),
        dout_pairs_(workspace.take<std::uint32_t>(chunk_blocks_ * pairs_of_block(dim_v_))),
        q_rows_(workspace.take<std::uint32_t>(chunk_blocks_ * pairs_of_block(dim_))),
        dout_rows_(workspace.take<std::uint32_t>(chunk_blocks_ * pairs_of_block(dim_v_))),
        lse_(workspace.take<float>(blocks_ * kBlockQueries)),
        delta_(workspace.take<float>(blocks_ * kBlockQueries)),
        dq_columns_(workspace.take<float>(chunk_blocks_ * width_ * kBlockQueries)),
        dk_(workspace.take<float>(whole_tiles(task.key_end - task.key_begin) * width_)),
        dv_(workspace.take<float>(whole_tiles(task.key_end - task.key_begin) * width_v_)),
        dq_of_chunk_(workspace.take<float>(chunk_blocks_ * width_ * kBlockQueries)),
        grads_(p, s_, task.mask_extents, scratch),
        key_rows_(scratch.take<std::uint16_t>(key_halves(dim_))),
        key_columns_(scratch.take<std::uint16_t>(key_halves(dim_))),
        value_rows_(scratch.take<std::uint16_t>(key_halves(dim_v_))),
        weight_rows_(scratch.take<std::uint16_t>(kWeightHalves)),
        grad_rows_(scratch.take<std::uint16_t>(kWeightHalves)),
        grad_pairs_(scratch.take<std::uint32_t>(kPairHalves / 2)),
        step_scores_(scratch.take<float>(2 * kStepFloats)),
        step_grads_(scratch.take<float>(2 * kStepFloats)) {}

  void run() {
    with_storage(p_.dtype, [this](auto storage) {
      for_each_pass(p_, task_, blocks_, chunk_blocks_,
                    [this](const Pass& pass) { add_queries<decltype(storage)>(pass); });
    });
  }

 private:
  static constexpr int kGroup = 8;          // query blocks
  static constexpr int kStep = kTileDepth;  // keys whose scores are found at a time
  static constexpr int kStepFloats = kStep * kBlockQueries;
  static constexpr std::int64_t kRowTiles = kGroup * kParts * kTileHalves;  // of P^T or dS^T, from 16 keys to the next
  static constexpr std::int64_t kWeightHalves = kBlockKeys / kTileSide * kRowTiles;
  static constexpr std::int64_t kPairHalves = kParts * kBlockKeys * kBlockQueries;
  static_assert(kBlockQueries == kTileDepth, "a query block is one step of depth in dV and dK");

  static std::int64_t key_halves(std::int64_t dim) { return kParts * kBlockKeys * whole_depth(dim); }
  /// Dwords of a query block as B.
  static std::int64_t pairs_of_block(std::int64_t dim) { return kParts * whole_depth(dim) / 2 * kBlockQueries; }

  /// A query block of the chunk as a tile without keys.
  ScoreTile tile_of(std::int64_t block) const {
    const std::int64_t first = (first_ + block) * kBlockQueries;
    const int queries = static_cast<int>(min_of<std::int64_t>(kBlockQueries, s_.seqlen_q - first));
    return {nullptr, kTileVectors, 0, 0, first, queries};
  }

  template <class T>
  Rows<T> query_rows(const detail::TensorParams& t, const ScoreTile& block, int dim) const {
    return {static_cast<const T*>(t.data) + detail::q_offset(t, s_, head_, block.first_query), t.seq, block.queries,
            dim};
  }
  template <class T>
  Rows<T> key_rows(const detail::TensorParams& t, const KeySpan& span, int dim) const {
    return {static_cast<const T*>(t.data) + detail::k_offset(p_, t, s_, task_.head_k, span.first), t.seq, span.count,
            dim};
  }

  /// What the queries of a pass and the task's keys give to each other.
  template <class T>
  void add_queries(const Pass& pass) {
    head_ = pass.head;
    first_ = pass.begin;
    const std::int64_t count = pass.end - pass.begin;
    for (std::int64_t n = 0; n < count; ++n) pack_block<T>(n);
    const std::int64_t first_query = first_ * kBlockQueries;
    const std::int64_t end_query = min_of(pass.end * kBlockQueries, s_.seqlen_q);
    const detail::KeyRange seen = grads_.rules().keys_of(first_query, static_cast<int>(end_query - first_query));
    const std::int64_t block_floats = width_ * kBlockQueries;
    sum_chunks(task_, count * block_floats, dq_columns_, dq_of_chunk_, [&](const KeySpan& span, float* dq) {
      if (pass.first) clear_sums(span);
      if (count > 0 && span.meets(seen)) add_span<T>(span, count, dq);
      if (pass.last) store_sums<T>(span);
    });
    for (std::int64_t n = 0; n < count; ++n)
      store_query_columns<T>(p_, task_, head_, tile_of(n), dq_columns_ + n * block_floats, scale_);
    if (task_.dsinks && task_.key_begin == 0 && pass.end == blocks_)
      task_.dsinks[s_.batch * p_.size.heads_q + head_] = sink_gradient(p_, s_, head_, lse_, delta_);
  }

  template <class T>
  void add_span(const KeySpan& span, std::int64_t count, float* dq) {
    span_ = span;
    dq_ = dq;
    split_rows<kParts>(key_rows<T>(p_.k, span_, dim_), key_rows_);
    split_rows<kParts>(key_rows<T>(p_.v, span_, dim_v_), value_rows_);
    if (p_.grad.dq.data)
      split_columns<kParts>(key_rows<T>(p_.k, span_, dim_), kBlockKeys / kTileDepth * kParts, key_columns_);
    for (std::int64_t n = 0; n < count; n += kGroup)
      add_group(n, static_cast<int>(min_of<std::int64_t>(kGroup, count - n)));
  }

  float* dk_of(const KeySpan& span) const { return dk_ + (span.first - task_.key_begin) * width_; }
  float* dv_of(const KeySpan& span) const { return dv_ + (span.first - task_.key_begin) * width_v_; }
  void clear_sums(const KeySpan& span) {
    const std::size_t rows = static_cast<std::size_t>(whole_tiles(span.count));
    std::memset(dk_of(span), 0, rows * static_cast<std::size_t>(width_) * sizeof(float));
    std::memset(dv_of(span), 0, rows * static_cast<std::size_t>(width_v_) * sizeof(float));
  }
  template <class T>
  void store_sums(const KeySpan& span) {
    store_key_rows<T>(p_, task_, span, p_.grad.dk, dk_of(span), width_, dim_, scale_);
    store_key_rows<T>(p_, task_, span, p_.grad.dv, dv_of(span), width_v_, dim_v_, 1.f);
  }

  template <class T>
  void pack_block(std::int64_t n) {
    const ScoreTile t = tile_of(n);
    const auto q = query_rows<T>(p_.q, t, dim_);
    const auto dout = query_rows<T>(p_.grad.dout, t, dim_v_);
    pack_pairs<kParts>(q, 1.f, kTileVectors, q_pairs_ + n * pairs_of_block(dim_));
    pack_pairs<kParts>(dout, 1.f, kTileVectors, dout_pairs_ + n * pairs_of_block(dim_v_));
    pack_rows(q, n, q_rows_);
    pack_rows(dout, n, dout_rows_);
    pack_row_facts<T>(p_, s_, head_, t, lse_ + t.first_query, delta_ + t.first_query);
  }

  /// As B of dK or dV: two columns of tiles for all query blocks of a chunk, then the next two.
  template <class T>
  void pack_rows(const Rows<T>& rows, std::int64_t block, std::uint32_t* to) {
    for (int d = 0; d < rows.columns; d += 2 * kTileSide) {
      const int columns = min_of(2 * kTileSide, rows.columns - d);
      const int tiles = columns > kTileSide ? 2 : 1;
      const Rows<T> two{rows.data + d, rows.stride, rows.rows, columns};
      pack_row_pairs<kParts>(two, kTilePairs, tiles * kTilePairs, to + block * kParts * tiles * kTilePairs);
      to += pair_stride();
    }
  }
  /// From two columns of tiles to the next.
  std::int64_t pair_stride() const { return chunk_blocks_ * kParts * 2 * kTilePairs; }

  float* dq_of(std::int64_t block) const { return dq_ + block * width_ * kBlockQueries; }

  /// What the span of keys and some query blocks give to each other.
  void add_group(std::int64_t first, int count) {
    int begin = kBlockKeys;  // of the span's keys that some block sees
    int end = 0;
    for (int n = 0; n < count; ++n) {
      const std::int64_t block = first + n;
      const bool sees = grads_.turn_to(tile_of(block), head_, span_, kTileDepth);
      const ScoreTile& t = grads_.weights();
      const int own_begin = sees ? static_cast<int>(t.first_key - span_.first) : 0;
      const int own_end = sees ? own_begin + t.keys : 0;
      clear_rows(n, 0, own_begin);
      clear_rows(n, own_end, kBlockKeys);
      if (!sees) continue;
      begin = min_of(begin, own_begin);
      end = max_of(end, own_end);
      if (grads_.plain())
        find_plain(block, n, own_begin, t.keys);
      else
        find_changed(block, n, own_begin, t.keys);
      if (p_.grad.dq.data) add_dq(block, own_begin, t.keys);
    }
    if (begin >= end) return;
    if (p_.grad.dv.data) add_rows(weight_rows_, first, count, begin, end, dout_rows_, dv_of(span_), width_v_);
    if (p_.grad.dk.data) add_rows(grad_rows_, first, count, begin, end, q_rows_, dk_of(span_), width_);
  }

  /// Keys [begin, end) have no weight with query block n of the group.
  void clear_rows(int n, int begin, int end) {
    for (int j = begin; j < end; ++j)
      for (int i = 0; i < kParts; ++i) {
        _mm512_storeu_si512(row_of(weight_rows_, n, j) + i * kTileHalves, _mm512_setzero_si512());
        _mm512_storeu_si512(row_of(grad_rows_, n, j) + i * kTileHalves, _mm512_setzero_si512());
      }
  }
  static std::uint16_t* row_of(std::uint16_t* rows, int n, int key) {
    return rows + key / kTileSide * kRowTiles + n * kParts * kTileHalves + key % kTileSide * kTileDepth;
  }
  /// Where the pairs of key `key`, counted from the tile's first, and the one behind it lie.
  std::uint32_t* pairs_of(int key) const {
    return grad_pairs_ + key / kTileDepth * kParts * 2 * kTilePairs + key % kTileDepth / 2 * kTileSide;
  }

  TileProduct product(const std::uint16_t* rows, int key, int keys, const std::uint32_t* pairs, int dim, float* to) {
    const std::int64_t row = whole_depth(dim) * kParts * kTileSide;
    return tile_product({rows + key / kTileSide * row, row}, keys, dim, pairs, to, kBlockQueries);
  }
  TileProduct score_product(std::int64_t block, int key, int keys, float* to) {
    const std::uint32_t* q = q_pairs_ + block * pairs_of_block(dim_);
    return product(key_rows_, key, keys, q, dim_, to);
  }
  TileProduct grad_product(std::int64_t block, int key, int keys, float* to) {
    const std::uint32_t* dout = dout_pairs_ + block * pairs_of_block(dim_v_);
    return product(value_rows_, key, keys, dout, dim_v_, to);
  }

  /// Weights and gradients of a tile, some keys after the other, while the products of the next ones are found: the
  /// processor then works on both at a time.
  void find_plain(std::int64_t block, int n, int begin, int keys) {
    const auto depth = static_cast<unsigned>((whole_depth(dim_) + whole_depth(dim_v_)) / kTileDepth);
    const unsigned pairs = (kStep / 2 + depth - 1) / depth;  // of keys, a step of depth
    const auto scores = [&](int first, int count) {
      return score_product(block, begin + first, count, scores_of(first));
    };
    const auto grads = [&](int first, int count) { return grad_product(block, begin + first, count, grads_of(first)); };
    multiply<kParts, false>(scores(0, min_of(kStep, keys)));
    multiply<kParts, false>(grads(0, min_of(kStep, keys)));
    for (int j = 0; j < keys; j += kStep) {
      const int next = j + kStep;
      const int count = min_of(kStep, keys - next);
      StepWeights weights(*this, block, n, begin, j);
      if (count > kTileSide) {
        const auto weigh = [&]() __attribute__((always_inline)) { weights.next(pairs); };
        multiply_tiles<2, 2, kParts, false>(scores(next, count), 0, weigh);
        multiply_tiles<2, 2, kParts, false>(grads(next, count), 0, weigh);
      } else if (count > 0) {
        multiply<kParts, false>(scores(next, count));
        multiply<kParts, false>(grads(next, count));
      }
      if (next <= keys)
        weights.next(kStep / 2);
      else
        weights.last(static_cast<unsigned>(keys - j));
    }
  }

  float* scores_of(int key) const { return step_scores_ + (key / kStep & 1) * kStepFloats; }
  float* grads_of(int key) const { return step_grads_ + (key / kStep & 1) * kStepFloats; }

  /// Weights and gradients of the tile's keys from `first` on, kStep at most, two keys after the other.
  class StepWeights {
   public:
    FLASHCORE_INLINE StepWeights(const TileBackward& b, std::int64_t block, int n, int begin, int first)
        : scores_(b.scores_of(first)),
          grads_(b.grads_of(first)),
          pairs_(b.pairs_of(first)),
          weight_row_(row_of(b.weight_rows_, n, begin + first)),
          grad_row_(row_of(b.grad_rows_, n, begin + first)),
          unit_(broadcast(b.grads_.rules().query_scale())) {
      const std::int64_t query = (b.first_ + block) * kBlockQueries;
      for (int i = 0; i < kTileVectors; ++i) {
        lse_[i] = load(b.lse_ + query + i * kLanes);
        delta_[i] = load(b.delta_ + query + i * kLanes);
      }
    }

    /// The next `pairs` pairs, as far as there are any.
    FLASHCORE_INLINE void next(unsigned pairs) {
      const unsigned end = min_of<unsigned>(key_ + 2 * pairs, kStep);
      for (; key_ < end; key_ += 2) pair<2>();
    }
    /// All pairs, of `count` keys. Behind them there is nothing.
    void last(unsigned count) {
      for (; key_ + 2 <= count; key_ += 2) pair<2>();
      if (key_ < count) pair<1>(), key_ += 2;
      for (; key_ < kStep; key_ += 2) pair<0>();
    }

   private:
    template <int kKeys>
    FLASHCORE_INLINE void pair() {
      VecF weight[2][kTileVectors] = {};
      VecF grad[2][kTileVectors] = {};
#pragma GCC unroll 2
      for (unsigned k = 0; k < kKeys; ++k)
#pragma GCC unroll 2
        for (int i = 0; i < kTileVectors; ++i) {
          const std::int64_t at = std::int64_t{key_ + k} * kBlockQueries + i * kLanes;
          weight[k][i] = exp2_for_parts<kParts>(load(scores_ + at) * unit_ - lse_[i]);
          grad[k][i] = weight[k][i] * (load(grads_ + at) - delta_[i]);
        }
      const std::int64_t row = key_ / unsigned{kTileSide} * kRowTiles + key_ % unsigned{kTileSide} * kTileDepth;
      store_weights(weight_row_ + row, grad_row_ + row, weight, grad, pairs_ + key_ / 2 * kTileSide, kKeys);
    }

    const float* scores_;
    const float* grads_;
    std::uint32_t* pairs_;
    std::uint16_t* weight_row_;
    std::uint16_t* grad_row_;
    VecF unit_;
    VecF lse_[kTileVectors];
    VecF delta_[kTileVectors];
    unsigned key_ = 0;
  };

  /// Two keys' weights and gradients in the forms that products take, of which `rows` are rows.
  static FLASHCORE_INLINE void store_weights(std::uint16_t* weight_row, std::uint16_t* grad_row,
                                             VecF (&weight)[2][kTileVectors], VecF (&grad)[2][kTileVectors],
                                             std::uint32_t* pairs, int rows) {
#pragma GCC unroll 2
    for (int i = 0; i < kTileVectors; ++i)
      store_pair<kParts>(grad[0][i], grad[1][i], pairs + i * kTilePairs, 2 * kTilePairs);
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k)
      if (k < rows) {
        round_row<kParts>(weight[k][0], weight[k][1], weight_row + k * kTileDepth, kTileHalves);
        round_row<kParts>(grad[k][0], grad[k][1], grad_row + k * kTileDepth, kTileHalves);
      }
  }

  /// The same where scores are changed, excluded or dropped.
  void find_changed(std::int64_t block, int n, int begin, int keys) {
    struct Products {
      TileBackward& self;
      std::int64_t block;
      int begin;
      void scores(const ScoreTile& t, const VecF* start) {
        multiply<kParts, false>(self.score_product(block, begin, t.keys, t.data));
        const float unit = self.grads_.rules().query_scale();
        change_scores(t, [&](VecF x, int, int i) { return x * unit + start[i]; });
      }
      void grads(const ScoreTile& t, const VecF* start) {
        multiply<kParts, false>(self.grad_product(block, begin, t.keys, t.data));
        change_scores(t, [&](VecF x, int, int i) { return x + start[i]; });
      }
    };
    const std::int64_t query = (first_ + block) * kBlockQueries;
    grads_.find(lse_ + query, delta_ + query, Products{*this, block, begin});
    grads_.pass_softcap();
    const ScoreTile& weights = grads_.weights();
    const ScoreTile grads = grads_.grads();
    for (int j = 0; j < whole_depth(keys); j += 2) {
      VecF weight[2][kTileVectors] = {};
      VecF grad[2][kTileVectors] = {};
      for (int k = 0; k < 2 && j + k < keys; ++k)
        for (int i = 0; i < kTileVectors; ++i) {
          weight[k][i] = load(weights.row(j + k) + i * kLanes);
          grad[k][i] = load(grads.row(j + k) + i * kLanes);
        }
      store_weights(row_of(weight_rows_, n, begin + j), row_of(grad_rows_, n, begin + j), weight, grad, pairs_of(j),
                    min_of(2, keys - j));
    }
  }

  void add_dq(std::int64_t block, int begin, int keys) {
    const std::uint16_t* first = key_columns_ + begin / kTileDepth * kParts * kTileHalves;
    constexpr std::int64_t kRow = kBlockKeys / kTileDepth * kParts * kTileHalves;
    multiply<kParts, true>(tile_product({first, kRow}, width_, keys, grad_pairs_, dq_of(block), kBlockQueries));
  }

  /// to += rows · queries, for the span's keys [begin, end) and a group of query blocks.
  void add_rows(const std::uint16_t* rows, std::int64_t first, int count, int begin, int end,
                const std::uint32_t* queries, float* to, std::int64_t width) {
    TileProduct p;
    p.rows = static_cast<int>(whole_tiles(end - begin) / kTileSide);
    p.depth = count;
    p.columns = static_cast<int>(width / kTileSide);
    p.a_row = kRowTiles;
    p.a = rows + begin / kTileSide * kRowTiles;
    p.b = queries + first * kParts * 2 * kTilePairs;
    p.c = to + begin * width;
    p.c_row = width;
    p.c_column = kTileSide;
    const std::int64_t single = p.columns % 2;  // the last of an odd number of columns lies closer
    p.columns -= static_cast<int>(single);
    multiply_add_wide<kParts>(p, pair_stride());
    if (single == 0) return;
    p.b = queries + p.columns / 2 * pair_stride() + first * kParts * kTilePairs;
    p.c += p.columns * kTileSide;
    p.columns = 1;
    multiply_add_wide<kParts>(p, 0);
  }

  const detail::Params& p_;
  const BackwardTask& task_;
  const detail::Sequence& s_;
  const int dim_;
  const int dim_v_;
  const std::int64_t width_;  // of rows of dk, in whole tiles
  const std::int64_t width_v_;
  const std::int64_t blocks_;  // of queries
  const std::int64_t chunk_blocks_;
  const float scale_;
  std::uint32_t* const q_pairs_;
  std::uint32_t* const dout_pairs_;
  std::uint32_t* const q_rows_;  // pairs of queries
  std::uint32_t* const dout_rows_;
  float* const lse_;
  float* const delta_;
  float* const dq_columns_;  // (width_, kBlockQueries) for each block
  float* const dk_;          // (the task's keys, width_)
  float* const dv_;
  float* const dq_of_chunk_;  // of a chunk but the first
  float* dq_ = nullptr;       // of the current chunk
  ScoreGrads grads_;
  std::uint16_t* const key_rows_;
  std::uint16_t* const key_columns_;
  std::uint16_t* const value_rows_;
  std::uint16_t* const weight_rows_;  // P^T: keys by the queries of a group
  std::uint16_t* const grad_rows_;    // dS^T
  std::uint32_t* const grad_pairs_;   // dS^T of one block, pairs of keys
  float* const step_scores_;
  float* const step_grads_;
  KeySpan span_ = {};
  std::int64_t head_ = 0;
  std::int64_t first_ = 0;  // block of the chunk
};

}  // namespace
}  // namespace flashcore::cpu
