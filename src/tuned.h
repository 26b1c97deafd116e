// Which kernel is tuned for a problem on a device: the table that make_plan asks, read from FLASHCORE_TUNED's file.
#pragma once

#include <string>

#include "problem.h"

namespace flashcore::detail {

/// What the loaded file says. Both live as long as the process: files that were replaced are kept.
struct Tuned {
  const std::string* kernel = nullptr;  // a KernelWord; null: nothing
  const std::string* path = nullptr;
};

/// Costs one atomic load where no file is loaded. Throws InvalidArgument where FLASHCORE_TUNED names a file that cannot
/// be read.
Tuned find_tuned(const Problem& problem, const std::string& device_name);

}  // namespace flashcore::detail
