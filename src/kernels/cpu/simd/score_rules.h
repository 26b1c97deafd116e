// ScoreRules: what a call does to the scores of a tile, and which tiles it needs at all.
#pragma once

#include "score.h"

namespace flashcore::cpu {
namespace {

constexpr int kBlockKeys = 128;
constexpr int kMostTileKeys = 256;  // of any engine's tiles
constexpr int kBlockQueries = kLanes * kTileVectors;

/// Vectors [begin, end) of block `index` of a sequence's queries: three, but 2 + 2 at the end instead of 3 + 1.
struct VectorRange {
  std::int64_t begin;
  std::int64_t end;
};
FLASHCORE_INLINE VectorRange vectors_of_block(std::int64_t index, std::int64_t seqlen_q) {
  const std::int64_t vectors = (seqlen_q + kLanes - 1) / kLanes;
  const std::int64_t blocks = (vectors + kTileVectors - 1) / kTileVectors;
  const bool uneven = blocks > 1 && vectors % kTileVectors == 1;
  const std::int64_t begin = index * kTileVectors - (uneven && index == blocks - 1);
  const std::int64_t end = (index + 1) * kTileVectors - (uneven && index == blocks - 2);
  return {begin, min_of(end, vectors)};
}

class ScoreRules {
 public:
  /// `plane` has room for a tile. `mask_extents` as in ForwardTask.
  ScoreRules(const detail::Params& p, const detail::Sequence& s, float* plane, std::uint8_t* mask_extents)
      : p_(p), s_(s), plane_(plane), mask_extents_(mask_extents) {
    constexpr std::int64_t kFar = std::int64_t{1} << 60;
    const std::int64_t shift = p.position.top_left ? 0 : s.seqlen_k - s.seqlen_q;
    high_ = p.position.causal ? shift : kFar;
    if (p.position.window_right >= 0) high_ = min_of(high_, shift + p.position.window_right);
    low_ = p.position.window_left >= 0 ? shift - p.position.window_left : -kFar;
    changes_all_ = p.score.softcap > 0 || p.alibi.data || p.bias.data;
  }

  /// What queries are multiplied with, so that scores come out in units of log 2, or as the argument of tanh.
  float query_scale() const {
    constexpr double kUnit = 1.44269504088896341;
    return static_cast<float>(p_.score.scale * (p_.score.softcap > 0 ? 1 / p_.score.softcap : kUnit));
  }

  /// Whether scores of a tile are changed by more than exclusion by position, so that it has to start at 0.
  bool changes_scores(Extent extent) const { return changes_all_ || extent == Extent::part; }

  /// Keys that some query of [first, first + count) sees by position.
  detail::KeyRange keys_of(std::int64_t first, int count) const {
    return {max_of<std::int64_t>(0, first + low_), min_of(s_.seqlen_k, first + count + high_)};
  }

  /// Whether some query of the tile does not see some key by position.
  bool has_edges(const ScoreTile& t) const {
    return t.first_key - (t.first_query + t.queries - 1) < low_ || t.first_key + t.keys - 1 - t.first_query > high_;
  }
  void exclude_by_position(const ScoreTile& t) const { keep_band(t, low_, high_); }

  /// What the mask leaves of a tile. Blocks of keys at the tile's ends of which it leaves nothing are cut off.
  Extent cut_to_mask(ScoreTile& t, std::int64_t head) const {
    if (!p_.mask.data) return Extent::everything;
    const std::int64_t end = t.first_key + t.keys;
    std::int64_t seen_begin = end;
    std::int64_t seen_end = t.first_key;
    std::int64_t wholly_seen = 0;
    for (std::int64_t first = t.first_key; first < end;) {
      const std::int64_t next = min_of(end, (first / kBlockKeys + 1) * kBlockKeys);
      ScoreTile block = t;
      block.first_key = first;
      block.keys = static_cast<int>(next - first);
      const Extent extent = extent_of_block(block, head);
      if (extent != Extent::nothing) {
        seen_begin = min_of(seen_begin, first);
        seen_end = next;
      }
      if (extent == Extent::everything) wholly_seen += block.keys;
      first = next;
    }
    if (seen_begin >= seen_end) return Extent::nothing;
    t.first_key = seen_begin;
    t.keys = static_cast<int>(seen_end - seen_begin);
    return wholly_seen == t.keys ? Extent::everything : Extent::part;
  }

  /// Softcap, ALiBi, bias, mask. `slope`, if given, becomes a tile of the softcap's slopes.
  void change_scores(const ScoreTile& t, std::int64_t head, Extent extent, float* slope = nullptr) const {
    if (p_.score.softcap > 0) cap_scores(t, static_cast<float>(p_.score.softcap) * kLog2E, slope);
    if (p_.alibi.data) {
      const float alibi = detail::head_value<float>(p_.alibi, s_.batch, head, 0.f);
      add_alibi(t, alibi * kLog2E, t.first_query + s_.seqlen_k - s_.seqlen_q - t.first_key);
    }
    if (p_.bias.data) {
      load_plane(p_.bias, s_, head, t, plane_);
      add_bias(t, plane_);
    }
    if (extent == Extent::part) {
      load_plane(p_.mask, s_, head, t, plane_);
      keep_where(t, plane_);
    }
  }

 private:
  /// What the mask leaves of keys of one block. All of them, of a mask that heads share, are looked at by the first to
  /// come.
  Extent extent_of_block(const ScoreTile& t, std::int64_t head) const {
    const bool whole =
        t.first_key % kBlockKeys == 0 && t.keys == min_of<std::int64_t>(kBlockKeys, s_.seqlen_k - t.first_key);
    if (!mask_extents_ || !whole) return mask_extent(p_.mask, s_, head, t);
    constexpr std::uint8_t kSeen = 4;
    const std::int64_t block = (t.first_query + kBlockQueries - 1) / kBlockQueries;  // the last may begin earlier
    const std::int64_t key_blocks = (s_.seqlen_k + kBlockKeys - 1) / kBlockKeys;
    std::uint8_t* entry = mask_extents_ + block * key_blocks + t.first_key / kBlockKeys;
    // Note: threads that come at the same time write the same.
    const std::uint8_t known = __atomic_load_n(entry, __ATOMIC_RELAXED);
    if (known & kSeen) return static_cast<Extent>(known & ~kSeen);
    const Extent found = mask_extent(p_.mask, s_, head, t);
    __atomic_store_n(entry, static_cast<std::uint8_t>(kSeen | static_cast<std::uint8_t>(found)), __ATOMIC_RELAXED);
    return found;
  }

  const detail::Params& p_;
  const detail::Sequence& s_;
  float* const plane_;  // the mask's or bias's part of a tile
  std::uint8_t* const mask_extents_;
  std::int64_t low_;  // query i sees key j where low ≤ j − i ≤ high
  std::int64_t high_;
  bool changes_all_;  // the scores of any tile
};

/// tile = the products of a block's queries with a tile's keys, started from `offset`; `top` is raised to the largest.
FLASHCORE_INLINE void multiply_rows(const ScoreTile& t, const KeyRows& rows, int dim, const float* columns,
                                    const VecF* offset, VecF* top, const char* prefetch) {
  Product p;
  p.m = t.keys;
  p.k = dim;
  p.a = rows.data;
  p.lda = rows.stride;
  p.b = columns;
  p.c = t.data;
  p.start = offset;
  p.max = top;
  p.prefetch = prefetch;
  if (rows.stride == 64)
    multiply_dense<false, Start::given, true, 64>(t.vectors, p);
  else if (rows.stride == 128)
    multiply_dense<false, Start::given, true, 128>(t.vectors, p);
  else
    multiply_dense<false, Start::given, true>(t.vectors, p);
}

}  // namespace
}  // namespace flashcore::cpu
