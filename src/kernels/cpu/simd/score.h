// Scores: the product of keys and queries as a tile with queries in the lanes, and everything that may change a score.
#pragma once

#include "pack.h"
#include "product.h"

namespace flashcore::cpu {
namespace {

/// Scores of `keys` keys (rows) and up to kTileVectors vectors of queries (lanes), in units of log 2.
struct ScoreTile {
  float* data;
  int vectors;
  int keys;
  std::int64_t first_key;
  std::int64_t first_query;
  int queries;  // lanes behind these belong to nobody

  FLASHCORE_INLINE int width() const { return vectors * kLanes; }
  FLASHCORE_INLINE float* row(int j) const { return data + j * width(); }
};

/// What the mask leaves of a tile.
enum class Extent : std::uint8_t { nothing, part, everything };

/// Replaces every vector x of the tile, in row j and vector n, by change(x, j, n).
template <class Change>
FLASHCORE_INLINE void change_scores(const ScoreTile& t, Change&& change) {
  for (int j = 0; j < t.keys; ++j)
    for (int n = 0; n < t.vectors; ++n) {
      float* at = t.row(j) + n * kLanes;
      store(at, change(load(at), j, n));
    }
}

/// tanh to about 1e-7: a polynomial where the formula with 2^x would cancel (Cephes' tanhf has the same two ranges).
FLASHCORE_INLINE VecF tanh_of(VecF x) {
  const VecF magnitude = x < 0.f ? -x : x;
  const VecF t = exp2(magnitude * (-2.f * kLog2E));
  const VecF large = (1.f - t) / (1.f + t);
  const VecF z = x * x;
  VecF p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const VecF small = p * z * x + x;
  return magnitude < 0.625f ? small : x < 0.f ? -large : large;
}

/// x = cap · tanh(x); `slope`, if given, becomes the derivative of the capped score by the score before.
__attribute__((noinline)) void cap_scores(const ScoreTile& t, float cap, float* slope) {
  change_scores(t, [&](VecF x, int j, int n) {
    const VecF capped = tanh_of(x);
    if (slope) store(slope + j * t.width() + n * kLanes, 1.f - capped * capped);
    return capped * cap;
  });
}

/// −slope · |distance|, where `corner` is the distance of the tile's first query and key.
__attribute__((noinline)) void add_alibi(const ScoreTile& t, float slope, std::int64_t corner) {
  const VecF lanes = __builtin_convertvector(lane_numbers(), VecF);
  change_scores(t, [&](VecF x, int j, int n) {
    const VecF distance = lanes + static_cast<float>(corner - j + n * kLanes);
    return x - slope * (distance < 0.f ? -distance : distance);
  });
}

/// An element as a float.
FLASHCORE_INLINE float number(std::uint8_t x) { return x; }
template <class T>
FLASHCORE_INLINE float number(T x) {
  return detail::load(x);
}

/// The part of a mask or bias that belongs to a tile, as floats.
__attribute__((noinline)) void load_plane(const detail::PlaneParams& plane, const detail::Sequence& s,
                                          std::int64_t head, const ScoreTile& t, float* tile) {
  const std::int64_t offset = detail::plane_offset(plane, s.batch, head, t.first_query, t.first_key);
  if (plane.key == 1) {
    return with_plane_storage(plane.dtype, [&](auto storage) {
      using T = decltype(storage);
      pack_transposed<T>({static_cast<const T*>(plane.data) + offset, plane.query, t.queries, t.keys}, 1.f, t.vectors,
                         t.width(), tile);
    });
  }
  with_plane_storage(plane.dtype, [&](auto storage) {
    using T = decltype(storage);
    const T* data = static_cast<const T*>(plane.data) + offset;
    for (int j = 0; j < t.keys; ++j)
      for (int i = 0; i < t.width(); ++i) {
        float& x = tile[j * t.width() + i];
        x = i >= t.queries ? 0.f : number(data[i * plane.query + j * plane.key]);
      }
  });
}

/// Biases in units of log 2. What is finite stays so: a row of nothing but the lowest number is not an empty row.
FLASHCORE_INLINE VecF bias_in_log2(VecF bias) {
  constexpr float kMost = __FLT_MAX__;
  const VecF x = bias * kLog2E;
  const VecF finite = x < -kMost ? broadcast(-kMost) : x > kMost ? broadcast(kMost) : x;
  return ((bias == -kInfinity) | (bias == kInfinity)) ? bias : finite;
}

__attribute__((noinline)) void add_bias(const ScoreTile& t, const float* plane) {
  change_scores(t, [&](VecF x, int j, int n) { return x + bias_in_log2(load(plane + j * t.width() + n * kLanes)); });
}

__attribute__((noinline)) void keep_where(const ScoreTile& t, const float* plane) {
  change_scores(t, [&](VecF x, int j, int n) {
    return load(plane + j * t.width() + n * kLanes) != 0.f ? x : broadcast(-kInfinity);
  });
}

/// Excludes what lies outside low ≤ key − query ≤ high.
__attribute__((noinline)) void keep_band(const ScoreTile& t, std::int64_t low, std::int64_t high) {
  constexpr std::int64_t kFar = 1 << 28;  // beyond any tile
  const std::int64_t corner = t.first_key - t.first_query;
  const VecI lowest = broadcast(static_cast<std::int32_t>(detail::clamped(low - corner, -kFar, kFar)));
  const VecI highest = broadcast(static_cast<std::int32_t>(detail::clamped(high - corner, -kFar, kFar)));
  const VecI lanes = lane_numbers();
  change_scores(t, [&](VecF x, int j, int n) {
    const VecI distance = (j - n * kLanes) - lanes;
    return ((distance < lowest) | (distance > highest)) ? broadcast(-kInfinity) : x;
  });
}

/// Excludes whole keys.
void drop_keys(const ScoreTile& t, const bool* missing) {
  for (int j = 0; j < t.keys; ++j)
    for (int n = 0; missing[j] && n < t.vectors; ++n) store(t.row(j) + n * kLanes, broadcast(-kInfinity));
}

/// max[n] = the largest score of each query.
FLASHCORE_INLINE void find_max(const ScoreTile& t, VecF* max) {
  for (int n = 0; n < t.vectors; ++n) {
    VecF top = broadcast(-kInfinity);
    for (int j = 0; j < t.keys; ++j) top = max_of(load(t.row(j) + n * kLanes), top);
    max[n] = top;
  }
}

/// How many of the tile's queries and keys the mask keeps.
__attribute__((noinline)) Extent mask_extent(const detail::PlaneParams& mask, const detail::Sequence& s,
                                             std::int64_t head, const ScoreTile& t) {
  const std::uint8_t* first = static_cast<const std::uint8_t*>(mask.data) +
                              detail::plane_offset(mask, s.batch, head, t.first_query, t.first_key);
  const int queries = mask.query == 0 ? 1 : t.queries;
  constexpr int kBytes = kLanes * 4;
  bool any = false;
  bool all = true;
  for (int i = 0; i < queries && (all || !any); ++i) {
    const std::uint8_t* row = first + i * mask.query;
    int j = 0;
    if (mask.key == 1) {
      VecBytes ones{};
      VecBytes zeros{};
      for (; j + kBytes <= t.keys; j += kBytes) {
        const VecBytes kept = *reinterpret_cast<const UnalignedBytes*>(row + j);
        ones |= kept;
        zeros |= reinterpret_cast<VecBytes>(kept == 0);
      }
      any |= any_lane(reinterpret_cast<VecI>(ones) != 0);
      all &= !any_lane(reinterpret_cast<VecI>(zeros) != 0);
    }
    for (; j < t.keys; ++j) {
      const bool kept = row[j * mask.key] != 0;
      any |= kept;
      all &= kept;
    }
  }
  return all ? Extent::everything : any ? Extent::part : Extent::nothing;
}

}  // namespace
}  // namespace flashcore::cpu
