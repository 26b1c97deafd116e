// make_plan: the first row that fits, or every row's reason and the nearest thing that works.
#include "plan.h"

#include <cstdlib>

#include "flashcore/error.h"
#include "registry.h"

namespace flashcore::detail {
namespace {

bool any_row_matches(DeviceType type, std::string_view wanted) {
  for (const Kernel* row : kernels_of(type))
    if (matches(row->name, wanted)) return true;
  return false;
}

/// What the caller asked for, or else FLASHCORE_KERNEL. The variable speaks only to the devices that have such a row,
/// so that pinning a CUDA kernel does not break the CPU calls of the same program.
std::string_view wanted_kernel(std::string_view asked, DeviceType type) {
  if (asked.empty()) {
    const char* variable = std::getenv("FLASHCORE_KERNEL");
    if (!variable) return {};
    asked = variable;
    const DeviceType other = type == DeviceType::cpu ? DeviceType::cuda : DeviceType::cpu;
    if (!any_row_matches(type, asked) && any_row_matches(other, asked)) return {};
  }
  if (any_row_matches(DeviceType::cpu, asked) || any_row_matches(DeviceType::cuda, asked)) return asked;
  std::string names;
  for (const DeviceType each : {DeviceType::cpu, DeviceType::cuda})
    for (const Kernel* row : kernels_of(each))
      if (names.find(row->name) == std::string::npos) names += (names.empty() ? "" : ", ") + std::string(row->name);
  throw InvalidArgument("no kernel is called \"" + std::string(asked) + "\"; this build has " + names);
}

const Kernel* first_fit(const Problem& problem, const DeviceInfo& device, std::string_view wanted) {
  const FeatureSet features = features_of(problem);
  for (const Kernel* row : kernels_of(device.device.type)) {
    if (!matches(row->name, wanted) || !fits_by_kind(*row, problem, features)) continue;
    if (!row->refuse || row->refuse(problem, device).empty()) return row;
  }
  return nullptr;
}

/// One change to the problem that makes it run, in words; empty if no single change does.
std::string nearest(const Problem& problem, const DeviceInfo& device, std::string_view wanted) {
  if (!wanted.empty() && first_fit(problem, device, {})) return "the same call without naming a kernel runs";
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    Problem other = problem;
    other.dtype = other.dtype_out = dtype;
    other.flags &= ~kDescale;
    if (dtype != problem.dtype && first_fit(other, device, wanted))
      return std::string("the same call in ") + name_of(dtype) + " runs";
  }
  for (FeatureSet flag = 1; flag != 0; flag <<= 1) {
    Problem other = problem;
    other.flags &= ~flag;
    if ((problem.flags & flag) && first_fit(other, device, wanted))
      return "the same call without " + describe_features(flag) + " runs";
  }
  return {};
}

std::string refusals(const Problem& problem, const DeviceInfo& device, std::string_view wanted, const Kernel* chosen) {
  std::string text;
  for (const Kernel* row : kernels_of(device.device.type)) {
    // A name may stand for several rows, one for each phase; the chosen name is not among the refused.
    if (chosen && std::string_view(row->name) == chosen->name) continue;
    std::string reason = refusal(*row, problem, device);
    if (reason.empty())
      reason = matches(row->name, wanted) ? "fits, but stands after the chosen one" : "fits, but was not asked for";
    text += "\n  " + std::string(row->name) + ": " + reason;
  }
  return text;
}

}  // namespace

Plan make_plan(const Problem& problem, const DeviceInfo& device, std::string_view asked) {
  const std::string_view wanted = wanted_kernel(asked, device.device.type);
  Plan plan;
  plan.kernel = first_fit(problem, device, wanted);
  plan.problem = problem;
  plan.device = device.device;
  if (plan.kernel) {
    if (plan.kernel->plan) plan.kernel->plan(problem, device, plan);
    return plan;
  }
  std::string message = "no kernel";
  if (!wanted.empty()) message += " called \"" + std::string(wanted) + "\"";
  message += " runs \"" + to_line(problem) + "\" on " + name_of(device.device) + " (" + device.name + "):";
  message += refusals(problem, device, wanted, nullptr);
  const std::string hint = nearest(problem, device, wanted);
  if (!hint.empty()) message += "\n" + hint;
  throw Unsupported(message);
}

std::string explain_plan(const Problem& problem, const DeviceInfo& device, std::string_view asked) {
  std::string text =
      "problem:   " + to_line(problem) + "\ndevice:    " + name_of(device.device) + " (" + device.name + ")\n";
  try {
    const Plan plan = make_plan(problem, device, asked);
    text += std::string("kernel:    ") + plan.kernel->name + "\nworkspace: " + std::to_string(plan.workspace.bytes()) +
            " bytes";
    const std::string others = refusals(problem, device, wanted_kernel(asked, device.device.type), plan.kernel);
    if (!others.empty()) text += "\nothers:" + others;
  } catch (const Unsupported& reason) {
    text += std::string("kernel:    none\n") + reason.what();
  }
  return text;
}

}  // namespace flashcore::detail
