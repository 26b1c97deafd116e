// make_plan: the tuned row, or the first that fits, or every row's reason and the nearest thing that works.
#include "plan.h"

#include <cstdlib>

#include "flashcore/error.h"
#include "flashcore/tuning.h"
#include "registry.h"
#include "tuned.h"

namespace flashcore::detail {
namespace {

bool any_row_matches(DeviceType type, KernelWord wanted) {
  for (const Kernel* row : kernels_of(type))
    if (matches(row->name, wanted.name)) return true;
  return false;
}

/// What the caller asked for, or else FLASHCORE_KERNEL. The variable speaks only to the devices that have such a row,
/// so that pinning a CUDA kernel does not break the CPU calls of the same program.
KernelWord wanted_kernel(std::string_view word, DeviceType type) {
  KernelWord asked = parse_kernel_word(word);
  if (asked.empty()) {
    const char* variable = std::getenv("FLASHCORE_KERNEL");
    if (!variable) return {};
    word = variable;
    asked = parse_kernel_word(word);
    const DeviceType other = type == DeviceType::cpu ? DeviceType::cuda : DeviceType::cpu;
    if (!any_row_matches(type, asked) && any_row_matches(other, asked)) return {};
  }
  if (any_row_matches(DeviceType::cpu, asked) || any_row_matches(DeviceType::cuda, asked)) return asked;
  std::string names;
  for (const DeviceType each : {DeviceType::cpu, DeviceType::cuda})
    for (const Kernel* row : kernels_of(each))
      if (names.find(row->name) == std::string::npos) names += (names.empty() ? "" : ", ") + std::string(row->name);
  throw InvalidArgument("no kernel is called \"" + std::string(word) + "\"; this build has " + names);
}

const Kernel* first_fit(const Problem& problem, const DeviceInfo& device, KernelWord wanted) {
  const FeatureSet features = features_of(problem);
  for (const Kernel* row : kernels_of(device.device.type)) {
    if (!matches(row->name, wanted.name) || !fits_by_kind(*row, problem, features)) continue;
    if (row->refuse && !row->refuse(problem, device).empty()) continue;
    if (wanted.setting.empty() || setting_refusal(*row, problem, device, wanted.setting).empty()) return row;
  }
  return nullptr;
}

/// The row and its setting, unplanned; without a kernel where none fits.
Plan choose(const Problem& problem, const DeviceInfo& device, KernelWord wanted) {
  Plan plan;
  plan.problem = problem;
  plan.device = device.device;
  if (wanted.empty()) {
    if (const Tuned tuned = find_tuned(problem, device.name); tuned.kernel) {
      const KernelWord word = parse_kernel_word(*tuned.kernel);
      plan.kernel = first_fit(problem, device, word);
      plan.tuned = plan.kernel != nullptr;
      if (plan.tuned) plan.setting = word.setting;
    }
  }
  if (!plan.kernel) {
    plan.kernel = first_fit(problem, device, wanted);
    plan.setting = wanted.setting;
  }
  return plan;
}

/// One change to the problem that makes it run, in words; empty if no single change does.
std::string nearest(const Problem& problem, const DeviceInfo& device, KernelWord wanted) {
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

std::string refusals(const Problem& problem, const DeviceInfo& device, KernelWord wanted, const Plan& chosen) {
  const char* const passed_over =
      chosen.tuned ? "fits, but another one is tuned" : "fits, but stands after the chosen one";
  std::string text;
  for (const Kernel* row : kernels_of(device.device.type)) {
    // A name may stand for several rows, one for each phase; the chosen name is not among the refused.
    if (chosen.kernel && std::string_view(row->name) == chosen.kernel->name) continue;
    std::string reason = refusal(*row, problem, device);
    if (reason.empty() && matches(row->name, wanted.name))
      reason = setting_refusal(*row, problem, device, wanted.setting);
    if (reason.empty()) reason = matches(row->name, wanted.name) ? passed_over : "fits, but was not asked for";
    text += "\n  " + std::string(row->name) + ": " + reason;
  }
  return text;
}

/// What explain tells of a tuned kernel: from which file it is, or why it is not taken. Empty where there is none.
std::string tuned_line(const Problem& problem, const DeviceInfo& device, KernelWord wanted, const Plan& plan) {
  const Tuned tuned = find_tuned(problem, device.name);
  if (!tuned.kernel) return {};
  if (plan.tuned) return "\ntuned:     by " + *tuned.path;
  std::string why = "this build has no such kernel for it";
  const KernelWord word = parse_kernel_word(*tuned.kernel);
  for (const Kernel* row : kernels_of(device.device.type)) {
    if (!matches(row->name, word.name) || !(row->phases & bit(problem.phase))) continue;
    why = refusal(*row, problem, device);
    if (why.empty()) why = setting_refusal(*row, problem, device, word.setting);
  }
  if (!wanted.empty()) why = "another was asked for";
  return "\ntuned:     not " + *tuned.kernel + " of " + *tuned.path + ": " + why;
}

}  // namespace

int Plan::setting_number() const { return std::stoi(setting.substr(setting.find_first_of("0123456789"))); }

Plan make_plan(const Problem& problem, const DeviceInfo& device, std::string_view asked) {
  const KernelWord wanted = wanted_kernel(asked, device.device.type);
  Plan plan = choose(problem, device, wanted);
  if (plan.kernel) {
    if (plan.kernel->plan) plan.kernel->plan(problem, device, plan);
    return plan;
  }
  std::string message = "no kernel";
  if (!wanted.name.empty()) message += " called \"" + std::string(wanted.name) + "\"";
  message += " runs \"" + to_line(problem) + "\" on " + name_of(device.device) + " (" + device.name + "):";
  message += refusals(problem, device, wanted, plan);
  const std::string hint = nearest(problem, device, wanted);
  if (!hint.empty()) message += "\n" + hint;
  throw Unsupported(message);
}

std::string explain_plan(const Problem& problem, const DeviceInfo& device, std::string_view asked) {
  std::string text =
      "problem:   " + to_line(problem) + "\ndevice:    " + name_of(device.device) + " (" + device.name + ")\n";
  try {
    const Plan plan = make_plan(problem, device, asked);
    const KernelWord wanted = wanted_kernel(asked, device.device.type);
    text += "kernel:    " + kernel_word(plan) + tuned_line(problem, device, wanted, plan) +
            "\nworkspace: " + std::to_string(plan.workspace.bytes()) + " bytes";
    const std::string others = refusals(problem, device, wanted, plan);
    if (!others.empty()) text += "\nothers:" + others;
  } catch (const Unsupported& reason) {
    text += std::string("kernel:    none\n") + reason.what();
  }
  return text;
}

std::string kernel_word(const Plan& plan) {
  return plan.kernel->name + (plan.setting.empty() ? std::string() : ":" + plan.setting);
}

}  // namespace flashcore::detail

namespace flashcore {

std::vector<std::string> kernel_choices(std::string_view problem_line, Device device) {
  const detail::Problem problem = detail::parse_problem(problem_line);
  const DeviceInfo& info = device_info(device);
  std::vector<std::string> words;
  for (const detail::Kernel* row : detail::kernels_of(device.type)) {
    if (!detail::refusal(*row, problem, info).empty()) continue;
    const std::vector<std::string> of_row = detail::kernel_words(*row, problem, info);
    words.insert(words.end(), of_row.begin(), of_row.end());
  }
  return words;
}

}  // namespace flashcore
