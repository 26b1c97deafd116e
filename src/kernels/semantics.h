// What attention means, element by element: lengths, addresses, visibility, scores, dropout. Host and device code
// share this one text, so the CPU and the CUDA reference rows cannot drift apart; fast rows are tested against them.
//
// Everything read from lengths and tables is clamped to the tensors: whatever they hold, no address leaves them.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "params.h"
#include "philox.h"

namespace flashcore::detail {

FLASHCORE_HD std::int64_t clamped(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

/// The rows of one sequence. q_begin and k_begin are row offsets into packed tensors (0 where not varlen).
struct Sequence {
  std::int64_t batch;
  std::int64_t q_begin;
  std::int64_t k_begin;
  std::int64_t seqlen_q;
  std::int64_t seqlen_k;
};

FLASHCORE_HD Sequence sequence_of(const Params& p, std::int64_t batch) {
  Sequence s{batch, 0, 0, p.size.seqlen_q, p.size.seqlen_k};
  if (p.sequence.cu_seqlens_q) {
    s.q_begin = clamped(p.sequence.cu_seqlens_q[batch], 0, p.size.total_q);
    s.seqlen_q =
        clamped(clamped(p.sequence.cu_seqlens_q[batch + 1], s.q_begin, p.size.total_q) - s.q_begin, 0, p.size.seqlen_q);
  }
  if (p.sequence.cu_seqlens_k) {
    s.k_begin = clamped(p.sequence.cu_seqlens_k[batch], 0, p.size.total_k);
    s.seqlen_k =
        clamped(clamped(p.sequence.cu_seqlens_k[batch + 1], s.k_begin, p.size.total_k) - s.k_begin, 0, p.size.seqlen_k);
  }
  if (p.sequence.seqused_k) s.seqlen_k = clamped(p.sequence.seqused_k[batch] + p.sequence.seqlen_new, 0, s.seqlen_k);
  return s;
}

/// Finds the sequence that owns packed query row `row` (varlen). Returns -1 for a row that no sequence owns.
FLASHCORE_HD std::int64_t batch_of_row(const Params& p, std::int64_t row) {
  if (p.size.batch == 0) return -1;
  std::int64_t low = 0;
  std::int64_t high = p.size.batch;
  while (low + 1 < high) {  // the last batch whose first row is at most `row`
    const std::int64_t middle = (low + high) / 2;
    if (p.sequence.cu_seqlens_q[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Sequence s = sequence_of(p, low);
  return row >= s.q_begin && row < s.q_begin + s.seqlen_q ? low : -1;
}

/// Element offset of a query-side row (q, out, dout, dq).
FLASHCORE_HD std::int64_t q_offset(const TensorParams& t, const Sequence& s, std::int64_t head, std::int64_t i) {
  return s.batch * t.batch + head * t.head + (s.q_begin + i) * t.seq;
}

FLASHCORE_HD std::int64_t row_offset(const RowParams& t, const Sequence& s, std::int64_t head, std::int64_t i) {
  return s.batch * t.batch + head * t.head + (s.q_begin + i) * t.seq;
}

/// Element offset of a key-side row (k, v, dk, dv). -1 where the page table points outside the cache.
FLASHCORE_HD std::int64_t k_offset(const Params& p, const TensorParams& t, const Sequence& s, std::int64_t head,
                                   std::int64_t j) {
  if (!p.page.block_table) return s.batch * t.batch + head * t.head + (s.k_begin + j) * t.seq;
  const std::int64_t slot = j / p.page.page_size;
  if (slot >= p.page.max_pages) return -1;
  const std::int64_t page = p.page.block_table[s.batch * p.page.table_batch + slot];
  if (page < 0 || page >= p.page.pages) return -1;
  return page * t.batch + head * t.head + (j - slot * p.page.page_size) * t.seq;
}

FLASHCORE_HD std::int64_t plane_offset(const PlaneParams& t, std::int64_t batch, std::int64_t head, std::int64_t i,
                                       std::int64_t j) {
  return batch * t.batch + head * t.head + i * t.query + j * t.key;
}

/// The keys [begin, end) that the causal rule and the window leave to query i. May be empty (begin >= end).
struct KeyRange {
  std::int64_t begin;
  std::int64_t end;
};

FLASHCORE_HD KeyRange visible_keys(const PositionParams& p, const Sequence& s, std::int64_t i) {
  const std::int64_t diagonal = i + (p.top_left ? 0 : s.seqlen_k - s.seqlen_q);
  KeyRange r{0, s.seqlen_k};
  if (p.causal && diagonal + 1 < r.end) r.end = diagonal + 1;
  if (p.window_right >= 0 && p.window_right < r.end - diagonal - 1) r.end = diagonal + p.window_right + 1;
  if (p.window_left >= 0 && p.window_left < diagonal - r.begin) r.begin = diagonal - p.window_left;
  return r;
}

/// Whether the boolean mask keeps (i, j).
FLASHCORE_HD bool kept_by_mask(const PlaneParams& mask, const Sequence& s, std::int64_t head, std::int64_t i,
                               std::int64_t j) {
  return !mask.data || static_cast<const std::uint8_t*>(mask.data)[plane_offset(mask, s.batch, head, i, j)] != 0;
}

/// Reads element `offset` of an array whose dtype is known only at run time, as float (or double).
template <class Acc>
FLASHCORE_HD Acc load_as(const void* data, DType dtype, std::int64_t offset) {
  switch (dtype) {
    case DType::float16:
      return static_cast<Acc>(load(static_cast<const Float16*>(data)[offset]));
    case DType::bfloat16:
      return static_cast<Acc>(load(static_cast<const BFloat16*>(data)[offset]));
    case DType::float32:
      return static_cast<Acc>(static_cast<const float*>(data)[offset]);
    case DType::float64:
      return static_cast<Acc>(static_cast<const double*>(data)[offset]);
    case DType::float8_e4m3:
      return static_cast<Acc>(load(static_cast<const Float8E4M3*>(data)[offset]));
    default:
      return static_cast<Acc>(0);
  }
}

template <class Acc>
FLASHCORE_HD void store_as(void* data, DType dtype, std::int64_t offset, Acc x) {
  switch (dtype) {
    case DType::float16:
      store(static_cast<Float16*>(data)[offset], static_cast<float>(x));
      break;
    case DType::bfloat16:
      store(static_cast<BFloat16*>(data)[offset], static_cast<float>(x));
      break;
    case DType::float32:
      static_cast<float*>(data)[offset] = static_cast<float>(x);
      break;
    case DType::float64:
      static_cast<double*>(data)[offset] = static_cast<double>(x);
      break;
    default:
      break;
  }
}

/// A per-(batch, head) number, or `fallback` where the tensor is not given.
template <class Acc>
FLASHCORE_HD Acc head_value(const HeadParams& t, std::int64_t batch, std::int64_t head, Acc fallback) {
  return t.data ? load_as<Acc>(t.data, t.dtype, batch * t.batch + head * t.head) : fallback;
}

/// The score of (i, j) in two steps, because the backward pass needs the slope of the softcap.
template <class Acc>
struct Score {
  Acc value;  // after softcap, ALiBi and bias
  Acc slope;  // d value / d (scale·q·k)
};

/// `product` is q_i·k_j; `scale` includes the descales of float8.
template <class Acc>
FLASHCORE_HD Score<Acc> score_of(const Params& p, const Sequence& s, std::int64_t head, std::int64_t i, std::int64_t j,
                                 Acc product, Acc scale, Acc alibi_slope) {
  Score<Acc> r{product * scale, Acc(1)};
  if (p.score.softcap > 0) {
    const Acc cap = static_cast<Acc>(p.score.softcap);
    const Acc t = tanh(r.value / cap);
    r.value = cap * t;
    r.slope = Acc(1) - t * t;
  }
  if (p.alibi.data) {
    const std::int64_t distance = i + s.seqlen_k - s.seqlen_q - j;
    r.value -= alibi_slope * static_cast<Acc>(distance < 0 ? -distance : distance);
  }
  if (p.bias.data) r.value += load_as<Acc>(p.bias.data, p.bias.dtype, plane_offset(p.bias, s.batch, head, i, j));
  return r;
}

/// What dropout multiplies the weight of (i, j) with: 0, or 1/(1-p).
template <class Acc>
FLASHCORE_HD Acc dropout_factor(const DropoutParams& d, const Sequence& s, std::int64_t head, std::int64_t i,
                                std::int64_t j) {
  if (d.threshold == 0) return Acc(1);
  return dropout_word(d.seed, s.batch, head, i, j) < d.threshold ? Acc(0) : static_cast<Acc>(d.keep_scale);
}

/// Element d of a row after rotary embedding at `position`. `row` points to the row; values beyond rotary.dim, and
/// positions that the tables do not hold, pass unchanged.
template <class T>
FLASHCORE_HD typename Accumulator<T>::type rotated(const T* row, int d, std::int64_t position, const RotaryParams& r) {
  using Acc = typename Accumulator<T>::type;
  const Acc x = load(row[d]);
  if (d >= r.dim || position < 0 || position >= r.positions) return x;
  const int half = r.dim / 2;
  const int pair = r.interleaved ? d / 2 : d % half;
  const bool first = r.interleaved ? d % 2 == 0 : d < half;
  const int other = r.interleaved ? d ^ 1 : first ? d + half : d - half;
  const Acc cosine = load_as<Acc>(r.cos, r.dtype, position * r.cos_stride + pair);
  const Acc sine = load_as<Acc>(r.sin, r.dtype, position * r.sin_stride + pair);
  const Acc y = load(row[other]);
  return first ? x * cosine - y * sine : x * cosine + y * sine;
}

/// Position of query i for rotary embedding: the last query sits at the last key.
FLASHCORE_HD std::int64_t query_position(const Sequence& s, std::int64_t i) { return s.seqlen_k - s.seqlen_q + i; }

}  // namespace flashcore::detail
