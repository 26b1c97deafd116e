// One instance of the forward kernel behind C functions: what `python -m flashcore tune` compiles for every tile that
// it tries. No part of the library. The instance comes as macros:
//
//   #define FLASHCORE_TUNE_ELEMENT BFloat16
//   #define FLASHCORE_TUNE_BUCKET 64
//   #define FLASHCORE_TUNE_KIND full
//   #define FLASHCORE_FWD_TILE 192, 128, 2, 2, true, false, 32, 160, 8, 32   (left out: the tile of tiles.h)
#include <cstdio>
#include <exception>
#include <type_traits>

#include "fwd_launch.cuh"

using namespace flashcore;

using Element = detail::FLASHCORE_TUNE_ELEMENT;
using Traits = sm90::FwdTraits<Element, FLASHCORE_TUNE_BUCKET, sm90::FwdKind::FLASHCORE_TUNE_KIND>;

/// A call on contiguous tensors (batch, heads, seqlen, head_dim). python/flashcore/tune/instance.py has it, too.
struct TuneCall {
  void* q;
  void* k;
  void* v;
  void* out;
  float* lse;  // (batch, heads_q, seqlen_q), or null
  void* workspace;
  Stream stream;
  std::int64_t batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v;
  std::int64_t causal, top_left, window_left, window_right;  // -1: unbounded
  std::int64_t device, multiprocessors;
  double scale, softcap;
};

namespace {

detail::TensorParams contiguous(void* data, std::int64_t heads, std::int64_t rows, std::int64_t dim) {
  return {data, heads * rows * dim, rows * dim, dim};
}

detail::Params params_of(const TuneCall& call) {
  detail::Params p;
  p.dtype = p.dtype_out = std::is_same_v<Element, detail::Float16> ? DType::float16 : DType::bfloat16;
  p.size.batch = call.batch;
  p.size.seqlen_q = call.seqlen_q;
  p.size.seqlen_k = call.seqlen_k;
  p.size.total_q = call.batch * call.seqlen_q;
  p.size.total_k = call.batch * call.seqlen_k;
  p.size.heads_q = static_cast<std::int32_t>(call.heads_q);
  p.size.heads_k = static_cast<std::int32_t>(call.heads_k);
  p.size.head_dim = static_cast<std::int32_t>(call.head_dim);
  p.size.head_dim_v = static_cast<std::int32_t>(call.head_dim_v);
  p.q = contiguous(call.q, call.heads_q, call.seqlen_q, call.head_dim);
  p.k = contiguous(call.k, call.heads_k, call.seqlen_k, call.head_dim);
  p.v = contiguous(call.v, call.heads_k, call.seqlen_k, call.head_dim_v);
  p.out = contiguous(call.out, call.heads_q, call.seqlen_q, call.head_dim_v);
  p.lse = {call.lse, call.heads_q * call.seqlen_q, call.seqlen_q, 1};
  p.position.causal = call.causal != 0;
  p.position.top_left = call.top_left != 0;
  p.position.window_left = call.window_left;
  p.position.window_right = call.window_right;
  p.score.scale = call.scale;
  p.score.softcap = call.softcap;
  return p;
}

detail::Plan plan_of(const TuneCall& call, const detail::Params& p) {
  detail::Plan plan;
  plan.device = {DeviceType::cuda, static_cast<int>(call.device)};
  plan.blocks = static_cast<int>(call.multiprocessors);
  sm90::plan_fwd_slices(false, p.size, plan);
  return plan;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) std::size_t flashcore_tune_workspace(const TuneCall* call) {
  return plan_of(*call, params_of(*call)).workspace.bytes();
}

/// 0, or 1 and why in `message`.
__attribute__((visibility("default"))) int flashcore_tune_run(const TuneCall* call, char* message, std::size_t bytes) {
  try {
    const detail::Params p = params_of(*call);
    const cuda::DeviceGuard guard(static_cast<int>(call->device));
    sm90::launch_fwd<Traits>(plan_of(*call, p), p, call->workspace, call->stream);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, bytes, "%s", error.what());
    return 1;
  }
}

}  // extern "C"
