// The rungs of the ladder, as its table sees them.
#pragma once

#include <string>
#include <vector>

#include "../kernel.h"

namespace flashcore::ladder {

detail::KernelTable table();

/// Three kernels: scores and weights go through the workspace.
void plan_unfused_wmma(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
void launch_unfused_wmma(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

/// One kernel: scores and weights stay in shared memory. The plan chooses the height of its tiles.
/// "rows<n>" chooses it otherwise.
std::vector<std::string> fused_wmma_settings(const detail::Problem& problem, const DeviceInfo& device);
void plan_fused_wmma(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
void launch_fused_wmma(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

}  // namespace flashcore::ladder
