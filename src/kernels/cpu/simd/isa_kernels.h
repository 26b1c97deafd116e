// All kernels of one instruction set: what each isa_*.cpp compiles with its own flags.
#pragma once

#include "linkage.h"

#include "backward.h"
#include "bias_grad.h"
#include "decode.h"
#include "forward.h"

namespace flashcore::cpu {
namespace {

constexpr Isa isa_kernels(const char* name) {
  return {
      .name = name,
      .in_parts = kMultipliesInParts,
      .lanes = kLanes,
      .tile_vectors = kTileVectors,
      .task_queries = kTaskQueries,
      .task_bytes = kTaskBytes,
      .forward = forward,
      .forward_scratch = forward_scratch,
      .few_queries = kFewQueries,
      .decode = decode,
      .decode_scratch = decode_scratch,
      .merge_spans = merge_spans,
      .backward = backward,
      .backward_scratch = backward_scratch,
      .backward_queries = backward_queries,
      .sum_dq = sum_dq,
      .bias_grad = bias_grad,
      .bias_grad_scratch = bias_grad_scratch,
      .block_keys = kBlockKeys,
  };
}

}  // namespace
}  // namespace flashcore::cpu
