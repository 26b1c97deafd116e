// Whether kernels compiled for a list of architectures run on a device.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

#include "flashcore/device.h"

namespace flashcore::cuda {

/// True where code for `arch`, in CMake's words ("90-real", "80-virtual", "90a-real", "80"), runs on the device.
/// Machine code runs on its major version from its minor version on (an "a" on exactly its own), PTX on everything
/// newer (an "a" again on its own only).
inline bool runs_on(const std::string& arch, const DeviceInfo& device) {
  const int number = std::atoi(arch.c_str());
  const int own = device.compute_major * 10 + device.compute_minor;
  const std::size_t digits = arch.find_first_not_of("0123456789");
  const bool exact = digits != std::string::npos && arch[digits] == 'a';
  if (exact) return number == own;
  const bool has_code = arch.find("-virtual") == std::string::npos;
  const bool has_ptx = arch.find("-real") == std::string::npos;
  return number <= own && (has_ptx || (has_code && number / 10 == device.compute_major));
}

/// Why kernels compiled for `archs` (words with a space between) cannot run on the device; empty where they can, and
/// where the device's architecture is not known.
inline std::string missing_machine_code(const DeviceInfo& device, const std::string& archs) {
  if (device.compute_major == 0) return "";
  std::istringstream words(archs);
  for (std::string arch; words >> arch;)
    if (arch == "native" || arch.compare(0, 3, "all") == 0 || runs_on(arch, device)) return "";
  return "compiled for " + archs + ", not for compute capability " + std::to_string(device.compute_major) + "." +
         std::to_string(device.compute_minor);
}

}  // namespace flashcore::cuda
