// Walking arrays of any rank: axes that can be walked as one become one, and an index becomes an offset.
#pragma once

#include <cstdint>

#include "../numbers.h"
#include "../params.h"

namespace flashcore::common {

/// The offset of element `index`, counted in row-major order.
FLASHCORE_HD std::int64_t offset_of(const detail::ArrayParams& a, std::int64_t index) {
  std::int64_t offset = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 1  // a division of 64 bits is long, and most arrays have no second axis
#endif
  for (int axis = a.rank - 1; axis > 0; --axis) {
    const std::int64_t rest = index / a.shape[axis];
    offset += (index - rest * a.shape[axis]) * a.stride[axis];
    index = rest;
  }
  return a.rank > 0 ? offset + index * a.stride[0] : 0;
}

inline std::int64_t element_count(const detail::ArrayParams& a) {
  std::int64_t count = 1;
  for (int axis = 0; axis < a.rank; ++axis) count *= a.shape[axis];
  return count;
}

/// Joins neighbouring axes of arrays of one shape wherever all of them allow it, and drops axes of size 1: dense arrays
/// come out with rank 1 and stride 1, or rank 0.
template <int kArrays>
void collapse(detail::ArrayParams* const (&arrays)[kArrays]) {
  int rank = 0;
  for (int axis = 0; axis < arrays[0]->rank; ++axis) {
    const std::int64_t size = arrays[0]->shape[axis];
    if (size == 1) continue;
    bool joins = rank > 0;
    for (const detail::ArrayParams* a : arrays) joins = joins && a->stride[rank - 1] == size * a->stride[axis];
    if (!joins) ++rank;
    for (detail::ArrayParams* a : arrays) {
      a->shape[rank - 1] = joins ? a->shape[rank - 1] * size : size;
      a->stride[rank - 1] = a->stride[axis];
    }
  }
  for (detail::ArrayParams* a : arrays) a->rank = rank;
}

}  // namespace flashcore::common
