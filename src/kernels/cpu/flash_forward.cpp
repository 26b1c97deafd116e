// The fast CPU forward: cuts a call into tasks of query blocks and gives these to the threads.
#include <algorithm>
#include <limits>

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

enum Slice { kMaskExtents };  // the workspace's parts

/// Waking a thread pays from about this many operations for each thread on.
constexpr double kOperationsPerThread = 2e6;

/// How a call is cut. A task is `blocks` query blocks of one head, or all of those of `heads` heads of a group.
/// Results do not depend on the cut: a query block's arithmetic is its own.
struct Cut {
  std::int64_t blocks;
  std::int64_t heads;
  std::int64_t chunks;       // tasks that the blocks of a head make
  std::int64_t head_chunks;  // tasks that the heads of a group make
};

Cut cut_call(const Params& p, const Isa& isa, int threads) {
  const std::int64_t all = std::max<std::int64_t>(1, isa.query_blocks(p.size.seqlen_q));
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  const std::int64_t block_queries = isa.lanes * isa.tile_vectors;
  const std::int64_t block_bytes =
      static_cast<std::int64_t>(sizeof(float)) * block_queries * (p.size.head_dim + p.size.head_dim_v);
  const std::int64_t most = std::clamp<std::int64_t>(isa.task_bytes / block_bytes, 1, isa.task_queries / block_queries);
  const auto cut_to = [&](std::int64_t limit) {
    Cut cut{std::min(all, limit), 1, 1, group};
    if (all <= limit) cut.heads = std::min(group, limit / all);
    cut.chunks = (all + cut.blocks - 1) / cut.blocks;
    cut.blocks = (all + cut.chunks - 1) / cut.chunks;  // of equal size
    cut.head_chunks = (group + cut.heads - 1) / cut.heads;
    return cut;
  };
  Cut cut = cut_to(most);
  for (std::int64_t limit = most - 1; limit > 1 && threads > 1; --limit) {
    if (p.size.batch * p.size.heads_k * cut.head_chunks * cut.chunks >= 4 * threads) break;
    cut = cut_to(limit);
  }
  return cut;
}

ForwardTask task_of(const Params& p, const Isa& isa, const Cut& cut, const MaskExtents& mask_extents,
                    std::int64_t index) {
  // Note: the chunks of a head follow each other, so that its keys stay in the cache, except under a causal rule: there
  // the last queries, which have most work, come first, so that threads end together.
  const std::int64_t head_tasks = p.size.batch * p.size.heads_k * cut.head_chunks;
  const std::int64_t chunk = p.position.causal ? cut.chunks - 1 - index / head_tasks : index % cut.chunks;
  std::int64_t rest = p.position.causal ? index % head_tasks : index / cut.chunks;
  const std::int64_t head_chunk = rest % cut.head_chunks;
  rest /= cut.head_chunks;
  const std::int64_t group = p.size.heads_q / p.size.heads_k;
  const std::int64_t head_k = rest % p.size.heads_k;
  const std::int64_t first_head = head_k * group;
  ForwardTask task;
  task.sequence = sequence_of(p, rest / p.size.heads_k);
  task.mask_extents = mask_extents.of_sequence(rest / p.size.heads_k);
  task.head_begin = first_head + head_chunk * cut.heads;
  task.head_end = std::min(task.head_begin + cut.heads, first_head + group);
  const std::int64_t blocks = isa.query_blocks(task.sequence.seqlen_q);
  task.block_begin = std::min(chunk * cut.blocks, blocks);
  task.block_end = std::min(task.block_begin + cut.blocks, blocks);
  return task;
}

double operations_of(const Params& p) {
  const double pairs = static_cast<double>(p.size.total_q) * static_cast<double>(p.size.heads_q) *
                       static_cast<double>(p.size.seqlen_k) * (p.position.causal ? 0.5 : 1.0);
  return 2.0 * pairs * static_cast<double>(p.size.head_dim + p.size.head_dim_v);
}

template <class T>
void clear_rows(const Params& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t head = 0; head < p.size.heads_q; ++head)
    for (std::int64_t i = begin; i < end; ++i) {
      std::fill_n(static_cast<T*>(p.out.data) + head * p.out.head + i * p.out.seq, p.size.head_dim_v, T{});
      if (p.lse.data)
        static_cast<float*>(p.lse.data)[head * p.lse.head + i * p.lse.seq] = -std::numeric_limits<float>::infinity();
    }
}

}  // namespace

int threads_for(double operations) {
  return static_cast<int>(std::min<double>(num_threads(), 1 + operations / kOperationsPerThread));
}

void clear_unowned_rows(const Params& p) {
  if (!p.sequence.cu_seqlens_q) return;
  const auto clear = [&p](std::int64_t begin, std::int64_t end) {
    with_wide_storage(p.dtype, [&](auto storage) { clear_rows<decltype(storage)>(p, begin, end); });
  };
  std::int64_t owned = 0;
  for (std::int64_t batch = 0; batch < p.size.batch; ++batch) {
    const Sequence s = sequence_of(p, batch);
    clear(owned, s.q_begin);
    owned = std::max(owned, s.q_begin + s.seqlen_q);
  }
  clear(owned, p.size.total_q);
}

void plan_isa(const Problem& problem, Plan& plan) {
  // Note: one product of floats is six of their parts. With them AMX is up to 1.4 times as fast as AVX-512, but where a
  // machine slows it down to a quarter, as some do for seconds on end, half as fast. Which it is, tuning finds out.
  const Isa* isa = &chosen_isa(problem.dtype != DType::float32);
  if (!plan.setting.empty())
    for (const Isa* other : usable_isas())
      if (plan.setting == other->name) isa = other;
  plan.variant = isa;
  num_threads();  // throws for settings that cannot be followed
}

std::vector<std::string> isa_settings(const Problem&, const DeviceInfo&) {
  std::vector<std::string> names;
  for (const Isa* isa : usable_isas()) names.emplace_back(isa->name);
  return names;
}

const Isa& isa_of(const Plan& plan) { return *static_cast<const Isa*>(plan.variant); }

void plan_flash_forward(const Problem& problem, const DeviceInfo&, Plan& plan) {
  plan_isa(problem, plan);
  MaskExtents::plan(plan, kMaskExtents);
}

void launch_flash_forward(const Plan& plan, const Params& params, void* workspace, Stream) {
  if (params.append.k_new.data) append_keys(params);
  clear_unowned_rows(params);
  const Isa& isa = isa_of(plan);
  const int threads = threads_for(operations_of(params));
  const Cut cut = cut_call(params, isa, threads);
  const std::int64_t tasks = params.size.batch * params.size.heads_k * cut.head_chunks * cut.chunks;
  const std::size_t scratch = isa.forward_scratch(params.size.head_dim, params.size.head_dim_v, cut.blocks * cut.heads);
  const MaskExtents mask_extents(plan, params, workspace, kMaskExtents);
  parallel_for(tasks, threads, [&](std::int64_t index) {
    const ForwardTask task = task_of(params, isa, cut, mask_extents, index);
    if (task.block_begin < task.block_end) isa.forward(params, task, thread_scratch(scratch));
  });
}

}  // namespace flashcore::cpu
