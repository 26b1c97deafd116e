// merge_states: checks the two states and hands them to the backend.
#include <string>

#include "backend.h"
#include "flashcore/attention.h"
#include "flashcore/error.h"
#include "overlap.h"
#include "tensor_checks.h"

namespace flashcore {
namespace {

/// In place is allowed, a shifted overlap is not.
void require_apart(const TensorView& written, const TensorView& read, const std::string& what) {
  if (!detail::is_same_view(written, read) && detail::may_overlap(written, read))
    throw InvalidArgument("merge_states: " + what + "; they must be the same tensor or not overlap at all");
}

}  // namespace

void merge_states(const AttentionState& a, const AttentionState& b, const AttentionState& merged, Layout layout,
                  Stream stream) {
  using detail::Rows;
  const Device device = a.out.device;
  detail::TensorReader read(device, layout, "out_a");
  const Rows rows = read.rows(a.out, "out_a");
  read.require_dtype(a.out, "out_a", {DType::float16, DType::bfloat16, DType::float32, DType::float64});
  detail::MergeParams p;
  p.dtype = a.out.dtype;
  p.size.batch = rows.batch;
  p.size.seqlen_q = rows.seq;
  p.size.heads_q = static_cast<std::int32_t>(rows.heads);
  p.size.head_dim_v = static_cast<std::int32_t>(rows.dim);
  p.out_a = rows.params;
  p.out_b = read.rows(b.out, "out_b", rows, rows.dim).params;
  p.out = read.rows(merged.out, "out", rows, rows.dim).params;
  read.require_dtype(b.out, "out_b (like out_a)", {p.dtype});
  read.require_dtype(merged.out, "out (like out_a)", {p.dtype});
  p.lse_a = read.row_numbers(a.lse, "lse_a", rows, p.dtype);
  p.lse_b = read.row_numbers(b.lse, "lse_b", rows, p.dtype);
  p.lse = read.row_numbers(merged.lse, "lse", rows, p.dtype);
  for (const auto& [written, name] : {std::pair{&merged.out, "out"}, std::pair{&merged.lse, "lse"}}) {
    if (detail::overlaps_itself(*written))
      throw InvalidArgument(std::string("merge_states: the elements of ") + name + " share memory");
    for (const TensorView* source : {&a.out, &a.lse, &b.out, &b.lse})
      require_apart(*written, *source, std::string(name) + " overlaps an input");
  }
  require_apart(merged.out, merged.lse, "out overlaps lse");
  for (const TensorView* t : {&a.out, &a.lse, &b.out, &b.lse, &merged.out, &merged.lse})
    if (!t->data && t->numel() > 0) throw InvalidArgument("merge_states: a data pointer is null");
  detail::backend_of(device).merge_states(p, device.index, stream);
}

}  // namespace flashcore
