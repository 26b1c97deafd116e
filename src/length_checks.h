// Looking into lengths and page tables: on the CPU always, on CUDA only where FLASHCORE_CHECK=1 asks for it (it copies
// them to the host, which synchronises). Kernels clamp whatever is not looked at here.
#pragma once

#include "kernels/params.h"
#include "problem.h"

namespace flashcore::detail {

/// Throws InvalidArgument where cu_seqlens do not start at 0, fall, or pass the packed rows; where a length is negative
/// or longer than its sequence or cache; where a page that is needed does not exist; where rotary tables are too short.
void check_lengths(const Problem& problem, const Params& params, Device device, Stream stream);

}  // namespace flashcore::detail
