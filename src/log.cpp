// FLASHCORE_LOG: one line per plan.
#include "log.h"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "registry.h"

namespace flashcore::detail {

void log_plan(const Plan& plan, const DeviceInfo& device) {
  const char* wish = std::getenv("FLASHCORE_LOG");
  if (!wish || std::string_view(wish) != "plan") return;
  std::string line = "flashcore: " + to_line(plan.problem) + " on " + name_of(plan.device) + " -> " +
                     kernel_word(plan) + (plan.tuned ? " (tuned)" : "") + ", workspace " +
                     std::to_string(plan.workspace.bytes()) + " bytes";
  const std::string another = plan.tuned ? "another kernel is tuned" : "another kernel was asked for";
  for (const Kernel* row : kernels_of(plan.device.type)) {
    if (row == plan.kernel) break;
    const std::string reason = refusal(*row, plan.problem, device);
    line += std::string("; not ") + row->name + ": " + (reason.empty() ? another : reason);
  }
  line += '\n';
  std::fputs(line.c_str(), stderr);
}

}  // namespace flashcore::detail
