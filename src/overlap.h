// Overlap: whether two views share memory, or one view shares memory with itself.
#pragma once

#include "flashcore/tensor.h"

namespace flashcore::detail {

/// True if some byte belongs to both. Exact for the layouts that programs use, interleaved slices of one buffer
/// among them; true in doubt. Empty tensors overlap nothing.
bool may_overlap(const TensorView& a, const TensorView& b);

/// True if two elements of the tensor share a byte. Exact in the same sense.
bool overlaps_itself(const TensorView& t);

/// True if both are the same elements at the same addresses: what "in place" means.
bool is_same_view(const TensorView& a, const TensorView& b);

}  // namespace flashcore::detail
