// Forward: flash attention with queries in the vector lanes, one task of query blocks of a key head at a time.
//
// For each block of 128 keys and each query block: S^T = K·Q^T (score.h), the weights P^T by online softmax
// (softmax.h), O^T += V^T·P^T (value.h). With queries in lanes the maximum, the sum, the rescaling and every mask are
// operations between vectors, and K and V are read as they lie.
//
// Note: the running maximum is subtracted by starting the accumulators of S at −max, and is replaced only when a score
// exceeds it by 2^16: floats lose nothing by that, and most blocks need no rescaling. Where a feature changes scores
// ("general") they start at 0, are changed in place, and the maximum is looked for afterwards.
#pragma once

#include "arena.h"
#include "isa.h"
#include "value.h"

namespace flashcore::cpu {
namespace {

constexpr float kSlack = 16.f;  // log2 of how far a score may exceed the running maximum

/// Up to kBlockQueries queries of a head, and their running softmax.
struct QueryBlock {
  VecF max[kTileVectors];  // in units of log 2
  VecF sum[kTileVectors];
  float* q;    // (head_dim, width), scaled
  float* out;  // (head_dim_v, width), not yet divided by the sum
  std::int64_t head;
  std::int64_t first;
  detail::KeyRange keys;  // seen by any of its queries
  int queries;
  int vectors;
  bool started;
};

class Forward {
 public:
  Forward(const detail::Params& p, const ForwardTask& task, Arena arena)
      : p_(p),
        s_(task.sequence),
        tile_(arena.take<float>(kBlockKeys * kBlockQueries)),
        plane_(arena.take<float>(kBlockKeys * kBlockQueries)),
        rules_(p, s_, plane_),
        keys_(p, p.k, s_, task.head_begin / group(), p.size.head_dim,
              arena.take<float>(kBlockKeys * p.size.head_dim + kLanes)),
        values_(p, p.v, s_, task.head_begin / group(), p.size.head_dim_v,
                arena.take<float>(kBlockKeys * p.size.head_dim_v + kLanes)) {
    // Note: pages may be missing, and a missing page's scores are changed.
    general_ = rules_.changes_scores() || p.page.block_table;
    const std::int64_t blocks = task.block_end - task.block_begin;
    blocks_ = arena.take<QueryBlock>((task.head_end - task.head_begin) * blocks);
    for (std::int64_t head = task.head_begin; head < task.head_end; ++head)
      for (std::int64_t index = task.block_begin; index < task.block_end; ++index) {
        QueryBlock& b = blocks_[block_count_++];
        b.q = arena.take<float>(p.size.head_dim * kBlockQueries);
        b.out = arena.take<float>(p.size.head_dim_v * kBlockQueries);
        start_block(b, head, vectors_of_block(index, s_.seqlen_q));
      }
  }

  void run() {
    detail::KeyRange seen{s_.seqlen_k, 0};
    for (int n = 0; n < block_count_; ++n) {
      seen.begin = min_of(seen.begin, blocks_[n].keys.begin);
      seen.end = max_of(seen.end, blocks_[n].keys.end);
    }
    for (std::int64_t first = seen.begin / kBlockKeys * kBlockKeys; first < seen.end; first += kBlockKeys) {
      first_key_ = first;
      key_count_ = static_cast<int>(min_of<std::int64_t>(kBlockKeys, seen.end - first));
      set_prefetch(seen.end);
      for (int n = 0; n < block_count_; ++n) attend(blocks_[n]);
    }
    for (int n = 0; n < block_count_; ++n) finish_block(blocks_[n]);
  }

 private:
  std::int64_t group() const { return p_.size.heads_q / p_.size.heads_k; }

  void start_block(QueryBlock& b, std::int64_t head, VectorRange range) {
    b.head = head;
    b.first = range.begin * kLanes;
    b.vectors = static_cast<int>(range.end - range.begin);
    b.queries = static_cast<int>(min_of<std::int64_t>(b.vectors * kLanes, s_.seqlen_q - b.first));
    b.keys = rules_.keys_of(b.first, b.queries);
    b.started = false;
    for (int n = 0; n < b.vectors; ++n) {
      b.max[n] = broadcast(-kInfinity);
      b.sum[n] = VecF{};
    }
    with_storage(p_.dtype, [&](auto storage) { pack_queries<decltype(storage)>(b, rules_.query_scale()); });
  }

  template <class T>
  void pack_queries(const QueryBlock& b, float scale) {
    const T* q = static_cast<const T*>(p_.q.data) + detail::q_offset(p_.q, s_, b.head, b.first);
    const int dim = p_.size.head_dim;
    const int width = b.vectors * kLanes;
    if (p_.rotary.dim == 0) return pack_transposed<T>({q, p_.q.seq, b.queries, dim}, scale, b.vectors, width, b.q);
    for (int n = 0; n < b.vectors; ++n) {
      const int rows = min_of(kLanes, b.queries - n * kLanes);
      for (int i = 0; i < rows; ++i)
        for (int d = 0; d < dim; ++d) {
          const std::int64_t query = b.first + n * kLanes + i;
          plane_[i * dim + d] =
              detail::rotated(q + (query - b.first) * p_.q.seq, d, detail::query_position(s_, query), p_.rotary);
        }
      pack_transposed<float>({plane_, dim, rows, dim}, scale, 1, width, b.q + n * kLanes);
    }
  }

  /// The first query block brings the next keys and values into L2 while it computes.
  void set_prefetch(std::int64_t end) {
    const std::int64_t next = first_key_ + kBlockKeys;
    const bool more = next < end;
    if (keys_.in_place() && values_.in_place()) {
      prefetch_keys_ = more ? keys_.address(next) : nullptr;
      prefetch_values_ = values_.address(first_key_);
    } else {
      prefetch_keys_ = more ? values_.address(next) : nullptr;
      prefetch_values_ = more ? keys_.address(next) : nullptr;
    }
  }

  void attend(QueryBlock& b) {
    // Note: a tile starts at a multiple of 4 keys, which dropout asks for.
    const std::int64_t begin = max_of(first_key_, b.keys.begin / 4 * 4);
    const std::int64_t end = min_of(first_key_ + key_count_, b.keys.end);
    if (begin >= end) return;
    const ScoreTile t{tile_, b.vectors, static_cast<int>(end - begin), begin, b.first, b.queries};
    const Extent extent = rules_.extent(t, b.head);
    if (extent == Extent::nothing) return;
    const bool edges = rules_.has_edges(t);

    VecF offset[kTileVectors];  // what the scores start from
    VecF top[kTileVectors];
    for (int n = 0; n < b.vectors; ++n) {
      offset[n] = general_ ? VecF{} : b.max[n] > -kInfinity ? -b.max[n] : VecF{};
      top[n] = broadcast(-kInfinity);
    }
    const KeyRows k = keys_.rows(first_key_, key_count_).from(begin - first_key_);
    multiply_rows(t, k, p_.size.head_dim, b.q, offset, top, &b == blocks_ ? prefetch_values_ : nullptr);
    if (general_) rules_.change_scores(t, b.head, extent);
    if (keys_.missing()) drop_keys(t, keys_.missing() + (begin - first_key_));
    if (edges) rules_.exclude_by_position(t);
    if (general_ || edges) find_max(t, top);

    bool rescale = general_ || edges || !b.started;
    for (int n = 0; n < b.vectors && !rescale; ++n) rescale = max_of_lanes(top[n]) > kSlack;
    VecF correction[kTileVectors];
    if (rescale) {
      raise_max(b, offset, top, correction);
      exponentiate<true>(t, offset, b.sum);
    } else {
      exponentiate<false>(t, nullptr, b.sum);
    }
    if (p_.dropout.threshold > 0) drop_weights(t, p_.dropout, s_, b.head);
    multiply_values(b, t, rescale ? correction : nullptr, general_ || edges || p_.dropout.threshold > 0);
  }

  /// Takes the tile's maxima into the running ones. `offset` becomes what is to be added to the scores, `correction`
  /// what the sums so far are multiplied with.
  void raise_max(QueryBlock& b, VecF* offset, const VecF* top, VecF* correction) {
    for (int n = 0; n < b.vectors; ++n) {
      const VecF max = max_of(b.max[n], top[n] - offset[n]);
      const VecF safe = max > -kInfinity ? max : VecF{};  // −inf − −inf would be NaN
      correction[n] = exp2(b.max[n] - safe);
      offset[n] = -safe - offset[n];
      b.max[n] = max;
      b.sum[n] *= correction[n];
    }
  }

  void multiply_values(QueryBlock& b, const ScoreTile& t, const VecF* correction, bool some_excluded) {
    const int dim = p_.size.head_dim_v;
    const KeyRows v = values_.rows(first_key_, key_count_).from(t.first_key - first_key_);
    const char* prefetch = &b == blocks_ ? prefetch_keys_ : nullptr;
    if (some_excluded && !values_.is_finite(first_key_, key_count_)) {
      for (int d = 0; d < dim; ++d)
        for (int n = 0; n < b.vectors; ++n) {
          float* at = b.out + d * t.width() + n * kLanes;
          store(at, b.started ? load(at) * (correction ? correction[n] : broadcast(1.f)) : VecF{});
        }
      add_values_with_weight(t, v, dim, b.out);
    } else if (!b.started) {
      add_values<Start::zero>(t, v, dim, b.out, nullptr, prefetch);
    } else if (correction) {
      add_values<Start::scaled>(t, v, dim, b.out, correction, prefetch);
    } else {
      add_values<Start::add>(t, v, dim, b.out, nullptr, prefetch);
    }
    b.started = true;
  }

  void finish_block(QueryBlock& b) {
    VecF factor[kTileVectors];
    const int width = b.vectors * kLanes;
    if (!b.started) std::memset(b.out, 0, static_cast<std::size_t>(width * p_.size.head_dim_v) * sizeof(float));
    const float sink = detail::head_value<float>(p_.sinks, 0, b.head, -kInfinity) * kLog2E;
    for (int n = 0; n < b.vectors; ++n) {
      factor[n] = p_.sinks.data ? join_sink(b, n, sink) : broadcast(1.f);
      factor[n] = b.sum[n] == 0.f ? VecF{} : factor[n] / b.sum[n];
    }
    with_storage(p_.dtype, [&](auto storage) {
      using T = decltype(storage);
      T* out = static_cast<T*>(p_.out.data) + detail::q_offset(p_.out, s_, b.head, b.first);
      unpack_transposed<T>(b.out, b.vectors, factor, out, p_.out.seq, b.queries, p_.size.head_dim_v);
    });
    if (!p_.lse.data) return;
    float* lse = static_cast<float*>(p_.lse.data) + detail::row_offset(p_.lse, s_, b.head, b.first);
    for (int i = 0; i < b.queries; ++i) {
      const float sum = b.sum[i / kLanes][i % kLanes];
      const float max = b.max[i / kLanes][i % kLanes];
      lse[i * p_.lse.seq] = sum == 0.f ? -kInfinity : max * kLn2 + __builtin_logf(sum);
    }
  }

  /// The sink is one more score, of a query that sees a key, and has no value. Returns what the sums of values are to
  /// be multiplied with.
  VecF join_sink(QueryBlock& b, int n, float sink) {
    const VecF max = max_of(b.max[n], broadcast(sink));
    const VecF safe = max > -kInfinity ? max : VecF{};
    const VecF correction = exp2(b.max[n] - safe);
    b.sum[n] = b.sum[n] == 0.f ? VecF{} : b.sum[n] * correction + exp2(sink - safe);
    b.max[n] = max;
    return correction;
  }

  const detail::Params& p_;
  const detail::Sequence s_;
  float* const tile_;
  float* const plane_;  // the rules' own tile; before that, rotated queries
  ScoreRules rules_;
  KeyBlocks keys_;
  KeyBlocks values_;
  bool general_ = false;
  QueryBlock* blocks_ = nullptr;
  int block_count_ = 0;
  std::int64_t first_key_ = 0;  // of the current block of keys
  int key_count_ = 0;
  const char* prefetch_keys_ = nullptr;
  const char* prefetch_values_ = nullptr;
};

void forward(const detail::Params& params, const ForwardTask& task, void* scratch) {
  Forward(params, task, Arena(scratch)).run();
}

std::size_t forward_scratch(std::int64_t head_dim, std::int64_t head_dim_v, std::int64_t blocks) {
  const auto bytes = Arena::rounded_floats;
  return 2 * bytes(kBlockKeys * kBlockQueries) + bytes(kBlockKeys * head_dim + kLanes) +
         bytes(kBlockKeys * head_dim_v + kLanes) +
         Arena::rounded(static_cast<std::size_t>(blocks) * sizeof(QueryBlock)) +
         static_cast<std::size_t>(blocks) * (bytes(head_dim * kBlockQueries) + bytes(head_dim_v * kBlockQueries));
}

}  // namespace
}  // namespace flashcore::cpu
