// What the files of this folder give to its table.
#pragma once

#include "../common/repair.h"
#include "../kernel.h"

namespace flashcore::sm90 {

/// Workspace slices of the forward kernel.
enum FwdSlice { kTileCounter, kAnySpoilt, kSpoiltFlags };

inline void plan_fwd_slices(bool packed, const detail::SizeParams& size, detail::Plan& plan) {
  plan.slices[kTileCounter] = plan.workspace.add(sizeof(unsigned long long));  // tile::TileCounter's word
  plan.slices[kAnySpoilt] = plan.workspace.add(sizeof(unsigned));
  const std::int64_t flags = detail::spoilt_flags(packed, size, detail::spoilt_flags_per_head(packed, size));
  plan.slices[kSpoiltFlags] = plan.workspace.add(static_cast<std::size_t>(flags));
}

/// Launches of the forward kernel, one per head_dim bucket; each in a file of its own so that they compile in parallel.
void launch_fwd_d64(const detail::Plan&, const detail::Params&, void* workspace, Stream);
void launch_fwd_d96(const detail::Plan&, const detail::Params&, void* workspace, Stream);
void launch_fwd_d128(const detail::Plan&, const detail::Params&, void* workspace, Stream);
void launch_fwd_d192(const detail::Plan&, const detail::Params&, void* workspace, Stream);
void launch_fwd_d256(const detail::Plan&, const detail::Params&, void* workspace, Stream);

/// The kernel for small problems. Plan::splits: the parts of the keys.
void launch_fwd_small(const detail::Plan&, const detail::Params&, void* workspace, Stream);

/// The rows of this folder, best first.
detail::KernelTable table();

}  // namespace flashcore::sm90
