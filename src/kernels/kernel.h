// Kernel: one row of the dispatch table. C++17: device code includes this header.
#pragma once

#include <string>
#include <vector>

#include "../plan.h"
#include "../problem.h"
#include "flashcore/device.h"
#include "params.h"

namespace flashcore::detail {

/// One way to run a set of problems. Rows are constants; the registry holds them in order of preference.
struct Kernel {
  const char* name;  // "cuda.reference": backend, then what it is
  DeviceType device;
  unsigned phases;      // bit (1 << Phase)
  FeatureSet features;  // the features this row was taught; any other refuses the problem
  unsigned dtypes;      // bit (1 << DType)

  /// A reason why not, or an empty string. Called after phase, dtype and features were found to fit. May be null.
  std::string (*refuse)(const Problem&, const DeviceInfo&);
  /// Sets splits and workspace slices. May be null where there is nothing to set.
  void (*plan)(const Problem&, const DeviceInfo&, Plan&);
  /// Queues the work on `stream` and returns. Throws CudaError.
  void (*launch)(const Plan&, const Params&, void* workspace, Stream stream);
  /// The words that may stand behind the name ("cpu.decode:splits4") for a problem that the row takes: how else than by
  /// its own choice it can work. `plan` finds the one that was asked for in Plan::setting. Null: there are none.
  std::vector<std::string> (*settings)(const Problem&, const DeviceInfo&) = nullptr;
};

constexpr unsigned bit(Phase phase) { return 1u << static_cast<unsigned>(phase); }
constexpr unsigned bit(DType dtype) { return 1u << static_cast<unsigned>(dtype); }

/// A backend's or an architecture folder's rows, best first.
struct KernelTable {
  const Kernel* rows = nullptr;
  int count = 0;

  const Kernel* begin() const { return rows; }
  const Kernel* end() const { return rows + count; }
};

}  // namespace flashcore::detail
