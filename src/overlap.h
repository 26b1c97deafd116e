// Overlap: whether two views share memory, or one view shares memory with itself.
#pragma once

#include <cstdint>

#include "flashcore/tensor.h"

namespace flashcore::detail {

/// The addresses from a view's lowest byte to one past its highest; begin == end for an empty one.
struct ByteRange {
  std::int64_t begin;
  std::int64_t end;
};

/// Where a view lies; everywhere, if its strides reach farther than any address.
ByteRange byte_range(const TensorView& t);

/// False where no byte can belong to both: the cheap question to ask before `may_overlap`.
inline bool meet(ByteRange a, ByteRange b) { return a.begin < b.end && b.begin < a.end; }

/// True if some byte belongs to both. Exact for the layouts that programs use, interleaved slices of one buffer
/// among them; true in doubt. Empty tensors overlap nothing.
bool may_overlap(const TensorView& a, const TensorView& b);

/// True if two elements of the tensor share a byte. Exact in the same sense.
bool overlaps_itself(const TensorView& t);

/// True if both are the same elements at the same addresses: what "in place" means.
bool is_same_view(const TensorView& a, const TensorView& b);

}  // namespace flashcore::detail
