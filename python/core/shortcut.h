// Shortcut: a Python function whose plainest calls are answered without entering Python.
#pragma once

#include <nanobind/nanobind.h>

#include "bridge.h"
#include "flashcore/attention.h"

namespace flashcore::python {

/// Attention of three arrays, written to `out` or, where that is None, to a new array. Returns the array written to.
nb::object attend(const Bridge& bridge, nb::handle q, nb::handle k, nb::handle v, nb::handle out,
                  const AttentionOptions& options);

void bind_shortcut(nb::module_& m);

}  // namespace flashcore::python
