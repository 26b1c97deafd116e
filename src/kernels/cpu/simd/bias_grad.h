// BiasGrad: the gradient of the bias, tile by tile of its own shape.
//
// dbias is dS summed over what was broadcast. A task owns a tile of dbias and computes every dS that belongs to it, so
// that no two threads add to one number and the order of sums is fixed. The price is drawing dS up once more.
#pragma once

#include "isa.h"
#include "score_grads.h"

namespace flashcore::cpu {
namespace {

class BiasGrad {
 public:
  BiasGrad(const detail::Params& p, const BiasGradTask& task, Arena scratch)
      : p_(p),
        task_(task),
        shape_(p.grad.dbias_shape),
        sum_(scratch.take<float>(kBlockKeys * kBlockQueries)),
        columns_{scratch.take<float>(p.size.head_dim * kBlockQueries),
                 scratch.take<float>(p.size.head_dim_v * kBlockQueries), scratch.take<float>(kBlockQueries),
                 scratch.take<float>(kBlockQueries)},
        keys_(scratch.take<float>(KeyBlocks::floats(p.size.head_dim))),
        values_(scratch.take<float>(KeyBlocks::floats(p.size.head_dim_v))),
        tiles_(scratch) {}

  void run() {
    std::memset(sum_, 0, kBlockKeys * kBlockQueries * sizeof(float));
    const detail::KeyRange batches = summed(0, task_.batch, p_.size.batch);
    const detail::KeyRange heads = summed(1, task_.head, p_.size.heads_q);
    for (std::int64_t batch = batches.begin; batch < batches.end; ++batch)
      for (std::int64_t head = heads.begin; head < heads.end; ++head)
        with_storage(p_.dtype, [&](auto storage) { add_head<decltype(storage)>(batch, head); });
    with_storage(p_.grad.dbias.dtype, [this](auto storage) { store_tile<decltype(storage)>(); });
  }

 private:
  /// The indices that are summed into index `own` of dbias: itself, or all where bias was broadcast.
  detail::KeyRange summed(int axis, std::int64_t own, std::int64_t extent) const {
    return shape_[axis] == 1 ? detail::KeyRange{0, extent} : detail::KeyRange{own, min_of(own + 1, extent)};
  }

  template <class T>
  void add_head(std::int64_t batch, std::int64_t head) {
    const detail::Sequence s = detail::sequence_of(p_, batch);
    const std::int64_t head_k = head / (p_.size.heads_q / p_.size.heads_k);
    KeyBlocks keys(p_, p_.k, s, head_k, p_.size.head_dim, keys_);
    KeyBlocks values(p_, p_.v, s, head_k, p_.size.head_dim_v, values_);
    Arena arena = tiles_;
    ScoreGrads grads(p_, s, nullptr, arena);
    const bool all_queries = shape_[2] == 1;
    const bool all_keys = shape_[3] == 1;
    const std::int64_t query_begin = all_queries ? 0 : task_.query_block * kBlockQueries;
    const std::int64_t query_end = all_queries ? s.seqlen_q : min_of(query_begin + kBlockQueries, s.seqlen_q);
    const std::int64_t key_begin = all_keys ? 0 : task_.key_block * kBlockKeys;
    const std::int64_t key_end = all_keys ? s.seqlen_k : min_of(key_begin + kBlockKeys, s.seqlen_k);
    for (std::int64_t i = query_begin; i < query_end; i += kBlockQueries) {
      const int queries = static_cast<int>(min_of<std::int64_t>(kBlockQueries, query_end - i));
      const ScoreTile block{nullptr, (queries + kLanes - 1) / kLanes, 0, 0, i, queries};
      pack_query_columns<T>(p_, s, head, block, grads.rules().query_scale(), columns_);
      for (std::int64_t j = key_begin; j < key_end; j += kBlockKeys) {
        const int count = static_cast<int>(min_of<std::int64_t>(kBlockKeys, key_end - j));
        const KeySpan span{j, count};
        if (!grads.turn_to(block, head, span, 4)) continue;
        grads.find(columns_.lse, columns_.delta, FloatProducts(p_, columns_, keys, values, span));
        add_tile(grads.grads(), j);
      }
    }
  }

  void add_tile(const ScoreTile& t, std::int64_t first_key) {
    float* rows = sum_ + (t.first_key - first_key) * kBlockQueries;
    for (int j = 0; j < t.keys; ++j)
      for (int n = 0; n < t.vectors; ++n) {
        float* at = rows + j * kBlockQueries + n * kLanes;
        store(at, load(at) + load(t.row(j) + n * kLanes));
      }
  }

  template <class T>
  void store_tile() {
    if (shape_[2] == 1) sum_queries();
    if (shape_[3] == 1) sum_keys();
    const std::int64_t first_query = task_.query_block * kBlockQueries;
    const std::int64_t first_key = task_.key_block * kBlockKeys;
    const int queries = static_cast<int>(min_of<std::int64_t>(kBlockQueries, shape_[2] - first_query));
    const int keys = static_cast<int>(min_of<std::int64_t>(kBlockKeys, shape_[3] - first_key));
    const detail::PlaneParams& dbias = p_.grad.dbias;
    T* to = static_cast<T*>(dbias.data) + detail::plane_offset(dbias, task_.batch, task_.head, first_query, first_key);
    if (dbias.key == 1 || keys == 1) {
      VecF one[kTileVectors];
      for (VecF& x : one) x = broadcast(1.f);
      return unpack_transposed<T>(sum_, kTileVectors, one, to, dbias.query, queries, keys);
    }
    for (int j = 0; j < keys; ++j)
      for (int i = 0; i < queries; ++i)
        store_floats(to + i * dbias.query + j * dbias.key, broadcast(sum_[j * kBlockQueries + i]), 1);
  }

  /// Sums into the first query.
  void sum_queries() {
    for (int j = 0; j < kBlockKeys; ++j) {
      float* row = sum_ + j * kBlockQueries;
      VecF sum{};
      for (int n = 0; n < kTileVectors; ++n) sum += load(row + n * kLanes);
      row[0] = sum_of_lanes(sum);
    }
  }

  /// Sums into the first key.
  void sum_keys() {
    for (int n = 0; n < kTileVectors; ++n) {
      VecF sum{};
      for (int j = 0; j < kBlockKeys; ++j) sum += load(sum_ + j * kBlockQueries + n * kLanes);
      store(sum_ + n * kLanes, sum);
    }
  }

  const detail::Params& p_;
  const BiasGradTask& task_;
  const std::int64_t (&shape_)[4];
  float* const sum_;  // (kBlockKeys, kBlockQueries)
  const QueryColumns columns_;
  float* const keys_;
  float* const values_;
  const Arena tiles_;
};

void bias_grad(const detail::Params& params, const BiasGradTask& task, void* scratch) {
  BiasGrad(params, task, Arena(scratch)).run();
}

std::size_t bias_grad_scratch(std::int64_t head_dim, std::int64_t head_dim_v) {
  return ScoreGrads::bytes() + Arena::rounded_floats(kBlockKeys * kBlockQueries) +
         Arena::rounded_floats(head_dim * kBlockQueries) + Arena::rounded_floats(head_dim_v * kBlockQueries) +
         2 * Arena::rounded_floats(kBlockQueries) + Arena::rounded_floats(KeyBlocks::floats(head_dim)) +
         Arena::rounded_floats(KeyBlocks::floats(head_dim_v));
}

}  // namespace
}  // namespace flashcore::cpu
