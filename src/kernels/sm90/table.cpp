// The Hopper rows.
#include <algorithm>
#include <iterator>
#include <string>

#include "flashcore/device.h"
#include "sm90.h"

namespace flashcore::sm90 {
namespace {

using detail::Kernel;
using detail::Plan;
using detail::Problem;

constexpr detail::FeatureSet kForwardFeatures =
    detail::kCausal | detail::kCausalTopLeft | detail::kWindow | detail::kMask | detail::kBias | detail::kSoftcap |
    detail::kAlibi | detail::kSinks | detail::kGroupedHeads | detail::kHeadDimV | detail::kLse;

/// `bucket`: the head_dim the kernel is compiled for.
template <int bucket>
std::string refuse_forward(const Problem& problem, const DeviceInfo& device) {
  constexpr std::int64_t kMaxRows = 1 << 30;  // row and tile numbers are 32 bit
  if (device.compute_major != 9) return "needs compute capability 9.0";
  const std::int64_t head_dim = std::max(problem.size.head_dim, problem.size.head_dim_v);
  if (head_dim > bucket) return "holds head_dim up to " + std::to_string(bucket);
  if (!(problem.scale > 0)) return "needs a positive scale";
  if (problem.size.seqlen_k == 0) return "needs at least one key";
  const detail::Sizes& s = problem.size;
  if (s.seqlen_q > kMaxRows || s.seqlen_k > kMaxRows || s.batch * s.heads_q * (s.seqlen_q / 64 + 1) > kMaxRows)
    return "counts rows and tiles in 32 bits";
  return {};
}

void plan_forward(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  constexpr detail::FeatureSet kUneven =
      detail::kCausal | detail::kWindow | detail::kMask | detail::kBias | detail::kSoftcap | detail::kAlibi;
  constexpr std::int64_t kFlagRows = 16;
  constexpr std::int64_t kLargestBlock = 192;
  plan.blocks = device.multiprocessors;
  if (!(detail::features_of(problem) & kUneven)) return;
  const detail::Sizes& s = problem.size;
  const std::int64_t flags = (s.seqlen_q + kLargestBlock) / kFlagRows + 1;  // of a head, whatever the tile
  plan.slices[kTileCounter] = plan.workspace.add(sizeof(unsigned));
  plan.slices[kSpoiltFlags] = plan.workspace.add(static_cast<std::size_t>(s.batch * s.heads_q * flags));
}

template <int bucket>
constexpr Kernel forward_row(const char* name, void (*launch)(const Plan&, const detail::Params&, void*, Stream)) {
  return {name,
          DeviceType::cuda,
          detail::bit(detail::Phase::forward),
          kForwardFeatures,
          detail::bit(DType::float16) | detail::bit(DType::bfloat16),
          refuse_forward<bucket>,
          plan_forward,
          launch};
}

constexpr Kernel kRows[] = {
    forward_row<64>("cuda.sm90.fwd_d64", launch_fwd_d64),
    forward_row<96>("cuda.sm90.fwd_d96", launch_fwd_d96),
    forward_row<128>("cuda.sm90.fwd_d128", launch_fwd_d128),
    forward_row<256>("cuda.sm90.fwd_d256", launch_fwd_d256),
};

}  // namespace

detail::KernelTable table() { return {kRows, static_cast<int>(std::size(kRows))}; }

}  // namespace flashcore::sm90
