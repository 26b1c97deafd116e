// The registry: every kernel row of this build in order of preference, and the rules by which a row is refused.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "backend.h"

namespace flashcore::detail {

/// Rows of one device type, best first.
const std::vector<const Kernel*>& kernels_of(DeviceType type);

/// True where `wanted` is the row's name or some whole words of it in a row: "cuda", "sm90" and "sm90.fwd_d64" all
/// match "cuda.sm90.fwd_d64". Empty matches every row.
bool matches(std::string_view name, std::string_view wanted);

/// The part of the question that bits answer: phase, dtype and features. `features` is features_of(problem).
bool fits_by_kind(const Kernel& kernel, const Problem& problem, FeatureSet features);

/// Why `kernel` does not take the problem; empty if it does.
std::string refusal(const Kernel& kernel, const Problem& problem, const DeviceInfo& device);

}  // namespace flashcore::detail
