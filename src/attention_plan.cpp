// AttentionPlan: a call checked and dispatched once. `run` checks that the tensors describe the planned problem again.
#include <string>
#include <string_view>
#include <utility>

#include "flashcore/attention.h"
#include "flashcore/device.h"
#include "flashcore/error.h"
#include "kernels/kernel.h"
#include "log.h"
#include "plan.h"
#include "validate.h"

namespace flashcore {

struct AttentionPlan::State {
  State(const detail::Call& call, const AttentionOptions& given)
      : kernel_name(given.kernel),
        options(given),
        plan(detail::make_plan(call.problem, device_info(call.device), given.kernel)) {
    options.kernel = kernel_name;
    detail::log_plan(plan, device_info(call.device));
  }

  template <class... Tensors>
  void run(void* workspace, Stream stream, const Tensors&... tensors) const {
    const detail::Call call = detail::validate(tensors..., options, detail::Check::everything, stream);
    if (call.problem != plan.problem || call.device != plan.device)
      throw InvalidArgument("this plan is for \"" + to_line(plan.problem) + "\" on " + name_of(plan.device) +
                            ", but the tensors given are \"" + to_line(call.problem) + "\" on " + name_of(call.device));
    if (!workspace && plan.workspace.bytes() > 0)
      throw InvalidArgument("this plan needs a workspace of " + std::to_string(plan.workspace.bytes()) +
                            " bytes, null was given");
    plan.kernel->launch(plan, call.params, workspace, stream);
  }

  std::string kernel_name;  // what options.kernel points to
  AttentionOptions options;
  detail::Plan plan;
};

AttentionPlan::AttentionPlan(std::shared_ptr<const State> state) : state_(std::move(state)) {}

AttentionPlan AttentionPlan::forward(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                     const AttentionOptions& options) {
  return AttentionPlan(std::make_shared<const State>(
      detail::validate(inputs, outputs, options, detail::Check::shapes, nullptr), options));
}

AttentionPlan AttentionPlan::backward(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                                      const AttentionCotangents& cotangents, const AttentionGrads& grads,
                                      const AttentionOptions& options) {
  return AttentionPlan(std::make_shared<const State>(
      detail::validate(inputs, outputs, cotangents, grads, options, detail::Check::shapes, nullptr), options));
}

AttentionPlan AttentionPlan::decode(const DecodeInputs& inputs, const AttentionOutputs& outputs,
                                    const AttentionOptions& options) {
  return AttentionPlan(std::make_shared<const State>(
      detail::validate(inputs, outputs, options, detail::Check::shapes, nullptr), options));
}

std::size_t AttentionPlan::workspace_bytes() const noexcept { return state_->plan.workspace.bytes(); }

std::string AttentionPlan::kernel() const { return detail::kernel_word(state_->plan); }

std::string AttentionPlan::describe() const {
  const detail::Plan& plan = state_->plan;
  return to_line(plan.problem) + " on " + name_of(plan.device) + " -> " + detail::kernel_word(plan) + ", workspace " +
         std::to_string(plan.workspace.bytes()) + " bytes";
}

void AttentionPlan::run(const AttentionInputs& inputs, const AttentionOutputs& outputs, void* workspace,
                        Stream stream) const {
  state_->run(workspace, stream, inputs, outputs);
}

void AttentionPlan::run(const AttentionInputs& inputs, const AttentionOutputs& outputs,
                        const AttentionCotangents& cotangents, const AttentionGrads& grads, void* workspace,
                        Stream stream) const {
  state_->run(workspace, stream, inputs, outputs, cotangents, grads);
}

void AttentionPlan::run(const DecodeInputs& inputs, const AttentionOutputs& outputs, void* workspace,
                        Stream stream) const {
  state_->run(workspace, stream, inputs, outputs);
}

}  // namespace flashcore
