// The fast CPU backward: a task for each key head, each with workspace of its own while it runs.
//
// Where key heads are few their keys are cut into chunks, and dq is the sum of what each chunk gives to it. With more
// threads than key heads each chunk is a task of its own, and its part of dq is written as floats. The cut follows from
// the problem alone, so that the bits do not depend on the number of threads.
#include <algorithm>
#include <array>
#include <atomic>

#include "../semantics.h"
#include "executor.h"
#include "flash.h"
#include "flashcore/threads.h"
#include "kernels.h"
#include "mask_extents.h"
#include "rows.h"
#include "simd/isa.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

enum Slice { kTasks, kSinkGrads, kMaskExtents, kQueryParts };  // the workspace's parts

/// As many workspaces as tasks run at a time.
constexpr int kMaxWorkspaces = 64;

/// How the keys of a head are cut.
struct Chunks {
  std::int64_t count;
  std::int64_t keys;  // of each but the last

  explicit Chunks(const Sizes& s) {
    constexpr std::int64_t kTasks = 16;
    constexpr std::int64_t kFewestKeys = 1024;   // to take in queries once more costs 4 to 8 per cent
    constexpr std::int64_t kPartsOfQueries = 4;  // parts of dq, in units of q, unless heads are very few
    const std::int64_t most_parts = std::max(kPartsOfQueries, kTasks / std::max<std::int64_t>(1, s.batch * s.heads_q));
    const std::int64_t wanted = std::min(kTasks / std::max<std::int64_t>(1, s.batch * s.heads_k), most_parts);
    const std::int64_t blocks = (s.seqlen_k + kFewestKeys - 1) / kFewestKeys;
    const std::int64_t most = std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(1, blocks));
    keys = std::max<std::int64_t>(1, (blocks + most - 1) / most) * kFewestKeys;
    count = std::max<std::int64_t>(1, (s.seqlen_k + keys - 1) / keys);
  }
};

std::int64_t chunk_queries(const Problem& problem, const Isa& isa) {
  return isa.backward_queries(problem.dtype, problem.size.head_dim, problem.size.head_dim_v);
}

/// How a call is cut into tasks: by key heads, or by chunks of their keys as well.
struct Cut {
  Chunks chunks;
  bool by_chunks;

  Cut(const Sizes& s, bool more_threads_than_heads)
      : chunks(s), by_chunks(more_threads_than_heads && chunks.count > 1) {}

  std::int64_t tasks_of_head() const { return by_chunks ? chunks.count : 1; }
  std::int64_t keys_of_task(const Sizes& s) const { return by_chunks ? std::min(chunks.keys, s.seqlen_k) : s.seqlen_k; }
  std::size_t task_bytes(const Problem& problem, const Isa& isa) const {
    const Sizes& s = problem.size;
    constexpr std::size_t kLine = WorkspaceLayout::kAlignment;
    const bool several = chunks.count > 1 && !by_chunks;
    const std::int64_t queries = std::min<std::int64_t>(s.seqlen_q, chunk_queries(problem, isa));
    const std::size_t bytes =
        Isa::backward_workspace(s.seqlen_q, queries, keys_of_task(s), s.head_dim, s.head_dim_v, several);
    return (bytes + kLine - 1) / kLine * kLine;
  }
};

/// Floats of a part of dq: of the heads that share a key head.
std::int64_t part_floats(const Problem& problem) {
  return problem.group() * problem.size.seqlen_q * Isa::dq_width(problem.size.head_dim);
}

/// Lends one of `count` workspaces to each running task.
class Workspaces {
 public:
  explicit Workspaces(int count) : count_(count) {}

  int take() {
    for (int n = 0;; n = (n + 1) % count_)
      if (!taken_[static_cast<std::size_t>(n)].exchange(true, std::memory_order_acquire)) return n;
  }
  void give_back(int n) { taken_[static_cast<std::size_t>(n)].store(false, std::memory_order_release); }

 private:
  const int count_;
  std::array<std::atomic<bool>, kMaxWorkspaces> taken_ = {};
};

/// Of the five products, two or three of which each part needs.
double operations_of(const Params& p) {
  return 5.0 * static_cast<double>(p.size.total_q * p.size.heads_q) *
         static_cast<double>(p.size.seqlen_k * (p.size.head_dim + p.size.head_dim_v));
}

/// What no task writes: rows that no sequence owns, and keys beyond a used length.
template <class T>
void clear_unowned_gradients(const Params& p) {
  if (!p.sequence.cu_seqlens_q && !p.sequence.cu_seqlens_k && !p.sequence.seqused_k) return;
  fill(p.grad.dq, query_extents(p, p.size.head_dim), T{});
  fill(p.grad.dk, key_extents(p, p.size.head_dim), T{});
  fill(p.grad.dv, key_extents(p, p.size.head_dim_v), T{});
}

/// Every tile of dbias is a task.
void launch_bias_gradient(const Params& p, const Isa& isa) {
  const std::int64_t (&shape)[4] = p.grad.dbias_shape;
  const std::int64_t block_queries = isa.lanes * isa.tile_vectors;
  const std::int64_t query_blocks = (shape[2] + block_queries - 1) / block_queries;
  const std::int64_t key_blocks = (shape[3] + isa.block_keys - 1) / isa.block_keys;
  const std::size_t scratch = isa.bias_grad_scratch(p.size.head_dim, p.size.head_dim_v);
  const int threads = threads_for(operations_of(p));
  parallel_for(shape[0] * shape[1] * query_blocks * key_blocks, threads, [&](std::int64_t index) {
    const std::int64_t row = index / key_blocks;
    const std::int64_t plane = row / query_blocks;
    const BiasGradTask task{plane / shape[1], plane % shape[1], row % query_blocks, index % key_blocks};
    isa.bias_grad(p, task, thread_scratch(scratch));
  });
}

void sum_query_parts(const Params& p, const Isa& isa, const Chunks& chunks, const float* parts, std::int64_t floats,
                     int threads) {
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  parallel_for(p.size.batch * p.size.heads_q, threads, [&](std::int64_t index) {
    const std::int64_t head = index % p.size.heads_q;
    const Sequence sequence = sequence_of(p, index / p.size.heads_q);
    const std::int64_t own = std::max<std::int64_t>(1, (sequence.seqlen_k + chunks.keys - 1) / chunks.keys);
    const float* first = parts + index / group * chunks.count * floats +
                         head % group * sequence.seqlen_q * Isa::dq_width(p.size.head_dim);
    isa.sum_dq(p, sequence, head, first, floats, own);
  });
}

void store_sink_gradients(const Params& p, const double* parts) {
  for (std::int64_t head = 0; head < p.size.heads_q; ++head) {
    double sum = 0;
    for (std::int64_t batch = 0; batch < p.size.batch; ++batch) sum += parts[batch * p.size.heads_q + head];
    store_as(p.grad.dsinks.data, p.grad.dsinks.dtype, head * p.grad.dsinks.head, sum);
  }
}

}  // namespace

void plan_flash_backward(const Problem& problem, const DeviceInfo&, Plan& plan) {
  plan_isa(problem, plan);
  MaskExtents::plan(plan, kMaskExtents);
  const Sizes& size = problem.size;
  const Cut cut(size, num_threads() > size.batch * size.heads_k);
  const std::int64_t tasks = std::max<std::int64_t>(1, size.batch * size.heads_k * cut.tasks_of_head());
  plan.splits = static_cast<int>(std::min<std::int64_t>({tasks, num_threads(), kMaxWorkspaces}));
  plan.slices[kTasks] =
      plan.workspace.add(static_cast<std::size_t>(plan.splits) * cut.task_bytes(problem, isa_of(plan)));
  if (cut.by_chunks)
    plan.slices[kQueryParts] =
        plan.workspace.add(static_cast<std::size_t>(tasks * part_floats(problem)) * sizeof(float));
  if (problem.flags & kDsinks)
    plan.slices[kSinkGrads] = plan.workspace.add(static_cast<std::size_t>(size.batch * size.heads_q) * sizeof(double));
}

void launch_flash_backward(const Plan& plan, const Params& params, void* workspace, Stream) {
  with_wide_storage(params.dtype, [&](auto storage) { clear_unowned_gradients<decltype(storage)>(params); });
  const Isa& isa = isa_of(plan);
  const SizeParams& size = params.size;
  const int threads = std::min(plan.splits, threads_for(operations_of(params)));
  const std::size_t scratch = isa.backward_scratch(size.head_dim, size.head_dim_v);
  const Cut cut(plan.problem.size, plan.splits > size.batch * size.heads_k);
  const std::size_t bytes = cut.task_bytes(plan.problem, isa);
  double* dsinks = params.grad.dsinks.data ? slice<double>(workspace, plan.slices[kSinkGrads]) : nullptr;
  const MaskExtents mask_extents(plan, params, workspace, kMaskExtents);
  Workspaces workspaces(plan.splits);
  const std::int64_t floats = part_floats(plan.problem);
  const std::int64_t tasks = cut.tasks_of_head();
  const std::int64_t keys = cut.keys_of_task(plan.problem.size);
  const std::int64_t queries = chunk_queries(plan.problem, isa);
  float* parts = cut.by_chunks ? slice<float>(workspace, plan.slices[kQueryParts]) : nullptr;
  parallel_for(size.batch * size.heads_k * tasks, threads, [&](std::int64_t index) {
    const std::int64_t head = index / tasks;
    const std::int64_t batch = head / size.heads_k;
    const std::int64_t first = index % tasks * keys;
    const Sequence sequence = sequence_of(params, batch);
    if (first > 0 && first >= sequence.seqlen_k) return;
    void* tiles = thread_scratch(scratch);
    const int own = workspaces.take();
    const BackwardTask task{sequence,
                            head % size.heads_k,
                            first,
                            std::min(first + keys, sequence.seqlen_k),
                            cut.chunks.keys,
                            queries,
                            parts ? parts + index * floats : nullptr,
                            slice<char>(workspace, plan.slices[kTasks] + static_cast<std::size_t>(own) * bytes),
                            dsinks,
                            mask_extents.of_sequence(batch)};
    isa.backward(params, task, tiles);
    workspaces.give_back(own);
  });
  if (parts && params.grad.dq.data) sum_query_parts(params, isa, cut.chunks, parts, floats, threads);
  if (dsinks) store_sink_gradients(params, dsinks);
  if (params.grad.dbias.data) launch_bias_gradient(params, isa);
}

}  // namespace flashcore::cpu
