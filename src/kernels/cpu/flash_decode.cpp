// The fast CPU decode: a few queries against many keys, cut into spans of keys so that all threads have work.
#include <algorithm>
#include <string>

#include "../semantics.h"
#include "executor.h"
#include "flash.h"
#include "flashcore/threads.h"
#include "kernels.h"
#include "simd/isa.h"

namespace flashcore::cpu {

using namespace detail;

namespace {

/// Queries of all heads that share a key head: so many are few in any case, more only if each head has few.
constexpr std::int64_t kFewRows = 16;
constexpr std::int64_t kMostRows = 256;  // their partial results take a tenth of the memory of keys and values
/// Vectors run along head_dim and need one whole: the widest has 16 lanes.
constexpr std::int64_t kMinHeadDim = 16;
/// Keys of a task. Fixed, so that results do not depend on the number of threads.
constexpr std::int64_t kSpanKeys = 1024;
/// Other spans are whole multiples of this, up to so many.
constexpr std::int64_t kSpanStep = 64;
constexpr std::int64_t kMostSpans = 256;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t even_span(std::int64_t seqlen_k, std::int64_t spans) {
  return divide_up(divide_up(seqlen_k, spans), kSpanStep) * kSpanStep;
}

/// Keys of a span: what the setting says, else kSpanKeys.
std::int64_t span_keys(const Plan& plan) {
  if (plan.setting.empty()) return kSpanKeys;
  return even_span(plan.problem.size.seqlen_k, plan.setting_number());
}

}  // namespace

std::string refuse_flash_decode(const Problem& problem, const DeviceInfo&) {
  // Note: most calls pass here, so the words are not put together from numbers.
  static_assert(kFewRows == 16 && kMinHeadDim == 16 && kMostRows == 256);
  const std::int64_t rows = problem.group() * problem.size.seqlen_q;
  if (rows > kMostRows || (rows > kFewRows && problem.size.seqlen_q > chosen_isa().few_queries))
    return "takes up to 16 queries a key head, up to 256 where each of its heads has but a few";
  if (std::min(problem.size.head_dim, problem.size.head_dim_v) < kMinHeadDim) return "needs a head_dim of 16 or more";
  return {};
}

std::vector<std::string> flash_decode_settings(const Problem& problem, const DeviceInfo&) {
  const std::int64_t keys = problem.size.seqlen_k;
  std::vector<std::string> words;
  for (std::int64_t spans = 1; spans <= std::min(kMostSpans, divide_up(keys, kSpanStep)); spans *= 2)
    if (divide_up(keys, even_span(keys, spans)) == spans) words.push_back("splits" + std::to_string(spans));
  return words;
}

void plan_flash_decode(const Problem& problem, const DeviceInfo&, Plan& plan) {
  plan.variant = &chosen_isa();
  num_threads();  // throws for settings that cannot be followed
  const Sizes& size = problem.size;
  plan.splits = static_cast<int>(std::max<std::int64_t>(1, divide_up(size.seqlen_k, span_keys(plan))));
  if (plan.splits == 1) return;
  const std::int64_t partials = size.batch * size.heads_k * plan.splits;
  const std::int64_t floats = Isa::partial_floats(problem.group() * size.seqlen_q, size.head_dim_v);
  plan.slices[0] = plan.workspace.add(static_cast<std::size_t>(partials * floats) * sizeof(float));
}

void launch_flash_decode(const Plan& plan, const Params& params, void* workspace, Stream) {
  if (params.append.k_new.data) append_keys(params);
  clear_unowned_rows(params);
  const Isa& isa = isa_of(plan);
  const SizeParams& size = params.size;
  const std::int64_t spans = plan.splits;
  const std::int64_t span = span_keys(plan);
  const std::int64_t rows = size.heads_q / size.heads_k * size.seqlen_q;
  const std::int64_t floats = Isa::partial_floats(rows, size.head_dim_v);
  const std::int64_t heads = size.batch * size.heads_k;
  const int threads = threads_for(2.0 * static_cast<double>(heads * rows * size.seqlen_k) *
                                  static_cast<double>(size.head_dim + size.head_dim_v));
  const std::size_t scratch = isa.decode_scratch(rows, size.head_dim, size.head_dim_v);
  const auto sequence = [&](std::int64_t head) { return sequence_of(params, head / size.heads_k); };
  const auto decode = [&](std::int64_t head, std::int64_t first, float* partial, void* tiles) {
    const Sequence s = sequence(head);
    isa.decode(params, {s, head % size.heads_k, first, std::min(first + span, s.seqlen_k), partial}, tiles);
  };
  const auto merge = [&](std::int64_t head, float* partial) {
    isa.merge_spans(params, sequence(head), head % size.heads_k, partial, spans);
  };
  if (spans == 1) {
    parallel_for(heads, threads, [&](std::int64_t head) {
      void* tiles = thread_scratch(scratch + static_cast<std::size_t>(floats) * sizeof(float));
      float* partial = slice<float>(tiles, scratch);
      decode(head, 0, partial, tiles);
      merge(head, partial);
    });
    return;
  }
  float* partials = slice<float>(workspace, plan.slices[0]);
  parallel_for(heads * spans, threads, [&](std::int64_t index) {
    decode(index / spans, index % spans * span, partials + index * floats, thread_scratch(scratch));
  });
  parallel_for(heads, heads * rows < 256 ? 1 : threads,
               [&](std::int64_t head) { merge(head, partials + head * spans * floats); });
}

}  // namespace flashcore::cpu
