// The rows of the ladder. They stand behind the reference, which runs every call: only their names reach them.
#include <sstream>
#include <string>

#include "../../cuda/architectures.h"
#include "ladder.h"

namespace flashcore::ladder {
namespace {

constexpr detail::FeatureSet kFeatures =
    detail::kCausal | detail::kCausalTopLeft | detail::kGroupedHeads | detail::kLse | detail::kDeterministic;

/// The architectures of this build that have WMMA for bfloat16: older code is there, but empty.
std::string bfloat16_archs() {
  std::istringstream words(FLASHCORE_ARCH_LIST);
  std::string archs;
  for (std::string arch; words >> arch;)
    if (std::atoi(arch.c_str()) >= 80 || std::atoi(arch.c_str()) == 0) archs += (archs.empty() ? "" : " ") + arch;
  return archs;
}

std::string refuse(const detail::Problem& problem, const DeviceInfo& device) {
  constexpr std::int64_t kMost = 1 << 30;  // row and tile numbers are 32 bit
  constexpr std::int64_t kLowestTile = 32;
  const detail::Sizes& s = problem.size;
  const bool bfloat16 = problem.dtype == DType::bfloat16;
  if (s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 128)
    return "does head_dim 32, 64 and 128, not " + std::to_string(s.head_dim);
  if (s.seqlen_q > kMost || s.seqlen_k > kMost || s.batch * s.heads_q * (s.seqlen_q / kLowestTile + 1) > kMost)
    return "counts rows and tiles in 32 bits";
  if (device.compute_major < (bfloat16 ? 8 : 7))
    return bfloat16 ? "needs compute capability 8.0 for bfloat16" : "needs compute capability 7.0";
  return cuda::missing_machine_code(device, bfloat16 ? bfloat16_archs() : FLASHCORE_ARCH_LIST);
}

constexpr detail::Kernel row(const char* name, decltype(detail::Kernel::plan) plan,
                             decltype(detail::Kernel::launch) launch, decltype(detail::Kernel::settings) settings) {
  return {name,
          DeviceType::cuda,
          detail::bit(detail::Phase::forward),
          kFeatures,
          detail::bit(DType::float16) | detail::bit(DType::bfloat16),
          refuse,
          plan,
          launch,
          settings};
}

constexpr detail::Kernel kRows[] = {
    row("cuda.ladder.unfused_wmma", plan_unfused_wmma, launch_unfused_wmma, nullptr),
    row("cuda.ladder.fused_wmma", plan_fused_wmma, launch_fused_wmma, fused_wmma_settings),
};

}  // namespace

detail::KernelTable table() { return {kRows, 2}; }

}  // namespace flashcore::ladder
