// Masking of a block of scores in wgmma accumulators by position: the two rows of a thread keep keys [begin, end).
#pragma once

#include <cstdint>

namespace flashcore::tile {

/// Keys that row i may see, relative to key 0. Shared by the producer, which skips whole blocks, and the consumers.
struct KeyWindow {
  int seqlen_k;
  int shift;  // of the diagonal: seqlen_k − seqlen_q, or 0 where aligned top-left
  int left;   // −1: unbounded
  int right;  // −1: unbounded; 0 is the causal rule

  __device__ __forceinline__ int begin(int row) const { return left < 0 ? 0 : max(0, row + shift - left); }
  __device__ __forceinline__ int end(int row) const {
    return right < 0 ? seqlen_k : max(0, min(seqlen_k, row + shift + right + 1));
  }
};

/// Scores of keys outside the window become −inf. `first_key` is the block's, `row` the thread's first row (the second
/// is row + 8), `quad_lane` its lane in the quad.
template <int N>
__device__ __forceinline__ void mask_by_position(float (&s)[N], const KeyWindow& window, int first_key, int row,
                                                 int quad_lane) {
  const int origin = first_key + 2 * quad_lane;  // the comparisons below are against constants
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int end = window.end(row + 8 * r) - origin;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (8 * i + c >= end) s[4 * i + 2 * r + c] = -INFINITY;
    }
  }
  if (window.left < 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int begin = window.begin(row + 8 * r) - origin;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (8 * i + c < begin) s[4 * i + 2 * r + c] = -INFINITY;
    }
  }
}

}  // namespace flashcore::tile
