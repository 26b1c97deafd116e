// QueryBlock: up to kBlockQueries queries of a head, and their running softmax.
//
// The running maximum is replaced only when a score exceeds it by 2^16: floats lose nothing by that, and most tiles
// need no rescaling.
#pragma once

#include "score_rules.h"
#include "softmax.h"

namespace flashcore::cpu {
namespace {

constexpr float kSlack = 16.f;  // log2 of how far a score may exceed the running maximum

struct QueryBlock {
  VecF max[kTileVectors];  // in units of log 2
  VecF sum[kTileVectors];
  void* q;     // as the engine wants them
  float* out;  // (head_dim_v, width), not yet divided by the sum
  std::int64_t head;
  std::int64_t first;
  detail::KeyRange keys;  // seen by any of its queries
  int queries;
  int vectors;
  bool started;  // whether `out` holds something
  bool finite;   // whether q does, as far as the engine asked
};

/// Where `top`, above the running maximum, is too far above it, or where there is none yet.
FLASHCORE_INLINE VecI to_raise(const QueryBlock& b, int n, VecF top) {
  return (top > kSlack) | (b.max[n] == -kInfinity);
}
FLASHCORE_INLINE bool needs_raise(const QueryBlock& b, const VecF* top) {
  VecI any{};
  for (int n = 0; n < b.vectors; ++n) any |= to_raise(b, n, top[n]);
  return any_lane(any);
}

/// Takes maxima, which stand `offset` above what they are, into the running ones. `offset` becomes what is to be added
/// to the scores, `correction` what the sums so far are multiplied with.
FLASHCORE_INLINE void raise_max(QueryBlock& b, VecF* offset, const VecF* top, VecF* correction) {
  for (int n = 0; n < b.vectors; ++n) {
    const VecF max = max_of(b.max[n], top[n] - offset[n]);
    const VecF safe = max > -kInfinity ? max : VecF{};  // −inf − −inf would be NaN
    correction[n] = exp2(b.max[n] - safe);
    offset[n] = -safe - offset[n];
    b.max[n] = max;
    b.sum[n] *= correction[n];
  }
}

/// A tile of changed scores becomes its weights. `correction` becomes what sums before it are multiplied with.
FLASHCORE_INLINE void weigh_changed_scores(QueryBlock& b, const ScoreTile& t, VecF* correction) {
  VecF top[kTileVectors];
  VecF offset[kTileVectors] = {};
  find_max(t, top);
  raise_max(b, offset, top, correction);
  exponentiate<true>(t, offset, b.sum);
}

/// out, where nothing is yet, becomes 0; elsewhere it is multiplied with `correction`, if given.
FLASHCORE_INLINE void scale_out(QueryBlock& b, int head_dim_v, const VecF* correction) {
  const std::int64_t width = b.vectors * kLanes;
  if (!b.started) {
    std::memset(b.out, 0, static_cast<std::size_t>(width * head_dim_v) * sizeof(float));
  } else if (correction) {
    for (int d = 0; d < head_dim_v; ++d)
      for (int n = 0; n < b.vectors; ++n) {
        float* at = b.out + d * width + n * kLanes;
        store(at, load(at) * correction[n]);
      }
  }
}

}  // namespace
}  // namespace flashcore::cpu
