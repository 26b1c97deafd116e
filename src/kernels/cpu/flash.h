// What the vectorised rows of the CPU backend give to its table.
#pragma once

#include <string>
#include <vector>

#include "../kernel.h"

namespace flashcore::cpu {

struct Isa;

/// Chooses the instruction set: the one that the plan's setting names, else the best for the problem. Throws
/// InvalidArgument where FLASHCORE_CPU_ISA or FLASHCORE_NUM_THREADS cannot be followed.
void plan_isa(const detail::Problem& problem, detail::Plan& plan);
/// The settings of rows that do so: the names of the instruction sets.
std::vector<std::string> isa_settings(const detail::Problem& problem, const DeviceInfo& device);
/// What was chosen.
const Isa& isa_of(const detail::Plan& plan);

void plan_flash_forward(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
void launch_flash_forward(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

/// Empty, or why a call is not for the decode row.
std::string refuse_flash_decode(const detail::Problem& problem, const DeviceInfo& device);
/// "splits<n>": keys in so many spans.
std::vector<std::string> flash_decode_settings(const detail::Problem& problem, const DeviceInfo& device);
void plan_flash_decode(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
void launch_flash_decode(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

void plan_flash_backward(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
void launch_flash_backward(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

/// Threads that are worth waking for a call of so many operations.
int threads_for(double operations);

/// Rows that no sequence owns: out = 0, lse = −inf.
void clear_unowned_rows(const detail::Params& params);

}  // namespace flashcore::cpu
