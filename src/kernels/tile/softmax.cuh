// Online softmax on wgmma accumulators: running maximum and sum of the two rows that a thread shares with its quad.
//
// Scores stay in raw units; weights are 2^((s − max)·scale_log2). The running maximum is lazy: it moves only when a
// score passes it by `threshold` (in raw units, worth 8 in the exponent), so that sums and outputs are seldom rescaled.
// That is exact, since sum and output share whatever maximum is used (idea: FlashAttention-4). The test comes before
// the shuffles: some thread's own maximum passes if and only if the row's does, so one vote saves the quad reduction.
#pragma once

#include <cstdint>

#include "../ptx/warp.cuh"

namespace flashcore::tile {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

struct OnlineSoftmax {
  float max[2] = {-INFINITY, -INFINITY};
  float offset[2] = {0, 0};      // −max·scale_log2, 0 while the row is empty
  float sum[2] = {0, 0};         // this thread's part
  float correction[2] = {1, 1};  // what the output must be scaled with if `moved`
  bool moved = false;

  /// Starts a row with a logit that has no value (a sink), in raw units.
  __device__ __forceinline__ void start_with(float logit, float scale_log2, bool counts_it) {
    for (int r = 0; r < 2; ++r) {
      max[r] = logit;
      offset[r] = -logit * scale_log2;
      sum[r] = counts_it ? 1.0f : 0.0f;
    }
  }

  /// Takes in a block of scores. Sets `moved` (the same in all lanes) and `correction`.
  template <int N>
  __device__ __forceinline__ void take_max(const float (&s)[N], float scale_log2, float threshold) {
    float even[2] = {-INFINITY, -INFINITY};
    float odd[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      float (&m)[2] = i & 1 ? odd : even;
      m[0] = fmaxf(m[0], fmaxf(s[4 * i], s[4 * i + 1]));
      m[1] = fmaxf(m[1], fmaxf(s[4 * i + 2], s[4 * i + 3]));
    }
    const float own[2] = {fmaxf(even[0], odd[0]), fmaxf(even[1], odd[1])};
    moved = __any_sync(kAllLanes, own[0] > max[0] + threshold || own[1] > max[1] + threshold);
    if (!moved) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float grown = quad_max(fmaxf(own[r], max[r]));
      const float safe = grown == -INFINITY ? 0.0f : grown;
      correction[r] = ptx::ex2((max[r] - safe) * scale_log2);
      sum[r] *= correction[r];
      max[r] = grown;
      offset[r] = -safe * scale_log2;
    }
  }

  /// Turns scores into weights and adds them up.
  template <int N>
  __device__ __forceinline__ void exponentiate(float (&s)[N], float scale_log2) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[4 * i + e] = ptx::ex2(fmaf(s[4 * i + e], scale_log2, offset[e >> 1]));
      sum[0] += s[4 * i] + s[4 * i + 1];
      sum[1] += s[4 * i + 2] + s[4 * i + 3];
    }
  }

  template <int N>
  __device__ __forceinline__ void rescale(float (&o)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) o[i] *= correction[i >> 1 & 1];
  }

  /// The end: `sum` becomes the row's, the return value is what the output of row r is scaled with.
  __device__ __forceinline__ float finish(int r) {
    sum[r] = quad_sum(sum[r]);
    return sum[r] > 0 || sum[r] != sum[r] ? 1.0f / sum[r] : 0.0f;
  }

  /// After finish.
  __device__ __forceinline__ float lse(int r, float scale_log2) const {
    return sum[r] > 0 || sum[r] != sum[r] ? (max[r] * scale_log2 + log2f(sum[r])) * kLn2 : -INFINITY;
  }
};

/// Accumulators to A-operand registers, rounded to T: element pairs in place, no shuffle.
template <class T, int N>
__device__ __forceinline__ void pack_weights(const float (&s)[N], std::uint32_t (&packed)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) packed[i] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
}

}  // namespace flashcore::tile
