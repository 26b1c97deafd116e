// The small CUDA kernels that belong to no architecture, as the backend sees them.
#pragma once

#include "../params.h"

namespace flashcore::common {

void merge_states(const detail::MergeParams& params, int index, Stream stream);
void vector_add(const detail::ArrayParams& a, const detail::ArrayParams& b, const detail::ArrayParams& out, int index,
                Stream stream);
void reduce(const detail::ReduceParams& params, int index, Stream stream);

}  // namespace flashcore::common
