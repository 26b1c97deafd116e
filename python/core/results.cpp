// The arrays that a call writes to: what they look like, and how a framework is asked for new ones.
#include "results.h"

#include <utility>

namespace flashcore::python {

namespace {

/// The array given, or a new one for what is only imagined so far; `view` then looks at it.
nb::object take(Reader& reader, nb::handle given, const char* name, TensorView& view, nb::handle like,
                const TensorView& seen) {
  if (!given.is_none() || !view) return nb::borrow(given);
  nb::object made = new_array(reader, like, seen, view);
  view = reader.read(made, name, Access::fresh);
  return made;
}

/// Whether a result can have this dtype. The library refuses the others in its own words.
bool is_real(DType dtype) { return dtype != DType::int32 && dtype != DType::int64 && dtype != DType::boolean; }

}  // namespace

TensorView dense(TensorView view) {
  std::int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

AttentionOutputs imagined_outputs(AttentionOutputs given, const TensorView& q, const TensorView& v, Layout layout,
                                  bool with_lse) {
  if (!given.out && q.rank > 0 && v.rank > 0) {
    given.out = q;
    given.out.data = nullptr;
    given.out.shape[q.rank - 1] = v.shape[v.rank - 1];
    if (q.dtype == DType::float8_e4m3) given.out.dtype = DType::bfloat16;
    given.out = dense(given.out);
  }
  if (with_lse && !given.lse && q.rank >= 3) {
    given.lse = q;
    given.lse.data = nullptr;
    given.lse.rank = q.rank - 1;
    given.lse.dtype = q.dtype == DType::float64 ? DType::float64 : DType::float32;
    if (layout == Layout::bshd) std::swap(given.lse.shape[1], given.lse.shape[2]);
    if (layout == Layout::thd) std::swap(given.lse.shape[0], given.lse.shape[1]);
    given.lse = dense(given.lse);
  }
  return given;
}

nb::object new_array(const Reader& reader, nb::handle like, const TensorView& seen, const TensorView& wanted) {
  static const nb::handle dtype_alone = nb::make_tuple("dtype").release();
  static const nb::handle dtype_and_stream = nb::make_tuple("dtype", "stream").release();
  if (!is_real(wanted.dtype)) return nb::none();
  const Bridge& bridge = reader.bridge();
  const bool alike = wanted.dtype == seen.dtype && wanted.rank == seen.rank && wanted.shape == seen.shape &&
                     wanted.stride == seen.stride;
  if (alike && !bridge.empty_like.is_none() && like.type().is(bridge.type)) return ask(bridge.empty_like, like);
  nb::object sizes[kMaxRank];
  PyObject* arguments[kMaxRank + 3] = {like.ptr()};
  std::size_t count = 1;
  for (int i = 0; i < wanted.rank; ++i) {
    sizes[i] = nb::int_(wanted.shape[i]);
    arguments[count++] = sizes[i].ptr();
  }
  const nb::str name(name_of(wanted.dtype));
  const bool named = bridge.dtypes.is_none();
  arguments[count] = named ? name.ptr() : PyDict_GetItem(bridge.dtypes.ptr(), name.ptr());
  arguments[count + 1] = reader.given_stream().ptr();
  const nb::handle keywords = named ? dtype_and_stream : dtype_alone;
  nb::object made = nb::steal(nb::detail::vectorcall(bridge.empty.ptr(), arguments, count, keywords.ptr()));
  if (!made.is_valid()) throw nb::python_error();
  return made;
}

Results take_results(Reader& reader, const Wanted& wanted, nb::handle like, const TensorView& q, const TensorView& v) {
  const AttentionOutputs given{.out = reader.read(wanted.out, "out", Access::write),
                               .lse = reader.read(wanted.lse, "lse", Access::write)};
  Results results{.out = {}, .lse = {}, .views = imagined_outputs(given, q, v, wanted.layout, wanted.with_lse)};
  results.out = take(reader, wanted.out, "out", results.views.out, like, q);
  results.lse = take(reader, wanted.lse, "lse", results.views.lse, like, q);
  return results;
}

nb::object Results::answer() const { return lse.is_none() ? out : nb::object(nb::make_tuple(out, lse)); }

}  // namespace flashcore::python
