// Which output tile comes when. Tiles are (query block, head of some batch). Heads are cut into sections whose keys
// and values fit in the L2 cache together; inside a section the longest tiles come first. Where lengths grow with the
// query, rows may come by octaves of their length, so that the long tiles of all sections are done before the short
// ones. Blocks may draw tiles from a counter.
#pragma once

#include <atomic>

namespace flashcore::tile {

/// A counter from which the blocks of one launch draw tiles, in memory that nobody has zeroed: a memset would be a node
/// of its own in front of the kernel (1.2 us). The launch's tag marks the count as its own, so blocks that come before
/// block 0 has opened it try again; the last block to leave clears the tag, since a captured launch is replayed with
/// the same one.
struct TileCounter {
  unsigned long long* word;  // tag | blocks that have left | next tile; null: no counter
  unsigned tag;              // below 2^kTagBits, never 0

  static constexpr int kTileBits = 28;
  static constexpr int kBlockBits = 12;
  static constexpr int kTagBits = 24;
  static constexpr int kMost = (1 << kTileBits) - (1 << kBlockBits);  // tiles: each block draws one more

  __device__ __forceinline__ void open(int next) const {
    atomicExch(word, static_cast<unsigned long long>(tag) << (kTileBits + kBlockBits) | static_cast<unsigned>(next));
  }
  __device__ __forceinline__ int draw() const { return static_cast<int>(add(1) & ((1u << kTileBits) - 1)); }
  /// Once by each block, when it is done: whether it is the last.
  __device__ __forceinline__ bool leave(int blocks) const {
    const unsigned long long left = add(1ull << kTileBits) >> kTileBits & ((1u << kBlockBits) - 1);
    const bool last = static_cast<int>(left) == blocks - 1;
    if (last) atomicExch(word, 0ull);
    return last;
  }

 private:
  __device__ __forceinline__ unsigned long long add(unsigned long long what) const {
    for (;;) {
      const unsigned long long old = atomicAdd(word, what);
      if (old >> (kTileBits + kBlockBits) == tag) return old;
      __nanosleep(100);
    }
  }
};

/// For each launch another, until they come round.
inline unsigned new_tag() {
  static std::atomic<unsigned> launches{0};
  constexpr unsigned kTags = (1u << TileCounter::kTagBits) - 1;
  return launches.fetch_add(1, std::memory_order_relaxed) % kTags + 1;
}

struct TileOrder {
  int m_blocks;       // query blocks per head
  int heads;          // heads · batch
  int section_heads;  // heads per section
  int tiles;          // m_blocks · heads
};

struct Tile {
  int m_block;
  int head;  // counts through all batches: batch · heads_q + head
};

__device__ __forceinline__ Tile tile_at(const TileOrder& order, int index) {
  const int per_section = order.section_heads * order.m_blocks;
  const int section = index / per_section;
  const int rest = index - section * per_section;
  const int first_head = section * order.section_heads;
  const int heads = min(order.section_heads, order.heads - first_head);
  const int row = rest / heads;
  return {order.m_blocks - 1 - row, first_head + rest - row * heads};
}

/// The same, but first the longer half of all heads' rows, then the half of the rest, in sections of twice as many
/// heads, since shorter rows see fewer keys, and so on.
__device__ __forceinline__ Tile tile_by_octaves(TileOrder order, int index) {
  int shorter = order.m_blocks / 2;  // rows that later octaves have
  for (int tiles; index >= (tiles = (order.m_blocks - shorter) * order.heads); index -= tiles) {
    order.m_blocks = shorter;
    order.section_heads = min(2 * order.section_heads, order.heads);
    shorter /= 2;
  }
  order.m_blocks -= shorter;
  Tile tile = tile_at(order, index);
  tile.m_block += shorter;
  return tile;
}

}  // namespace flashcore::tile
