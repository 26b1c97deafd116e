// What the files of the CPU backend give to its table: plans, launches and the small primitives.
#pragma once

#include "../kernel.h"

namespace flashcore::cpu {

void plan_forward(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
/// Forward and decode: appends the new keys to the cache where there are any, then attends.
void launch_forward(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

void plan_backward(const detail::Problem& problem, const DeviceInfo& device, detail::Plan& plan);
void launch_backward(const detail::Plan& plan, const detail::Params& params, void* workspace, Stream stream);

/// Writes k_new (rotated where rotary is on) and v_new into the cache, behind the keys that it holds.
void append_keys(const detail::Params& params);

void merge_states(const detail::MergeParams& params, int index, Stream stream);
void vector_add(const detail::ArrayParams& a, const detail::ArrayParams& b, const detail::ArrayParams& out, int index,
                Stream stream);
void reduce(const detail::ReduceParams& params, int index, Stream stream);

}  // namespace flashcore::cpu
