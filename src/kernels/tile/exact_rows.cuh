// A query row done by one warp, touching only the keys that it sees.
#pragma once

#include <cstdint>

#include "../semantics.h"
#include "softmax.cuh"

namespace flashcore::tile {

template <class T>
__device__ __forceinline__ float exact_score(const detail::Params& p, const detail::Sequence& s, int head, int i, int j,
                                             float scale, float slope) {
  const int head_k = head / (p.size.heads_q / p.size.heads_k);
  const T* q = static_cast<const T*>(p.q.data) + detail::q_offset(p.q, s, head, i);
  const T* k = static_cast<const T*>(p.k.data) + detail::k_offset(p, p.k, s, head_k, j);
  float product = 0;
  for (int d = 0; d < p.size.head_dim; ++d) product += detail::load(q[d]) * detail::load(k[d]);
  return detail::score_of(p, s, head, i, j, product, scale, slope).value;
}

/// out and lse of query i, by all 32 lanes of a warp.
template <class T, int kMaxHeadDim>
__device__ void exact_row(const detail::Params& p, int batch, int head, int i) {
  constexpr int kColumns = (kMaxHeadDim + 31) / 32;  // output columns per lane: lane, lane + 32, …
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const detail::Sequence s = detail::sequence_of(p, batch);
  const detail::KeyRange keys = detail::visible_keys(p.position, s, i);
  const int head_k = head / (p.size.heads_q / p.size.heads_k);
  const float scale = static_cast<float>(p.score.scale);
  const float slope = detail::head_value<float>(p.alibi, batch, head, 0.0f);
  float max = p.sinks.data ? detail::head_value<float>(p.sinks, batch, head, 0.0f) : -INFINITY;
  float sum = p.sinks.data ? 1.0f : 0.0f;
  bool any = false;  // a row that sees no key is empty, whatever its sink
  float out[kColumns] = {};
  for (int first = static_cast<int>(keys.begin); first < keys.end; first += 32) {
    const int j = first + lane;
    const bool seen = j < keys.end && detail::kept_by_mask(p.mask, s, head, i, j);
    const float score = seen ? exact_score<T>(p, s, head, i, j, scale, slope) : -INFINITY;
    float grown = score;
    for (int lanes = 16; lanes > 0; lanes /= 2) grown = fmaxf(grown, __shfl_xor_sync(kAllLanes, grown, lanes));
    grown = fmaxf(grown, max);
    const float correction = grown == -INFINITY ? 1.0f : expf(max - grown);
    const float weight = seen ? expf(score - grown) : 0.0f;
    max = grown;
    sum *= correction;
    for (float& x : out) x *= correction;
    unsigned visible = __ballot_sync(kAllLanes, seen && score != -INFINITY);  // a bias of −inf excludes as well
    any = any || visible != 0;
    while (visible) {
      const int source = __ffs(static_cast<int>(visible)) - 1;
      visible &= visible - 1;
      const float w = __shfl_sync(kAllLanes, weight, source);
      const T* v = static_cast<const T*>(p.v.data) + detail::k_offset(p, p.v, s, head_k, first + source);
      sum += w;
      for (int c = 0; c < kColumns; ++c)
        if (lane + 32 * c < p.size.head_dim_v) out[c] += w * detail::load(v[lane + 32 * c]);
    }
  }
  T* target = static_cast<T*>(p.out.data) + detail::q_offset(p.out, s, head, i);
  for (int c = 0; c < kColumns; ++c)
    if (lane + 32 * c < p.size.head_dim_v)
      detail::store(target[lane + 32 * c], sum > 0 || sum != sum ? out[c] / sum : 0.0f);
  if (lane == 0 && p.lse.data)
    static_cast<float*>(p.lse.data)[detail::row_offset(p.lse, s, head, i)] =
        any && (sum > 0 || sum != sum) ? max + logf(sum) : -INFINITY;
}

}  // namespace flashcore::tile
