// WorkspaceLayout: slices of one allocation are aligned, in order, and apart.
#include "workspace.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace flashcore {
namespace {

using detail::WorkspaceLayout;

TEST(WorkspaceLayout, IsEmptyAtFirst) { EXPECT_EQ(WorkspaceLayout().bytes(), 0u); }

TEST(WorkspaceLayout, SlicesAreAlignedAndDoNotOverlap) {
  const std::vector<std::size_t> sizes = {1, 256, 257, 0, 1000, 4096, 255};
  WorkspaceLayout layout;
  std::size_t end = 0;
  for (const std::size_t bytes : sizes) {
    const std::size_t offset = layout.add(bytes);
    EXPECT_EQ(offset % WorkspaceLayout::kAlignment, 0u);
    EXPECT_GE(offset, end);
    end = offset + bytes;
    EXPECT_GE(layout.bytes(), end);
  }
  EXPECT_EQ(layout.bytes() % WorkspaceLayout::kAlignment, 0u);
}

TEST(WorkspaceLayout, ASliceOfNoBytesTakesNoRoom) {
  WorkspaceLayout layout;
  layout.add(300);
  const std::size_t before = layout.bytes();
  layout.add(0);
  EXPECT_EQ(layout.bytes(), before);
}

TEST(WorkspaceLayout, SliceIsTheStartPlusTheOffset) {
  alignas(256) unsigned char memory[1024];
  WorkspaceLayout layout;
  layout.add(10);
  const std::size_t offset = layout.add(10);
  EXPECT_EQ(reinterpret_cast<unsigned char*>(detail::slice<float>(memory, offset)), memory + offset);
}

}  // namespace
}  // namespace flashcore
