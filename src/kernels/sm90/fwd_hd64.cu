// Hopper forward, head_dim bucket 64.
#include "fwd_launch.cuh"

namespace flashcore::sm90 {

void launch_fwd_d64(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream) {
  launch_fwd_bucket<64>(plan, params, workspace, stream);
}

}  // namespace flashcore::sm90
