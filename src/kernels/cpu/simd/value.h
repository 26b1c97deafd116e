// Values: the transposed output O^T = start + V^T·P^T of one tile of weights.
#pragma once

#include "keys.h"
#include "softmax.h"

namespace flashcore::cpu {
namespace {

/// O^T (head_dim_v rows, as wide as the tile) starts as kStart says; then each weight adds its value.
template <Start kStart>
FLASHCORE_INLINE void add_values(const ScoreTile& weights, const KeyRows& v, int head_dim_v, float* out,
                                 const VecF* start, const char* prefetch) {
  Product p;
  p.m = head_dim_v;
  p.k = weights.keys;
  p.a = v.data;
  p.lda = v.stride;
  p.b = weights.data;
  p.c = out;
  p.start = start;
  p.prefetch = prefetch;
  multiply_dense<true, kStart, false>(weights.vectors, p);
}

/// The same, slowly, for values with NaN or Inf: where a weight is 0 the value is not multiplied.
__attribute__((noinline)) void add_values_with_weight(const ScoreTile& weights, const KeyRows& v, int head_dim_v,
                                                      float* out) {
  for (int d = 0; d < head_dim_v; ++d)
    for (int n = 0; n < weights.vectors; ++n) {
      float* at = out + d * weights.width() + n * kLanes;
      VecF sum = load(at);
      for (int j = 0; j < weights.keys; ++j) {
        const VecF weight = load(weights.row(j) + n * kLanes);
        sum = multiply_add(weight, weight != 0.f ? broadcast(v.data[j * v.stride + d]) : VecF{}, sum);
      }
      store(at, sum);
    }
}

}  // namespace
}  // namespace flashcore::cpu
