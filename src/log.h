// FLASHCORE_LOG: what the library says on stderr about its own decisions.
#pragma once

#include "plan.h"

namespace flashcore::detail {

/// With FLASHCORE_LOG=plan prints one line: the problem, the device, the chosen kernel, its workspace, and why each
/// better row was passed over.
void log_plan(const Plan& plan, const DeviceInfo& device);

}  // namespace flashcore::detail
