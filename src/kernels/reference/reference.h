// The CUDA reference rows, as the backend and the files of this folder see them.
#pragma once

#include "../kernel.h"

namespace flashcore::reference {

/// Threads of a block, and the keys (or queries) that it scores in one step.
inline constexpr int kThreads = 128;
/// The rows of q, k and v that a block keeps in shared memory hold at most this many elements.
inline constexpr int kMaxHeadDim = 256;

detail::KernelTable table();

/// Forward and decode: appends to the cache where k_new is given, then attends.
void launch_forward(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);
void launch_append(const detail::Params& params, Stream stream);

/// Backward. Its only workspace slice holds a number per query row.
void plan_backward(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
void launch_backward(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

}  // namespace flashcore::reference
