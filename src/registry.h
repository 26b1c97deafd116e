// The registry: every kernel row of this build in order of preference, and the rules by which a row is refused.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backend.h"

namespace flashcore::detail {

/// Rows of one device type, best first.
const std::vector<const Kernel*>& kernels_of(DeviceType type);

/// A kernel as it is asked for: "cpu.decode:splits4" is the rows of that name, working in one of their settings.
struct KernelWord {
  std::string_view name;     // see matches()
  std::string_view setting;  // see Kernel::settings; empty: the row decides

  bool empty() const { return name.empty() && setting.empty(); }
};
KernelWord parse_kernel_word(std::string_view word);

/// What asks for a kernel that takes the problem: its name, then that with each of its settings.
std::vector<std::string> kernel_words(const Kernel& kernel, const Problem& problem, const DeviceInfo& device);

/// True where `wanted` is the row's name or some whole words of it in a row: "cuda", "sm90" and "sm90.fwd_d64" all
/// match "cuda.sm90.fwd_d64". Empty matches every row.
bool matches(std::string_view name, std::string_view wanted);

/// The part of the question that bits answer: phase, dtype and features. `features` is features_of(problem).
bool fits_by_kind(const Kernel& kernel, const Problem& problem, FeatureSet features);

/// Why `kernel` does not take the problem; empty if it does.
std::string refusal(const Kernel& kernel, const Problem& problem, const DeviceInfo& device);

/// Why `kernel`, which takes the problem, does not take it in that setting; empty if it does.
std::string setting_refusal(const Kernel& kernel, const Problem& problem, const DeviceInfo& device,
                            std::string_view setting);

}  // namespace flashcore::detail
