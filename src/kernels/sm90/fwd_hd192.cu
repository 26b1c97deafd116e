// Hopper forward, head_dim bucket 192.
#include "fwd_launch.cuh"

namespace flashcore::sm90 {

void launch_fwd_d192(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream) {
  launch_fwd_bucket<192>(plan, params, workspace, stream);
}

}  // namespace flashcore::sm90
