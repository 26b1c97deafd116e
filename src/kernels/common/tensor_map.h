// Tensor maps: how the copy engine is told where a strided tensor lies.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../params.h"

namespace flashcore::detail {

/// A map over (dim, seq, heads, batch) of a 16-bit tensor, read in boxes of 64 columns × `box_rows` rows with 128-byte
/// swizzle. What lies outside reads as zero and is not written.
struct TensorMap {
  CUtensorMap map;
  int batch_step = 1;  // 0 where the tensor is broadcast (stride 0): multiply the coordinate with it
  int head_step = 1;
};

struct MapShape {
  std::int64_t dim;
  std::int64_t seq;
  std::int64_t heads;
  std::int64_t batch;
};

/// Throws CudaError where the driver refuses. The driver is asked only for what this thread has not asked lately.
TensorMap make_tensor_map(const TensorParams& tensor, DType dtype, const MapShape& shape, int box_rows);

}  // namespace flashcore::detail
