// Reading one tensor of a call: rank, dtype, device and shape are checked, and its strides put in kernel order.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "flashcore/attention.h"
#include "kernels/params.h"
#include "overlap.h"

namespace flashcore::detail {

/// A rank-3 or rank-4 tensor in the order (batch, heads, seq, dim). thd: batch is 1 and seq counts packed rows.
struct Rows {
  std::int64_t batch = 0;
  std::int64_t heads = 0;
  std::int64_t seq = 0;
  std::int64_t dim = 0;
  TensorParams params;
};

/// The shape that a rank-4 (thd: rank-3) tensor of these sizes has in `layout`: for messages.
std::string shape_text(Layout layout, std::int64_t batch, std::int64_t heads, std::int64_t seq, std::int64_t dim);

/// The tensors of one call: remembers what was read and written, so that devices and overlaps are checked for all.
class TensorReader {
 public:
  /// All tensors have to be on the device of the call's first one; `first` is what messages call it.
  TensorReader(Device device, Layout layout, const char* first = "q")
      : device_(device), layout_(layout), first_(first) {}

  /// q, k, v, out and their like. `name` is what messages call it.
  Rows rows(const TensorView& t, const char* name);
  /// The same, which must have the given sizes.
  Rows rows(const TensorView& t, const char* name, const Rows& like, std::int64_t dim);
  /// lse and its like: (batch, heads, seq), thd (heads, seq); float32, or float64 for float64 problems.
  RowParams row_numbers(const TensorView& t, const char* name, const Rows& q, DType dtype);
  /// mask and bias: broadcastable to (batch, heads, query, key). shape4 receives the tensor's own sizes.
  PlaneParams plane(const TensorView& t, const char* name, const std::int64_t (&full)[4], std::int64_t (&shape4)[4]);
  /// A number per head, (heads) or (batch, heads); `per_batch`: whether the second form is allowed.
  HeadParams per_head(const TensorView& t, const char* name, std::int64_t batch, std::int64_t heads, bool per_batch);
  /// A dense int32 vector of `size` elements.
  const std::int32_t* lengths(const TensorView& t, const char* name, std::int64_t size);

  void require_device(const TensorView& t, const char* name) const;
  void require_dtype(const TensorView& t, const char* name, std::initializer_list<DType> allowed) const;

  /// Marks a tensor as read or written. `finish` then checks the written ones against themselves and all others.
  void reads(const TensorView& t, const char* name) { add(t, name, false); }
  void writes(const TensorView& t, const char* name) { add(t, name, true); }
  /// Null data, outputs that overlap. `check_null` is off while planning.
  void finish(bool check_null) const;

  /// True if some row of a tensor of `rows` does not start on a 16-byte boundary, or rows run backwards or repeat.
  bool unaligned() const { return unaligned_; }

 private:
  struct Entry {
    const TensorView* tensor;
    const char* name;
    ByteRange range;
    bool written;
  };

  void add(const TensorView& t, const char* name, bool written);

  Device device_;
  Layout layout_;
  const char* first_;
  bool unaligned_ = false;
  Entry entries_[32];
  int count_ = 0;
};

}  // namespace flashcore::detail
