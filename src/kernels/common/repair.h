// Repair: rows that a fast kernel may have spoilt are done again, exactly.
//
// A matrix product multiplies excluded keys with weight 0, and 0 · NaN is NaN: a NaN or Inf in the value of a key that
// a mask or the causal rule excludes for some rows of a tile would reach them. The fast kernels therefore leave a flag
// for each 16 rows of output that ended non-finite, and when all are done those rows are computed again over the keys
// that they see: by the last block of the kernel itself (repair.cuh), or by a kernel behind it. Rows that really see a
// NaN keep it.
#pragma once

#include <cstdint>

#include "../numbers.h"
#include "../params.h"

namespace flashcore::detail {

inline constexpr int kSpoiltRows = 16;  // of one sequence and head, that share a flag

/// The fewest flags of a head: of one batch entry, or of all packed sequences, each starting at a flag of its own.
inline std::int64_t spoilt_flags_per_head(bool packed, const SizeParams& size) {
  return packed ? size.total_q / kSpoiltRows + size.batch + 1 : (size.seqlen_q + kSpoiltRows - 1) / kSpoiltRows;
}
FLASHCORE_HD std::int64_t spoilt_flags(bool packed, const SizeParams& size, std::int64_t flags_per_head) {
  return flags_per_head * size.heads_q * (packed ? 1 : size.batch);
}

/// The flag of rows `row` … `row` + 15 of a sequence that begins at packed row `q_begin`.
FLASHCORE_HD std::int64_t spoilt_flag(bool packed, std::int64_t flags_per_head, std::int64_t heads_q,
                                      std::int64_t batch, std::int64_t head, std::int64_t q_begin, std::int64_t row) {
  if (packed) return head * flags_per_head + q_begin / kSpoiltRows + batch + row / kSpoiltRows;
  return (batch * heads_q + head) * flags_per_head + row / kSpoiltRows;
}

/// Queues the repair, of sequences that are not packed.
void repair_spoilt_rows(const Params& params, const std::uint8_t* spoilt, std::int64_t flags_per_head, Stream stream);

}  // namespace flashcore::detail
