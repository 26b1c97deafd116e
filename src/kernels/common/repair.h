// Repair: rows that a fast kernel may have spoilt are done again, exactly.
//
// A matrix product multiplies excluded keys with weight 0, and 0 · NaN is NaN: a NaN or Inf in the value of a key that
// a mask or the causal rule excludes for some rows of a tile would reach them. The fast kernels therefore leave a flag
// for each 16 rows of output that ended non-finite, and this kernel, queued behind them, recomputes those rows over the
// keys that they see. Rows that really see a NaN keep it. Without flags it costs one short launch.
#pragma once

#include <cstdint>

#include "../params.h"

namespace flashcore::detail {

/// `spoilt`: a byte for each 16 rows, laid out [batch · head][groups], every one written by the kernel before. Works on
/// float16 and bfloat16 forward problems of fixed length.
void repair_spoilt_rows(const Params& params, const std::uint8_t* spoilt, std::int64_t groups, Stream stream);

}  // namespace flashcore::detail
