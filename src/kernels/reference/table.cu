// The CUDA reference rows of the dispatch table: they know every feature, and stand last.
#include "../../cuda/architectures.h"
#include "reference.h"

namespace flashcore::reference {
namespace {

constexpr detail::FeatureSet kForwardFeatures =
    detail::kCausal | detail::kCausalTopLeft | detail::kWindow | detail::kMask | detail::kBias | detail::kSoftcap |
    detail::kAlibi | detail::kSinks | detail::kDropout | detail::kVarlen | detail::kSequsedK | detail::kPaged |
    detail::kAppend | detail::kRotary | detail::kDescale | detail::kGroupedHeads | detail::kHeadDimV | detail::kLse |
    detail::kDeterministic | detail::kUnaligned;

constexpr detail::FeatureSet kBackwardFeatures =
    detail::kCausal | detail::kCausalTopLeft | detail::kWindow | detail::kMask | detail::kBias | detail::kSoftcap |
    detail::kAlibi | detail::kSinks | detail::kDropout | detail::kVarlen | detail::kSequsedK | detail::kGroupedHeads |
    detail::kHeadDimV | detail::kDlse | detail::kDbias | detail::kDsinks | detail::kDeterministic | detail::kUnaligned;

constexpr unsigned kFloats = detail::bit(DType::float16) | detail::bit(DType::bfloat16) | detail::bit(DType::float32) |
                             detail::bit(DType::float64);

std::string refuse(const detail::Problem& problem, const DeviceInfo& device) {
  const std::int64_t head_dim =
      problem.size.head_dim > problem.size.head_dim_v ? problem.size.head_dim : problem.size.head_dim_v;
  if (head_dim > kMaxHeadDim)
    return "head_dim " + std::to_string(head_dim) + " is more than " + std::to_string(kMaxHeadDim);
  return cuda::missing_machine_code(device, FLASHCORE_ARCH_LIST);
}

const detail::Kernel kRows[] = {
    {"cuda.reference", DeviceType::cuda, detail::bit(detail::Phase::forward) | detail::bit(detail::Phase::decode),
     kForwardFeatures, kFloats | detail::bit(DType::float8_e4m3), refuse, nullptr, launch_forward},
    {"cuda.reference", DeviceType::cuda, detail::bit(detail::Phase::backward), kBackwardFeatures, kFloats, refuse,
     plan_backward, launch_backward},
};

}  // namespace

detail::KernelTable table() { return {kRows, 2}; }

}  // namespace flashcore::reference
