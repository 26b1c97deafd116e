// Words: how causal, scale and layout are read where a call is answered without entering Python.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>

#include "flashcore/attention.h"

namespace flashcore::python {

namespace nb = nanobind;

/// Python's own copy of a name or a word; the compiler interns those in a call, so that addresses can be compared.
const PyObject* interned(const char* text);

/// Each reads a value in its usual form; false for every other, which is the Python function's to read or to refuse.
bool read_causal(nb::handle value, Mask& mask);
bool read_scale(nb::handle value, std::optional<double>& scale);
bool read_layout(nb::handle value, Layout& layout);

}  // namespace flashcore::python
