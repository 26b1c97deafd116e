// The fast CPU decode: a few queries against many keys, cut into spans of keys so that all threads have work.
#include <algorithm>

#include "../semantics.h"
#include "executor.h"
#include "flash.h"
#include "kernels.h"
#include "simd/isa.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

/// Queries of a key head that are still few.
constexpr std::int64_t kMaxRows = 16;
/// Vectors run along head_dim and need one whole: the widest has 16 lanes.
constexpr std::int64_t kMinHeadDim = 16;
/// Keys of a task. Fixed, so that results do not depend on the number of threads.
constexpr std::int64_t kSpanKeys = 1024;

std::int64_t spans_of(std::int64_t seqlen_k) {
  return std::max<std::int64_t>(1, (seqlen_k + kSpanKeys - 1) / kSpanKeys);
}

}  // namespace

std::string refuse_flash_decode(const Problem& problem, const DeviceInfo&) {
  const std::int64_t rows = problem.group() * problem.size.seqlen_q;
  if (rows > kMaxRows)
    return "takes up to " + std::to_string(kMaxRows) + " queries a key head, these are " + std::to_string(rows);
  if (std::min(problem.size.head_dim, problem.size.head_dim_v) < kMinHeadDim)
    return "needs a head_dim of at least " + std::to_string(kMinHeadDim);
  return {};
}

void plan_flash_decode(const Problem& problem, const DeviceInfo& device, Plan& plan) {
  plan_flash_forward(problem, device, plan);
  const Sizes& size = problem.size;
  plan.splits = static_cast<int>(spans_of(size.seqlen_k));
  const std::int64_t partials = size.batch * size.heads_k * plan.splits;
  const std::int64_t floats = Isa::partial_floats(problem.group() * size.seqlen_q, size.head_dim_v);
  plan.slices[0] = plan.workspace.add(static_cast<std::size_t>(partials * floats) * sizeof(float));
}

void launch_flash_decode(const Plan& plan, const Params& params, void* workspace, Stream) {
  if (params.append.k_new.data) append_keys(params);
  clear_unowned_rows(params);
  const Isa& isa = chosen_isa();
  const SizeParams& size = params.size;
  const std::int64_t spans = plan.splits;
  const std::int64_t rows = size.heads_q / size.heads_k * size.seqlen_q;
  const std::int64_t floats = Isa::partial_floats(rows, size.head_dim_v);
  float* partials = slice<float>(workspace, plan.slices[0]);
  const std::int64_t heads = size.batch * size.heads_k;
  const int threads = threads_for(2.0 * static_cast<double>(heads * rows * size.seqlen_k) *
                                  static_cast<double>(size.head_dim + size.head_dim_v));
  const std::size_t scratch = isa.decode_scratch(rows, size.head_dim, size.head_dim_v);
  parallel_for(heads * spans, threads, [&](std::int64_t index) {
    const std::int64_t head = index / spans;
    const std::int64_t first = index % spans * kSpanKeys;
    const Sequence sequence = sequence_of(params, head / size.heads_k);
    const DecodeTask task{sequence, head % size.heads_k, first, std::min(first + kSpanKeys, sequence.seqlen_k),
                          partials + index * floats};
    isa.decode(params, task, thread_scratch(scratch));
  });
  parallel_for(heads, heads * rows < 256 ? 1 : threads, [&](std::int64_t head) {
    isa.merge_spans(params, sequence_of(params, head / size.heads_k), head % size.heads_k,
                    partials + head * spans * floats, spans);
  });
}

}  // namespace flashcore::cpu
