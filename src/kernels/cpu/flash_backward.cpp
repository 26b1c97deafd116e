// The fast CPU backward: a task for each key head, each with workspace of its own while it runs.
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

enum Slice { kTasks, kSinkGrads, kMaskExtents };  // the workspace's parts

/// As many workspaces as tasks run at a time.
constexpr int kMaxWorkspaces = 64;

std::size_t task_bytes(const Sizes& s) {
  constexpr std::size_t kLine = WorkspaceLayout::kAlignment;
  const std::size_t bytes = Isa::backward_workspace(s.seqlen_q, s.seqlen_k, s.head_dim, s.head_dim_v);
  return (bytes + kLine - 1) / kLine * kLine;
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

void store_sink_gradients(const Params& p, const double* parts) {
  for (std::int64_t head = 0; head < p.size.heads_q; ++head) {
    double sum = 0;
    for (std::int64_t batch = 0; batch < p.size.batch; ++batch) sum += parts[batch * p.size.heads_q + head];
    store_as(p.grad.dsinks.data, p.grad.dsinks.dtype, head * p.grad.dsinks.head, sum);
  }
}

}  // namespace

void plan_flash_backward(const Problem& problem, const DeviceInfo&, Plan& plan) {
  plan_settings(plan);
  MaskExtents::plan(plan, kMaskExtents);
  const Sizes& size = problem.size;
  const std::int64_t tasks = std::max<std::int64_t>(1, size.batch * size.heads_k);
  plan.splits = static_cast<int>(std::min<std::int64_t>({tasks, num_threads(), kMaxWorkspaces}));
  plan.slices[kTasks] = plan.workspace.add(static_cast<std::size_t>(plan.splits) * task_bytes(size));
  if (problem.flags & kDsinks)
    plan.slices[kSinkGrads] = plan.workspace.add(static_cast<std::size_t>(size.batch * size.heads_q) * sizeof(double));
}

void launch_flash_backward(const Plan& plan, const Params& params, void* workspace, Stream) {
  with_wide_storage(params.dtype, [&](auto storage) { clear_unowned_gradients<decltype(storage)>(params); });
  const Isa& isa = isa_of(plan);
  const SizeParams& size = params.size;
  const int threads = std::min(plan.splits, threads_for(operations_of(params)));
  const std::size_t scratch = isa.backward_scratch(size.head_dim, size.head_dim_v);
  const std::size_t bytes = task_bytes(plan.problem.size);
  double* dsinks = params.grad.dsinks.data ? slice<double>(workspace, plan.slices[kSinkGrads]) : nullptr;
  const MaskExtents mask_extents(plan, params, workspace, kMaskExtents);
  Workspaces workspaces(plan.splits);
  parallel_for(size.batch * size.heads_k, threads, [&](std::int64_t index) {
    void* tiles = thread_scratch(scratch);
    const int own = workspaces.take();
    const BackwardTask task{sequence_of(params, index / size.heads_k), index % size.heads_k,
                            slice<char>(workspace, plan.slices[kTasks] + static_cast<std::size_t>(own) * bytes), dsinks,
                            mask_extents.of_sequence(index / size.heads_k)};
    isa.backward(params, task, tiles);
    workspaces.give_back(own);
  });
  if (dsinks) store_sink_gradients(params, dsinks);
  if (params.grad.dbias.data) launch_bias_gradient(params, isa);
}

}  // namespace flashcore::cpu
