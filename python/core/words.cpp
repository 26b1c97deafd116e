// How the words of a call are read; each in the one form that the compiler of Python gives to a literal.
#include "words.h"

namespace flashcore::python {

const PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

bool read_causal(nb::handle value, Mask& mask) {
  static const PyObject* const top_left = interned("top_left");
  static const PyObject* const bottom_right = interned("bottom_right");
  if (value.is(Py_True))
    mask = Mask::causal();
  else if (value.is(top_left))
    mask = Mask::top_left();
  else if (value.is(bottom_right))
    mask = Mask::bottom_right();
  return value.is(Py_False) || mask.kind != Causal::none;
}

bool read_scale(nb::handle value, std::optional<double>& scale) {
  if (PyFloat_CheckExact(value.ptr())) scale = PyFloat_AsDouble(value.ptr());
  return value.is_none() || scale.has_value();
}

bool read_layout(nb::handle value, Layout& layout) {
  static const PyObject* const bhsd = interned("bhsd");
  static const PyObject* const bshd = interned("bshd");
  if (value.is(bshd)) layout = Layout::bshd;
  return value.is(bhsd) || value.is(bshd);
}

}  // namespace flashcore::python
