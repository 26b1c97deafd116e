// MaskExtents: what the tasks of a call tell each other of a mask, so that heads that share it read it once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../plan.h"
#include "../params.h"

namespace flashcore::cpu {

/// A byte for each tile of a mask, in the workspace: written by the task that comes by first (ScoreRules::extent).
class MaskExtents {
 public:
  /// Takes room in the workspace where heads may share a mask.
  static void plan(detail::Plan& plan, std::size_t slice);
  MaskExtents(const detail::Plan& plan, const detail::Params& params, void* workspace, std::size_t slice);

  /// Those of a sequence's mask; null where there is nothing to share.
  std::uint8_t* of_sequence(std::int64_t batch) const { return data_ ? data_ + batch * stride_ : nullptr; }

 private:
  std::uint8_t* data_ = nullptr;
  std::int64_t stride_ = 0;  // from a sequence to the next; 0 where they share a mask, too
};

}  // namespace flashcore::cpu
