// Decode: a few queries against many keys. Vectors run along head_dim, so keys and values stream through once, as they
// are stored, and up to four queries that share a key head use each of them.
//
// A group of R queries keeps its scores in tiles whose lanes are (key, query): lane l is query l % R of key l / R. The
// sums of a kLanes-square of accumulators come out of a transposition in just that order. A task takes a span of the
// keys and leaves partial results; merge_spans joins them in the order of the keys.
#pragma once

#include <type_traits>

#include "arena.h"
#include "isa.h"
#include "keys.h"
#include "score.h"

namespace flashcore::cpu {
namespace {

constexpr int kDecodeKeys = 64;  // of a tile
constexpr int kMaxGroup = 4;     // queries that share a pass over the keys
constexpr int kAhead = 8;        // rows that are fetched ahead
// Queries of a head that this takes faster than the forward does, whose vectors of queries are then not full. To AMX
// they hardly matter.
#if defined(FLASHCORE_AMX)
constexpr int kFewQueries = 1;
#else
constexpr int kFewQueries = kLanes == 4 ? 3 : 6;
#endif

FLASHCORE_INLINE std::int64_t padded(std::int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }
FLASHCORE_INLINE std::int64_t padded_rows(std::int64_t rows) { return (rows + kMaxGroup - 1) / kMaxGroup * kMaxGroup; }

/// Where vector `n` of a row of `dim` ≥ kLanes elements starts: the last one overlaps the one before it.
FLASHCORE_INLINE std::int64_t vector_offset(std::int64_t n, std::int64_t dim) {
  return min_of<std::int64_t>(n * kLanes, dim - kLanes);
}

/// Whether rows of `dim` elements are read two vectors at a time, even elements before odd ones:
/// a dword of two bfloat16 becomes both of them as floats in one operation each.
template <class T>
FLASHCORE_INLINE bool in_pairs(std::int64_t dim) {
  return std::is_same_v<T, detail::BFloat16> && dim % (2 * kLanes) == 0;
}

/// The even and the odd elements of two vectors.
FLASHCORE_INLINE void load_pair(const detail::BFloat16* p, VecF& even, VecF& odd) {
  const VecU words = *reinterpret_cast<const UnalignedPairs*>(p);
  even = reinterpret_cast<VecF>(words << 16);
  odd = reinterpret_cast<VecF>(words & 0xffff0000u);
}
FLASHCORE_INLINE void store_pair(detail::BFloat16* p, VecF even, VecF odd) {
  *reinterpret_cast<UnalignedPairs*>(p) = narrow_pair(even, odd);
}
template <class T>
FLASHCORE_INLINE void load_pair(const T*, VecF&, VecF&) {}  // never called

/// One span's results for the queries of a key head: in units of log 2, and not yet divided by the sum.
struct Span {
  float* max;
  float* sum;
  float* out;  // (rows, padded(head_dim_v)), vector n holding elements from vector_offset(n) on, or vectors in_pairs

  Span(float* memory, std::int64_t rows) : max(memory), sum(max + padded_rows(rows)), out(sum + padded_rows(rows)) {}
};

template <int kShift, int... I>
FLASHCORE_INLINE VecF rotate(VecF v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + kShift) % kLanes)...);
}

/// Each lane becomes the maximum of the lanes of its query.
template <int R, int kShift = kLanes / 2>
FLASHCORE_INLINE VecF max_of_query(VecF v) {
  if constexpr (kShift >= R) {
    return max_of_query<R, kShift / 2>(max_of(v, rotate<kShift>(v, std::make_integer_sequence<int, kLanes>{})));
  } else {
    return v;
  }
}
template <int R, int kShift = kLanes / 2>
FLASHCORE_INLINE VecF sum_of_query(VecF v) {
  if constexpr (kShift >= R) {
    return sum_of_query<R, kShift / 2>(v + rotate<kShift>(v, std::make_integer_sequence<int, kLanes>{}));
  } else {
    return v;
  }
}

/// tile = the products of R queries with kLanes / R keys at a time.
template <class T, int R, bool kPairs>
__attribute__((noinline)) void score_keys(const T* k, std::int64_t stride, int count, const float* q, int dim,
                                          float* tile) {
  constexpr int kKeys = kLanes / R;
  const std::int64_t width = padded(dim);
  for (int j = 0; j < count; j += kKeys) {
    // Keys behind the last one repeat it; their scores are not used.
    const T* first = k + j * stride;
    const int last = min_of(kKeys, count - j) - 1;
    VecF x[kLanes] = {};
    constexpr int kVectors = kPairs ? 2 : 1;
    for (std::int64_t d = 0; d < width; d += kVectors * kLanes) {
      const std::int64_t offset = kPairs ? d : min_of<std::int64_t>(d, dim - kLanes);
      VecF query[R][kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; ++n) query[r][n] = load(q + r * width + d + n * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const T* at = first + min_of(i, last) * stride + offset;
        __builtin_prefetch(at + kAhead * stride, 0, 3);
        VecF key[kVectors];
        if constexpr (kPairs)
          load_pair(at, key[0], key[1]);
        else
          key[0] = load_floats(at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int n = 0; n < kVectors; ++n) x[i * R + r] += key[n] * query[r][n];
      }
    }
    transpose(x);
    VecF sum = x[0];
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) sum += x[i];
    store(tile + j * R, sum);
  }
}

/// kVectors vectors of the R sums: sum = sum · correction + Σ weight · value. kSelect: a value whose weight is 0 is not
/// multiplied, so that NaN and Inf may stand where a query does not look.
template <class T, int R, int kVectors, bool kPairs, bool kSelect>
FLASHCORE_INLINE void add_value_vectors(const T* v, std::int64_t stride, int count, const float* weights,
                                        const float* correction, float* out, std::int64_t width) {
  VecF sum[R][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) sum[r][n] = load(out + r * width + n * kLanes) * correction[r];
  for (int j = 0; j < count; ++j, v += stride) {
    VecF value[kVectors];
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) {
      const T* at = v + n * kLanes;
      __builtin_prefetch(at + kAhead * stride, 0, 3);
      if constexpr (!kPairs) value[n] = load_floats(at);
      if constexpr (kPairs)
        if (n % 2 == 0) load_pair(at, value[n], value[n + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const VecF weight = broadcast(weights[j * R + r]);
#pragma GCC unroll 16
      for (int n = 0; n < kVectors; ++n)
        sum[r][n] += weight * (kSelect ? (weight != 0.f ? value[n] : VecF{}) : value[n]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int n = 0; n < kVectors; ++n) store(out + r * width + n * kLanes, sum[r][n]);
}

template <class T, int R, bool kPairs, bool kSelect>
__attribute__((noinline)) void add_values_of(const T* v, std::int64_t stride, int count, int dim, const float* weights,
                                             const float* correction, float* out) {
  constexpr int kVectors = (kLanes == 16 ? 16 : 8) / R;  // accumulators that the registers hold
  constexpr int kLeast = kPairs ? 2 : 1;
  const std::int64_t width = padded(dim);
  std::int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes)
    add_value_vectors<T, R, kVectors, kPairs, kSelect>(v + d, stride, count, weights, correction, out + d, width);
  for (; d < dim; d += kLeast * kLanes)
    add_value_vectors<T, R, kLeast, kPairs, kSelect>(v + (kPairs ? d : vector_offset(d / kLanes, dim)), stride, count,
                                                     weights, correction, out + d, width);
}

class Decode {
 public:
  Decode(const detail::Params& p, const DecodeTask& task, Arena arena)
      : p_(p),
        task_(task),
        s_(task.sequence),
        group_(p.size.heads_q / p.size.heads_k),
        rows_(group_ * s_.seqlen_q),
        span_(task.partial, rows_),
        queries_(arena.take<float>(padded_rows(rows_) * padded(p.size.head_dim))),
        tile_(arena.take<float>(kDecodeKeys * kMaxGroup)),
        plane_(arena.take<float>(kDecodeKeys * kMaxGroup)),
        copied_keys_(arena.take<float>(kDecodeKeys * p.size.head_dim)),
        copied_values_(arena.take<float>(kDecodeKeys * p.size.head_dim_v)) {}

  void run() {
    with_storage(p_.dtype, [this](auto storage) { attend_span<decltype(storage)>(); });
  }

 private:
  struct Query {
    std::int64_t head;
    std::int64_t i;
  };
  Query query(std::int64_t row) const { return {task_.head_k * group_ + row / s_.seqlen_q, row % s_.seqlen_q}; }

  template <class T>
  void attend_span() {
    detail::KeyRange seen{task_.key_end, task_.key_begin};
    for (std::int64_t row = 0; row < padded_rows(rows_); ++row) {
      span_.max[row] = -kInfinity;
      span_.sum[row] = 0;
      if (row >= rows_) continue;
      const detail::KeyRange keys = detail::visible_keys(p_.position, s_, query(row).i);
      seen.begin = min_of(seen.begin, keys.begin);
      seen.end = max_of(seen.end, keys.end);
    }
    const std::int64_t out_width = padded(p_.size.head_dim_v);
    if (rows_ == 0) return;
    std::memset(span_.out, 0, static_cast<std::size_t>(padded_rows(rows_) * out_width) * sizeof(float));
    const std::int64_t begin = max_of(seen.begin, task_.key_begin);
    const std::int64_t end = min_of(seen.end, task_.key_end);
    if (begin >= end) return;
    pack_queries<T>();
    for (std::int64_t first = begin; first < end; first += kDecodeKeys) {
      first_key_ = first;
      count_ = static_cast<int>(min_of<std::int64_t>(kDecodeKeys, end - first));
      const Block<T> k = block<T>(p_.k, p_.size.head_dim, reinterpret_cast<T*>(copied_keys_));
      const Block<T> v = block<T>(p_.v, p_.size.head_dim_v, reinterpret_cast<T*>(copied_values_));
      for (std::int64_t row = 0; row < rows_;) {
        const std::int64_t left = rows_ - row;
        if (left >= 3)
          attend_group<T, 4>(row, k, v);
        else if (left == 2)
          attend_group<T, 2>(row, k, v);
        else
          attend_group<T, 1>(row, k, v);
        row += left >= 3 ? 4 : left;
      }
    }
  }

  /// Scaled queries as floats. The last vector of a row overlaps the one before it: there it holds zeros.
  template <class T>
  void pack_queries() {
    const int dim = p_.size.head_dim;
    const std::int64_t width = padded(dim);
    const std::int64_t last = vector_offset(width / kLanes - 1, dim);
    const double unit = p_.score.softcap > 0 ? 1 / p_.score.softcap : 1.44269504088896341;
    const float scale = static_cast<float>(p_.score.scale * unit);
    for (std::int64_t row = 0; row < padded_rows(rows_); ++row) {
      float* target = queries_ + row * width;
      std::memset(target, 0, static_cast<std::size_t>(width) * sizeof(float));
      if (row >= rows_) continue;
      const Query at = query(row);
      const T* q = static_cast<const T*>(p_.q.data) + detail::q_offset(p_.q, s_, at.head, at.i);
      const std::int64_t position = detail::query_position(s_, at.i);
      for (int d = 0; d < dim; ++d) {
        const std::int64_t slot = in_pairs<T>(dim)     ? d - d % (2 * kLanes) + d % 2 * kLanes + d % (2 * kLanes) / 2
                                  : d < width - kLanes ? d
                                                       : width - kLanes + d - last;
        target[slot] = scale * detail::rotated(q, d, position, p_.rotary);
      }
    }
  }

  template <class T>
  struct Block {
    const T* data;
    std::int64_t stride;
  };

  /// The current block of keys or values: where it lies, or copied together if it spans pages.
  template <class T>
  Block<T> block(const detail::TensorParams& t, int dim, T* copy) const {
    const T* data = static_cast<const T*>(t.data);
    const auto offset = [&](std::int64_t j) { return detail::k_offset(p_, t, s_, task_.head_k, j); };
    const std::int64_t page = p_.page.page_size;
    if (!p_.page.block_table) return {data + offset(first_key_), t.seq};
    const std::int64_t start = offset(first_key_);
    if (start >= 0 && first_key_ / page == (first_key_ + count_ - 1) / page) return {data + start, t.seq};
    for (int j = 0; j < count_; ++j) {
      const std::int64_t from = offset(first_key_ + j);
      const std::size_t bytes = static_cast<std::size_t>(dim) * sizeof(T);
      if (from < 0)
        std::memset(copy + j * dim, 0, bytes);
      else
        std::memcpy(copy + j * dim, data + from, bytes);
    }
    return {copy, dim};
  }

  template <class T, int R>
  void attend_group(std::int64_t row, const Block<T>& k, const Block<T>& v) {
    constexpr bool kMayPair = std::is_same_v<T, detail::BFloat16>;
    const float* q = queries_ + row * padded(p_.size.head_dim);
    if (in_pairs<T>(p_.size.head_dim))
      score_keys<T, R, kMayPair>(k.data, k.stride, count_, q, p_.size.head_dim, tile_);
    else
      score_keys<T, R, false>(k.data, k.stride, count_, q, p_.size.head_dim, tile_);
    const bool excluded = change_scores_of<R>(row);
    float correction[R];
    exponentiate_group<R>(row, correction);
    if (in_pairs<T>(p_.size.head_dim_v))
      add_values<T, R, kMayPair>(row, v, correction, excluded);
    else
      add_values<T, R, false>(row, v, correction, excluded);
  }

  template <class T, int R, bool kPairs>
  void add_values(std::int64_t row, const Block<T>& v, const float* correction, bool excluded) {
    const int dim = p_.size.head_dim_v;
    float* out = span_.out + row * padded(dim);
    if (excluded)
      add_values_of<T, R, kPairs, true>(v.data, v.stride, count_, dim, tile_, correction, out);
    else
      add_values_of<T, R, kPairs, false>(v.data, v.stride, count_, dim, tile_, correction, out);
  }

  /// Everything between the product and the softmax. Returns whether some score may have become −inf.
  template <int R>
  bool change_scores_of(std::int64_t row) {
    constexpr int kKeys = kLanes / R;
    const int vectors = (count_ + kKeys - 1) / kKeys;
    VecI begin{};  // the keys that each lane's query sees, counted from the block's first
    VecI end{};
    VecF slope{};
    VecF distance{};  // from the query to the block's first key
    bool excluded = p_.mask.data || p_.bias.data || p_.page.block_table;
    for (int r = 0; r < R && row + r < rows_; ++r) {
      const Query at = query(row + r);
      const detail::KeyRange keys = detail::visible_keys(p_.position, s_, at.i);
      const auto first = static_cast<std::int32_t>(detail::clamped(keys.begin - first_key_, 0, count_));
      const auto last = static_cast<std::int32_t>(detail::clamped(keys.end - first_key_, 0, count_));
      const float alibi = detail::head_value<float>(p_.alibi, s_.batch, at.head, 0.f) * kLog2E;
      excluded |= first > 0 || last < count_;
      for (int lane = r; lane < kLanes; lane += R) {
        begin[lane] = first;
        end[lane] = last;
        slope[lane] = alibi;
        distance[lane] = static_cast<float>(detail::query_position(s_, at.i) - first_key_);
      }
    }
    const VecI key = lane_numbers() / R;
    const float cap = static_cast<float>(p_.score.softcap) * kLog2E;
    if (p_.bias.data) load_plane_of<R>(p_.bias, row);
    for (int n = 0; n < vectors; ++n) {
      float* at = tile_ + n * kLanes;
      const VecI j = key + n * kKeys;
      VecF x = load(at);
      if (p_.score.softcap > 0) x = tanh_of(x) * cap;
      if (p_.alibi.data) {
        const VecF from = distance - __builtin_convertvector(j, VecF);
        x -= slope * (from < 0.f ? -from : from);
      }
      if (p_.bias.data) x += bias_in_log2(load(plane_ + n * kLanes));
      x = ((j >= begin) & (j < end)) ? x : broadcast(-kInfinity);
      store(at, x);
    }
    if (p_.mask.data) mask_scores<R>(row);
    if (p_.page.block_table) drop_missing_keys<R>();
    return excluded;
  }

  template <int R>
  void load_plane_of(const detail::PlaneParams& plane, std::int64_t row) {
    for (int r = 0; r < R && row + r < rows_; ++r) {
      const Query at = query(row + r);
      const std::int64_t offset = detail::plane_offset(plane, s_.batch, at.head, at.i, first_key_);
      for (int j = 0; j < count_; ++j)
        plane_[j * R + r] = detail::load_as<float>(plane.data, plane.dtype, offset + j * plane.key);
    }
  }

  template <int R>
  void mask_scores(std::int64_t row) {
    for (int r = 0; r < R && row + r < rows_; ++r) {
      const Query at = query(row + r);
      for (int j = 0; j < count_; ++j)
        if (!detail::kept_by_mask(p_.mask, s_, at.head, at.i, first_key_ + j)) tile_[j * R + r] = -kInfinity;
    }
  }

  template <int R>
  void drop_missing_keys() {
    for (int j = 0; j < count_; ++j)
      for (int r = 0; r < R && detail::k_offset(p_, p_.k, s_, task_.head_k, first_key_ + j) < 0; ++r)
        tile_[j * R + r] = -kInfinity;
  }

  template <int R>
  void exponentiate_group(std::int64_t row, float* correction) {
    constexpr int kKeys = kLanes / R;
    const int vectors = (count_ + kKeys - 1) / kKeys;
    VecF old_max{};
    for (int lane = 0; lane < kLanes; ++lane) old_max[lane] = span_.max[row + lane % R];
    VecF max = old_max;
    for (int n = 0; n < vectors; ++n) max = max_of(load(tile_ + n * kLanes), max);
    max = max_of_query<R>(max);
    const VecF safe = max > -kInfinity ? max : VecF{};
    VecF sum{};
    for (int n = 0; n < vectors; ++n) {
      const VecF weight = exp2(load(tile_ + n * kLanes) - safe);
      sum += weight;
      store(tile_ + n * kLanes, weight);
    }
    sum = sum_of_query<R>(sum);
    const VecF change = exp2(old_max - safe);
    for (int r = 0; r < R; ++r) {
      correction[r] = change[r];
      span_.max[row + r] = max[r];
      span_.sum[row + r] = span_.sum[row + r] * change[r] + sum[r];
    }
  }

  const detail::Params& p_;
  const DecodeTask& task_;
  const detail::Sequence& s_;
  const std::int64_t group_;
  const std::int64_t rows_;  // queries that share the key head
  Span span_;
  float* const queries_;
  float* const tile_;
  float* const plane_;
  float* const copied_keys_;
  float* const copied_values_;
  std::int64_t first_key_ = 0;
  int count_ = 0;
};

void decode(const detail::Params& params, const DecodeTask& task, void* scratch) {
  Decode(params, task, Arena(scratch)).run();
}

std::size_t decode_scratch(std::int64_t rows, std::int64_t head_dim, std::int64_t head_dim_v) {
  const auto bytes = Arena::rounded_floats;
  return bytes(padded_rows(rows) * padded(head_dim)) + 2 * bytes(kDecodeKeys * kMaxGroup) +
         bytes(kDecodeKeys * head_dim) + bytes(kDecodeKeys * head_dim_v);
}

/// Joins the spans of one key head and writes out and lse.
void merge_spans(const detail::Params& p, const detail::Sequence& s, std::int64_t head_k, float* partials,
                 std::int64_t spans) {
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  const std::int64_t rows = group * s.seqlen_q;
  const int dim = p.size.head_dim_v;
  const std::int64_t width = padded(dim);
  const std::int64_t step = Isa::partial_floats(group * p.size.seqlen_q, dim);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t head = head_k * group + row / s.seqlen_q;
    const std::int64_t i = row % s.seqlen_q;
    float max = -kInfinity;
    float found = 0;  // 0 as long as no key was seen; NaN stays
    for (std::int64_t n = 0; n < spans; ++n) {
      const Span span(partials + n * step, rows);
      max = span.max[row] > max ? span.max[row] : max;
      found += span.sum[row];
    }
    const float sink = detail::head_value<float>(p.sinks, 0, head, -kInfinity) * kLog2E;
    if (found != 0) max = max_of(max, sink);
    const float safe = max > -kInfinity ? max : 0.f;
    float sum = found == 0 ? 0.f : exp2(broadcast(sink - safe))[0];
    for (std::int64_t n = 0; n < spans; ++n) {
      const Span span(partials + n * step, rows);
      const float weight = exp2(broadcast(span.max[row] - safe))[0];
      sum += weight * span.sum[row];
      span.max[row] = weight;
    }
    const float inverse = sum == 0 ? 0.f : 1 / sum;
    with_storage(p.dtype, [&](auto storage) {
      using T = decltype(storage);
      T* out = static_cast<T*>(p.out.data) + detail::q_offset(p.out, s, head, i);
      const auto total = [&](std::int64_t v) {
        VecF all{};
        for (std::int64_t n = 0; n < spans; ++n) {
          const Span span(partials + n * step, rows);
          all += span.max[row] * load(span.out + row * width + v * kLanes);
        }
        return all * inverse;
      };
      for (std::int64_t v = 0; v < width / kLanes; ++v) {
        if constexpr (std::is_same_v<T, detail::BFloat16>) {
          if (in_pairs<T>(dim)) {
            store_pair(out + v * kLanes, total(v), total(v + 1));
            ++v;
            continue;
          }
        }
        store_floats(out + vector_offset(v, dim), total(v));
      }
    });
    if (p.lse.data)
      static_cast<float*>(p.lse.data)[detail::row_offset(p.lse, s, head, i)] =
          sum == 0 ? -kInfinity : max * kLn2 + __builtin_logf(sum);
  }
}

}  // namespace
}  // namespace flashcore::cpu
