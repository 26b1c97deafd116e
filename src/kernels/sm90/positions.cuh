// From Params to what the forward kernels know of positions.
#pragma once

#include "../params.h"
#include "../tile/mask.cuh"

namespace flashcore::sm90 {

/// Whether some queries see other keys than others do.
inline bool tiles_differ(const detail::PositionParams& position) {
  return position.causal || position.window_left >= 0 || position.window_right >= 0;
}

inline tile::KeyWindow key_window(const detail::Params& p) {
  const detail::PositionParams& position = p.position;
  const auto shift = position.top_left ? 0 : static_cast<int>(p.size.seqlen_k - p.size.seqlen_q);
  const int right = position.causal ? 0 : static_cast<int>(position.window_right);
  return {static_cast<int>(p.size.seqlen_k), shift, static_cast<int>(position.window_left), right};
}

}  // namespace flashcore::sm90
