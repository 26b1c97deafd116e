// validate: the caller's words -> a Problem and the Params that go with it. The only place that throws
// InvalidArgument and InvalidType for attention calls.
#pragma once

#include "flashcore/attention.h"
#include "kernels/params.h"
#include "problem.h"

namespace flashcore::detail {

/// A checked call: what is asked, and where its tensors are.
struct Call {
  Problem problem;
  Params params;
  Device device;
};

/// Whether the tensors' memory is looked at. Planning checks shapes, strides and dtypes only; running also checks
/// addresses (null, alignment, overlap) and, where the values lie on the CPU, lengths and page tables.
enum class Check { shapes, everything };

Call validate(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options,
              Check check, Stream stream);
Call validate(const AttentionInputs& inputs, const AttentionOutputs& outputs, const AttentionCotangents& cotangents,
              const AttentionGrads& grads, const AttentionOptions& options, Check check, Stream stream);
Call validate(const DecodeInputs& inputs, const AttentionOutputs& outputs, const AttentionOptions& options, Check check,
              Stream stream);

}  // namespace flashcore::detail
