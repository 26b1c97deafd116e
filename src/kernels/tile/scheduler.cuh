// Which output tile comes when. Tiles are (query block, head of some batch). Heads are cut into sections whose keys and
// values fit in the L2 cache together; inside a section the longest tiles come first.
#pragma once

namespace flashcore::tile {

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

}  // namespace flashcore::tile
