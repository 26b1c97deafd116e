// Shortcut: a Python function whose plainest calls are answered without entering Python.
#pragma once

#include <nanobind/nanobind.h>

#include "flashcore/attention.h"
#include "results.h"

namespace flashcore::python {

/// Attention of three arrays. Returns out or, where lse is given or wanted, (out, lse).
nb::object attend(const Bridge& bridge, nb::handle q, nb::handle k, nb::handle v, const Wanted& wanted,
                  const AttentionOptions& options);

void bind_shortcut(nb::module_& m);

}  // namespace flashcore::python
