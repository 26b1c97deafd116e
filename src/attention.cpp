// The spine: the public calls are validate -> make_plan -> launch, nothing else.
#include "flashcore/attention.h"

#include <exception>

#include "flashcore/device.h"
#include "flashcore/memory.h"
#include "kernels/kernel.h"
#include "log.h"
#include "plan.h"
#include "validate.h"

namespace flashcore {
namespace {

using detail::Call;
using detail::Check;

void run(const Call& call, const AttentionOptions& options, Stream stream) {
  const DeviceInfo& device = device_info(call.device);
  const detail::Plan plan = detail::make_plan(call.problem, device, options.kernel);
  detail::log_plan(plan, device);
  const Buffer workspace(plan.workspace.bytes(), call.device, stream);
  plan.kernel->launch(plan, call.params, workspace.data(), stream);
}

template <class... Tensors>
Support try_to_plan(const AttentionOptions& options, const Tensors&... tensors) {
  try {
    const Call call = detail::validate(tensors..., options, Check::shapes, nullptr);
    return {true, kernel_word(detail::make_plan(call.problem, device_info(call.device), options.kernel)), {}};
  } catch (const std::exception& reason) {
    return {false, {}, reason.what()};
  }
}

template <class... Tensors>
std::string explain_call(const AttentionOptions& options, const Tensors&... tensors) {
  const Call call = detail::validate(tensors..., options, Check::shapes, nullptr);
  return detail::explain_plan(call.problem, device_info(call.device), options.kernel);
}

}  // namespace

void attention_forward(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options,
                       Stream stream) {
  run(detail::validate(inputs, outputs, options, Check::everything, stream), options, stream);
}

void attention_backward(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                        const AttentionCotangents& cotangents, const AttentionGrads& grads,
                        const AttentionOptions& options, Stream stream) {
  run(detail::validate(inputs, outputs, cotangents, grads, options, Check::everything, stream), options, stream);
}

void attention_decode(const DecodeInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options,
                      Stream stream) {
  run(detail::validate(inputs, outputs, options, Check::everything, stream), options, stream);
}

Support supports(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options) {
  return try_to_plan(options, inputs, outputs);
}

Support supports(const DecodeInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options) {
  return try_to_plan(options, inputs, outputs);
}

Support supports(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
                 const AttentionGrads& grads, const AttentionOptions& options) {
  return try_to_plan(options, inputs, outputs, cotangents, grads);
}

std::string explain(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options) {
  return explain_call(options, inputs, outputs);
}

std::string explain(const DecodeInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options) {
  return explain_call(options, inputs, outputs);
}

std::string explain(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                    const AttentionCotangents& cotangents, const AttentionGrads& grads,
                    const AttentionOptions& options) {
  return explain_call(options, inputs, outputs, cotangents, grads);
}

std::string explain(std::string_view problem_line, Device device, std::string_view kernel) {
  return detail::explain_plan(detail::parse_problem(problem_line), device_info(device), kernel);
}

}  // namespace flashcore
