// vector_add and reduce: checks the arrays and hands them to the backend.
#include "flashcore/primitives.h"

#include <string>

#include "backend.h"
#include "flashcore/error.h"
#include "overlap.h"

namespace flashcore {
namespace {

using detail::ArrayParams;

struct Named {
  const TensorView& tensor;
  const char* name;
};

std::string given(const Named& t) { return std::string(t.name) + " is " + describe(t.tensor); }

/// What can be said of one array alone.
void check_array(const Named& t) {
  const TensorView& view = t.tensor;
  if (!view) throw InvalidArgument(std::string(t.name) + " is missing");
  if (view.dtype != DType::float16 && view.dtype != DType::bfloat16 && view.dtype != DType::float32 &&
      view.dtype != DType::float64)
    throw InvalidType(given(t) + "; float16, bfloat16, float32 and float64 are allowed");
  for (int i = 0; i < view.rank; ++i)
    if (view.shape[i] < 0) throw InvalidArgument(given(t) + ": a dimension has a negative size");
  if (view.numel() == 0) return;
  if (!view.data) throw InvalidArgument(given(t) + ", but has no memory: its data pointer is null");
  if (reinterpret_cast<std::uintptr_t>(view.data) % size_of(view.dtype) != 0)
    throw InvalidArgument(given(t) + ", but its address is not a multiple of the element's size, " +
                          std::to_string(size_of(view.dtype)));
}

void check_like(const Named& t, const Named& first) {
  if (t.tensor.dtype != first.tensor.dtype)
    throw InvalidType(given(t) + ", but " + given(first) + "; they must have one dtype");
  if (t.tensor.device != first.tensor.device)
    throw InvalidArgument(given(t) + ", but " + given(first) + "; they must be on one device");
}

void check_shape(const Named& t, int rank, const std::int64_t* shape, const std::string& wanted_by) {
  bool same = t.tensor.rank == rank;
  for (int i = 0; same && i < rank; ++i) same = t.tensor.shape[i] == shape[i];
  if (same) return;
  std::string wanted;
  for (int i = 0; i < rank; ++i) wanted += (i ? ", " : "") + std::to_string(shape[i]);
  throw InvalidArgument(given(t) + "; its shape must be (" + wanted + (rank == 1 ? ",)" : ")") + wanted_by);
}

void check_written(const Named& out) {
  if (detail::overlaps_itself(out.tensor))
    throw InvalidArgument(given(out) + ", but its strides make elements share memory; it cannot be written to");
}

ArrayParams array_params(const TensorView& t) {
  ArrayParams p;
  p.data = t.data;
  p.dtype = t.dtype;
  p.rank = t.rank;
  for (int i = 0; i < t.rank; ++i) {
    p.shape[i] = t.shape[i];
    p.stride[i] = t.stride[i];
  }
  return p;
}

void add_axis(ArrayParams& p, const TensorView& x, int axis) {
  p.shape[p.rank] = x.shape[axis];
  p.stride[p.rank++] = x.stride[axis];
}

/// The axis counted from the front; kAllAxes stays.
int axis_from_front(const TensorView& x, int axis) {
  if (axis == kAllAxes) return axis;
  if (axis < -x.rank || axis >= x.rank)
    throw InvalidArgument(
        "axis " + std::to_string(axis) + " given for x of rank " + std::to_string(x.rank) + "; " +
        (x.rank == 0 ? "only kAllAxes is allowed"
                     : std::to_string(-x.rank) + " to " + std::to_string(x.rank - 1) + ", or kAllAxes, are allowed"));
  return axis < 0 ? axis + x.rank : axis;
}

}  // namespace

void vector_add(const TensorView& a, const TensorView& b, const TensorView& out, Stream stream) {
  const Named first{a, "a"};
  const Named others[] = {{b, "b"}, {out, "out"}};
  check_array(first);
  for (const Named& t : others) {
    check_array(t);
    check_like(t, first);
    check_shape(t, a.rank, a.shape.data(), ", the shape of a");
  }
  check_written(others[1]);
  for (const Named& input : {first, others[0]})
    if (!detail::is_same_view(out, input.tensor) && detail::may_overlap(out, input.tensor))
      throw InvalidArgument(std::string("out overlaps ") + input.name +
                            " in memory; it must be the same array or share no memory with it");
  const detail::Backend& backend = detail::backend_of(a.device);
  if (out.numel() == 0) return;
  backend.vector_add(array_params(a), array_params(b), array_params(out), a.device.index, stream);
}

void reduce(const TensorView& x, const TensorView& out, ReduceOp op, int axis, Stream stream) {
  const Named input{x, "x"};
  const Named output{out, "out"};
  check_array(input);
  check_array(output);
  check_like(output, input);
  axis = axis_from_front(x, axis);

  detail::ReduceParams p;
  p.outer.data = x.data;
  p.outer.dtype = p.reduced.dtype = x.dtype;
  p.inner = 1;
  p.op = static_cast<int>(op);
  for (int i = 0; i < x.rank; ++i) {
    const bool is_reduced = axis == kAllAxes || axis == i;
    if (is_reduced) p.inner *= x.shape[i];
    add_axis(is_reduced ? p.reduced : p.outer, x, i);
  }
  check_shape(output, p.outer.rank, p.outer.shape,
              axis == kAllAxes ? ", one number" : ", the shape of x without axis " + std::to_string(axis));
  p.out = array_params(out);

  check_written(output);
  if (detail::may_overlap(out, x)) throw InvalidArgument("out overlaps x in memory; it needs memory of its own");
  const bool has_identity = op == ReduceOp::sum || op == ReduceOp::mean;
  if (!has_identity && op != ReduceOp::max && op != ReduceOp::min)
    throw InvalidArgument("reduction " + std::to_string(p.op) + " given; sum, max, min and mean are allowed");
  if (!has_identity && p.inner == 0 && out.numel() > 0)
    throw InvalidArgument(given(input) + ": the " + (op == ReduceOp::max ? "maximum" : "minimum") +
                          " of no elements does not exist; sum and mean are allowed there");
  const detail::Backend& backend = detail::backend_of(x.device);
  if (out.numel() == 0) return;
  backend.reduce(p, x.device.index, stream);
}

}  // namespace flashcore
