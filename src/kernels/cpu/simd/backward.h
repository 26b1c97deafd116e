// Backward: dq, dk and dv of one key head and the queries that share it, with queries in the vector lanes.
//
// For each block of keys and each query block, with P^T and dS^T from score_grads.h:
//   dV += P^T·dO,  dK += dS^T·Q     vectors along the head dimension, weights broadcast
//   dQ^T += K^T·dS^T                as the forward's O^T
// so neither P nor dS is ever transposed. Everything is summed in floats and rounded once.
#pragma once

#include "isa.h"
#include "score_grads.h"
#if defined(FLASHCORE_AMX)
#include "tile_backward.h"
#endif

namespace flashcore::cpu {
namespace {

FLASHCORE_INLINE std::int64_t whole_vectors(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

/// kRows rows of C += A·B, from row `m` on, for B and C of any width: rows of whole vectors.
template <int kRows>
FLASHCORE_INLINE void add_wide_rows(Product p, int m, std::int64_t width) {
  const char* no_prefetch = nullptr;
  const auto add = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    tile<kRows, kVectors, false, Start::add, false, false>(p, m, p.lda, p.ldb, p.ldc, no_prefetch);
    p.b += kVectors * kLanes;
    p.c += kVectors * kLanes;
    width -= kVectors * kLanes;
  };
  if constexpr (kLanes == 16)
    while (width >= 4 * kLanes) add(std::integral_constant<int, 4>{});
  // Three vectors at a time, but 2 + 2 for the last four.
  while (width >= 3 * kLanes && width != 4 * kLanes) add(std::integral_constant<int, 3>{});
  while (width >= 2 * kLanes) add(std::integral_constant<int, 2>{});
  if (width > 0) add(std::integral_constant<int, 1>{});
}

/// C += A·B, whole rows of C after each other: C comes from L2 and goes there.
__attribute__((noinline)) void multiply_wide_rows(const ScoreTile& a, const KeyRows& b, float* c, std::int64_t width) {
  Product p;
  p.k = a.queries;
  p.a = a.data;
  p.lda = a.width();
  p.b = b.data;
  p.ldb = b.stride;
  p.c = c;
  p.ldc = width;
  int m = 0;
  constexpr int kRows = kLanes == 16 ? 6 : kTileRows;
  for (; m + kRows <= a.keys; m += kRows) add_wide_rows<kRows>(p, m, width);
  for (; m + 2 <= a.keys; m += 2) add_wide_rows<2>(p, m, width);
  for (; m < a.keys; ++m) add_wide_rows<1>(p, m, width);
}

class Backward {
 public:
  static std::size_t scratch_bytes(std::int64_t head_dim, std::int64_t head_dim_v) {
    return ScoreGrads::bytes() + Arena::rounded_floats(KeyBlocks::floats(head_dim)) +
           Arena::rounded_floats(KeyBlocks::floats(head_dim_v));
  }

  Backward(const detail::Params& p, const BackwardTask& task, Arena scratch)
      : Backward(p, task, scratch, Arena(task.workspace)) {}

  void run() {
    with_storage(p_.dtype, [this](auto storage) {
      for_each_pass(p_, task_, blocks_, chunk_blocks_,
                    [this](const Pass& pass) { add_queries<decltype(storage)>(pass); });
    });
  }

 private:
  Backward(const detail::Params& p, const BackwardTask& task, Arena scratch, Arena workspace)
      : p_(p),
        task_(task),
        s_(task.sequence),
        width_(whole_vectors(p.size.head_dim)),
        width_v_(whole_vectors(p.size.head_dim_v)),
        blocks_((whole_vectors(s_.seqlen_q) / kLanes + kTileVectors - 1) / kTileVectors),
        chunk_blocks_(min_of(blocks_, task.chunk_queries / kBlockQueries)),
        queries_(min_of(whole_vectors(s_.seqlen_q), chunk_blocks_ * kBlockQueries)),
        scale_(static_cast<float>(p.score.scale)),
        columns_{workspace.take<float>(queries_ * p.size.head_dim), workspace.take<float>(queries_ * p.size.head_dim_v),
                 workspace.take<float>(whole_vectors(s_.seqlen_q)), workspace.take<float>(whole_vectors(s_.seqlen_q))},
        dq_columns_(workspace.take<float>(queries_ * p.size.head_dim)),
        q_rows_(workspace.take<float>(queries_ * width_)),
        dout_rows_(workspace.take<float>(queries_ * width_v_)),
        dk_(workspace.take<float>((task.key_end - task.key_begin) * width_)),
        dv_(workspace.take<float>((task.key_end - task.key_begin) * width_v_)),
        dq_of_chunk_(workspace.take<float>(queries_ * p.size.head_dim)),
        grads_(p, s_, task.mask_extents, scratch),
        keys_(p, p.k, s_, task.head_k, p.size.head_dim, scratch.take<float>(KeyBlocks::floats(p.size.head_dim)),
              chunk_blocks_),
        values_(p, p.v, s_, task.head_k, p.size.head_dim_v, scratch.take<float>(KeyBlocks::floats(p.size.head_dim_v))) {
  }

  /// A query block as a tile without keys.
  ScoreTile tile_of(std::int64_t block) const {
    const VectorRange range = vectors_of_block(block, s_.seqlen_q);
    const std::int64_t first = range.begin * kLanes;
    const int vectors = static_cast<int>(range.end - range.begin);
    return {nullptr, vectors, 0,
            0,       first,   static_cast<int>(min_of<std::int64_t>(vectors * kLanes, s_.seqlen_q - first))};
  }

  QueryColumns columns_of(const ScoreTile& t) const {
    const std::int64_t first = t.first_query - first_;
    return {columns_.q + first * p_.size.head_dim, columns_.dout + first * p_.size.head_dim_v,
            columns_.lse + t.first_query, columns_.delta + t.first_query};
  }

  template <class T>
  const T* row(const detail::TensorParams& t, std::int64_t i) const {
    return static_cast<const T*>(t.data) + detail::q_offset(t, s_, head_, i);
  }

  /// What the queries of a pass and the task's keys give to each other.
  template <class T>
  void add_queries(const Pass& pass) {
    head_ = pass.head;
    first_ = tile_of(pass.begin).first_query;
    const ScoreTile last = tile_of(pass.end - 1);
    const std::int64_t queries = pass.end > pass.begin ? last.first_query + last.queries - first_ : 0;
    widen_queries<T>(p_.q, p_.size.head_dim, queries, q_rows_);
    widen_queries<T>(p_.grad.dout, p_.size.head_dim_v, queries, dout_rows_);
    const auto pack = [&](const ScoreTile& block) {
      pack_query_columns<T>(p_, s_, head_, block, grads_.rules().query_scale(), columns_of(block));
    };
    if (task_.key_begin == task_.key_end)
      for (std::int64_t n = pass.begin; n < pass.end; ++n) pack(tile_of(n));
    sum_chunks(task_, queries_ * p_.size.head_dim, dq_columns_, dq_of_chunk_, [&](const KeySpan& span, float* dq) {
      if (pass.first) clear_sums(span);
      for (std::int64_t n = pass.begin; n < pass.end; ++n) {
        const ScoreTile block = tile_of(n);
        // Note: not before its first keys, so that the next block's rows come into the cache while this one computes.
        if (span.first == task_.key_begin) pack(block);
        add_block(block, span, dq);
      }
      if (pass.last) store_sums<T>(span);
    });
    for (std::int64_t n = pass.begin; n < pass.end; ++n) {
      const ScoreTile t = tile_of(n);
      store_query_columns<T>(p_, task_, head_, t, dq_columns_ + (t.first_query - first_) * p_.size.head_dim, scale_);
    }
    if (task_.dsinks && task_.key_begin == 0 && pass.end == blocks_)
      task_.dsinks[s_.batch * p_.size.heads_q + head_] = sink_gradient(p_, s_, head_, columns_.lse, columns_.delta);
  }

  float* dk_of(const KeySpan& span) const { return dk_ + (span.first - task_.key_begin) * width_; }
  float* dv_of(const KeySpan& span) const { return dv_ + (span.first - task_.key_begin) * width_v_; }
  void clear_sums(const KeySpan& span) {
    std::memset(dk_of(span), 0, static_cast<std::size_t>(span.count * width_) * sizeof(float));
    std::memset(dv_of(span), 0, static_cast<std::size_t>(span.count * width_v_) * sizeof(float));
  }
  template <class T>
  void store_sums(const KeySpan& span) {
    store_key_rows<T>(p_, task_, span, p_.grad.dk, dk_of(span), width_, p_.size.head_dim, scale_);
    store_key_rows<T>(p_, task_, span, p_.grad.dv, dv_of(span), width_v_, p_.size.head_dim_v, 1.f);
  }

  /// Rows that are whole vectors of floats, dense, are used where they lie.
  bool in_place(const detail::TensorParams& t, int dim) const {
    return p_.dtype == DType::float32 && t.seq == dim && whole_vectors(dim) == dim;
  }
  template <class T>
  void widen_queries(const detail::TensorParams& t, int dim, std::int64_t count, float* rows) {
    if (in_place(t, dim)) return;
    for (std::int64_t i = 0; i < count; ++i) widen_row(row<T>(t, first_ + i), dim, rows + i * whole_vectors(dim));
  }
  KeyRows query_rows(const detail::TensorParams& t, int dim, const float* rows, std::int64_t first) const {
    const std::int64_t width = whole_vectors(dim);
    return {in_place(t, dim) ? row<float>(t, first) : rows + (first - first_) * width, width};
  }

  /// What a span of keys and a query block give to each other.
  void add_block(const ScoreTile& block, const KeySpan& span, float* dq_columns) {
    if (!grads_.turn_to(block, head_, span, 4)) return;
    const QueryColumns columns = columns_of(block);
    grads_.find(columns.lse, columns.delta, FloatProducts(p_, columns, keys_, values_, span));
    grads_.pass_softcap();
    const ScoreTile& weights = grads_.weights();
    const ScoreTile grads = grads_.grads();
    const std::int64_t key = grads.first_key - task_.key_begin;
    const std::int64_t query = grads.first_query;
    const int dim = p_.size.head_dim;
    const int dim_v = p_.size.head_dim_v;
    if (p_.grad.dv.data)
      multiply_wide_rows(weights, query_rows(p_.grad.dout, dim_v, dout_rows_, query), dv_ + key * width_v_, width_v_);
    if (p_.grad.dk.data) multiply_wide_rows(grads, query_rows(p_.q, dim, q_rows_, query), dk_ + key * width_, width_);
    if (!p_.grad.dq.data) return;
    const KeyRows k = keys_.rows(span.first, span.count).from(grads.first_key - span.first);
    float* dq = dq_columns + (query - first_) * dim;
    if (grads_.some_excluded() && !keys_.is_finite(span.first, span.count))
      add_values_with_weight(grads, k, dim, dq);
    else
      add_values<Start::add>(grads, k, dim, dq, nullptr, nullptr);
  }

  const detail::Params& p_;
  const BackwardTask& task_;
  const detail::Sequence& s_;
  const std::int64_t width_;    // of rows of head_dim, in whole vectors
  const std::int64_t width_v_;  // of rows of head_dim_v
  const std::int64_t blocks_;   // of queries
  const std::int64_t chunk_blocks_;
  const std::int64_t queries_;  // of a chunk, in whole vectors
  const float scale_;
  const QueryColumns columns_;  // q and dout of a chunk; lse and Δ of all queries of a head
  float* const dq_columns_;
  float* const q_rows_;  // (seqlen_q, width_)
  float* const dout_rows_;
  float* const dk_;  // (the task's keys, width_)
  float* const dv_;
  float* const dq_of_chunk_;  // of a chunk but the first
  ScoreGrads grads_;
  KeyBlocks keys_;
  KeyBlocks values_;
  std::int64_t head_ = 0;
  std::int64_t first_ = 0;  // query of the chunk
};

/// Queries that take about 768 KB with `bytes` bytes for each of their numbers: both forms of q and dout, and dq.
inline std::int64_t queries_in_cache(std::int64_t head_dim, std::int64_t head_dim_v, std::int64_t bytes) {
  constexpr std::int64_t kBytes = 768 * 1024;
  constexpr std::int64_t kStep = 128;
  const std::int64_t one = (head_dim + head_dim_v) * bytes / 2;
  return max_of<std::int64_t>(1, (kBytes / one + kStep / 2) / kStep) * kStep;
}

#if defined(FLASHCORE_AMX)
/// Whether what a task multiplies is finite: parts of an infinity are not numbers, and 0 times it is none.
template <class T>
bool task_is_finite(const detail::Params& p, const BackwardTask& task, T) {
  const detail::Sequence& s = task.sequence;
  const auto keys_are = [&](const detail::TensorParams& t, int dim) {
    return all_finite(static_cast<const T*>(t.data) + detail::k_offset(p, t, s, task.head_k, 0), t.seq, s.seqlen_k,
                      dim);
  };
  const auto queries_are = [&](const detail::TensorParams& t, std::int64_t head, int dim) {
    return all_finite(static_cast<const T*>(t.data) + detail::q_offset(t, s, head, 0), t.seq, s.seqlen_q, dim);
  };
  bool finite = keys_are(p.k, p.size.head_dim) && keys_are(p.v, p.size.head_dim_v);
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  for (std::int64_t head = task.head_k * group; finite && head < (task.head_k + 1) * group; ++head)
    finite = queries_are(p.q, head, p.size.head_dim) && queries_are(p.grad.dout, head, p.size.head_dim_v);
  return finite;
}

void backward(const detail::Params& params, const BackwardTask& task, void* scratch) {
  with_storage(params.dtype, [&](auto storage) {
    if (!task_is_finite(params, task, storage)) return Backward(params, task, Arena(scratch)).run();
    constexpr int kParts = kPartsOf<decltype(storage)>;
    const TileScope tiles;
    TileBackward<kParts>(params, task, Arena(scratch), Arena(task.workspace)).run();
  });
}

std::size_t backward_scratch(std::int64_t head_dim, std::int64_t head_dim_v) {
  return max_of(Backward::scratch_bytes(head_dim, head_dim_v), TileBackward<3>::scratch_bytes(head_dim, head_dim_v));
}

std::int64_t backward_queries(DType dtype, std::int64_t head_dim, std::int64_t head_dim_v) {
  const int parts = dtype == DType::float32 ? 3 : dtype == DType::float16 ? 2 : 1;
  return queries_in_cache(head_dim, head_dim_v, 8 * parts + 4);
}
#else
void backward(const detail::Params& params, const BackwardTask& task, void* scratch) {
  Backward(params, task, Arena(scratch)).run();
}

std::size_t backward_scratch(std::int64_t head_dim, std::int64_t head_dim_v) {
  return Backward::scratch_bytes(head_dim, head_dim_v);
}

std::int64_t backward_queries(DType, std::int64_t head_dim, std::int64_t head_dim_v) {
  return queries_in_cache(head_dim, head_dim_v, 20);
}
#endif

}  // namespace
}  // namespace flashcore::cpu
