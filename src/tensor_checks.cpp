// Reading one tensor of a call: the checks that look at a single tensor, and overlaps between all of them.
#include "tensor_checks.h"

#include "flashcore/error.h"

namespace flashcore::detail {
namespace {

std::string list(const std::int64_t* sizes, int rank) {
  std::string text = "(";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (rank == 1 ? ",)" : ")");
}

const char* dimensions_of(Layout layout) {
  switch (layout) {
    case Layout::bhsd:
      return "(batch, heads, seqlen, head_dim)";
    case Layout::bshd:
      return "(batch, seqlen, heads, head_dim)";
    case Layout::thd:
      return "(total, heads, head_dim)";
  }
  return "";
}

const char* name_of(Layout layout) { return layout == Layout::bhsd ? "bhsd" : layout == Layout::bshd ? "bshd" : "thd"; }

bool rows_aligned(const TensorView& t) {
  constexpr std::uintptr_t kVector = 16;
  if (reinterpret_cast<std::uintptr_t>(t.data) % kVector != 0) return false;
  const auto size = static_cast<std::int64_t>(size_of(t.dtype));
  for (int i = 0; i + 1 < t.rank; ++i)
    if (t.shape[i] > 1 && t.stride[i] * size % static_cast<std::int64_t>(kVector) != 0) return false;
  return true;
}

}  // namespace

std::string shape_text(Layout layout, std::int64_t batch, std::int64_t heads, std::int64_t seq, std::int64_t dim) {
  const std::int64_t bhsd[] = {batch, heads, seq, dim};
  const std::int64_t bshd[] = {batch, seq, heads, dim};
  const std::int64_t thd[] = {seq, heads, dim};
  return layout == Layout::bhsd ? list(bhsd, 4) : layout == Layout::bshd ? list(bshd, 4) : list(thd, 3);
}

void TensorReader::require_device(const TensorView& t, const char* name) const {
  if (t.device != device_)
    throw InvalidArgument(std::string(name) + " is on " + flashcore::name_of(t.device) + ", but " + first_ + " is on " +
                          flashcore::name_of(device_) + "; all tensors of a call must be on one device");
}

void TensorReader::require_dtype(const TensorView& t, const char* name, std::initializer_list<DType> allowed) const {
  for (const DType dtype : allowed)
    if (t.dtype == dtype) return;
  std::string names;
  for (const DType dtype : allowed) {
    const std::string each = flashcore::name_of(dtype);
    if (names.find(each) == std::string::npos) names += (names.empty() ? "" : " or ") + each;
  }
  throw InvalidType(std::string(name) + " must be " + names + ", got " + flashcore::name_of(t.dtype));
}

Rows TensorReader::rows(const TensorView& t, const char* name) {
  const int rank = layout_ == Layout::thd ? 3 : 4;
  if (!t) throw InvalidArgument(std::string(name) + " is missing");
  if (t.rank != rank)
    throw InvalidArgument(std::string(name) + " must have shape " + dimensions_of(layout_) + " in layout \"" +
                          name_of(layout_) + "\", got " + describe(t));
  require_device(t, name);
  if (t.numel() > 0 && t.shape[rank - 1] > 1 && t.stride[rank - 1] != 1)
    throw InvalidArgument(std::string(name) + ": the last dimension must be contiguous (stride 1), got stride " +
                          std::to_string(t.stride[rank - 1]) + "; make a contiguous copy of it");
  Rows r;
  r.params.data = t.data;
  const auto stride = [&t](int axis) { return t.shape[axis] > 1 ? t.stride[axis] : 0; };
  const int heads = layout_ == Layout::bshd ? 2 : 1;
  const int seq = layout_ == Layout::bhsd ? 2 : layout_ == Layout::bshd ? 1 : 0;
  r.batch = layout_ == Layout::thd ? 1 : t.shape[0];
  r.heads = t.shape[heads];
  r.seq = t.shape[seq];
  r.dim = t.shape[rank - 1];
  r.params.batch = layout_ == Layout::thd ? 0 : stride(0);
  r.params.head = stride(heads);
  r.params.seq = stride(seq);
  const bool forward = r.params.batch >= 0 && r.params.head >= 0 && (r.seq <= 1 || r.params.seq > 0);
  if (!forward || !rows_aligned(t)) unaligned_ = true;
  return r;
}

Rows TensorReader::rows(const TensorView& t, const char* name, const Rows& like, std::int64_t dim) {
  const Rows r = rows(t, name);
  if (r.batch != like.batch || r.heads != like.heads || r.seq != like.seq || r.dim != dim)
    throw InvalidArgument(std::string(name) + " must have shape " +
                          shape_text(layout_, like.batch, like.heads, like.seq, dim) + ", got " + describe(t));
  return r;
}

RowParams TensorReader::row_numbers(const TensorView& t, const char* name, const Rows& q, DType dtype) {
  if (!t) throw InvalidArgument(std::string(name) + " is missing");
  require_device(t, name);
  require_dtype(t, name, {dtype == DType::float64 ? DType::float64 : DType::float32});
  const bool packed = layout_ == Layout::thd;
  const std::int64_t expected[] = {q.batch, q.heads, q.seq};
  const int skip = packed ? 1 : 0;
  bool same = t.rank == 3 - skip;
  for (int i = 0; same && i < t.rank; ++i) same = t.shape[i] == expected[i + skip];
  if (!same)
    throw InvalidArgument(std::string(name) + " must have shape " + list(expected + skip, 3 - skip) + " (" +
                          (packed ? "heads, total" : "batch, heads, seqlen") + "), got " + describe(t));
  RowParams r;
  r.data = t.data;
  r.batch = packed || t.shape[0] <= 1 ? 0 : t.stride[0];
  r.head = t.shape[1 - skip] > 1 ? t.stride[1 - skip] : 0;
  r.seq = t.shape[2 - skip] > 1 ? t.stride[2 - skip] : 0;
  return r;
}

PlaneParams TensorReader::plane(const TensorView& t, const char* name, const std::int64_t (&full)[4],
                                std::int64_t (&shape4)[4]) {
  require_device(t, name);
  std::int64_t stride4[4] = {0, 0, 0, 0};
  bool fits = t.rank <= 4;
  for (int axis = 0; fits && axis < 4; ++axis) {
    const int own = axis - (4 - t.rank);
    shape4[axis] = own < 0 ? 1 : t.shape[own];
    stride4[axis] = own < 0 || t.shape[own] == 1 ? 0 : t.stride[own];
    fits = shape4[axis] == 1 || shape4[axis] == full[axis];
  }
  if (!fits)
    throw InvalidArgument(std::string(name) + " must be broadcastable to (batch, heads, seqlen_q, seqlen_k) = " +
                          list(full, 4) + ", got " + describe(t));
  return {t.data, t.dtype, stride4[0], stride4[1], stride4[2], stride4[3]};
}

HeadParams TensorReader::per_head(const TensorView& t, const char* name, std::int64_t batch, std::int64_t heads,
                                  bool per_batch) {
  require_device(t, name);
  const bool flat = t.rank == 1 && t.shape[0] == heads;
  const bool full = per_batch && t.rank == 2 && t.shape[0] == batch && t.shape[1] == heads;
  if (!flat && !full) {
    const std::int64_t both[] = {batch, heads};
    throw InvalidArgument(std::string(name) + " must have shape " + list(both + 1, 1) +
                          (per_batch ? " or " + list(both, 2) : std::string()) + ", got " + describe(t));
  }
  HeadParams h{t.data, t.dtype, 0, 0};
  h.batch = full && batch > 1 ? t.stride[0] : 0;
  h.head = heads > 1 ? t.stride[t.rank - 1] : 0;
  return h;
}

const std::int32_t* TensorReader::lengths(const TensorView& t, const char* name, std::int64_t size) {
  require_device(t, name);
  require_dtype(t, name, {DType::int32});
  if (t.rank != 1 || t.shape[0] != size)
    throw InvalidArgument(std::string(name) + " must have shape " + list(&size, 1) + ", got " + describe(t));
  if (size > 1 && t.stride[0] != 1)
    throw InvalidArgument(std::string(name) + " must be contiguous, got stride " + std::to_string(t.stride[0]));
  return static_cast<const std::int32_t*>(t.data);
}

void TensorReader::add(const TensorView& t, const char* name, bool written) {
  if (t) entries_[count_++] = {&t, name, byte_range(t), written};
}

void TensorReader::finish(bool check_null) const {
  for (int w = 0; w < count_; ++w) {
    const Entry& entry = entries_[w];
    if (check_null && !entry.tensor->data && entry.tensor->numel() > 0)
      throw InvalidArgument(std::string(entry.name) + " has no memory: its data pointer is null");
    if (!entry.written) continue;
    if (overlaps_itself(*entry.tensor))
      throw InvalidArgument(std::string(entry.name) +
                            " is written to, but its strides make elements share memory: " + describe(*entry.tensor));
    for (int r = 0; r < count_; ++r) {
      const Entry& other = entries_[r];
      if (r == w || (other.written && r < w) || !entry.tensor->data || !other.tensor->data) continue;
      if (meet(entry.range, other.range) && may_overlap(*entry.tensor, *other.tensor))
        throw InvalidArgument(std::string(entry.name) + " overlaps " + other.name +
                              " in memory; it is written while the other is read, so it needs memory of its own");
    }
  }
}

}  // namespace flashcore::detail
