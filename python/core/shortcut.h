// Shortcut: a Python function whose plainest calls are answered without entering Python.
#pragma once

#include <nanobind/nanobind.h>

#include "flashcore/attention.h"
#include "results.h"

namespace flashcore::python {

/// The inputs of a call of three arrays.
AttentionInputs read_qkv(Reader& reader, nb::handle q, nb::handle k, nb::handle v);

/// Attention of inputs that `reader` has read, of which `q` is one. Returns out or, where lse is wanted, (out, lse).
nb::object attend(Reader& reader, const AttentionInputs& in, nb::handle q, const Wanted& wanted,
                  const AttentionOptions& options);

void bind_shortcut(nb::module_& m);

}  // namespace flashcore::python
