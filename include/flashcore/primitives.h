// The small building blocks: element-wise addition and reductions.
#pragma once

#include "flashcore/tensor.h"

namespace flashcore {

/// out = a + b, element by element, rounded once to the dtype. NaN and infinities as IEEE 754 adds them: NaN + x and
/// ∞ − ∞ are NaN, and what is too large for the dtype becomes ∞.
///
/// a, b, out: one shape (any rank up to kMaxRank, any strides), one dtype of float16, bfloat16, float32, float64, one
/// device. `out` may be `a` or `b` itself, but must not overlap them in any other way.
/// Throws InvalidArgument or InvalidType; nothing is written then.
FLASHCORE_API void vector_add(const TensorView& a, const TensorView& b, const TensorView& out, Stream stream = nullptr);

enum class ReduceOp : std::uint8_t { sum, max, min, mean };

/// out = op over `axis` of x, or over all of x where `axis` is kAllAxes.
///
/// x: any rank, any strides, dtype float16, bfloat16, float32 or float64. out: the same dtype; x's shape without
/// `axis`, or rank 0 for kAllAxes. Sums and means accumulate in float32 (float64 for float64) and round once; the
/// order depends on sizes and strides alone: the same call gives the same bits again. A NaN in x makes its result NaN,
/// whatever `op` is; so do ∞ and −∞ in one sum. An empty reduction gives 0 for sum and NaN for mean; for max and min it
/// is an InvalidArgument. `axis` may be negative (counted from the end).
inline constexpr int kAllAxes = 0x7fffffff;
FLASHCORE_API void reduce(const TensorView& x, const TensorView& out, ReduceOp op, int axis = kAllAxes,
                          Stream stream = nullptr);

}  // namespace flashcore
