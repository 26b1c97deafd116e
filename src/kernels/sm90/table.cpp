// The Hopper rows.
#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "flashcore/device.h"
#include "sm90.h"
#include "tiles.h"

namespace flashcore::sm90 {
namespace {

using detail::Kernel;
using detail::Plan;
using detail::Problem;

constexpr detail::FeatureSet kForwardFeatures = detail::kCausal | detail::kCausalTopLeft | detail::kWindow |
                                                detail::kMask | detail::kBias | detail::kSoftcap | detail::kAlibi |
                                                detail::kSinks | detail::kVarlen | detail::kSequsedK |
                                                detail::kGroupedHeads | detail::kHeadDimV | detail::kLse;

constexpr detail::FeatureSet kPositionFeatures = detail::kCausal | detail::kCausalTopLeft | detail::kWindow;
constexpr detail::FeatureSet kSmallFeatures =
    kPositionFeatures | detail::kSinks | detail::kGroupedHeads | detail::kHeadDimV | detail::kLse;

std::string refuse_small(const Problem& problem, const DeviceInfo& device) {
  if (device.compute_major != 9) return "needs compute capability 9.0";
  const detail::Sizes& s = problem.size;
  const std::int64_t head_dim = std::max(s.head_dim, s.head_dim_v);
  if (head_dim > 128) return "holds head_dim up to 128";
  if (!(problem.scale > 0)) return "needs a positive scale";
  const std::int64_t keys = small_most_keys(static_cast<int>(head_dim));
  if (s.seqlen_k == 0 || s.seqlen_k > keys) return "holds 1 to " + std::to_string(keys) + " keys";
  const std::int64_t tiles = (s.seqlen_q + kSmallQueries - 1) / kSmallQueries * s.batch * s.heads_q;
  if (tiles > device.multiprocessors) return "is for at most one tile of 64 queries for each multiprocessor";
  return {};
}

/// "splits<n>": keys in so many parts.
std::vector<std::string> small_settings(const Problem& problem, const DeviceInfo&) {
  const int head_dim = static_cast<int>(std::max(problem.size.head_dim, problem.size.head_dim_v));
  std::vector<std::string> words;
  for (int parts = 1; parts <= kSmallParts; ++parts)
    if (small_shape(head_dim, problem.size.seqlen_k, parts).keys > 0) words.push_back("splits" + std::to_string(parts));
  return words;
}

void plan_small(const Problem& problem, const DeviceInfo&, Plan& plan) {
  plan.splits = small_parts(problem.size.seqlen_k);
  if (!plan.setting.empty()) plan.splits = plan.setting_number();
}

/// `bucket`: the head_dim the kernel is compiled for.
template <int bucket>
std::string refuse_forward(const Problem& problem, const DeviceInfo& device) {
  constexpr std::int64_t kMaxRows = 1 << 30;  // row and tile numbers are 32 bit
  if (device.compute_major != 9) return "needs compute capability 9.0";
  const std::int64_t head_dim = std::max(problem.size.head_dim, problem.size.head_dim_v);
  if (head_dim > bucket) return "holds head_dim up to " + std::to_string(bucket);
  // Its threads store 16 bytes at a time.
  if (bucket > 128 && problem.size.head_dim_v % 8 != 0) return "needs head_dim_v to be a multiple of 8";
  if (!(problem.scale > 0)) return "needs a positive scale";
  if (problem.size.seqlen_k == 0 || problem.size.total_k == 0) return "needs at least one key";
  const detail::Sizes& s = problem.size;
  if ((problem.flags & detail::kVarlen) && (s.batch == 0 || s.seqlen_q == 0)) return "needs at least one query";
  const std::int64_t tiles = s.heads_q * (s.total_q / 64 + s.batch);
  if (s.total_q > kMaxRows || s.total_k > kMaxRows || tiles > kMaxRows) return "counts rows and tiles in 32 bits";
  return {};
}

constexpr detail::FeatureSet kGeneralFeatures = detail::kMask | detail::kBias | detail::kSoftcap | detail::kAlibi;

/// "rows<n>": tiles of so many queries.
template <int bucket>
std::vector<std::string> forward_settings(const Problem& problem, const DeviceInfo&) {
  const detail::FeatureSet features = detail::features_of(problem);
  const bool full = !(features & (kPositionFeatures | detail::kVarlen | detail::kSequsedK));
  const FwdKind kind = full ? FwdKind::full : FwdKind::positional;
  if ((features & kGeneralFeatures) || !has_small_tile(bucket, kind)) return {};
  std::vector<std::string> words;
  for (const FwdSize size : {FwdSize::large, FwdSize::small})
    words.push_back("rows" + std::to_string(fwd_tile(bucket, kind, size).block_m));
  return words;
}

void plan_forward(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  constexpr detail::FeatureSet kUneven = kPositionFeatures | kGeneralFeatures | detail::kVarlen | detail::kSequsedK;
  plan.blocks = device.multiprocessors;
  if (!plan.setting.empty()) plan.block_m = plan.setting_number();
  const detail::FeatureSet features = detail::features_of(problem);
  if (!(features & kUneven)) return;
  const detail::Sizes& s = problem.size;
  detail::SizeParams size;
  size.batch = s.batch;
  size.seqlen_q = s.seqlen_q;
  size.total_q = s.total_q;
  size.heads_q = static_cast<std::int32_t>(s.heads_q);
  plan_fwd_slices((features & detail::kVarlen) != 0, size, plan);
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
          launch,
          forward_settings<bucket>};
}

constexpr Kernel kRows[] = {
    {"cuda.sm90.fwd_small", DeviceType::cuda, detail::bit(detail::Phase::forward), kSmallFeatures,
     detail::bit(DType::float16) | detail::bit(DType::bfloat16), refuse_small, plan_small, launch_fwd_small,
     small_settings},
    forward_row<64>("cuda.sm90.fwd_d64", launch_fwd_d64),
    forward_row<96>("cuda.sm90.fwd_d96", launch_fwd_d96),
    forward_row<128>("cuda.sm90.fwd_d128", launch_fwd_d128),
    forward_row<192>("cuda.sm90.fwd_d192", launch_fwd_d192),
    forward_row<256>("cuda.sm90.fwd_d256", launch_fwd_d256),
};

}  // namespace

detail::KernelTable table() { return {kRows, static_cast<int>(std::size(kRows))}; }

}  // namespace flashcore::sm90
