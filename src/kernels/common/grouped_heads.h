// Query heads that share keys, as further rows of one head: short queries then fill whole tiles (known as PackGQA).
#pragma once

#include <cstdint>

#include "../params.h"

namespace flashcore::detail {

/// Whether rows of the next head lie where rows behind the last one of this head would. `x`: strides, as TensorParams
/// or RowParams have them.
template <class Strides>
bool heads_follow_rows(const Strides& x, std::int64_t seqlen) {
  return x.head > 0 && (seqlen == 1 || x.head == seqlen * x.seq);
}

template <class Strides>
Strides as_rows(Strides x, std::int64_t seqlen, std::int64_t group) {
  if (seqlen == 1) x.seq = x.head;
  x.head *= group;
  return x;
}

/// The same call with all query heads of a key head as one head of group · seqlen_q rows, where memory allows that and
/// blocks of `block_m` rows are done in fewer rounds on so many multiprocessors; else `p` as it is. For calls whose
/// queries all see every key, since a row no longer tells its position.
inline Params with_heads_as_rows(const Params& p, int block_m, int multiprocessors) {
  constexpr std::int64_t kMaxRows = 1 << 30;
  const SizeParams& size = p.size;
  const std::int64_t group = size.heads_k > 0 ? size.heads_q / size.heads_k : 1;
  const std::int64_t seqlen = size.seqlen_q;
  if (group == 1 || seqlen == 0 || seqlen * group > kMaxRows || p.sinks.data) return p;
  if (!heads_follow_rows(p.q, seqlen) || !heads_follow_rows(p.out, seqlen)) return p;
  if (p.lse.data && !heads_follow_rows(p.lse, seqlen)) return p;
  const auto rounds = [&](std::int64_t heads, std::int64_t rows) {
    const std::int64_t tiles = (rows + block_m - 1) / block_m * heads * size.batch;
    return (tiles + multiprocessors - 1) / multiprocessors;
  };
  if (rounds(size.heads_k, seqlen * group) >= rounds(size.heads_q, seqlen)) return p;
  Params packed = p;
  packed.size.seqlen_q = seqlen * group;
  packed.size.total_q = packed.size.seqlen_q * size.batch;
  packed.size.heads_q = size.heads_k;
  packed.q = as_rows(p.q, seqlen, group);
  packed.out = as_rows(p.out, seqlen, group);
  packed.lse = as_rows(p.lse, seqlen, group);
  return packed;
}

}  // namespace flashcore::detail
