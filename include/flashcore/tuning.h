// Tuned kernels: which kernel was measured to be the best for a problem on a device, kept in a file.
//
// Without a file the order of the kernels decides, the same everywhere. A file changes that for the problems that it
// names: each call then runs the kernel that the file has for its device's name and its problem line. The lines have to
// be the same in canonical form; only the seed of dropout does not count. A kernel that is asked for by
// AttentionOptions::kernel or FLASHCORE_KERNEL comes first. A tuned kernel that this build does not have, or that does
// not take the problem, is passed over; explain() tells so. Another kernel gives other bits within the same bounds.
//
//   flashcore-tuned 1
//   [NVIDIA H200]
//   fwd bf16 b2 q4096 k4096 h32/8 d128 causal -> cuda.sm90.fwd_d256
//   [Intel(R) Xeon(R) Platinum 8480+]
//   decode fp32 b1 q1 k8192 h32/8 d128 -> cpu.decode:splits32  # a note
//
// What stands behind " # " is a note. Empty lines and those that begin with # do not count.
//
// FLASHCORE_TUNED=FILE is read once, by the first call that has to choose. Such files are written by
// `python -m flashcore tune --rows`.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "flashcore/tensor.h"

namespace flashcore {

/// A line of a file.
struct TunedKernel {
  std::string device_name;   ///< as DeviceInfo has it
  std::string problem_line;  ///< canonical, without a seed
  std::string kernel;        ///< as AttentionOptions::kernel takes it
  std::string note;          ///< what stands behind "#"; does not count
};

/// Reads a file. Throws InvalidArgument where it cannot be read ("FILE: …"), or naming the line ("FILE:LINE: …").
FLASHCORE_API std::vector<TunedKernel> read_tuned(const std::string& path);

/// Reads a file, and from now on, in every thread, chooses kernels by it instead of by what was loaded before or what
/// FLASHCORE_TUNED names. Plans that are made already stay as they are. Throws like read_tuned; then nothing changes.
FLASHCORE_API void load_tuned(const std::string& path);

/// From now on no kernel is tuned, whatever FLASHCORE_TUNED says.
FLASHCORE_API void forget_tuned() noexcept;

/// Everything that AttentionOptions::kernel can be for a problem on a device: "cpu.flash", "cpu.decode:splits4". First
/// the one that runs where nothing is tuned. Throws InvalidArgument for a line that cannot be read.
FLASHCORE_API std::vector<std::string> kernel_choices(std::string_view problem_line, Device device);

}  // namespace flashcore
