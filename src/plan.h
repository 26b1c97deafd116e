// Plan: the answer to a Problem on a device. make_plan is pure: it reads no device and allocates no device memory, so
// it runs (and is tested) anywhere.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "problem.h"
#include "workspace.h"

namespace flashcore {
struct DeviceInfo;
}

namespace flashcore::detail {

struct Kernel;

struct Plan {
  const Kernel* kernel = nullptr;
  std::string setting = {};  // one of the kernel's settings(); empty: the kernel decides
  bool tuned = false;        // chosen because a file of tuned kernels says so
  Problem problem = {};
  Device device = {};
  int splits = 1;                 // parts that the keys are cut into
  int blocks = 0;                 // of a persistent grid
  int block_m = 0;                // query rows of a block, where the kernel comes in several sizes
  const void* variant = nullptr;  // which of the row's builds is to run, in the row's own type
  WorkspaceLayout workspace = {};
  std::array<std::size_t, 4> slices = {};  // offsets of the kernel's workspace slices, in the kernel's own order

  /// The number at the end of the setting, which has one: 4 of "splits4".
  int setting_number() const;
};

/// Chooses the first row of the registry that supports the problem, or the one that is tuned for it (tuned.h). `wanted`
/// ("cpu.decode", "decode:splits4", see KernelWord) restricts the choice to rows of that name, which then are not
/// tuned; empty means any. Throws Unsupported with every row's reason.
Plan make_plan(const Problem& problem, const DeviceInfo& device, std::string_view wanted = {});

/// The plan in words: line, kernel, workspace, then each row that was passed over and why. Never throws Unsupported.
std::string explain_plan(const Problem& problem, const DeviceInfo& device, std::string_view wanted = {});

/// The plan's kernel as a caller would ask for it: "cpu.flash", "cpu.decode:splits4".
std::string kernel_word(const Plan& plan);

}  // namespace flashcore::detail
