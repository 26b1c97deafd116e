// Results: the arrays that a call writes to, given by the caller or made by the caller's framework.
#pragma once

#include "bridge.h"
#include "flashcore/attention.h"

namespace flashcore::python {

/// The results that a call would allocate, without memory.
AttentionOutputs imagined_outputs(AttentionOutputs given, const TensorView& q, const TensorView& v, Layout layout,
                                  bool with_lse);

/// The same tensor, row-major and without gaps.
TensorView dense(TensorView view);

/// What the caller says of results: arrays to write to, or None, and whether lse is wanted where none is given.
struct Wanted {
  nb::handle out;
  nb::handle lse;
  Layout layout = Layout::bhsd;
  bool with_lse = false;
};

struct Results {
  nb::object out;
  nb::object lse;  // None where it is not wanted
  AttentionOutputs views;

  /// What the caller gets: out, or (out, lse).
  nb::object answer() const;
};

/// `like` is the array whose shape and dtype out follows, seen as `q`.
Results take_results(Reader& reader, const Wanted& wanted, nb::handle like, const TensorView& q, const TensorView& v);

/// A new array of the shape and dtype of `wanted`, where `like` is, which is seen as `seen`. None for a dtype that no
/// result has.
nb::object new_array(const Reader& reader, nb::handle like, const TensorView& seen, const TensorView& wanted);

}  // namespace flashcore::python
