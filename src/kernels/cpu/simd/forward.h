// Forward: flash attention with queries in the vector lanes, one task of query blocks of a key head at a time.
//
// For each tile of 128 or 256 keys by a query block: S^T = K·Q^T, the weights P^T by online softmax, O^T += V^T·P^T.
// With queries in lanes the maximum, the sum, the rescaling and every mask are operations between vectors. The two
// products, and the weights between them, belong to an engine: float_engine.h, or tile_engine.h where the processor
// has AMX.
#pragma once

#include "float_engine.h"
#include "isa.h"
#if defined(FLASHCORE_AMX)
#include "tile_engine.h"
#endif

namespace flashcore::cpu {
namespace {

#if defined(FLASHCORE_AMX)
// Note: processors with AMX have 2 MB of L2; and to split keys costs more than to read them.
constexpr int kTaskQueries = 1024;
constexpr std::int64_t kTaskBytes = 1024 * 1024;
#else
constexpr int kTaskQueries = 16 * kBlockQueries;
constexpr std::int64_t kTaskBytes = 256 * 1024;
#endif

template <class Engine>
class Forward {
 public:
  static std::size_t bytes(std::int64_t head_dim, std::int64_t head_dim_v, std::int64_t blocks) {
    return plane_bytes(head_dim) + Engine::bytes(head_dim, head_dim_v) +
           Arena::rounded(static_cast<std::size_t>(blocks) * sizeof(QueryBlock)) +
           static_cast<std::size_t>(blocks) * (Engine::query_bytes(head_dim) + Engine::out_bytes(head_dim_v));
  }

  Forward(const detail::Params& p, const ForwardTask& task, Arena arena)
      : p_(p),
        s_(task.sequence),
        plane_(arena.take<float>(static_cast<std::int64_t>(plane_bytes(p.size.head_dim) / sizeof(float)))),
        rules_(p, s_, plane_, task.mask_extents),
        engine_(p, s_, rules_, task.head_begin / (p.size.heads_q / p.size.heads_k), blocks_of(task), arena) {
    blocks_ = arena.take<QueryBlock>(blocks_of(task));
    for (std::int64_t head = task.head_begin; head < task.head_end; ++head)
      for (std::int64_t index = task.block_begin; index < task.block_end; ++index) {
        QueryBlock& b = blocks_[block_count_++];
        b.q = arena.take<char>(static_cast<std::int64_t>(Engine::query_bytes(p.size.head_dim)));
        b.out = arena.take<float>(static_cast<std::int64_t>(Engine::out_bytes(p.size.head_dim_v) / sizeof(float)));
        start_block(b, head, vectors_of_block(index, s_.seqlen_q));
      }
  }

  void run() {
    detail::KeyRange seen{s_.seqlen_k, 0};
    for (int n = 0; n < block_count_; ++n) {
      seen.begin = min_of(seen.begin, blocks_[n].keys.begin);
      seen.end = max_of(seen.end, blocks_[n].keys.end);
    }
    const std::int64_t span = Engine::span_keys(p_);
    for (std::int64_t first = seen.begin / Engine::kTileKeys * Engine::kTileKeys; first < seen.end; first += span) {
      const std::int64_t end = min_of(first + span, seen.end);
      engine_.set_keys(first, end - first, seen.end);
      for (int n = 0; n < block_count_; ++n)
        for (std::int64_t key = first; key < end; key += Engine::kTileKeys)
          attend(blocks_[n], key, min_of(key + Engine::kTileKeys, end));
    }
    for (int n = 0; n < block_count_; ++n) finish_block(blocks_[n]);
  }

 private:
  /// Room for a tile of a mask or bias, or for a vector of rotated queries.
  static std::size_t plane_bytes(std::int64_t head_dim) {
    return Arena::rounded_floats(max_of<std::int64_t>(Engine::kTileKeys * kBlockQueries, head_dim * kLanes));
  }

  static std::int64_t blocks_of(const ForwardTask& task) {
    return (task.head_end - task.head_begin) * (task.block_end - task.block_begin);
  }

  void start_block(QueryBlock& b, std::int64_t head, VectorRange range) {
    b.head = head;
    b.first = range.begin * kLanes;
    b.vectors = static_cast<int>(range.end - range.begin);
    b.queries = static_cast<int>(min_of<std::int64_t>(b.vectors * kLanes, s_.seqlen_q - b.first));
    b.keys = rules_.keys_of(b.first, b.queries);
    b.started = false;
    b.finite = true;
    for (int n = 0; n < b.vectors; ++n) {
      b.max[n] = broadcast(-kInfinity);
      b.sum[n] = VecF{};
    }
    with_storage(p_.dtype, [&](auto storage) { pack_queries<decltype(storage)>(b); });
  }

  template <class T>
  void pack_queries(QueryBlock& b) {
    const T* q = static_cast<const T*>(p_.q.data) + detail::q_offset(p_.q, s_, b.head, b.first);
    const int dim = p_.size.head_dim;
    if (p_.rotary.dim == 0) return engine_.pack(b, Rows<T>{q, p_.q.seq, b.queries, dim}, 0, b.vectors);
    for (int n = 0; n < b.vectors; ++n) {
      const int rows = min_of(kLanes, b.queries - n * kLanes);
      for (int i = 0; i < rows; ++i)
        for (int d = 0; d < dim; ++d) {
          const std::int64_t query = b.first + n * kLanes + i;
          plane_[i * dim + d] =
              detail::rotated(q + (query - b.first) * p_.q.seq, d, detail::query_position(s_, query), p_.rotary);
        }
      engine_.pack(b, Rows<float>{plane_, dim, rows, dim}, n, 1);
    }
  }

  void attend(QueryBlock& b, std::int64_t first_key, std::int64_t end_key) {
    const std::int64_t begin = max_of(first_key, b.keys.begin / Engine::kKeyStep * Engine::kKeyStep);
    const std::int64_t end = min_of(end_key, b.keys.end);
    if (begin >= end) return;
    ScoreTile t{engine_.tile(), b.vectors, static_cast<int>(end - begin), begin, b.first, b.queries};
    const Extent extent = rules_.cut_to_mask(t, b.head);
    if (extent == Extent::nothing) return;
    const bool edges = rules_.has_edges(t);
    const bool* missing = engine_.missing(t.first_key);
    const bool changed = rules_.changes_scores(extent);
    const bool plain = !changed && !edges && !missing;

    const VecF* correction = nullptr;
    if (plain) {
      correction = engine_.find_plain_weights(b, t);
    } else {
      engine_.find_scores(b, t);
      if (changed) rules_.change_scores(t, b.head, extent);
      if (missing) drop_keys(t, missing + (t.first_key - first_key));
      if (edges) rules_.exclude_by_position(t);
      correction = engine_.find_weights(b, t);
    }
    if (p_.dropout.threshold > 0) {
      engine_.make_weights_floats(b, t);
      drop_weights(t, p_.dropout, s_, b.head);
    }
    engine_.add_values(b, t, correction, !plain || p_.dropout.threshold > 0);
    b.started = true;
  }

  void finish_block(QueryBlock& b) {
    VecF factor[kTileVectors];
    scale_out(b, p_.size.head_dim_v, nullptr);
    const float sink = detail::head_value<float>(p_.sinks, 0, b.head, -kInfinity) * kLog2E;
    for (int n = 0; n < b.vectors; ++n) {
      // Note: without a maximum there is no weight, whatever an engine has added up; but NaN stays.
      b.sum[n] = (b.max[n] == -kInfinity) & (b.sum[n] == b.sum[n]) ? VecF{} : b.sum[n];
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
  float* const plane_;  // the rules' own tile; before that, rotated queries
  ScoreRules rules_;
  Engine engine_;
  QueryBlock* blocks_ = nullptr;
  int block_count_ = 0;
};

template <class Engine>
void run_forward(const detail::Params& params, const ForwardTask& task, void* scratch) {
  Forward<Engine>(params, task, Arena(scratch)).run();
}

#if defined(FLASHCORE_AMX)
void forward(const detail::Params& params, const ForwardTask& task, void* scratch) {
  // Note: rotated queries are floats with more digits than their storage type has. And to split few numbers into two or
  // three parts costs more than the products save.
  const detail::Sequence& s = task.sequence;
  const bool few_floats = params.dtype == DType::float32 && s.seqlen_k <= kBlockKeys;
  const bool few_halves = params.dtype == DType::float16 && max_of(s.seqlen_q, s.seqlen_k) <= kBlockQueries;
  if (params.rotary.dim > 0 || few_floats || few_halves) return run_forward<FloatEngine>(params, task, scratch);
  const TileScope tiles;
  with_storage(params.dtype,
               [&](auto storage) { run_forward<TileEngine<kPartsOf<decltype(storage)>>>(params, task, scratch); });
}

std::size_t forward_scratch(std::int64_t head_dim, std::int64_t head_dim_v, std::int64_t blocks) {
  std::size_t most = Forward<FloatEngine>::bytes(head_dim, head_dim_v, blocks);
  most = max_of(most, Forward<TileEngine<1>>::bytes(head_dim, head_dim_v, blocks));
  most = max_of(most, Forward<TileEngine<2>>::bytes(head_dim, head_dim_v, blocks));
  return max_of(most, Forward<TileEngine<3>>::bytes(head_dim, head_dim_v, blocks));
}
#else
void forward(const detail::Params& params, const ForwardTask& task, void* scratch) {
  run_forward<FloatEngine>(params, task, scratch);
}

std::size_t forward_scratch(std::int64_t head_dim, std::int64_t head_dim_v, std::int64_t blocks) {
  return Forward<FloatEngine>::bytes(head_dim, head_dim_v, blocks);
}
#endif

}  // namespace
}  // namespace flashcore::cpu
