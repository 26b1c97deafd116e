// MaskExtents: the tiles of masks that heads share.
#include "mask_extents.h"

#include <cstring>

#include "flash.h"
#include "simd/isa.h"
#include "workspace.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

std::int64_t tiles_of(const Plan& plan) {
  const Isa& isa = isa_of(plan);
  return isa.query_blocks(plan.problem.size.seqlen_q) * isa.key_blocks(plan.problem.size.seqlen_k);
}

/// Tiles of sequences of different lengths are not the same.
bool may_share(const Problem& problem) {
  return (problem.flags & kMask) && !(problem.flags & (kVarlen | kSequsedK)) && problem.phase != Phase::decode &&
         problem.size.batch > 0 && problem.size.heads_q > 1;
}

}  // namespace

void MaskExtents::plan(Plan& plan, std::size_t slice) {
  if (!may_share(plan.problem)) return;
  plan.slices[slice] = plan.workspace.add(static_cast<std::size_t>(plan.problem.size.batch * tiles_of(plan)));
}

MaskExtents::MaskExtents(const Plan& plan, const Params& params, void* workspace, std::size_t slice) {
  if (!may_share(plan.problem) || params.mask.head != 0) return;
  const std::int64_t tiles = tiles_of(plan);
  data_ = detail::slice<std::uint8_t>(workspace, plan.slices[slice]);
  stride_ = params.mask.batch == 0 ? 0 : tiles;
  const std::int64_t masks = stride_ == 0 ? 1 : plan.problem.size.batch;
  std::memset(data_, 0, static_cast<std::size_t>(masks * tiles));
}

}  // namespace flashcore::cpu
