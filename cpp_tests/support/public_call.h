// PublicCall: the arguments of a public call, taken from an AttentionCase, free to be spoilt before the call.
#pragma once

#include "attention_case.h"
#include "problem.h"

namespace flashcore::testing {

struct PublicCall {
  explicit PublicCall(const std::string& line, Device device = {}, const Variant& variant = all_variants()[0])
      : tensors(detail::parse_problem(line), device, variant),
        phase(tensors.problem.phase),
        in(tensors.inputs()),
        decode(tensors.decode_inputs()),
        out(tensors.outputs()),
        cotangents(tensors.cotangents()),
        grads(tensors.grads()),
        options(tensors.options) {}

  void run(Stream stream = nullptr) const {
    if (phase == detail::Phase::decode) {
      attention_decode(decode, out, options, stream);
    } else if (phase == detail::Phase::backward) {
      attention_backward(in, out, cotangents, grads, options, stream);
    } else {
      attention_forward(in, out, options, stream);
    }
  }

  Support supports() const {
    if (phase == detail::Phase::decode) return flashcore::supports(decode, out, options);
    if (phase == detail::Phase::backward) return flashcore::supports(in, out, cotangents, grads, options);
    return flashcore::supports(in, out, options);
  }

  AttentionPlan plan() const {
    if (phase == detail::Phase::decode) return AttentionPlan::decode(decode, out, options);
    if (phase == detail::Phase::backward) return AttentionPlan::backward(in, out, cotangents, grads, options);
    return AttentionPlan::forward(in, out, options);
  }

  void run(const AttentionPlan& plan, void* workspace, Stream stream = nullptr) const {
    if (phase == detail::Phase::decode) {
      plan.run(decode, out, workspace, stream);
    } else if (phase == detail::Phase::backward) {
      plan.run(in, out, cotangents, grads, workspace, stream);
    } else {
      plan.run(in, out, workspace, stream);
    }
  }

  AttentionCase tensors;
  detail::Phase phase;
  AttentionInputs in;
  DecodeInputs decode;
  AttentionOutputs out;
  AttentionCotangents cotangents;
  AttentionGrads grads;
  AttentionOptions options;
};

}  // namespace flashcore::testing
